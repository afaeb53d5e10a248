"""K and V in a cache of 8 or 4 bits, and what is computed with them, as every kernel does it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.graph import KVType
from edgeinfer.kernels.reference.blocks import quantise
from edgeinfer.kernels.reference.functions import fma, pad
from edgeinfer.kernels.reference.numerics import Floats, f32
from edgeinfer.ops import HADAMARD, KV_BLOCK

# A block of a head: a value is d * q. Codes of q4_0 take 4 bits elsewhere.
BLOCK = np.dtype([("d", np.float16), ("q", np.int8, KV_BLOCK)])


def hadamard(x: Floats) -> Floats:
    """Each 64 values of x times the Hadamard matrix of Sylvester, divided by 8: its own inverse.

    For step = 1, 2, 4, ... 32, of all i without that bit: x[i], x[i + step] = x[i] + x[i + step],
    x[i] - x[i + step]. Then x * 0.125.
    """
    parts = x.reshape(-1, HADAMARD)
    for bit in range(6):
        pairs = parts.reshape(-1, 2, 2**bit)
        a, b = pairs[:, 0], pairs[:, 1]
        parts = np.stack([a + b, a - b], axis=1).reshape(-1, HADAMARD)
    out: Floats = parts * np.float32(0.125)
    return out.reshape(x.shape)


def to_blocks(x: Floats, kind: KVType) -> NDArray[Any]:
    """Rows of heads (T, heads, dim) as blocks (T, heads, dim / 32), the last filled up with zeros.

    q8_0: d = m / 127, m = max|x|; q from -127 to 127.
    q4_0: d = m * -0.125, m = max x where that is above -min x, else min x; q from -8 to 7.
    d is rounded to float16, q = roundeven(x * (1 / d)), moved to the nearest end where it is
    beyond; all q are 0 where d is.
    """
    n_rows, n_heads, dim = x.shape
    blocks = pad(x.reshape(-1, dim), KV_BLOCK).reshape(n_rows, n_heads, -1, KV_BLOCK)
    high, low = blocks.max(axis=-1), blocks.min(axis=-1)
    out = np.empty(blocks.shape[:-1], BLOCK)
    if kind == "q8_0":
        least, most = -127, 127
        out["d"] = np.maximum(high, -low) / np.float32(127)
    else:
        least, most = -8, 7
        out["d"] = np.where(high > -low, high, low) * np.float32(-0.125)
    d = out["d"].astype(np.float32)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    out["q"] = np.rint(blocks * inverse[..., None]).clip(least, most)
    return out


def scores_of_blocks(q: Floats, k: NDArray[Any]) -> Floats:
    """q K^T (P, H, 32) of q (P, H, dim) and blocks k (P, H, 32, dim / 32), not yet scaled.

    q is quantised as activations are, and blocks add up as those of a matmul:
    acc = fma(dq * d, float(dot), acc), ascending from +0.
    """
    n_pages, n_heads, _, n_blocks = k.shape
    flat = np.pad(q, ((0, 0), (0, 0), (0, -q.shape[2] % KV_BLOCK))).reshape(n_pages * n_heads, -1)
    codes, dq = quantise(flat)
    codes = codes.reshape(n_pages, n_heads, n_blocks, KV_BLOCK)
    dq, d = dq.reshape(n_pages, n_heads, n_blocks), k["d"].astype(np.float32)
    acc = np.zeros(k.shape[:3], np.float32)
    for b in range(n_blocks):
        dots = f32(np.einsum("phd,phsd->phs", codes[:, :, b], k["q"][:, :, :, b], dtype=np.float64))
        acc = fma(dq[:, :, None, b] * d[..., b], dots, acc)
    return acc


def add_block_values(p: Floats, v: NDArray[Any], o: Floats) -> Floats:
    """o (P, H, dim) plus p (P, H) times blocks v (P, H, dim / 32) of one position.

    o = fma(p * d, float(q), o).
    """
    codes = v["q"].reshape(*p.shape, -1)[..., : o.shape[2]].astype(np.float32)
    weights = p[..., None] * v["d"].astype(np.float32)
    return fma(np.repeat(weights, KV_BLOCK, axis=2)[..., : o.shape[2]], codes, o)
