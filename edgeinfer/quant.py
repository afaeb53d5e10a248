"""The GGUF tensor types: their blocks and which ones run; and the weights that are of them.

Knows nothing of files, models or kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from edgeinfer.errors import UnsupportedModelError


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


class LazyBytes(Protocol):
    """Bytes in a file: a slice reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> memoryview: ...

    def read_into(self, buffer: memoryview, start: int) -> None: ...

    def forget(self, start: int, n_bytes: int) -> bool: ...


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A tensor of a model file: what it is called, its shape and its bytes.

    `shape` is in NumPy order, (rows N, columns K) for a matrix and (n,) for a vector. `data` is
    read from the file, while that is open, slice by slice; it is empty when the type isn't known.
    """

    name: str
    shape: tuple[int, ...]
    type: QuantType
    data: memoryview | LazyBytes

    @property
    def n_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)

    def rows(self, first: int, last: int) -> Weight:
        """Rows first <= i < last as a weight of its own, or those elements of a vector."""
        n_elements = math.prod(self.shape[1:])
        start, end = self._at(first * n_elements), self._at(last * n_elements)
        data = self.data
        part = data[start:end] if isinstance(data, memoryview) else _Part(data, start, end - start)
        name = f"{self.name}[{first}:{last}]"
        return Weight(name, (last - first, *self.shape[1:]), self.type, part)

    def parts(self, first: int, last: int) -> Weight:
        """Rows first <= i < last of each matrix of a stack, or those elements of each row."""
        n, size, *rest = self.shape
        n_elements = math.prod(rest)
        bounds = (
            [self._at((i * size + row) * n_elements) for row in (first, last)] for i in range(n)
        )
        pieces = [_Part(self.data, start, end - start) for start, end in bounds]
        name = f"{self.name}[:, {first}:{last}]"
        return Weight(name, (n, last - first, *rest), self.type, _Pieces(pieces))

    def matrix(self, i: int) -> Weight:
        """Matrix i of a stack."""
        one = self.rows(i, i + 1)
        return Weight(one.name, one.shape[1:], one.type, one.data)

    def _at(self, n_elements: int) -> int:
        """Bytes before element n; UnsupportedModelError where no block begins there."""
        check_runnable(self.name, self.type)
        if n_elements % self.type.block:
            raise UnsupportedModelError(
                f"{self.name} is {self.type.name} and would be cut inside a block of "
                f"{self.type.block}; choose a file that holds its parts apart, or another type",
                missing=[self.type.name],
            )
        return self.type.row_bytes(n_elements)

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fill a buffer with the bytes from `start` on."""
        _Part(self.data, 0, len(self.data)).read_into(buffer, start)

    def forget(self, start: int, n_bytes: int) -> bool:
        """Have the system keep these bytes of the file in memory no longer; False where it can't.

        For who has copied them where a GPU shares the processors' memory: there the file would be
        held twice. The next start reads them from the disk.
        """
        return _Part(self.data, 0, len(self.data)).forget(start, n_bytes)


class _Part:
    """Some of the bytes in a file."""

    def __init__(self, whole: memoryview | LazyBytes, start: int, n_bytes: int) -> None:
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

    def forget(self, start: int, n_bytes: int) -> bool:
        if isinstance(self._whole, memoryview):
            return False
        return self._whole.forget(self._start + start, n_bytes)


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

    def forget(self, start: int, n_bytes: int) -> bool:
        has_forgotten, end = n_bytes > 0, start + n_bytes
        while start < end:
            i, at = divmod(start, self._size)
            n = min(self._size - at, end - start)
            has_forgotten &= self._pieces[i].forget(at, n)
            start += n
        return has_forgotten


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
