"""How tests get CPU kernels that are in no cache yet: each is built once, by a builder that stays.

Starting a builder takes longer than most kernels do, and processes that run tests side by side
need the same ones at the same time. Kernels of other folders than the cache are built as ever.
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from edgeinfer import config, platform
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cpu import builders, kept_objects
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.targets import Target

_MOST_SECONDS = 1800.0  # that another process of a run builds for


class Builder:
    """A process that builds kernels of one target after another, started when it is needed."""

    def __init__(self) -> None:
        self._target: Target | None = None
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def build(self, name: str, target: Target) -> bytes:
        with self._lock:
            return self._build(name, target)

    def _build(self, name: str, target: Target) -> bytes:
        if self._process is None or target != self._target:
            self.close()
            command = builders.build_command(None, target)
            # A child that ends with us ends with the thread, which may be that of a test.
            self._process = platform.start_program(command, ends_with_us=False)
            self._target = target
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        built, _, data = self._process.stdout.readline().strip().partition(" ")
        if built != name:
            self.close()
            raise DeviceError(f"building the CPU kernel {name} failed")
        return bytes.fromhex(data)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes its pipes
                self._process = None


@contextmanager
def claimed(paths: Iterable[Path], folder: Path) -> Iterator[None]:
    """Inside, no other process of this run is at any of these files; `folder` is the run's own."""
    with ExitStack() as held:
        for path in sorted(paths):  # all in one order, or two would wait for each other
            name = hashlib.sha256(str(path).encode()).hexdigest()
            file = held.enter_context(open(folder / name, "ab"))
            end = time.monotonic() + _MOST_SECONDS
            while not platform.try_lock(file):
                assert time.monotonic() < end, f"another process does not let go of {path}"
                time.sleep(0.02)
        yield


@contextmanager
def kernels_built_once(folder: Path) -> Iterator[None]:
    """Inside, kernels that go to the cache are built so; processes of a run share `folder`."""
    builder, build, cache = Builder(), Library._build, config.cache_folder()
    folder.mkdir(exist_ok=True)

    def build_once(
        self: Library, names: Iterable[str], progress: object, code_bytes: int
    ) -> dict[str, bytes]:
        names = list(names)
        if self.folder.parent.parent != cache or not self._is_trusted:
            return build(self, names, progress, code_bytes)
        objects = {}
        platform.make_folder(self.folder)
        with claimed((kept_objects.object_path(self.folder, name) for name in names), folder):
            for name in names:
                data = kept_objects.read_object(self.folder, name)
                if data is None:
                    data = builder.build(name, self.target)
                    kept_objects.write_object(self.folder, name, data)
                objects[name] = data
        return objects

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Library, "_build", build_once)
        try:
            yield
        finally:
            builder.close()
