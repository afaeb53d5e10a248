"""A device that runs the CUDA kernels on the CPU: the same texts, compiled by g++.

Threads are fibres in random order, shared and new memory is full of 0xFF bytes, and every address
is checked, so that what would fail on some GPU fails here.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeinfer import config, platform
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cuda.cache import Cache, key_of
from edgeinfer.kernels.cuda.device import (
    Args,
    Bound,
    DeviceFacts,
    Event,
    Grid,
    Progress,
    check_args,
    check_launch,
)
from edgeinfer.kernels.cuda.kernel import Kernel, Signature, Sources

_COMPILERS = ("g++", "c++", "clang++")
# Nothing that contracts or reorders arithmetic, or that takes the types of pointers for a promise.
_FLAGS = (
    "-std=c++17", "-shared", "-fPIC", "-w", "-x", "c++", "-", "-U_FORTIFY_SOURCE",
    "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fno-threadsafe-statics",
    "-fno-exceptions", "-fvisibility=hidden",
)  # fmt: skip
_RUN_FLAGS = (
    "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-U_FORTIFY_SOURCE", "-O2",
)  # fmt: skip
_ALIGNMENT = 256
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
    memory; `arch`, `shared_bytes` and `memory_bytes` are those of the GPU it stands for.
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
        allocate: Callable[[int], HostMemory] = platform.Memory,
    ) -> None:
        self.facts = DeviceFacts("CPU shim", arch, 4, shared_bytes, True)
        self.seed = seed
        self._sources = Sources(*sources)
        self._compiler = _Compiler(folder or config.cache_folder() / "kernels" / "cuda", flags)
        self._allocate = allocate
        self._memory_bytes = memory_bytes
        self._reserved: dict[int, tuple[HostMemory, int]] = {}  # by address, with its bytes
        self._loaded: dict[Kernel, _Loaded] = {}
        self._recording: list[Callable[[], None]] | None = None

    # -- memory --

    def memory(self) -> tuple[int, int]:
        used = sum(n_bytes for _, n_bytes in self._reserved.values())
        return self._memory_bytes - used, self._memory_bytes

    def reserve(self, n_bytes: int) -> int:
        if n_bytes > self.memory()[0]:
            raise MemoryError(f"{n_bytes} bytes are not free on the {self.facts.name}")
        try:
            memory = self._allocate(max(n_bytes, 1))
        except OSError as error:
            raise MemoryError(f"{n_bytes} bytes: {error}") from error
        self._reserved[memory.address] = memory, n_bytes
        ctypes.memset(memory.address, 0xFF, n_bytes)
        return memory.address

    def free(self, address: int) -> None:
        if address not in self._reserved:
            raise DeviceError(f"no memory was reserved at {address:#x}")
        self._reserved.pop(address)[0].close()

    def write(self, address: int, data: NDArray[Any]) -> None:
        self._check_not_recorded("write")
        data = np.ascontiguousarray(data)
        self._check_range(address, data.nbytes)
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def write_now(self, address: int, word: int) -> None:
        self._check_range(address, 4)
        ctypes.c_int32.from_address(address).value = word

    def read(self, address: int, into: NDArray[Any]) -> None:
        self._check_not_recorded("read")
        self._read(address, into)

    def host(self, n_bytes: int) -> NDArray[np.uint8]:
        return np.zeros(n_bytes, np.uint8)

    def fetch(self, address: int, into: NDArray[Any]) -> None:
        self._do(partial(self._read, address, into))

    def fill(self, address: int, n_bytes: int, byte: int = 0) -> None:
        self._check_range(address, n_bytes)
        self._do(partial(ctypes.memset, address, byte, n_bytes))

    def copy(self, to: int, address: int, n_bytes: int) -> None:
        self._check_range(to, n_bytes)
        self._check_range(address, n_bytes)
        self._do(partial(ctypes.memmove, to, address, n_bytes))

    def _read(self, address: int, into: NDArray[Any]) -> None:
        if not (into.flags.c_contiguous and into.flags.writeable):
            raise ValueError("an array to read into must be contiguous and writable")
        self._check_range(address, into.nbytes)
        ctypes.memmove(into.ctypes.data, address, into.nbytes)

    def _check_range(self, address: int, n_bytes: int) -> None:
        if not any(
            start <= address and address + n_bytes <= start + size
            for start, (_, size) in self._reserved.items()
        ):
            raise DeviceError(f"{n_bytes} bytes at {address:#x} are not all reserved")

    # -- kernels --

    def load(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        wanted = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._loaded]
        signatures = {kernel: self._checked(kernel) for kernel in wanted}
        texts = {kernel.label: self._text(kernel, signatures[kernel]) for kernel in wanted}
        texts["shim_run"] = self._sources.flat("shim_run.cpp")
        paths = self._compiler.paths(texts, progress)
        run = _open_run(paths["shim_run"])
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

    def bind(self, kernel: Kernel, args: Args) -> Bound:
        signature = self._find(kernel).signature
        slots = np.zeros(len(signature.parameters), np.uint64)
        for i, value in enumerate(signature.pack(args)):
            slots[i : i + 1].view(value.dtype)[0] = value
            if signature.parameters[i].type.endswith("*") and value:
                self._check_range(int(value), 0)
        return Bound(kernel, slots)

    def launch(
        self, kernel: Kernel, grid: Grid, threads: int, shared: int, args: Args | Bound
    ) -> None:
        loaded = self._find(kernel)
        check_launch(kernel, grid, threads, shared, self.facts.shared_bytes)
        if threads > loaded.most_threads:
            raise ValueError(
                f"kernel {kernel}: {threads} threads, and it is declared for {loaded.most_threads}"
            )
        check_args(kernel, args)
        slots = (args if isinstance(args, Bound) else self.bind(kernel, args)).values
        self._do(partial(self._launch, kernel, loaded, grid, threads, shared, slots))

    def _launch(
        self,
        kernel: Kernel,
        loaded: _Loaded,
        grid: Grid,
        threads: int,
        shared: int,
        slots: NDArray[np.uint64],
    ) -> None:
        why = ctypes.create_string_buffer(_WHY_BYTES)
        loaded.launch(
            ctypes.c_void_p(loaded.entry),
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_size_t(shared),
            ctypes.c_void_p(slots.ctypes.data),
            ctypes.c_uint(self.seed),
            why,
        )
        if why.value:
            raise DeviceError(f"kernel {kernel}: {why.value.decode('utf-8', 'replace')}")

    def _find(self, kernel: Kernel) -> _Loaded:
        if kernel not in self._loaded:
            raise DeviceError(f"kernel {kernel} is not loaded")
        return self._loaded[kernel]

    def _checked(self, kernel: Kernel) -> Signature:
        if not self._sources.knows(kernel):
            variants = ", ".join(map(str, self._sources.variants(kernel.name)))
            raise DeviceError(
                f"{kernel} is none of the variants that {kernel.name}.cu lists: {variants}"
            )
        return self._sources.signature(kernel.name)

    def _text(self, kernel: Kernel, signature: Signature) -> str:
        """What the compiler gets: shim.h, the kernel, and how it is called."""
        defines = [f"#define {macro} {value}" for macro, value in kernel.defines]
        args = [f"ei_argument<{p.type}>(slots, {i})" for i, p in enumerate(signature.parameters)]
        entry = f"EI_ENTRY({kernel.name}({', '.join(args)}))\n"
        body = self._sources.flat(f"{kernel.name}.cu")
        return "\n".join([self._sources.flat("shim.h"), *defines, body, entry])

    # -- order --

    def record(self, body: Callable[[], None]) -> ShimGraph:
        self._check_not_recorded("record")
        self._recording = []
        try:
            body()
            return ShimGraph(self._recording)
        finally:
            self._recording = None

    def mark(self) -> ShimEvent:
        self._check_not_recorded("mark")
        return ShimEvent(time.perf_counter())

    def close(self) -> None:
        for address in list(self._reserved):
            self.free(address)

    def _do(self, action: Callable[[], Any]) -> None:
        """Do it now, or when what is being recorded is replayed."""
        if self._recording is None:
            action()
        else:
            self._recording.append(action)

    def _check_not_recorded(self, what: str) -> None:
        if self._recording is not None:
            raise DeviceError(f"{what} can't be recorded")


class ShimGraph(NamedTuple):
    """See `Graph`."""

    actions: list[Callable[[], None]]

    def replay(self) -> None:
        for action in self.actions:
            action()


class ShimEvent(NamedTuple):
    """See `Event`: whatever was asked for has been done when it returned."""

    at: float

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, ShimEvent)
        return self.at - earlier.at


class _Entry(ctypes.Structure):
    """`ei::Entry` of shim_run.h."""

    _fields_ = [
        ("call", ctypes.c_void_p),
        ("most_threads", ctypes.c_uint),
        ("shared", ctypes.c_void_p),
    ]


class _Run(NamedTuple):
    address: ctypes.c_void_p
    launch: Any


def _open_run(path: Path) -> _Run:
    library = ctypes.CDLL(str(path))
    library.ei_run.restype = ctypes.c_void_p
    library.ei_launch.restype = None
    return _Run(ctypes.c_void_p(library.ei_run()), library.ei_launch)


class _Compiler:
    """Makes shared libraries of texts with g++, and keeps them in a folder."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        program = next(filter(None, map(platform.find_program, _COMPILERS)), None)
        if program is None:
            raise DeviceError(
                "the shim compiles kernels with g++, and there is none in PATH: install g++ "
                "(Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"
            )
        self._program = program
        self._kernel_flags = (*_FLAGS, *_fma_flags(), *flags)
        self._cache = Cache(folder)

    def paths(self, texts: dict[str, str], progress: Progress | None) -> dict[str, Path]:
        """The library of each text, compiled now where it is not there, several at a time."""
        version = _version(self._program)
        keys = {label: key_of(text, version, *self._flags(label)) for label, text in texts.items()}
        found = {label: self._cache.find(label, keys[label], ".so") for label in texts}
        paths = {label: path for label, path in found.items() if path is not None}
        missing = [label for label in texts if label not in paths]
        if not missing:
            return paths
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            libraries = pool.map(lambda label: self._compile(label, texts[label]), missing)
            for n_done, (label, data) in enumerate(zip(missing, libraries, strict=True)):
                if progress:
                    progress(n_done, len(missing), label)
                paths[label] = self._cache.add(label, keys[label], ".so", data)
        return paths

    def _flags(self, label: str) -> tuple[str, ...]:
        return _RUN_FLAGS if label == "shim_run" else self._kernel_flags

    def _compile(self, label: str, text: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "library.so"
            said = Path(folder) / "said"
            command = [self._program, *self._flags(label), "-o", str(library)]
            with open(said, "wb") as errors:
                # It ends by itself, and starts 20 ms sooner than one that would end with us.
                with platform.start_program(command, errors=errors, ends_with_us=False) as process:
                    process.communicate(text)
            if process.returncode != 0:
                raise DeviceError(
                    f"{self._program} can't compile {label}: "
                    f"{said.read_text('utf-8', 'replace').strip()[:1500]}"
                )
            return library.read_bytes()


def _fma_flags() -> list[str]:
    """Without these, x86-64 calls a function for every fused multiply-add."""
    facts = (platform.processor_facts() or "").split()
    return ["-mfma"] if "fma" in facts else []


@cache
def _version(program: str) -> str:
    """A compiler's version and the machine it compiles for."""
    with platform.start_program([program, "--version"], ends_with_us=False) as process:
        said, _ = process.communicate()
    return str(said)
