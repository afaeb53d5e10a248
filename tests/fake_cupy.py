"""What `CudaDevice` calls of CuPy, on host memory: everything is done when it returns.

Names of functions and parameters are CuPy's; `test_cupy_device` compares them where CuPy is.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

OUT_OF_MEMORY = 2


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError{status}")
        self.status = status


class Runtime:
    """cupy.cuda.runtime. `fails[name]` is the status with which a call fails.

    So does the call of number `fails_at`; but for want of memory, a GPU is lost then.
    """

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3
    cudaDevAttrMultiProcessorCount, cudaDevAttrIntegrated = 16, 18
    cudaDevAttrCooperativeLaunch, cudaDevAttrMaxSharedMemoryPerBlockOptin = 95, 97

    def __init__(self) -> None:
        self.fails: dict[str, int] = {}
        self.version = 12090
        self.is_integrated, self.is_cooperative, self.n_free = 1, 1, 1 << 62
        self.devices: list[int] = []
        self.memory: dict[int, Any] = {}
        self.captured: list[Any] | None = None
        self.n_calls, self.fails_at, self.status, self.is_lost = 0, 0, OUT_OF_MEMORY, False

    def fail(self, at: int, status: int) -> None:
        """From now on, in the call of this number."""
        self.n_calls, self.fails_at, self.status, self.is_lost = 0, at, status, False

    def call(self, name: str) -> None:
        """Count a call, which may fail."""
        self.n_calls += 1
        if self.n_calls == self.fails_at:
            self.is_lost = self.status != OUT_OF_MEMORY
            raise CUDARuntimeError(self.status)
        if self.is_lost:
            raise CUDARuntimeError(self.status)
        if name in self.fails:
            raise CUDARuntimeError(self.fails[name])

    def do(self, name: str, action: Any) -> None:
        """Unless it fails: now, or when what is captured is launched."""
        self.call(name)
        action() if self.captured is None else self.captured.append(action)

    def runtimeGetVersion(self) -> int:
        return self.version

    def setDevice(self, device: int) -> None:
        self.devices.append(device)

    def deviceGetAttribute(self, attrib: int, device: int) -> int:
        self.call("deviceGetAttribute")
        facts = {16: 14, 18: self.is_integrated, 95: self.is_cooperative, 97: 166912}
        return facts[attrib]

    def memGetInfo(self) -> tuple[int, int]:
        self.call("memGetInfo")
        return self.n_free, 1 << 63

    def malloc(self, size: int) -> int:
        self.call("malloc")
        if size > 1 << 30:
            raise CUDARuntimeError(OUT_OF_MEMORY)
        memory = (ctypes.c_char * (size + 255))()
        address = -(-ctypes.addressof(memory) // 256) * 256
        self.memory[address] = memory
        return address

    def free(self, ptr: int) -> None:
        self.call("free")
        del self.memory[ptr]

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        self.do("memcpyAsync", lambda: ctypes.memmove(dst, src, size))

    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None:
        self.do("memsetAsync", lambda: ctypes.memset(ptr, value, size))


class Driver:
    """cupy.cuda.driver."""

    CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0
    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        self.attributes: dict[tuple[int, int], int] = {}
        self.most_threads = 64  # of a block of any kernel

    def funcGetAttribute(self, attribute: int, f: int) -> int:
        return {0: self.most_threads, 1: 1024}[attribute]

    def occupancyMaxActiveBlocksPerMultiprocessor(
        self, func: int, blockSize: int, dynamicSMemSize: int
    ) -> int:
        return min(2048 // blockSize, (166912 + 1024) // (dynamicSMemSize + 1024))

    def funcSetAttribute(self, f: int, attribute: int, value: int) -> None:
        self.attributes[f, attribute] = value


class Cuda(ModuleType):
    """cupy.cuda; `run` is given every launch: kernel, grid, threads, arguments, shared bytes."""

    def __init__(self) -> None:
        super().__init__("cupy.cuda")
        self.run: Any = lambda *launch: None
        runtime, self.driver = Runtime(), Driver()
        self.runtime = runtime
        self.launches: list[Any] = []
        launches, cuda = self.launches, self

        class Event:
            def __init__(self, disable_timing: bool = False) -> None:
                runtime.call("event")
                self.ptr = 0

            def record(self, stream: Any = None) -> None:
                runtime.call("record")

            def synchronize(self) -> None:
                runtime.do("synchronize", lambda: None)

        class Graph:
            def __init__(self, actions: list[Any]) -> None:
                self.actions = actions

            def upload(self, stream: Any = None) -> None:
                runtime.call("upload")

            def launch(self, stream: Any = None) -> None:
                runtime.call("replay")
                for action in self.actions:
                    action()

        class Stream:
            def __init__(self, non_blocking: bool = False) -> None:
                assert non_blocking
                runtime.call("stream")
                self.ptr = 5

            def synchronize(self) -> None:
                runtime.do("synchronize", lambda: None)

            def record(self, event: Any = None) -> Event:
                runtime.call("mark")
                return event or Event()

            def begin_capture(self, mode: Any = None) -> None:
                runtime.call("begin_capture")
                runtime.captured = []

            def end_capture(self) -> Graph:
                actions, runtime.captured = runtime.captured, None
                runtime.call("end_capture")
                assert actions is not None
                return Graph(actions)

        class Function:
            def __init__(self, module: Any, funcname: str) -> None:
                self.ptr, self.name, self.module = 77, funcname, module

            def __call__(
                self,
                grid: Any,
                block: Any,
                args: Any,
                shared_mem: int = 0,
                stream: Any = None,
                enable_cooperative_groups: bool = False,
            ) -> None:
                call: tuple[Any, ...] = (self.name, grid, block, args, shared_mem, stream.ptr)
                call += ("cooperative",) if enable_cooperative_groups else ()
                launch = self.module.cubin, grid, block[0], args, shared_mem
                runtime.do("launch", lambda: (launches.append(call), cuda.run(*launch)))

        class Module:
            def load(self, cubin: bytes) -> None:
                runtime.call("load")
                assert cubin.startswith(b"\x7fELF")
                self.cubin = cubin

            def get_function(self, name: str) -> Function:
                return Function(self, name)

        self.function = SimpleNamespace(Module=Module, Function=Function)
        self.Stream, self.Event, self.Graph = Stream, Event, Graph

    def alloc_pinned_memory(self, size: int) -> Any:
        self.runtime.call("alloc_pinned_memory")
        return (ctypes.c_char * size)()

    def get_elapsed_time(self, start_event: Any, end_event: Any) -> float:
        return 1500.0


def install(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Have `import cupy.cuda` give this."""
    cuda, cupy = Cuda(), ModuleType("cupy")
    cupy.cuda = cuda  # type: ignore[attr-defined]
    cupy.__spec__ = ModuleSpec("cupy", None)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    return cuda
