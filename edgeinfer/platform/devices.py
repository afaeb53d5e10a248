"""The board, the CUDA driver and its devices, and NVIDIA's runtime compilers."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from edgeinfer.platform import system_files
from edgeinfer.platform.files import files_below


def board_name() -> str | None:
    """The model of a single-board computer, such as a Jetson."""
    text = system_files.read("/proc/device-tree/model")
    return text.strip("\0 \n") if text else None


class Gpu(NamedTuple):
    """One CUDA device, as its driver describes it."""

    name: str
    compute_capability: str
    n_bytes: int
    is_integrated: bool = False  # its memory is the processors'


class CudaDriver(NamedTuple):
    """NVIDIA's driver: the newest CUDA it runs (13000 is 13.0), its devices, or its error."""

    version: int
    devices: tuple[Gpu, ...]
    error: int = 0


def cuda_library() -> ctypes.CDLL | None:
    """The CUDA driver's own library, None where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def cuda_driver() -> CudaDriver | None:
    """What the CUDA driver says, None where there is none. Loads no CUDA library but libcuda."""
    cuda = cuda_library()
    if cuda is None:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = () if error else tuple(_gpu(cuda, i) for i in range(count.value))
    return CudaDriver(version.value, devices, error)


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, n_bytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(n_bytes), device)
    major, minor, integrated = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    for value, attribute in ((major, 75), (minor, 76), (integrated, 18)):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    text = name.value.decode("utf-8", "replace")
    capability = f"{major.value}.{minor.value}"
    return Gpu(text, capability, n_bytes.value, bool(integrated.value))


class NvrtcLibrary(NamedTuple):
    """NVIDIA's runtime compiler: the path of its library, and the CUDA it belongs to (12)."""

    path: Path
    cuda: int


def nvrtc_libraries(root: Path = Path("/")) -> list[NvrtcLibrary]:
    """Those of pip's wheels, of conda, then the system's (JetPack's), the newest CUDA first.

    One of each; `root` is where the system's own files are looked for.
    """
    found: dict[int, NvrtcLibrary] = {}
    for path in chain(_nvrtc_of_wheels(), _nvrtc_of_conda(), _nvrtc_of_system(root)):
        version = _NVRTC_NAME.fullmatch(path.name)
        if version is not None:
            cuda = int(version[1] or version[2])
            found.setdefault(cuda, NvrtcLibrary(path, cuda))
    return sorted(found.values(), key=lambda library: -library.cuda)


_NVRTC_NAME = re.compile(r"libnvrtc\.so\.(\d+)|nvrtc64_(\d+)\d_0\.dll")


def _nvrtc_of_wheels() -> Iterator[Path]:
    for folder in map(Path, sys.path):
        for pattern in ("lib/libnvrtc.so.*", "bin/nvrtc64_*.dll", "bin/*/nvrtc64_*.dll"):
            yield from files_below(folder / "nvidia", f"*/{pattern}")


def _nvrtc_of_conda() -> Iterator[Path]:
    for pattern in ("lib/libnvrtc.so.*", "Library/bin/nvrtc64_*.dll"):
        yield from files_below(Path(sys.prefix), pattern)


def _nvrtc_of_system(root: Path) -> Iterator[Path]:
    for pattern in ("usr/local/cuda*/lib64", "usr/local/cuda*/targets/*/lib", "usr/lib/*-gnu"):
        yield from files_below(root, f"{pattern}/libnvrtc.so.*")
    programs = root / "Program Files" / "NVIDIA GPU Computing Toolkit" / "CUDA"
    yield from files_below(programs, "*/bin/nvrtc64_*.dll")
    yield from files_below(programs, "*/bin/x64/nvrtc64_*.dll")
