"""The shim for tests of CUDA kernels, and memory that ends where nothing may be read."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer import platform
from edgeinfer.kernels.cuda.cupy_device import CudaDevice
from edgeinfer.kernels.cuda.device import Device
from edgeinfer.kernels.cuda.shim import ShimDevice

SEEDS = (0, 1, 7)  # of the order in which threads run
GPU = "EDGEINFER_TEST_GPU"  # set: where there is a GPU, kernels run there instead
CHECKED = "EDGEINFER_TEST_CHECKED"  # set: kernels are watched by sanitizers, memory is guarded
SANITIZERS = (
    "-O1", "-fsanitize=alignment,bounds,shift,float-cast-overflow", "-fno-sanitize-recover=all",
)  # fmt: skip


def shim(folder: Path | None = None, **options: Any) -> ShimDevice | CudaDevice:
    """A shim that runs at once; the test is skipped where there is no g++."""
    if os.environ.get(GPU):
        return CudaDevice(0, folder, sources=options.get("sources", ()))
    if platform.find_program("g++") is None:
        pytest.skip("no g++ in PATH, which the shim compiles kernels with")
    checks = {"flags": SANITIZERS, "allocate": GuardedMemory} if os.environ.get(CHECKED) else {}
    return ShimDevice(folder, **{"runs_at_once": True, **checks, **options})


def put(device: Device, data: NDArray[Any]) -> int:
    """The address of new memory that holds an array."""
    address = device.reserve(data.nbytes)
    device.write(address, data)
    return address


def get(device: Device, address: int, shape: tuple[int, ...] | int, dtype: Any) -> NDArray[Any]:
    """What lies at an address, as an array."""
    out = np.empty(shape, dtype)
    device.read(address, out)
    return out


def put_step(device: Device, n_rows: int, n_wanted: int = 0, n_sequences: int = 1) -> int:
    """The address of a `struct Step`."""
    return put(device, np.array([n_rows, n_wanted, n_sequences, 0], np.int32))


class GuardedMemory:
    """For `ShimDevice(allocate=GuardedMemory)`: ends, but for 15 bytes, at a page out of bounds."""

    def __init__(self, n_bytes: int) -> None:
        page = mmap.PAGESIZE
        n_pages = -(-n_bytes // page)
        self._map = mmap.mmap(-1, (n_pages + 1) * page)
        self._view = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        end = ctypes.addressof(self._view) + n_pages * page
        self.address = end - -(-n_bytes // 16) * 16
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0

    def close(self) -> None:
        del self._view
        self._map.close()
