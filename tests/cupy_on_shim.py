"""A CuPy whose kernels run: that of `fake_cupy`, with the shim behind its launches.

So the whole of `CudaDevice` runs without a GPU, and fails where a test wants it to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edgeinfer import platform
from edgeinfer.kernels.cuda import shim as shims
from edgeinfer.kernels.cuda.cubins import Cubins
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.platform import CudaDriver, Gpu
from tests import fake_cupy
from tests.fake_cupy import Cuda
from tests.shim import shim

GPU = Gpu("Made-up", "9.0", 4 << 30)


class _Runner:
    """Kernels by what stands for their machine code: their labels."""

    def __init__(self) -> None:
        self._shim: Any = shim(shared_bytes=166912)
        self._kernels: dict[bytes, Kernel] = {}

    def load(self, kernels: Sequence[Kernel], progress: Any = None) -> Any:
        self._shim.load(kernels)
        codes = {kernel: b"\x7fELF" + kernel.label.encode() for kernel in kernels}
        self._kernels.update((code, kernel) for kernel, code in codes.items())
        return codes

    def run(self, code: bytes, grid: Any, threads: int, values: Any, shared: int) -> None:
        kernel = self._kernels[code]
        loaded, slots = self._shim._loaded[kernel], np.zeros(len(values), np.uint64)
        for i, value in enumerate(values):
            slots[i : i + 1].view(value.dtype)[0] = value
        launch = (
            ctypes.c_void_p(loaded.entry),
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_size_t(shared),
            ctypes.c_size_t(self._shim.facts.shared_bytes),
            ctypes.c_void_p(slots.ctypes.data),
            ctypes.c_uint(7),
            ctypes.c_uint(0),  # block after block
        )
        shims._launch(kernel, loaded.launch, launch, slots)


def install(monkeypatch: pytest.MonkeyPatch, n_gpus: int = 1) -> Cuda:
    """Have `import cupy.cuda` give it, on a machine with so many GPUs, each with its own memory."""
    cuda, runner = fake_cupy.install(monkeypatch), _Runner()
    cuda.runtime.is_integrated, cuda.runtime.n_free = 0, 4 << 30
    cuda.run, cuda.driver.most_threads = runner.run, 1024
    monkeypatch.setattr(platform, "cuda_driver", lambda: CudaDriver(12090, (GPU,) * n_gpus))
    monkeypatch.setattr(Cubins, "load", runner.load)
    return cuda
