"""A device that runs the CUDA kernels on the CPU: the same texts, compiled by g++.

Threads are fibres in random order, shared and new memory is full of 0xFF bytes, and every address
is checked, so that what would fail on some GPU fails here.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeinfer import config, platform
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cuda.compiler import Compiler, kernel_flags
from edgeinfer.kernels.cuda.device import (
    Args,
    Bound,
    DeviceFacts,
    Grid,
    Progress,
    check_args,
    check_launch,
    out_of_memory,
)
from edgeinfer.kernels.cuda.host_stream import HostStream, StreamEvent
from edgeinfer.kernels.cuda.kernel import SYMBOL, Kernel, Signature, Sources

_WHY_BYTES = 1000  # of `failure` in shim_run.cpp


class HostMemory(Protocol):
    """A piece of memory: `platform.Memory`, or one that tests watch over."""

    address: int

    def close(self) -> None: ...


class _Loaded(NamedTuple):
    signature: Signature
    entry: int  # address of its `ei::Entry`
    most_threads: int
    launch: Any


class ShimDevice:
    """See `Device`. `seed` is the order of threads, 0 for that of their numbers; it may be set.

    `sources` are folders with further kernels, `flags` go to the compiler, `allocate` gives
    memory; `arch`, `shared_bytes` and `memory_bytes` are those of the GPU it stands for, which has
    `blocks_at_once`. Where it `runs_at_once`, everything is done when it returns, and what fails
    spoils nothing else.
    """

    def __init__(
        self,
        folder: Path | None = None,  # of compiled kernels, by default below our cache's
        *,
        sources: Sequence[Path] = (),
        seed: int = 0,
        flags: Sequence[str] = ("-O2",),
        arch: int = 90,
        shared_bytes: int = 99 << 10,
        memory_bytes: int = 4 << 30,
        blocks_at_once: int = 4,
        allocate: Callable[[int], HostMemory] = platform.Memory,
        runs_at_once: bool = False,
    ) -> None:
        self.facts = DeviceFacts("CPU shim", arch, 4, shared_bytes, True, True)
        self.seed = seed
        self._sources = Sources(*sources)
        self._compiler = Compiler(folder or config.cache_folder() / "kernels" / "cuda")
        self._flags = [*kernel_flags(), *flags]
        self._stream = HostStream()
        self._runs_at_once = runs_at_once
        self._allocate = allocate
        self._memory_bytes = memory_bytes
        self._blocks_at_once = blocks_at_once
        self._reserved: dict[int, tuple[HostMemory, int]] = {}  # by address, with its bytes
        self._loaded: dict[Kernel, _Loaded] = {}
        self._recording: list[Callable[[], None]] | None = None
        # Memory must outlive what is still running, whoever forgets to close this.
        self._end = weakref.finalize(self, _end, self._stream, self._reserved)
        self._end.atexit = False

    # -- memory --

    def memory(self) -> tuple[int, int]:
        used = sum(n_bytes for _, n_bytes in self._reserved.values())
        return self._memory_bytes - used, self._memory_bytes

    def reserve(self, n_bytes: int) -> int:
        if n_bytes > self.memory()[0]:
            raise out_of_memory(self.facts.name, f"{n_bytes} bytes are not free")
        try:
            memory = self._allocate(max(n_bytes, 1))
        except OSError as error:
            raise out_of_memory(self.facts.name, f"{n_bytes} bytes: {error}") from error
        self._reserved[memory.address] = memory, n_bytes
        ctypes.memset(memory.address, 0xFF, n_bytes)
        return memory.address

    def free(self, address: int) -> None:
        if address not in self._reserved:
            raise DeviceError(f"no memory was reserved at {address:#x}")
        self._wait()
        self._reserved.pop(address)[0].close()

    def write(self, address: int, data: NDArray[Any]) -> None:
        self._check_not_recorded("write")
        self._check_range(address, data.nbytes)
        self._do(partial(_put, address, data.tobytes()))

    def write_now(self, address: int, word: int) -> None:
        self._check_range(address, 4)
        ctypes.c_int32.from_address(address).value = word

    def read(self, address: int, into: NDArray[Any]) -> None:
        self._check_not_recorded("read")
        self.fetch(address, into)
        self._wait()

    def host(self, n_bytes: int) -> NDArray[np.uint8]:
        return np.zeros(n_bytes, np.uint8)

    def fetch(self, address: int, into: NDArray[Any]) -> None:
        if not (into.flags.c_contiguous and into.flags.writeable):
            raise ValueError("an array to read into must be contiguous and writable")
        self._check_range(address, into.nbytes)
        self._do(partial(_get, address, into))

    def fill(self, address: int, n_bytes: int, byte: int = 0) -> None:
        self._check_range(address, n_bytes)
        self._do(partial(ctypes.memset, address, byte, n_bytes))

    def copy(self, to: int, address: int, n_bytes: int) -> None:
        self._check_range(to, n_bytes)
        self._check_range(address, n_bytes)
        self._do(partial(ctypes.memmove, to, address, n_bytes))

    def _check_range(self, address: int, n_bytes: int) -> None:
        if not any(
            start <= address and address + n_bytes <= start + size
            for start, (_, size) in self._reserved.items()
        ):
            raise DeviceError(f"{n_bytes} bytes at {address:#x} are not all reserved")

    # -- kernels --

    def load(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        wanted = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._loaded]
        if not wanted:
            return
        signatures = {kernel: self._sources.signature(kernel) for kernel in wanted}
        texts = {kernel.label: self._text(kernel, signatures[kernel]) for kernel in wanted}
        runner = {"shim_run": self._sources.flat("shim_run.cpp")}
        run = _open_run(self._compiler.libraries(runner, ["-O2"])["shim_run"])
        paths = self._compiler.libraries(texts, self._flags, progress)
        for kernel in wanted:
            library = ctypes.CDLL(str(paths[kernel.label]))
            library.ei_entry.restype = ctypes.POINTER(_Entry)
            entry = library.ei_entry(run.address)
            self._loaded[kernel] = _Loaded(
                signatures[kernel],
                ctypes.cast(entry, ctypes.c_void_p).value or 0,
                entry.contents.most_threads,
                run.launch,
            )

    @property
    def unkept(self) -> str:
        return ""  # it loads files alone

    def bind(self, kernel: Kernel, args: Args) -> Bound:
        signature = self._find(kernel).signature
        values = signature.pack(args)
        for parameter, value in zip(signature.parameters, values, strict=True):
            if parameter.type.endswith("*") and value:
                self._check_range(int(value), 0)
        return Bound(kernel, values)

    def launch(
        self,
        kernel: Kernel,
        grid: Grid,
        threads: int,
        shared: int,
        args: Args | Bound,
        *,
        at_once: bool = False,
    ) -> None:
        loaded = self._find(kernel)
        check_launch(kernel, grid, threads, loaded.most_threads, shared, self.facts.shared_bytes)
        check_args(kernel, args)
        if at_once and prod(grid) > self._blocks_at_once:
            raise DeviceError(f"kernel {kernel}: {grid} blocks can't run at once")
        slots = (args if isinstance(args, Bound) else self.bind(kernel, args)).slots()
        launch = (
            ctypes.c_void_p(loaded.entry),
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_size_t(shared),
            ctypes.c_size_t(self.facts.shared_bytes),
            ctypes.c_void_p(slots.ctypes.data),
            ctypes.c_uint(self.seed),
            ctypes.c_uint(at_once),
        )
        self._do(partial(_launch, kernel, loaded.launch, launch, slots))

    def blocks_at_once(self, kernel: Kernel, threads: int, shared: int) -> int:
        self._find(kernel)
        return self._blocks_at_once

    def _find(self, kernel: Kernel) -> _Loaded:
        if kernel not in self._loaded:
            raise DeviceError(f"kernel {kernel} is not loaded")
        return self._loaded[kernel]

    def _text(self, kernel: Kernel, signature: Signature) -> str:
        """What the compiler gets: shim.h, the kernel, and how it is called."""
        defines = [f"#define {macro} {value}" for macro, value in kernel.defines]
        args = [f"ei_argument<{p.type}>(slots, {i})" for i, p in enumerate(signature.parameters)]
        entry = f"EI_ENTRY({SYMBOL}{kernel.name}({', '.join(args)}))\n"
        body = self._sources.kernel_text(kernel)
        return "\n".join([self._sources.flat("shim.h"), *defines, body, entry])

    # -- order --

    def record(self, body: Callable[[], None]) -> _Graph:
        self._check_not_recorded("record")
        self._recording = []
        try:
            body()
            return _Graph(self._recording, self._do)
        finally:
            self._recording = None

    def mark(self) -> StreamEvent:
        self._check_not_recorded("mark")
        return self._stream.mark()

    def close(self) -> None:
        self._end()

    def _do(self, action: Callable[[], Any]) -> None:
        """Have it done in order, or when what is being recorded is replayed."""
        if self._recording is not None:
            self._recording.append(action)
        elif self._runs_at_once:
            action()
        else:
            self._stream.do(action)

    def _wait(self) -> None:
        self._stream.mark().wait()

    def _check_not_recorded(self, what: str) -> None:
        if self._recording is not None:
            raise DeviceError(f"{what} can't be recorded")


class _Graph(NamedTuple):
    """See `Graph`."""

    actions: list[Callable[[], Any]]
    do: Callable[[Callable[[], Any]], None]

    def replay(self) -> None:
        for action in self.actions:
            self.do(action)


class _Entry(ctypes.Structure):
    """`ei::Entry` of shim_run.h."""

    _fields_ = [
        ("call", ctypes.c_void_p),
        ("most_threads", ctypes.c_uint),
        ("shared", ctypes.c_void_p),
    ]


def _end(stream: HostStream, reserved: dict[int, tuple[HostMemory, int]]) -> None:
    stream.close()
    while reserved:
        reserved.popitem()[1][0].close()


def _launch(kernel: Kernel, function: Any, args: tuple[Any, ...], slots: NDArray[Any]) -> None:
    """Run a kernel; `slots` live until it has ended."""
    why = ctypes.create_string_buffer(_WHY_BYTES)
    function(*args, why)
    if why.value:
        raise DeviceError(f"kernel {kernel}: {why.value.decode('utf-8', 'replace')}")


def _put(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def _get(address: int, into: NDArray[Any]) -> None:
    ctypes.memmove(into.ctypes.data, address, into.nbytes)


class _Run(NamedTuple):
    address: ctypes.c_void_p
    launch: Any


def _open_run(path: Path) -> _Run:
    library = ctypes.CDLL(str(path))
    library.ei_run.restype = ctypes.c_void_p
    library.ei_launch.restype = None
    return _Run(ctypes.c_void_p(library.ei_run()), library.ei_launch)
