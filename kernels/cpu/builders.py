"""Builds kernels, in other processes: as many as there are cores and memory for.

Never imports Numba. Knows kernels by name only.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

from edgeinfer import platform
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cpu.kept_objects import write_object
from edgeinfer.kernels.cpu.targets import Target

if TYPE_CHECKING:
    import subprocess

Progress: TypeAlias = Callable[[int, int, str], None]  # done, total, kernel

# The most a process that builds kernels takes: x86-64 Linux, LLVM 20 and 22, all kernels in one.
BUILDER_BYTES = 400 << 20
_SLOWEST = ("sample", "attend", "matmul")  # to build, in this order


def can_build() -> bool:
    """Whether there are sources and an interpreter to build with: not in a frozen program."""
    return platform.can_start_python() and (Path(__file__).parent / "build.py").is_file()


def n_builders(n_kernels: int, memory: int | None) -> int:
    """Processes that build: as many as there are cores and memory for; Numba uses one core each."""
    n = min(platform.usable_processors(), -(-n_kernels // 2), 8)
    return max(1, n if memory is None else min(n, memory // BUILDER_BYTES))


def build_objects(
    folder: Path | None,
    names: Sequence[str],
    target: Target,
    progress: Progress | None,
    failed: list[OSError] | None = None,
    memory: int | None = None,
) -> dict[str, bytes]:
    """Build kernels, into a folder if there is one, in `n_builders` processes.

    Each process takes the next name when it is done with one, the slowest first. Where the folder
    takes one no more, why goes to `failed`, and no further ones are written.
    """
    n_jobs = n_builders(len(names), memory)
    command = build_command(None, target)
    failed = [] if failed is None else failed

    def keep(name: str, data: bytes) -> None:
        if folder is not None and not failed:
            try:
                write_object(folder, name, data)
            except OSError as error:
                failed.append(error)

    waiting, done = deque(sorted(names, key=_slowest_first)), dict[str, bytes]()
    if progress:
        progress(0, len(names), waiting[0])
    with platform.open_scratch() or nullcontext() as errors:
        jobs = [platform.start_program(command, errors=errors) for _ in range(n_jobs)]
        feeders = [
            threading.Thread(target=_feed, args=(job, waiting, done, keep), daemon=True)
            for job in jobs
        ]
        try:
            feeders = platform.start_some(feeders)
            if not feeders:
                raise DeviceError(
                    "building CPU kernels takes a thread, and none can be started: raise this "
                    "process's limits (ulimit -u, -v)"
                )
            for job in jobs[len(feeders) :]:  # which would wait for names
                assert job.stdin is not None
                job.stdin.close()
            n_told = 0
            while any(feeder.is_alive() for feeder in feeders) or n_told < len(done):
                for feeder in feeders:
                    feeder.join(0.02)
                for name in list(done)[n_told:]:
                    n_told += 1
                    if progress:
                        progress(n_told, len(names), name)
            if status := next(filter(None, [job.wait() for job in jobs]), 0):
                why = _end_of(errors) or f"a builder ended with status {status}, as one that is "
                "killed where memory runs out"
                raise DeviceError(f"building CPU kernels failed:\n{why}")
        finally:
            for job in jobs:
                if job.poll() is None:
                    job.kill()
                with job:  # closes its pipes
                    pass
    return done


def _end_of(errors: IO[bytes] | None) -> str:
    """The last of what children have said on their standard error."""
    if errors is None:
        return "there was no room for what was said of it"
    errors.seek(0)
    return errors.read().decode("utf-8", "replace").strip()[-2000:]


def build_command(folder: Path | None, target: Target) -> list[str]:
    """A process that builds the kernels whose names it reads, and answers each with its name.

    Where there is no folder to write them to, the object follows, in hexadecimal.
    """
    to = "-" if folder is None else str(folder.absolute())
    facts = [f"--triple={target.triple}", f"--cpu={target.cpu}", f"--features={target.features}"]
    return platform.python_command(
        "edgeinfer.kernels.cpu.build", to, "--family", target.family, *facts
    )


def _slowest_first(name: str) -> int:
    module = name.partition(".")[0]
    return _SLOWEST.index(module) if module in _SLOWEST else len(_SLOWEST)


def _feed(
    job: subprocess.Popen[str],
    waiting: deque[str],
    done: dict[str, bytes],
    keep: Callable[[str, bytes], None],
) -> None:
    """Hand one process name after name, until none is left or it ends."""
    assert job.stdin is not None and job.stdout is not None
    try:
        while waiting:
            job.stdin.write(waiting.popleft() + "\n")
            job.stdin.flush()
            line = job.stdout.readline()
            if not line:
                waiting.clear()  # it failed; the others need not go on
                return
            name, _, data = line.strip().partition(" ")
            built = bytes.fromhex(data)
            keep(name, built)
            done[name] = built
    except (IndexError, OSError):  # another took the last one; it ended
        pass
    finally:
        with suppress(OSError):
            job.stdin.close()
