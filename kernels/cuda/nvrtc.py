"""NVIDIA's runtime compiler: a kernel's text to a cubin for one architecture. It needs no GPU.

`python -m edgeinfer.kernels.cuda.nvrtc LIBRARY` compiles what it reads, a line of JSON at a time:
in processes of its own several kernels compile at once, and none takes ours down with it.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from edgeinfer import platform
from edgeinfer.errors import DeviceError

if TYPE_CHECKING:
    import subprocess

# Arithmetic as it is written: multiplications and additions are fused by default, and the rest
# stands here because other callers of NVRTC have other defaults.
FLAGS = (
    "--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true",
    "--ptxas-options=-v",
)  # fmt: skip
Progress: TypeAlias = Callable[[int, int, str], None]  # done, total, kernel
_MOST_PROCESSES = 8  # of up to 200 MB each


class Job(NamedTuple):
    """A kernel to compile: its file's name, its text, further flags, and an architecture (89)."""

    name: str
    text: str
    flags: tuple[str, ...]
    arch: int


class Usage(NamedTuple):
    """What a kernel takes, as the assembler tells it."""

    registers: int  # of a thread
    stack_bytes: int
    spilled_bytes: int
    shared_bytes: int  # static, of a block


class Cubin(NamedTuple):
    """Machine code for one architecture, and what the compiler wrote of it."""

    data: bytes
    log: str

    @property
    def usage(self) -> Usage:
        """Of its only kernel; ValueError where this compiler does not tell."""

        def bytes_of(what: str) -> int:
            return sum(map(int, re.findall(rf"(\d+) bytes {what}", self.log)))

        registers = re.search(r"Used (\d+) registers", self.log)
        if registers is None:
            raise ValueError(f"no registers are told of in {self.log!r}")
        spilled = bytes_of("spill stores") + bytes_of("spill loads")
        return Usage(int(registers[1]), bytes_of("stack frame"), spilled, bytes_of("smem"))


class Nvrtc:
    """The library; DeviceError where it can't be loaded."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:  # no library, or another one
            raise DeviceError(f"NVRTC can't be loaded: {error}") from error

    @property
    def architectures(self) -> list[int]:
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", found)
        return list(found)

    def compile(self, job: Job) -> Cubin:
        """DeviceError with the compiler's message."""
        flags = [flag.encode() for flag in (*FLAGS, *job.flags, f"-arch=sm_{job.arch}")]
        with self._program(job) as program:
            try:
                self._call("CompileProgram", program, len(flags), _strings(flags))
            except DeviceError as error:
                log = self._log(program)
                raise DeviceError(f"NVRTC can't compile {job.name}: {error} {log}") from None
            return Cubin(self._output("CUBIN", program), self._log(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        return self._output("ProgramLog", program).rstrip(b"\0").decode("utf-8", "replace")

    @contextmanager
    def _program(self, job: Job) -> Iterator[ctypes.c_void_p]:
        program = ctypes.c_void_p()
        text, name = job.text.encode(), job.name.encode()
        self._call("CreateProgram", ctypes.byref(program), text, name, 0, None, None)
        try:
            yield program
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _output(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def _call(self, name: str, *args: Any) -> None:
        try:
            function = getattr(self._library, f"nvrtc{name}")
        except AttributeError as error:  # of a CUDA before 11.2
            raise DeviceError(f"NVRTC is too old: {error}") from error
        if status := function(*args):
            raise DeviceError(self._library.nvrtcGetErrorString(status).decode())


def _strings(values: Sequence[bytes]) -> Any:
    return (ctypes.c_char_p * len(values))(*values)


# -- processes that compile ----------------------------------------------------------------------


def compile_all(
    library: Path, jobs: Sequence[Job], progress: Progress | None = None
) -> list[Cubin]:
    """Every job's cubin, in order, from several processes; DeviceError with the first message."""
    if not platform.can_start_python():  # a frozen program would start itself
        return _compile_here(library, jobs, progress)
    from queue import SimpleQueue

    idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    n = max(1, min(platform.usable_processors(), _MOST_PROCESSES, len(jobs) // 2))
    processes = _start(library, n)
    for process in processes:
        idle.put(process)

    def compile_one(job: Job) -> Cubin:
        process = idle.get()
        try:
            return _ask(process, job)
        finally:
            idle.put(process)

    try:
        cubins: list[Cubin] = []
        for cubin in platform.mapped(compile_one, jobs, len(processes)):
            if progress:
                progress(len(cubins), len(jobs), jobs[len(cubins)].name)
            cubins.append(cubin)
        return cubins
    finally:
        for process in processes:
            with process:  # ends when it has nothing more to read
                pass


def _compile_here(library: Path, jobs: Sequence[Job], progress: Progress | None) -> list[Cubin]:
    """One after the other, in this process."""
    compiler, cubins = Nvrtc(library), list[Cubin]()
    for job in jobs:
        if progress:
            progress(len(cubins), len(jobs), job.name)
        cubins.append(compiler.compile(job))
    return cubins


def _start(library: Path, n: int) -> list[subprocess.Popen[str]]:
    """Up to n processes that compile: as many as the system lets us have."""
    command = platform.python_command("edgeinfer.kernels.cuda.nvrtc", str(library))
    processes: list[subprocess.Popen[str]] = []
    while len(processes) < n:
        try:
            processes.append(platform.start_program(command))
        except OSError as error:
            if not processes:
                raise DeviceError(f"no compiler of kernels can be started: {error}") from error
            break
    return processes


def _ask(process: subprocess.Popen[str], job: Job) -> Cubin:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
    except (OSError, ValueError):  # no answer, or half of one
        raise DeviceError(
            f"the process that compiles {job.name} has ended, as one does that is killed where "
            "memory runs out"
        ) from None
    if "error" in answer:
        raise DeviceError(answer["error"])
    return Cubin(base64.b64decode(answer["cubin"]), answer["log"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile kernels, one line of JSON each.")
    parser.add_argument("library", type=Path)
    library = parser.parse_args().library
    for line in sys.stdin:
        try:
            name, text, flags, arch = json.loads(line)
            cubin = Nvrtc(library).compile(Job(name, text, flags, arch))
            answer = {"cubin": base64.b64encode(cubin.data).decode(), "log": cubin.log}
        except DeviceError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
