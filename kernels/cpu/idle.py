"""Work for the moments in which no step runs, in a thread of its own: building, and tuning.

A step that comes interrupts it at once; what was done by then is kept, and the next idle moment
goes on with the rest. Knows no programs.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer import platform
from edgeinfer.errors import ClosedError
from edgeinfer.kernels.cpu.builders import build_command
from edgeinfer.kernels.cpu.kept_objects import read_object
from edgeinfer.kernels.cpu.targets import Target

if TYPE_CHECKING:
    import subprocess

IDLE_SECONDS = 2.0  # since the last step; a person who reads an answer takes longer
_LEAST_MEMORY = 1 << 30  # Numba and LLVM take a quarter of that
_JOIN_SECONDS = 2.0
_LOOK_SECONDS = 0.1


class IdleWork(ABC):
    """Goes on whenever there has been no step for a while.

    No thread exists before the first step has ended, and none when there is nothing to do.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self._idle_seconds = idle_seconds
        self._changed = threading.Condition()
        self._idle_from = float("inf")  # the moment from which on it may work
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def _go_on(self) -> bool:
        """Work until it is done or interrupted; False where it can't be done."""

    @abstractmethod
    def _interrupt(self) -> None:
        """Have `_go_on` return soon, if it runs; called from any thread, inside `_changed`."""

    def begin_step(self) -> None:
        """Interrupt: a step takes the machine for itself."""
        if self.is_done:
            return
        idle_from, self._idle_from = self._idle_from, float("inf")
        # NOTE: this clock is read after that is set, so whoever looks in between sees one of them.
        if time.monotonic() >= idle_from:
            with self._changed:
                self._interrupt()

    def end_step(self) -> None:
        if self.is_done:
            return
        # Who waits for that looks again within as many seconds: nobody is woken between steps.
        self._idle_from = time.monotonic() + self._idle_seconds
        if self._thread is None:
            self._begin_at(self._idle_from)

    def finish(self, look: Callable[[], object] = lambda: None) -> None:
        """Do all of it now, and `look` now and then; no step may run meanwhile."""
        self._begin_at(0.0)
        if self._thread is None:
            self._run()
        while self._thread is not None and self._thread.is_alive():
            look()
            self._thread.join(_LOOK_SECONDS)
        look()

    def wait(self, timeout: float) -> bool:
        """Wait until nothing is left to do; False where that takes longer."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return self.is_done

    def close(self) -> None:
        """End the thread and what it does."""
        with self._changed:
            self._is_closed = True
            self._interrupt()
            self._changed.notify()
        self.wait(_JOIN_SECONDS)

    def _begin_at(self, moment: float) -> None:
        with self._changed:
            self._idle_from = moment
            if self._thread is None and not self._is_closed and not self.is_done:
                thread = threading.Thread(target=self._run, name="edgeinfer-idle", daemon=True)
                if platform.start_some([thread]):  # else the end of a later step tries again
                    self._thread = thread
            self._changed.notify()

    @property
    def _must_stop(self) -> bool:
        return self._is_closed or time.monotonic() < self._idle_from

    def _run(self) -> None:
        with suppress(ClosedError):  # the interpreter ends before its programs are closed
            while not self.is_done and self._wait_for_idle():
                if not self._go_on():
                    return

    def _wait_for_idle(self) -> bool:
        """True once nothing has run for a while, False when this is closed."""
        with self._changed:
            while not self._is_closed:
                left = self._idle_from - time.monotonic()
                if left <= 0:
                    return True
                self._changed.wait(min(left, self._idle_seconds))
        return False


class IdleBuild(IdleWork):
    """Builds kernels for this machine exactly, in one process at the lowest priority."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        target: Target,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        super().__init__(idle_seconds)
        self._names = deque(names)
        self._folder, self._target = folder, target
        self._job: subprocess.Popen[str] | None = None

    @property
    def is_done(self) -> bool:
        return not self._names

    def _go_on(self) -> bool:
        if platform.available_memory() < _LEAST_MEMORY or not self._build():
            self._names.clear()
            return False
        return True

    def _interrupt(self) -> None:
        if self._job is not None:
            self._job.kill()
            self._job = None

    def _build(self) -> bool:
        """Build until all is done or a step comes; False where building fails."""
        try:
            command = build_command(self._folder, self._target)
            job = platform.start_program(command, in_background=True)
        except OSError:
            return False
        with job:
            with self._changed:
                self._job = job
                if self._must_stop:
                    self._interrupt()
            is_fed = self._feed(job)
            with self._changed:
                was_ended = self._job is None
                self._interrupt()
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
