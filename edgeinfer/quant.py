"""The GGUF tensor types: their blocks, which ones run, and their float32 values in NumPy.

Knows nothing of files, models or kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from edgeinfer.errors import UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Buffer: TypeAlias = bytes | bytearray | memoryview | NDArray[np.uint8]
    Bytes: TypeAlias = NDArray[np.integer[Any]]  # uint8; NumPy's stubs lose that in shifts
    Floats: TypeAlias = NDArray[np.float32]


class QuantType(NamedTuple):
    """A tensor type: `block` consecutive elements of a row are stored in `block_bytes` bytes.

    A type that this version has no row for has `block` 0.
    """

    name: str
    ggml_id: int
    block: int
    block_bytes: int

    def row_bytes(self, n_elements: int) -> int:
        """Bytes of a row of `n_elements`, which must be a whole number of blocks."""
        if not self.is_known or n_elements % self.block:
            raise ValueError(f"{n_elements} elements are not whole {self.name} blocks")
        return n_elements // self.block * self.block_bytes

    @property
    def is_known(self) -> bool:
        """Whether the size of a tensor of this type can be computed."""
        return self.block > 0

    @property
    def is_runnable(self) -> bool:
        """Whether kernels and `dequantize` exist for this type."""
        return self in RUNNABLE

    @property
    def bits_per_weight(self) -> float:
        """Bits per element, scales included."""
        return 8 * self.block_bytes / self.block if self.block else 0.0


F32 = QuantType("F32", 0, 1, 4)
F16 = QuantType("F16", 1, 1, 2)
Q4_0 = QuantType("Q4_0", 2, 32, 18)
Q4_1 = QuantType("Q4_1", 3, 32, 20)
Q5_0 = QuantType("Q5_0", 6, 32, 22)
Q5_1 = QuantType("Q5_1", 7, 32, 24)
Q8_0 = QuantType("Q8_0", 8, 32, 34)
Q2_K = QuantType("Q2_K", 10, 256, 84)
Q3_K = QuantType("Q3_K", 11, 256, 110)
Q4_K = QuantType("Q4_K", 12, 256, 144)
Q5_K = QuantType("Q5_K", 13, 256, 176)
Q6_K = QuantType("Q6_K", 14, 256, 210)
IQ4_NL = QuantType("IQ4_NL", 20, 32, 18)
IQ4_XS = QuantType("IQ4_XS", 23, 256, 136)
BF16 = QuantType("BF16", 30, 1, 2)
MXFP4 = QuantType("MXFP4", 39, 32, 17)

RUNNABLE = (
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
    MXFP4,
)  # fmt: skip

# What a nibble stands for, times the scale of its block.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

QUANT_TYPES = {
    t.ggml_id: t
    for t in (
        *RUNNABLE,
        QuantType("Q8_1", 9, 32, 36),
        QuantType("Q8_K", 15, 256, 292),
        QuantType("IQ2_XXS", 16, 256, 66),
        QuantType("IQ2_XS", 17, 256, 74),
        QuantType("IQ3_XXS", 18, 256, 98),
        QuantType("IQ1_S", 19, 256, 50),
        QuantType("IQ3_S", 21, 256, 110),
        QuantType("IQ2_S", 22, 256, 82),
        QuantType("I8", 24, 1, 1),
        QuantType("I16", 25, 1, 2),
        QuantType("I32", 26, 1, 4),
        QuantType("I64", 27, 1, 8),
        QuantType("F64", 28, 1, 8),
        QuantType("IQ1_M", 29, 256, 56),
        QuantType("TQ1_0", 34, 256, 54),
        QuantType("TQ2_0", 35, 256, 66),
        QuantType("NVFP4", 40, 64, 36),
        QuantType("Q1_0", 41, 128, 18),
        QuantType("Q2_0", 42, 64, 18),
    )
}


class FileBytes(Protocol):
    """Bytes in a file: a slice reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> memoryview: ...

    def read_into(self, buffer: memoryview, start: int) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A tensor of a model file: what it is called, its shape and its bytes.

    `shape` is in NumPy order, (rows N, columns K) for a matrix and (n,) for a vector. `data` is
    read from the file, while that is open, slice by slice; it is empty when the type isn't known.
    """

    name: str
    shape: tuple[int, ...]
    type: QuantType
    data: memoryview | FileBytes

    @property
    def n_elements(self) -> int:
        """The product of the shape."""
        return _product(self.shape)

    def rows(self, first: int, last: int) -> Weight:
        """Rows first <= i < last as a weight of its own, or those elements of a vector."""
        row_bytes = self.type.row_bytes(_product(self.shape[1:])) if self.shape[1:] else 0
        start, end = (n * row_bytes or self.type.row_bytes(n) for n in (first, last))
        data = self.data
        part = data[start:end] if isinstance(data, memoryview) else _Part(data, start, end - start)
        name = f"{self.name}[{first}:{last}]"
        return Weight(name, (last - first, *self.shape[1:]), self.type, part)

    def parts(self, first: int, last: int) -> Weight:
        """Rows first <= i < last of each matrix of a stack, or those elements of each row."""
        check_runnable(self.name, self.type)
        n, size, *rest = self.shape
        unit = self.type.row_bytes(_product(tuple(rest)))
        starts = (i * size * unit + first * unit for i in range(n))
        pieces = [_Part(self.data, start, (last - first) * unit) for start in starts]
        name = f"{self.name}[:, {first}:{last}]"
        return Weight(name, (n, last - first, *rest), self.type, _Pieces(pieces))

    def matrix(self, i: int) -> Weight:
        """Matrix i of a stack."""
        one = self.rows(i, i + 1)
        return Weight(one.name, one.shape[1:], one.type, one.data)

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fill a buffer with the bytes from `start` on."""
        _Part(self.data, 0, len(self.data)).read_into(buffer, start)


class _Part:
    """Some of the bytes in a file."""

    def __init__(self, whole: memoryview | FileBytes, start: int, n_bytes: int) -> None:
        self._whole, self._start, self._n_bytes = whole, start, n_bytes

    def __len__(self) -> int:
        return self._n_bytes

    def __getitem__(self, part: slice, /) -> memoryview:
        begin, end, _ = part.indices(self._n_bytes)
        return self._whole[self._start + begin : self._start + end]

    def read_into(self, buffer: memoryview, start: int) -> None:
        first = self._start + start
        if isinstance(self._whole, memoryview):
            buffer[:] = self._whole[first : first + len(buffer)]
        else:
            self._whole.read_into(buffer, first)


class _Pieces:
    """Parts of a file of equal size, as if they followed each other."""

    def __init__(self, pieces: list[_Part]) -> None:
        self._pieces, self._size = pieces, len(pieces[0])

    def __len__(self) -> int:
        return len(self._pieces) * self._size

    def __getitem__(self, part: slice, /) -> memoryview:
        begin, end, _ = part.indices(len(self))
        buffer = memoryview(bytearray(max(0, end - begin)))
        self.read_into(buffer, begin)
        return buffer

    def read_into(self, buffer: memoryview, start: int) -> None:
        done = 0
        while done < len(buffer):
            i, at = divmod(start + done, self._size)
            n = min(self._size - at, len(buffer) - done)
            self._pieces[i].read_into(buffer[done : done + n], at)
            done += n


def quant_type(ggml_id: int) -> QuantType:
    """The type with this GGML id; one with `is_known` False when there is no row for it."""
    return QUANT_TYPES.get(ggml_id) or QuantType(f"type {ggml_id}", ggml_id, 0, 0)


def check_runnable(name: str, type: QuantType) -> None:
    """Raise UnsupportedModelError unless tensor `name` is of a type that runs."""
    if not type.is_runnable:
        raise UnsupportedModelError(
            f"{name} is {type.name}; edgeinfer runs {', '.join(t.name for t in RUNNABLE)}. "
            "Choose a file of one of these types, for example Q4_K_M.",
            missing=[type.name],
        )


def dequantize(
    source: Weight | Buffer,
    type: QuantType | None = None,
    shape: tuple[int, ...] | None = None,
) -> Floats:
    """The values of a weight, or of raw bytes of a `type` and `shape`, as a new float32 array."""
    import numpy as np

    if isinstance(source, Weight):
        name, type, shape, data = source.name, source.type, source.shape, source.data[:]
    else:
        assert type is not None and shape is not None, "raw bytes need a type and a shape"
        view = source.data if isinstance(source, np.ndarray) else memoryview(source)
        name, data = "the tensor", view.cast("B")
    check_runnable(name, type)
    n_elements = _product(shape)
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
    import numpy as np

    return b.view("<f4").astype(np.float32)


def _f16(b: Bytes) -> Floats:
    """2 bytes: one little-endian float16."""
    import numpy as np

    return b.view("<f2").astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    """2 bytes: the upper half of a float32."""
    import numpy as np

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
    import numpy as np

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
    import numpy as np

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
    import numpy as np

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
    import numpy as np

    high = b[:, 2:4][:, :, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    low = b[:, 4:8][:, :, None] >> np.array([0, 4], np.uint8) & 15
    scale = _f16(b[:, 0:2]) * _signed(low.reshape(-1, 8) | high.reshape(-1, 8) << 4, 32)
    values = _looked_up(IQ4_VALUES, _nibbles(b[:, 8:136], 16))
    return (scale[:, :, None] * values.reshape(-1, 8, 32)).reshape(-1, 256)


def _mxfp4(b: Bytes) -> Floats:
    """Exponent e | 16 bytes of nibbles as in Q4_0. 2^(e - 128) * E2M1_DOUBLED[q]."""
    import numpy as np

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
    import numpy as np

    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale: Bytes = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    low: Bytes = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)
    d, dmin = _f16(b[:, 0:2]) * scale, _f16(b[:, 2:4]) * low
    return (d[:, :, None] * q.reshape(-1, 8, 32) - dmin[:, :, None]).reshape(-1, 256)


def _nibbles(b: Bytes, run: int) -> Bytes:
    """Of each `run` bytes, the low nibbles and then the high nibbles."""
    import numpy as np

    runs = b.reshape(len(b), -1, 1, run)
    return (runs >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(len(b), -1)


def _pairs(b: Bytes) -> Bytes:
    """2-bit fields: of each 32 bytes, their bits 0-1, then bits 2-3, 4-5 and 6-7."""
    import numpy as np

    runs = b.reshape(len(b), -1, 1, 32)
    return (runs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(len(b), -1)


def _bit_planes(b: Bytes) -> Bytes:
    """Bit 0 of all 32 bytes, then bit 1 of all, up to bit 7."""
    import numpy as np

    return (b[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(b), -1)


def _bits(b: Bytes) -> Bytes:
    """The bits of each row, lowest first."""
    import numpy as np

    return (b[:, :, None] >> np.arange(8, dtype=np.uint8) & 1).reshape(len(b), -1)


def _signed(q: Bytes, zero: int) -> NDArray[np.int8]:
    """q - zero."""
    import numpy as np

    signed: NDArray[np.int8] = q.view(np.int8) - np.int8(zero)
    return signed


def _looked_up(table: tuple[int, ...], q: Bytes) -> NDArray[np.int8]:
    """table[q]."""
    import numpy as np

    return np.array(table, np.int8)[q]


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for dim in shape:
        n *= dim
    return n
