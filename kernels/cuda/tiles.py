"""Sizes of weights and activations in device memory: those of tiles.cuh, x8.cuh and halves.cuh."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from edgeinfer.quant import QuantType

TILE = 32  # rows of a matrix that lie together; the last tile is filled up with zeros
BLOCK = 32
CHUNK = 256  # columns that share the bytes of scales
_SHARED_BYTES = 48 << 10  # that every GPU has for a block of threads


class Planes(NamedTuple):
    """Of a block type the bits of a code and the bytes of a row's chunk, by plane of tiles.cuh."""

    low_bits: int
    high_bits: int
    scale_bytes: int
    rest_bytes: int
    n_lows: int = 0  # 1: every block has a low, 2: and mins

    def n_bytes(self, n_rows: int, n_cols: int) -> int:
        blocks = _up(n_rows, TILE) * (n_cols // BLOCK)
        chunks = _up(n_rows, TILE) * (_up(n_cols, CHUNK) // CHUNK)
        high = blocks * self.low_bits * 4
        scales = _up(high + blocks * self.high_bits * 4, 256)
        return _up(scales + chunks * (self.scale_bytes + self.rest_bytes), 256)


PLANES = {
    "Q4_0": Planes(4, 0, 16, 0),
    "Q4_1": Planes(4, 0, 16, 16, n_lows=1),
    "Q5_0": Planes(4, 1, 16, 0),
    "Q5_1": Planes(4, 1, 16, 16, n_lows=1),
    "Q8_0": Planes(8, 0, 16, 0),
    "Q2_K": Planes(2, 0, 16, 4, n_lows=2),
    "Q3_K": Planes(2, 1, 16, 0),
    "Q4_K": Planes(4, 0, 16, 0, n_lows=1),
    "Q5_K": Planes(4, 1, 16, 0, n_lows=1),
    "Q6_K": Planes(4, 2, 16, 2),
    "IQ4_NL": Planes(4, 0, 16, 0),
    "IQ4_XS": Planes(4, 0, 8, 0),
    "MXFP4": Planes(4, 0, 8, 0),
}


def matrix_bytes(kind: QuantType, n_rows: int, n_cols: int) -> int:
    """Bytes of a matrix in tiles, a multiple of 256; ValueError where its rows are no whole blocks.

    Matrices of a stack lie one behind the other.
    """
    kind.row_bytes(n_cols)
    if kind.name in PLANES:
        return PLANES[kind.name].n_bytes(n_rows, n_cols)
    return _up(n_rows, TILE) * _up(n_cols * kind.block_bytes, 64)


def row_stride(dim: int) -> int:
    """Floats from a row of activations to the next."""
    return _up(dim, 32)


def x8_bytes(dim: int) -> int:
    """Bytes of a quantised row of activations; ValueError where it is no whole number of blocks."""
    if dim % BLOCK:
        raise ValueError(f"{dim} values can't be quantised: they are no multiple of {BLOCK}")
    return _up(dim, CHUNK) // CHUNK * 352 + 32


def half_row_bytes(dim: int) -> int:
    """Bytes of a row of activations as halves: `halves.cuh`."""
    return 2 * _up(dim, 32) + 16


def most_warps(kind: QuantType, n_rows: int) -> int:
    """The largest WARPS of matmul.cu, 1 to 8, with ROWS = n_rows."""
    fits = (w for w in (2, 4, 8) if _left_bytes(kind, w, n_rows) <= _SHARED_BYTES)
    return max(fits, default=1)


def normed_bytes(kinds: Iterable[QuantType], dim: int, n_warps: int, n_rows: int) -> int:
    """Dynamic shared memory of norm_matmul.cu and norm_swiglu.cu for rows of x of `dim`."""
    left = max(_left_bytes(kind, n_warps, n_rows) for kind in kinds)
    return max(left, 4 * n_rows * row_stride(dim)) + n_rows * x8_bytes(dim)


def _left_bytes(kind: QuantType, n_warps: int, n_rows: int) -> int:
    """What warps leave for the one that adds up, twice: `Left` of matmul.cuh."""
    n_lows = PLANES[kind.name].n_lows
    n_values = (3 if n_lows == 2 else 2) * n_rows + (n_lows > 0)
    return 2 * 4 * n_values * n_warps * CHUNK


def mma_rows(n_tokens: int, n_warps: int) -> int:
    """Rows of a matrix that a block of threads of matmul_mma.cu takes."""
    return (16 if n_tokens <= 16 else 32) * n_warps


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
