"""Quantises floats to the blocks of GGUF's tensor types, those too that `gguf` only reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gguf
import numpy as np
from numpy.typing import NDArray

from edgeinfer.quant import E2M1_DOUBLED, IQ4_VALUES

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def quantize(values: Floats, kind: str) -> Bytes:
    """The blocks of `values` (rows, K) in a tensor type, as (rows, bytes per row)."""
    pack = _PACK.get(kind)
    if pack is None:
        packed = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        return np.ascontiguousarray(packed).view(np.uint8).reshape(len(values), -1)
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    parts = np.array_split(values.reshape(-1, block), 1 + (values.size >> 20))
    return np.concatenate([pack(part) for part in parts]).reshape(len(values), -1)


# The blocks' byte layouts are described in edgeinfer/dequantize.py.


def _pack_q2_k(x: Floats) -> Bytes:
    q, scale, low, d, dmin = _scale_and_min(x.reshape(-1, 16, 16), n_quants=3, n_scales=15)
    return np.concatenate([scale | low << 4, _pack_pairs(q), d, dmin], axis=1)


def _pack_q3_k(x: Floats) -> Bytes:
    q, scale, d = _scale_only(x.reshape(-1, 16, 16), half=4, half_scales=32)
    q, scale = (q + 4).astype(np.uint8), (scale + 32).astype(np.uint8)
    third = np.packbits((q >> 2).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    low = scale[:, :8] & 15 | (scale[:, 8:] & 15) << 4
    fields = (scale >> 4).reshape(-1, 4, 4)
    high = np.bitwise_or.reduce(fields << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=1)
    return np.concatenate([third, _pack_pairs(q & 3), low, high, d], axis=1)


def _pack_q4_k(x: Floats) -> Bytes:
    q, scale, low, d, dmin = _scale_and_min(x.reshape(-1, 8, 32), n_quants=15, n_scales=63)
    return np.concatenate([d, dmin, _pack_scales(scale, low), _pack_nibbles(q, 32)], axis=1)


def _pack_q5_k(x: Floats) -> Bytes:
    q, scale, low, d, dmin = _scale_and_min(x.reshape(-1, 8, 32), n_quants=31, n_scales=63)
    fifth = np.packbits((q >> 4).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    nibbles = _pack_nibbles(q & 15, 32)
    return np.concatenate([d, dmin, _pack_scales(scale, low), fifth, nibbles], axis=1)


def _pack_q6_k(x: Floats) -> Bytes:
    q, scale, d = _scale_only(x.reshape(-1, 16, 16), half=32, half_scales=128)
    q = (q + 32).astype(np.uint8)
    low, high = _pack_nibbles(q & 15, 64), _pack_pairs(q >> 4)
    return np.concatenate([low, high, scale.astype(np.int8).view(np.uint8), d], axis=1)


def _pack_iq4_nl(x: Floats) -> Bytes:
    d, d_bytes = _half(_largest(x) / -127)
    return np.concatenate([d_bytes, _pack_nibbles(_nearest(x, d, IQ4_VALUES), 16)], axis=1)


def _pack_iq4_xs(x: Floats) -> Bytes:
    sub_blocks = x.reshape(-1, 8, 32)
    step = _largest(sub_blocks)[:, :, 0] / -127
    d, d_bytes = _half(np.abs(step).max(axis=1, keepdims=True) / 31)
    scale = _ratio(step, d, 31, -32)
    nibbles = _nearest(sub_blocks, (d * scale)[:, :, None], IQ4_VALUES)
    fields = (scale + 32).astype(np.uint8)
    high = fields.reshape(-1, 2, 4) >> 4 << np.arange(0, 8, 2, dtype=np.uint8)
    low = fields[:, ::2] & 15 | (fields[:, 1::2] & 15) << 4
    return np.concatenate(
        [
            d_bytes,
            np.bitwise_or.reduce(high, axis=2),
            low,
            _pack_nibbles(nibbles.reshape(len(x), 256), 16),
        ],
        axis=1,
    )


def _pack_mxfp4(x: Floats) -> Bytes:
    largest = np.abs(_largest(x))
    # 6 is the largest element: the power of two that lets the largest weight be 4 to 8 of it.
    power = np.frexp(largest)[1] - 3
    exponent = np.where(largest > 0, np.clip(power + 127, 0, 254), 0).astype(np.uint8)
    d = np.ldexp(np.float32(1), exponent.astype(np.int32) - 128).astype(np.float32)
    return np.concatenate([exponent, _pack_nibbles(_nearest(x, d, E2M1_DOUBLED), 16)], axis=1)


_PACK: dict[str, Callable[[Floats], Bytes]] = {
    "Q2_K": _pack_q2_k,
    "Q3_K": _pack_q3_k,
    "Q4_K": _pack_q4_k,
    "Q5_K": _pack_q5_k,
    "Q6_K": _pack_q6_k,
    "IQ4_NL": _pack_iq4_nl,
    "IQ4_XS": _pack_iq4_xs,
    "MXFP4": _pack_mxfp4,
}


def _scale_and_min(
    x: Floats, n_quants: int, n_scales: int
) -> tuple[Bytes, Bytes, Bytes, Bytes, Bytes]:
    """q, scale, low, d, dmin with x about d * scale * q - dmin * low, per sub-block (axis 1)."""
    lowest = np.minimum(x.min(axis=2), 0)
    step = (x.max(axis=2) - lowest) / n_quants
    d, d_bytes = _half(step.max(axis=1, keepdims=True) / n_scales)
    dmin, dmin_bytes = _half(-lowest.min(axis=1, keepdims=True) / n_scales)
    scale, low = _ratio(step, d, n_scales), _ratio(-lowest, dmin, n_scales)
    shifted = x + (dmin * low)[:, :, None]
    q = _ratio(shifted, (d * scale)[:, :, None], n_quants)
    to_bytes = [array.astype(np.uint8) for array in (q.reshape(len(x), -1), scale, low)]
    return to_bytes[0], to_bytes[1], to_bytes[2], d_bytes, dmin_bytes


def _scale_only(x: Floats, half: int, half_scales: int) -> tuple[Floats, Floats, Bytes]:
    """q in [-half, half), scale in [-half_scales, half_scales) and d: x about d * scale * q."""
    step = np.abs(x).max(axis=2) / (half - 1)
    d, d_bytes = _half(step.max(axis=1, keepdims=True) / (half_scales - 1))
    scale = _ratio(step, d, half_scales - 1)
    q = _ratio(x, (d * scale)[:, :, None], half - 1, -half)
    return q.reshape(len(x), -1), scale, d_bytes


def _ratio(a: Floats, b: Floats, high: int, low: int = 0) -> Floats:
    """a / b rounded and clipped, 0 where b is 0."""
    rounded = np.rint(np.divide(a, b, out=np.zeros_like(a), where=b != 0))
    return np.clip(rounded, low, high)


def _largest(x: Floats) -> Floats:
    """The value farthest from 0 of every last axis, which stays as one of length 1."""
    at = np.abs(x).argmax(axis=-1, keepdims=True)
    return np.take_along_axis(x, at, axis=-1)


def _nearest(x: Floats, d: Floats, table: Sequence[int]) -> Bytes:
    """The place in a table of the value nearest to x / d; that of 0 or 1 where d is 0."""
    order = np.argsort(table, kind="stable")
    values = np.array(table, np.float32)[order]
    ratio = np.divide(x, d, out=np.zeros_like(x), where=d != 0)
    nearest = np.searchsorted((values[1:] + values[:-1]) / 2, ratio)
    places: Bytes = order.astype(np.uint8)[nearest]
    return places


def _half(values: Floats) -> tuple[Floats, Bytes]:
    """Values as float16 holds them, and the bytes."""
    halves = values.astype("<f2")
    return halves.astype(np.float32), halves.view(np.uint8)


def _pack_nibbles(q: Bytes, run: int) -> Bytes:
    runs = q.reshape(len(q), -1, 2, run)
    return (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(len(q), -1)


def _pack_pairs(q: Bytes) -> Bytes:
    runs = q.reshape(len(q), -1, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(runs, axis=2).reshape(len(q), -1)


def _pack_scales(scale: Bytes, low: Bytes) -> Bytes:
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = low[:, :4] | low[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4], axis=1)
