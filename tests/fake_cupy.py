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


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError{status}")
        self.status = status


class Runtime:
    """cupy.cuda.runtime. `fails[name]` is the status with which a call fails."""

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3
    cudaDevAttrMultiProcessorCount, cudaDevAttrIntegrated = 16, 18
    cudaDevAttrCooperativeLaunch, cudaDevAttrMaxSharedMemoryPerBlockOptin = 95, 97

    def __init__(self) -> None:
        self.fails: dict[str, int] = {}
        self.version, self.is_cooperative = 12090, 1
        self.devices: list[int] = []
        self.memory: dict[int, Any] = {}
        self.captured: list[Any] | None = None

    def do(self, name: str, action: Any) -> None:
        """Unless it fails: now, or when what is captured is launched."""
        if name in self.fails:
            raise CUDARuntimeError(self.fails[name])
        action() if self.captured is None else self.captured.append(action)

    def runtimeGetVersion(self) -> int:
        return self.version

    def setDevice(self, device: int) -> None:
        self.devices.append(device)

    def deviceGetAttribute(self, attrib: int, device: int) -> int:
        return {16: 14, 18: 1, 95: self.is_cooperative, 97: 166912}[attrib]

    def memGetInfo(self) -> tuple[int, int]:
        return 1 << 62, 1 << 63

    def malloc(self, size: int) -> int:
        if size > 1 << 30:
            raise CUDARuntimeError(2)
        memory = (ctypes.c_char * size)()
        self.memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, ptr: int) -> None:
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

    def funcGetAttribute(self, attribute: int, f: int) -> int:
        return {0: 64, 1: 1024}[attribute]

    def occupancyMaxActiveBlocksPerMultiprocessor(
        self, func: int, blockSize: int, dynamicSMemSize: int
    ) -> int:
        return min(2048 // blockSize, (166912 + 1024) // (dynamicSMemSize + 1024))

    def funcSetAttribute(self, f: int, attribute: int, value: int) -> None:
        self.attributes[f, attribute] = value


class Cuda(ModuleType):
    """cupy.cuda."""

    def __init__(self) -> None:
        super().__init__("cupy.cuda")
        runtime, self.driver = Runtime(), Driver()
        self.runtime = runtime
        self.launches: list[Any] = []
        launches = self.launches

        class Event:
            def __init__(self, disable_timing: bool = False) -> None:
                self.ptr = 0

            def record(self, stream: Any = None) -> None: ...

            def synchronize(self) -> None:
                runtime.do("synchronize", lambda: None)

        class Graph:
            def __init__(self, actions: list[Any]) -> None:
                self.actions = actions

            def upload(self, stream: Any = None) -> None: ...

            def launch(self, stream: Any = None) -> None:
                for action in self.actions:
                    action()

        class Stream:
            def __init__(self, non_blocking: bool = False) -> None:
                assert non_blocking
                self.ptr = 5

            def synchronize(self) -> None:
                runtime.do("synchronize", lambda: None)

            def record(self, event: Any = None) -> Event:
                return event or Event()

            def begin_capture(self, mode: Any = None) -> None:
                runtime.captured = []

            def end_capture(self) -> Graph:
                actions, runtime.captured = runtime.captured, None
                assert actions is not None
                return Graph(actions)

        class Function:
            def __init__(self, module: Any, funcname: str) -> None:
                self.ptr, self.name = 77, funcname

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
                runtime.do("launch", lambda: launches.append(call))

        class Module:
            def load(self, cubin: bytes) -> None:
                assert cubin.startswith(b"\x7fELF")

            def get_function(self, name: str) -> Function:
                return Function(self, name)

        self.function = SimpleNamespace(Module=Module, Function=Function)
        self.Stream, self.Event, self.Graph = Stream, Event, Graph

    def alloc_pinned_memory(self, size: int) -> Any:
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
