"""Builds kernels for this machine exactly while no step runs: one process at the lowest priority.

The first step that comes ends that process; kernels that were done by then are kept, and the next
idle moment goes on with the rest. Knows no programs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer import platform
from edgeinfer.kernels.cpu.library import build_command, read_object
from edgeinfer.kernels.cpu.targets import Target

if TYPE_CHECKING:
    import subprocess

_IDLE_SECONDS = 2.0  # since the last step; a person who reads an answer takes longer
_LEAST_MEMORY = 1 << 30  # Numba and LLVM take a quarter of that
_JOIN_SECONDS = 2.0


class IdleBuild:
    """Kernels to build into a folder whenever there has been no step for a while.

    No thread exists before the first step has ended, and none when there is nothing to build.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        target: Target,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        self._names = deque(names)
        self._folder, self._target, self._idle_seconds = folder, target, idle_seconds
        self._changed = threading.Condition()
        self._idle_from = float("inf")  # the moment from which on it may build
        self._is_closed = False
        self._job: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def begin_step(self) -> None:
        """End what builds: a step takes the machine for itself."""
        if not self._names:
            return
        with self._changed:
            self._idle_from = float("inf")
            self._kill()

    def end_step(self) -> None:
        if not self._names:
            return
        with self._changed:
            self._idle_from = time.monotonic() + self._idle_seconds
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(
                    target=self._run, name="edgeinfer-idle", daemon=True
                )
                self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is left to build; False where that takes longer."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return not self._names

    def close(self) -> None:
        """End the thread and its process."""
        with self._changed:
            self._is_closed = True
            self._kill()
            self._changed.notify()
        self.wait(_JOIN_SECONDS)

    def _kill(self) -> None:
        if self._job is not None:
            self._job.kill()
            self._job = None

    # -- its thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._names and self._wait_for_idle():
            if platform.available_memory() < _LEAST_MEMORY or not self._build():
                self._names.clear()

    def _wait_for_idle(self) -> bool:
        """True once nothing has run for a while, False when this is closed."""
        with self._changed:
            while not self._is_closed:
                left = self._idle_from - time.monotonic()
                if left <= 0:
                    return True
                self._changed.wait(min(left, self._idle_seconds))
        return False

    def _build(self) -> bool:
        """Build until all is done or a step comes; False where building fails."""
        try:
            job = platform.start_in_background(build_command(self._folder, self._target))
        except OSError:
            return False
        with job:
            with self._changed:
                self._job = job
                if self._is_closed or time.monotonic() < self._idle_from:
                    self._kill()
            is_fed = self._feed(job)
            with self._changed:
                was_ended = self._job is None
                self._kill()
        return is_fed or was_ended

    def _feed(self, job: subprocess.Popen[str]) -> bool:
        """Hand over one name after the other; False when the process is gone."""
        assert job.stdin is not None and job.stdout is not None
        try:
            while self._names:
                name = self._names[0]
                # Another process may have built it meanwhile.
                if read_object(self._folder, name) is None:
                    job.stdin.write(name + "\n")
                    job.stdin.flush()
                    if not job.stdout.readline():
                        return False
                self._names.popleft()
        except OSError:
            return False
        finally:
            with suppress(OSError):
                job.stdin.close()
        return True
