"""Kernels that are launched before the ones ahead of them have ended: a GPU gets them ready sooner.

CuPy has no attributes of launches, so the driver itself is called. Not yet measured on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from edgeinfer import platform
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cuda.device import Grid
from edgeinfer.kernels.cuda.kernel import DECLARATION, Sources

LEAST_ARCH = 90
_MAY_BEGIN_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_LAUNCH = "cuLaunchKernelEx"  # since CUDA 11.8


def waiting_first(text: str, sources: Sources) -> str:
    """A kernel's text in which it waits for the kernel ahead before it does anything else."""
    found = DECLARATION.findall(text)
    assert len(found) == 1, "a file holds one kernel"
    body = DECLARATION.sub(lambda match: f"{match[0]} ei_wait_for_predecessor();", text)
    return sources.flat("early.cuh") + body


class DriverError(RuntimeError):
    """Of CUDA's driver, with its number as CuPy's errors have it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"error {status} of {_LAUNCH}")
        self.status = status


class EarlyLauncher:
    """Launches kernels of one thread's current GPU; DeviceError where the driver can't do so."""

    def __init__(self) -> None:
        function = getattr(platform.cuda_library(), _LAUNCH, None)
        if function is None:
            raise DeviceError(f"the NVIDIA driver has no {_LAUNCH}: update it")
        self._function = function

    def launch(
        self,
        function: int,
        grid: Grid,
        threads: int,
        shared: int,
        stream: int,
        values: Sequence[np.generic],
    ) -> None:
        """Behind a kernel in a stream, of a kernel whose text is `waiting_first`; DriverError."""
        arrays = [np.array(value) for value in values]
        addresses = (ctypes.c_void_p * len(arrays))(*(each.ctypes.data for each in arrays))
        attribute = _Attribute(id=_MAY_BEGIN_EARLY, value=1)
        config = _Config(grid, (threads, 1, 1), shared, stream, ctypes.addressof(attribute), 1)
        status = self._function(ctypes.byref(config), ctypes.c_void_p(function), addresses, None)
        if status:
            raise DriverError(status)


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    ]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: of a union of 64 bytes the first number."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("unused", ctypes.c_char * 60),
    ]
