"""Runs single CPU kernels for tests: built and cached like the product's, called by ctypes."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from edgeinfer.config import cache_folder as cache_root
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.library import Library


@cache
def library(family: str | None = None) -> Library:
    """The kernel library of this machine, or of a poorer vocabulary on it."""
    return Library.host(cache_root(), family)


def address(name: str, family: str | None = None) -> int:
    """Address of a kernel, built if need be."""
    lib = library(family)
    lib.load([name])
    return lib.address(name)


def header(**words: int) -> np.ndarray:
    """A step header with these words set: `header(H_ROWS=3)`."""
    h = np.zeros(layout.HEADER_WORDS, np.int64)
    for name, value in words.items():
        h[getattr(layout, name) // layout.WORD] = value
    return h


def run(
    name: str,
    h: np.ndarray,
    args: list[int],
    chunks: range,
    family: str | None = None,
    thread: int = 0,
) -> None:
    """Call kernel `name` for every chunk, as thread `thread` of a team."""
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 4)(address(name, family))
    words = np.array(args, np.int64)
    for chunk in chunks:
        kernel(h.ctypes.data, words.ctypes.data, chunk, thread)


def huge(n_bytes: int) -> np.ndarray:
    """Zeroed bytes, 64-byte aligned, with 4 KiB behind them that a prefetch or tail may touch."""
    raw = np.zeros(n_bytes + 64 + 4096, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]


def float_bits(x: float) -> int:
    """The bits of a float32, for an argument word."""
    return int(np.float32(x).view(np.int32))
