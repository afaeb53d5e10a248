"""The float32 values of every tensor type that runs, from its blocks, in NumPy.

Each function says how its blocks lie in a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeinfer.quant import E2M1_DOUBLED, IQ4_VALUES, QuantType, Weight, check_runnable

Buffer: TypeAlias = "bytes | bytearray | memoryview | NDArray[np.uint8]"
Bytes: TypeAlias = NDArray[np.integer[Any]]  # uint8; NumPy's stubs lose that in shifts
Floats: TypeAlias = NDArray[np.float32]


def dequantize(
    source: Weight | Buffer,
    type: QuantType | None = None,
    shape: tuple[int, ...] | None = None,
) -> Floats:
    """The values of a weight, or of raw bytes of a `type` and `shape`, as a new float32 array."""
    if isinstance(source, Weight):
        name, type, shape, data = source.name, source.type, source.shape, source.data[:]
    else:
        assert type is not None and shape is not None, "raw bytes need a type and a shape"
        view = source.data if isinstance(source, np.ndarray) else memoryview(source)
        name, data = "the tensor", view.cast("B")
    check_runnable(name, type)
    n_elements = math.prod(shape)
    if n_elements % type.block or len(data) != type.row_bytes(n_elements):
        raise ValueError(f"{name}: {len(data)} bytes are not {shape} elements of {type.name}")
    blocks = np.frombuffer(data, np.uint8).reshape(-1, type.block_bytes)
    out = np.empty((len(blocks), type.block), np.float32)
    unpack = _UNPACK[type.name]
    step = max(1, _CHUNK // type.block)
    # Scales of a damaged file may be NaN or infinite: a value, not a warning.
    with np.errstate(all="ignore"):
        for at in range(0, len(blocks), step):
            out[at : at + step] = unpack(blocks[at : at + step])
    return out.reshape(shape)


# Elements per pass: bounds the temporaries to a few MiB whatever the tensor's size.
_CHUNK = 1 << 18


def _f32(b: Bytes) -> Floats:
    """4 bytes: one little-endian float32."""
    return b.view("<f4").astype(np.float32)


def _f16(b: Bytes) -> Floats:
    """2 bytes: one little-endian float16."""
    return b.view("<f2").astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    """2 bytes: the upper half of a float32."""
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(b: Bytes) -> Floats:
    """d f16 | 16 bytes: low nibbles are elements 0..15, high nibbles 16..31. d * (q - 8)."""
    return _f16(b[:, 0:2]) * _signed(_nibbles(b[:, 2:18], 16), 8)


def _q4_1(b: Bytes) -> Floats:
    """d f16 | m f16 | 16 bytes of nibbles as in Q4_0. d * q + m."""
    return _f16(b[:, 0:2]) * _nibbles(b[:, 4:20], 16) + _f16(b[:, 2:4])


def _q5_0(b: Bytes) -> Floats:
    """d f16 | 32 bits, element i's fifth bit at i | 16 bytes of nibbles. d * (q - 16)."""
    q = _nibbles(b[:, 6:22], 16) | _bits(b[:, 2:6]) << 4
    return _f16(b[:, 0:2]) * _signed(q, 16)


def _q5_1(b: Bytes) -> Floats:
    """d f16 | m f16 | 32 fifth bits | 16 bytes of nibbles. d * q + m."""
    q = _nibbles(b[:, 8:24], 16) | _bits(b[:, 4:8]) << 4
    return _f16(b[:, 0:2]) * q + _f16(b[:, 2:4])


def _q8_0(b: Bytes) -> Floats:
    """d f16 | 32 int8. d * q."""
    return _f16(b[:, 0:2]) * b[:, 2:34].view(np.int8)


def _q2_k(b: Bytes) -> Floats:
    """16 scale bytes (low nibble scale, high nibble min) | 64 bytes of 2 bits | d f16 | dmin f16.

    Sub-block s of 16 elements: d * scale[s] * q - dmin * min[s]. The quants lie as in `_pairs`.
    """
    q = _pairs(b[:, 16:80]).reshape(-1, 16, 16)
    scale: Floats = _f16(b[:, 80:82]) * (b[:, 0:16] & 15)
    low: Floats = _f16(b[:, 82:84]) * (b[:, 0:16] >> 4)
    return (scale[:, :, None] * q - low[:, :, None]).reshape(-1, 256)


def _q3_k(b: Bytes) -> Floats:
    """32 bytes of third bits | 64 bytes of low 2 bits | 12 bytes of 6-bit scales | d f16.

    Sub-block s of 16 elements: d * (scale[s] - 32) * (q - 4). Third bit of element 32 * k + l is
    bit k of byte l. Scale s: low 4 bits in nibble s // 8 of byte s % 8, high 2 bits in bits
    2 * (s // 4) of byte 8 + s % 4.
    """
    q = _pairs(b[:, 32:96]) | _bit_planes(b[:, 0:32]) << 2
    low = _nibbles(b[:, 96:104], 8)
    high = b[:, 104:108][:, None, :] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scale = _f16(b[:, 108:110]) * _signed(low | high.reshape(-1, 16) << 4, 32)
    return (scale[:, :, None] * _signed(q, 4).reshape(-1, 16, 16)).reshape(-1, 256)


def _q4_k(b: Bytes) -> Floats:
    """d f16 | dmin f16 | 12 bytes of 6-bit scales and mins | 128 bytes of nibbles.

    Sub-block s of 32 elements: d * scale[s] * q - dmin * min[s]. The low nibbles of 32 bytes are
    one sub-block, the high nibbles the next.
    """
    return _scale_min_32(b, _nibbles(b[:, 16:144], 32))


def _q5_k(b: Bytes) -> Floats:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit s of byte l for s[l]."""
    return _scale_min_32(b, _nibbles(b[:, 48:176], 32) | _bit_planes(b[:, 16:48]) << 4)


def _q6_k(b: Bytes) -> Floats:
    """128 bytes of low 4 bits | 64 bytes of high 2 bits | 16 int8 scales | d f16.

    Sub-block s of 16 elements: d * scale[s] * (q - 32). The low nibbles of 64 bytes are 64
    elements, their high nibbles the next 64; the high bits lie as in `_pairs`.
    """
    q = _signed(_nibbles(b[:, 0:128], 64) | _pairs(b[:, 128:192]) << 4, 32)
    scale = _f16(b[:, 208:210]) * b[:, 192:208].view(np.int8)
    return (scale[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


def _iq4_nl(b: Bytes) -> Floats:
    """d f16 | 16 bytes of nibbles as in Q4_0. d * IQ4_VALUES[q]."""
    return _f16(b[:, 0:2]) * _looked_up(IQ4_VALUES, _nibbles(b[:, 2:18], 16))


def _iq4_xs(b: Bytes) -> Floats:
    """d f16 | u16: high 2 bits of scales | 4 bytes: their low 4 bits | 128 bytes of nibbles.

    Sub-block s of 32 elements: d * (scale[s] - 32) * IQ4_VALUES[q]. Each 16 bytes of nibbles are a
    sub-block as in Q4_0.
    """
    high = b[:, 2:4][:, :, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    low = b[:, 4:8][:, :, None] >> np.array([0, 4], np.uint8) & 15
    scale = _f16(b[:, 0:2]) * _signed(low.reshape(-1, 8) | high.reshape(-1, 8) << 4, 32)
    values = _looked_up(IQ4_VALUES, _nibbles(b[:, 8:136], 16))
    return (scale[:, :, None] * values.reshape(-1, 8, 32)).reshape(-1, 256)


def _mxfp4(b: Bytes) -> Floats:
    """Exponent e | 16 bytes of nibbles as in Q4_0. 2^(e - 128) * E2M1_DOUBLED[q]."""
    e = b[:, 0:1].astype(np.int32)
    # Where 2^(e - 128) is denormal, for e below 2, the second is larger.
    scale: Floats = np.maximum((e - 1) << 23, (e + 1) << 21).view(np.float32)
    return scale * _looked_up(E2M1_DOUBLED, _nibbles(b[:, 1:17], 16))


_UNPACK: dict[str, Callable[[Bytes], Floats]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}


def _scale_min_32(b: Bytes, q: Bytes) -> Floats:
    """d * scale[s] * q - dmin * min[s] for the eight sub-blocks of a Q4_K or Q5_K block.

    Of the 12 bytes at 4, the low 6 bits of bytes 0..3 are scales 0..3 and those of 4..7 mins
    0..3. Byte 8 + i holds the low 4 bits of scale 4 + i and, above them, of min 4 + i; their
    high 2 bits are the top bits of bytes i and 4 + i.
    """
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale: Bytes = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    low: Bytes = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)
    d, dmin = _f16(b[:, 0:2]) * scale, _f16(b[:, 2:4]) * low
    return (d[:, :, None] * q.reshape(-1, 8, 32) - dmin[:, :, None]).reshape(-1, 256)


def _nibbles(b: Bytes, run: int) -> Bytes:
    """Of each `run` bytes, the low nibbles and then the high nibbles."""
    runs = b.reshape(len(b), -1, 1, run)
    return (runs >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(len(b), -1)


def _pairs(b: Bytes) -> Bytes:
    """2-bit fields: of each 32 bytes, their bits 0-1, then bits 2-3, 4-5 and 6-7."""
    runs = b.reshape(len(b), -1, 1, 32)
    return (runs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(b), -1)


def _bit_planes(b: Bytes) -> Bytes:
    """Bit 0 of all 32 bytes, then bit 1 of all, up to bit 7."""
    return (b[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(b), -1)


def _bits(b: Bytes) -> Bytes:
    """The bits of each row, lowest first."""
    return (b[:, :, None] >> np.arange(8, dtype=np.uint8) & 1).reshape(len(b), -1)


def _signed(q: Bytes, zero: int) -> NDArray[np.int8]:
    """q - zero."""
    signed: NDArray[np.int8] = q.view(np.int8) - np.int8(zero)
    return signed


def _looked_up(table: tuple[int, ...], q: Bytes) -> NDArray[np.int8]:
    """table[q]."""
    return np.array(table, np.int8)[q]
