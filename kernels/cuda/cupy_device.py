"""A device that is an NVIDIA GPU, through CuPy: memory, one stream, machine code, graphs, events.

CuPy is imported when a device is opened, which takes a second. Of it only memory, streams and
modules are used: it compiles nothing for us.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeinfer import config, device, platform
from edgeinfer.errors import DeviceError, memory_ran_out
from edgeinfer.kernels.cuda import early
from edgeinfer.kernels.cuda.cubins import Cubins
from edgeinfer.kernels.cuda.device import (
    Args,
    Bound,
    DeviceFacts,
    Event,
    Grid,
    Progress,
    check_args,
    check_launch,
    out_of_memory,
)
from edgeinfer.kernels.cuda.kernel import SYMBOL, Kernel, Signature, Sources

_OUT_OF_MEMORY = 2  # what CUDA's runtime and driver both call it
_SMALL = 64 << 10  # bytes of an array that is written through one of many small buffers


def _arch(gpu: platform.Gpu) -> int:
    major, _, minor = gpu.compute_capability.partition(".")
    return 10 * int(major) + int(minor)


def _cupy_cuda(driver: platform.CudaDriver, index: int) -> Any:
    """cupy.cuda; DeviceError where that is broken, or for a CUDA that the driver does not run."""
    try:
        import cupy.cuda

        cuda = cupy.cuda.runtime.runtimeGetVersion() // 1000
    except Exception as error:  # of whatever it needs and does not find
        if memory_ran_out(error):
            raise
        why = error.__cause__ or error  # itself CuPy says in ten lines
        found = f"CuPy is here and can't be used: {type(why).__name__}: {why}"
    else:
        if cuda <= driver.version // 1000:
            return cupy.cuda
        runs = device.cuda_version(driver)
        found = f"CuPy is here for CUDA {cuda}, and the NVIDIA driver runs CUDA up to {runs}"
    command = device.install_command(driver, index)
    raise DeviceError(found, advice=(f"uninstall it, then run {command}",))


class _Loaded(NamedTuple):
    signature: Signature
    function: Any  # cupy.cuda.function.Function
    most_threads: int


class CudaDevice:
    """See `Device`; DeviceError where there is no such GPU, with what to do.

    After an error of CUDA, but for memory that ran out, nothing works any more on this GPU in this
    process: everything raises that error. `waits_for_each` launch: the error names the kernel.
    With `begins_early` a kernel behind a kernel may begin before that one has ended, on a GPU that
    can do so: every kernel then waits for the one ahead before it does anything else.
    """

    def __init__(
        self,
        index: int = 0,
        folder: Path | None = None,  # of compiled kernels, by default below our cache's
        *,
        sources: Iterable[Path] = (),
        waits_for_each: bool = False,
        begins_early: bool = False,
    ) -> None:
        device.choose(device.Device("cuda", index))
        driver = platform.cuda_driver()
        assert driver is not None
        self._index, self._cuda = index, _cupy_cuda(driver, index)
        self._runtime, self._driver = self._cuda.runtime, self._cuda.driver
        self._waits_for_each = waits_for_each
        self._fault = ""
        self._is_recording = False
        self._is_behind_kernel = False  # what comes next in the stream
        self._reserved: set[int] = set()
        # Whoever forgets to close this: a GPU's memory is nobody else's to return.
        self._end = weakref.finalize(self, _free, self._runtime, index, self._reserved)
        self._end.atexit = False
        self._loaded: dict[Kernel, _Loaded] = {}
        with self._calls("open"):
            self.facts = self._ask(driver.devices[index])
            self._stream = self._cuda.Stream(non_blocking=True)
            self._overtaking = self._cuda.Stream(non_blocking=True)
            self._word = self.host(4).view(np.int32)
            self._small = self._uploads(64, _SMALL)
        self._large: _Uploads | None = None
        self._sources = Sources(*sources)
        folder = folder or config.cache_folder() / "kernels" / "cuda"
        is_early = begins_early and self.facts.arch >= early.LEAST_ARCH
        self._early = early.EarlyLauncher() if is_early else None
        cuda_version = driver.version // 1000
        self._cubins = Cubins(
            folder, self._sources, self.facts.arch, cuda_version, begins_early=is_early
        )

    def _ask(self, gpu: platform.Gpu) -> DeviceFacts:
        def attribute(name: str) -> int:
            which = getattr(self._runtime, f"cudaDevAttr{name}")
            return int(self._runtime.deviceGetAttribute(which, self._index))

        return DeviceFacts(
            name=gpu.name,
            arch=_arch(gpu),
            n_multiprocessors=attribute("MultiProcessorCount"),
            shared_bytes=attribute("MaxSharedMemoryPerBlockOptin"),
            has_own_memory=not attribute("Integrated"),
            is_cooperative=bool(attribute("CooperativeLaunch")),
        )

    @contextmanager
    def _calls(self, what: str) -> Iterator[None]:
        """Calls of CUDA, on this GPU; its errors become ours."""
        if self._fault:
            raise DeviceError(self._fault)
        self._is_behind_kernel = False
        try:
            self._runtime.setDevice(self._index)
            yield
        except RuntimeError as error:  # of CuPy, for CUDA's runtime and for its driver
            status = getattr(error, "status", None)
            if status == _OUT_OF_MEMORY:
                raise out_of_memory(f"cuda:{self._index}", f"{what}: {error}") from error
            if status is not None:
                self._fault = f"cuda:{self._index} failed: {what}: {error}"
                raise DeviceError(self._fault) from error
            raise

    # -- memory --

    def memory(self) -> tuple[int, int]:
        with self._calls("memory"):
            free, total = self._runtime.memGetInfo()
        if not self.facts.has_own_memory:
            free = min(free, platform.available_memory())
        return free, total

    def reserve(self, n_bytes: int) -> int:
        with self._calls(f"{n_bytes} bytes"):
            address = int(self._runtime.malloc(max(n_bytes, 1)))
        self._reserved.add(address)
        return address

    def free(self, address: int) -> None:
        if address not in self._reserved:
            raise DeviceError(f"no memory was reserved at {address:#x}")
        with self._calls("free"):
            self._stream.synchronize()
            self._reserved.remove(address)
            self._runtime.free(address)

    def write(self, address: int, data: NDArray[Any]) -> None:
        self._check_not_recorded("write")
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        with self._calls("write"):
            if len(flat) > _SMALL and self._large is None:
                self._large = self._uploads(2, 8 << 20)
            uploads = self._small if len(flat) <= _SMALL else self._large
            assert uploads is not None
            uploads.send(address, flat, self._stream)

    def _uploads(self, n_buffers: int, n_bytes: int) -> _Uploads:
        return _Uploads(self._cuda, self.host(n_buffers * n_bytes).reshape(n_buffers, n_bytes))

    def write_now(self, address: int, word: int) -> None:
        with self._calls("write_now"):
            self._word[0] = word
            _copy(
                self._runtime, address, self._word.ctypes.data, 4, "HostToDevice", self._overtaking
            )
            self._overtaking.synchronize()

    def read(self, address: int, into: NDArray[Any]) -> None:
        self._check_not_recorded("read")
        self.fetch(address, into)
        with self._calls("read"):
            self._stream.synchronize()

    def host(self, n_bytes: int) -> NDArray[np.uint8]:
        with self._calls(f"{n_bytes} bytes of the host"):
            memory = self._cuda.alloc_pinned_memory(max(n_bytes, 1))
        return np.frombuffer(memory, np.uint8)[:n_bytes]

    def fetch(self, address: int, into: NDArray[Any]) -> None:
        if not (into.flags.c_contiguous and into.flags.writeable):
            raise ValueError("an array to read into must be contiguous and writable")
        with self._calls("fetch"):
            _copy(
                self._runtime, into.ctypes.data, address, into.nbytes, "DeviceToHost", self._stream
            )

    def fill(self, address: int, n_bytes: int, byte: int = 0) -> None:
        with self._calls("fill"):
            self._runtime.memsetAsync(address, byte, n_bytes, self._stream.ptr)

    def copy(self, to: int, address: int, n_bytes: int) -> None:
        with self._calls("copy"):
            _copy(self._runtime, to, address, n_bytes, "DeviceToDevice", self._stream)

    # -- kernels --

    def load(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        wanted = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._loaded]
        for kernel, cubin in self._cubins.load(wanted, progress).items():
            with self._calls(f"loading kernel {kernel}"):
                module = self._cuda.function.Module()
                module.load(cubin)
                function = module.get_function(SYMBOL + kernel.name)
                self._allow_shared_memory(function)
                which = self._driver.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
                most = self._driver.funcGetAttribute(which, function.ptr)
            self._loaded[kernel] = _Loaded(self._sources.signature(kernel), function, most)

    @property
    def unkept(self) -> str:
        return self._cubins.unkept

    def _allow_shared_memory(self, function: Any) -> None:
        """All that a block may have: without this it is 48 KB."""
        static = self._driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        dynamic = self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        n_static = self._driver.funcGetAttribute(static, function.ptr)
        self._driver.funcSetAttribute(function.ptr, dynamic, self.facts.shared_bytes - n_static)

    def bind(self, kernel: Kernel, args: Args) -> Bound:
        return Bound(kernel, self._find(kernel).signature.pack(args))

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
        values = (args if isinstance(args, Bound) else self.bind(kernel, args)).values
        is_behind_kernel = self._is_behind_kernel
        with self._calls(f"kernel {kernel}"):
            if at_once:
                block = threads, 1, 1
                loaded.function(grid, block, values, shared, self._stream, at_once)
            elif self._early is not None and is_behind_kernel:
                function, stream = loaded.function.ptr, self._stream.ptr
                self._early.launch(function, grid, threads, shared, stream, values)
            else:
                loaded.function(grid, (threads, 1, 1), values, shared, self._stream)
            self._is_behind_kernel = True
            if self._waits_for_each and not self._is_recording:
                self._stream.synchronize()

    def blocks_at_once(self, kernel: Kernel, threads: int, shared: int) -> int:
        function, facts = self._find(kernel).function, self.facts
        if not facts.is_cooperative:
            return 0
        with self._calls(f"kernel {kernel}"):
            ask = self._driver.occupancyMaxActiveBlocksPerMultiprocessor
            return facts.n_multiprocessors * int(ask(function.ptr, threads, shared))

    def _find(self, kernel: Kernel) -> _Loaded:
        if kernel not in self._loaded:
            raise DeviceError(f"kernel {kernel} is not loaded")
        return self._loaded[kernel]

    # -- order --

    def record(self, body: Callable[[], None]) -> _Graph:
        self._check_not_recorded("record")
        with self._calls("record"):
            self._stream.begin_capture()
            self._is_recording = True
            try:
                body()
            except BaseException:
                with suppress(RuntimeError):  # what went wrong before is the error
                    self._stream.end_capture()
                raise
            finally:
                self._is_recording = self._is_behind_kernel = False
            graph = self._stream.end_capture()
            graph.upload(self._stream)
        return _Graph(self, graph)

    def mark(self) -> _Event:
        self._check_not_recorded("mark")
        with self._calls("mark"):
            return _Event(self, self._stream.record())

    def close(self) -> None:
        self._end()
        self._fault = self._fault or f"cuda:{self._index} is closed"

    def _check_not_recorded(self, what: str) -> None:
        if self._is_recording:
            raise DeviceError(f"{what} can't be recorded")


def _free(runtime: Any, index: int, reserved: set[int]) -> None:
    """Return memory once all that runs is done; after a fault that can't be done, nor need be."""
    with suppress(RuntimeError):
        runtime.setDevice(index)
        while reserved:
            runtime.free(reserved.pop())


class _Graph(NamedTuple):
    """See `Graph`."""

    device: CudaDevice
    graph: Any  # cupy.cuda.Graph

    def replay(self) -> None:
        with self.device._calls("replay"):
            self.graph.launch(self.device._stream)


class _Event(NamedTuple):
    """See `Event`."""

    device: CudaDevice
    event: Any  # cupy.cuda.Event

    def wait(self) -> None:
        with self.device._calls("wait"):
            self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _Event)
        with self.device._calls("seconds_since"):
            return float(self.device._cuda.get_elapsed_time(earlier.event, self.event)) / 1e3


class _Uploads:
    """Page-locked buffers that arrays go through, in turns: so they can change meanwhile."""

    def __init__(self, cuda: Any, buffers: NDArray[np.uint8]) -> None:
        self._runtime, self._buffers = cuda.runtime, buffers
        self._events = [cuda.Event(disable_timing=True) for _ in buffers]
        self._next = 0

    def send(self, address: int, data: NDArray[np.uint8], stream: Any) -> None:
        n_bytes = self._buffers.shape[1]
        for start in range(0, len(data), n_bytes):
            part = data[start : start + n_bytes]
            buffer, event = self._buffers[self._next], self._events[self._next]
            self._next = (self._next + 1) % len(self._events)
            event.synchronize()  # what it held before has arrived
            buffer[: len(part)] = part
            to, of = address + start, buffer.ctypes.data
            _copy(self._runtime, to, of, len(part), "HostToDevice", stream)
            event.record(stream)


def _copy(runtime: Any, to: int, address: int, n_bytes: int, kind: str, stream: Any) -> None:
    runtime.memcpyAsync(to, address, n_bytes, getattr(runtime, f"memcpy{kind}"), stream.ptr)
