"""Quantised matrices in blocks of 32 columns and their products, as every kernel computes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeinfer.dequantize import dequantize
from edgeinfer.kernels.reference.functions import fma
from edgeinfer.kernels.reference.numerics import Doubles, Floats, f32
from edgeinfer.quant import Weight


@dataclass(frozen=True, slots=True)
class Blocks:
    """A quantised matrix in blocks of 32 columns, whatever the blocks of its type.

    A weight is scale * code + low. `codes` are integers: quants less their zero point, times the
    sub-block scale where sub-blocks have 16 columns (Q2_K, Q3_K, Q6_K), or what the table of
    IQ4_NL, IQ4_XS and MXFP4 (doubled) holds. `scale` is d, d * float(sub-block scale) for Q4_K,
    Q5_K and IQ4_XS, 2^(e - 128) for MXFP4. `low` is m of Q4_1 and Q5_1 and
    -(dmin * float(min)) of Q4_K and Q5_K; Q2_K has -dmin there, and its mins in `mins`.
    """

    codes: NDArray[np.int16]  # (K / 32, N, 32)
    scale: Floats  # (K / 32, N)
    low: Floats | None = None  # (K / 32, N)
    mins: NDArray[np.int16] | None = None  # (K / 32, N, 2)


_BLOCK, _SUB_BLOCK = 32, 16
# Byte offsets in a block of d and of m or dmin, both float16.
_SCALES: dict[str, tuple[int, int | None]] = {
    "Q4_0": (0, None),
    "Q4_1": (0, 2),
    "Q5_0": (0, None),
    "Q5_1": (0, 2),
    "Q8_0": (0, None),
    "Q2_K": (80, 82),
    "Q3_K": (108, None),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, None),
}
# What stands before the nibbles when every scale is 1, and a nibble that stands for 1.
_TABLES: dict[str, tuple[bytes, int]] = {
    "IQ4_NL": (b"\x00\x3c", 8),
    "IQ4_XS": (b"\x00\x3c\xaa\xaa\x11\x11\x11\x11", 8),
    "MXFP4": (b"\x80", 1),
}


def load_blocks(weight: Weight) -> Blocks:
    """Take a matrix apart by dequantising it with (d, m) = (1, 0) and (0, 1)."""
    n_rows, dim = weight.shape
    kind = weight.type
    blocks = np.frombuffer(weight.data[:], np.uint8).reshape(n_rows, -1, kind.block_bytes)
    if kind.name in _TABLES:
        return _load_table_blocks(weight, blocks)
    at_d, at_m = _SCALES[kind.name]

    def halves(at: int) -> Floats:
        values = np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0]
        return np.repeat(values.T.astype(np.float32), kind.block // _BLOCK, axis=0)

    def integers(d: float, m: float) -> NDArray[np.int16]:
        copy = blocks.copy()
        copy[:, :, at_d : at_d + 2] = np.array([d], "<f2").view(np.uint8)
        if at_m is not None:
            copy[:, :, at_m : at_m + 2] = np.array([m], "<f2").view(np.uint8)
        values = dequantize(copy, kind, weight.shape).astype(np.int16)
        return np.ascontiguousarray(values.reshape(n_rows, -1, _BLOCK).transpose(1, 0, 2))

    codes, d = integers(1, 0), halves(at_d)
    if at_m is None:
        return Blocks(codes, d)
    lows, m = integers(0, 1)[:, :, ::_SUB_BLOCK], halves(at_m)
    if kind.block == _BLOCK:
        return Blocks(codes, d, m)
    if kind.name == "Q2_K":
        return Blocks(codes, d, -m, -lows)
    # A block of ones has the sub-blocks' scales as its integers.
    at_quants = {"Q4_K": 16, "Q5_K": 48}[kind.name]
    blocks = blocks.copy()
    blocks[:, :, 16:at_quants], blocks[:, :, at_quants:] = 0, 0x11
    scales = integers(1, 0)[:, :, :1]
    codes //= np.maximum(scales, 1)
    return Blocks(codes, d * scales[:, :, 0], m * lows[:, :, 0])


def _load_table_blocks(weight: Weight, blocks: NDArray[np.uint8]) -> Blocks:
    """Likewise, with scales of 1 and with nibbles that stand for 1."""
    unit_scales, one = _TABLES[weight.type.name]
    at_quants = len(unit_scales)

    def values(before: NDArray[np.uint8], quants: NDArray[np.uint8] | np.uint8) -> Floats:
        copy = blocks.copy()
        copy[:, :, :at_quants], copy[:, :, at_quants:] = before, quants
        rows = dequantize(copy, weight.type, weight.shape)
        return np.ascontiguousarray(rows.reshape(len(rows), -1, _BLOCK).transpose(1, 0, 2))

    codes = values(np.frombuffer(unit_scales, np.uint8), blocks[:, :, at_quants:])
    scale = values(blocks[:, :, :at_quants], np.uint8(0x11 * one))
    return Blocks(codes.astype(np.int16), scale[:, :, 0])


def matmul_blocks(x: Floats, weight: Blocks) -> Floats:
    """Blocks of 32 ascending, acc from +0, dot = float(dot(codes, q)), s = dx * float(sum of q).

    acc = fma(scale * dx, dot, acc), and where there is a low acc = fma(low, s, acc).

    Q2_K has lows for 16 columns: acc = fma(low * dx, float(dot(mins, sums of 16 q)), acc).

    Dots are exact integers (below 2^25) and round once on their way to float32.
    """
    n_blocks, n_rows, _ = weight.codes.shape
    q, dx = quantise(x)
    sums = q.reshape(len(x), n_blocks, -1, _SUB_BLOCK).sum(axis=3)
    s = dx * f32(sums.sum(axis=2))
    acc = np.zeros((len(x), n_rows), np.float32)
    for b in range(n_blocks):
        scale, d = weight.scale[b], dx[:, b, None]
        # Integers below 2^53 are exact in float64 whatever order BLAS adds them in.
        dots = f32(q[:, b] @ weight.codes[b].T.astype(np.float64))
        acc = fma(d * scale, dots, acc)
        if weight.low is None:
            continue
        if weight.mins is None:
            acc = fma(weight.low[b], s[:, b, None], acc)
        else:
            min_dots = f32(sums[:, b] @ weight.mins[b].T.astype(np.float64))
            acc = fma(weight.low[b] * d, min_dots, acc)
    return acc


def quantise(x: Floats) -> tuple[Doubles, Floats]:
    """Blocks of 32 values of x as integers q in -127 .. 127 and a scale d, x about d * q.

    m = max|x|; d = m / 127; q = roundeven(x * (127 / m)); all zero where m < 1e-36, since 127 / m
    would overflow.
    """
    blocks = x.reshape(len(x), -1, _BLOCK)
    m = np.abs(blocks).max(axis=2)
    m = np.where(m < np.float32(1e-36), np.float32(0), m)
    inverse = np.divide(np.float32(127), m, out=np.zeros_like(m), where=m > 0)
    return np.rint(blocks * inverse[:, :, None]).astype(np.float64), m / np.float32(127)
