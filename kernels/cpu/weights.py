"""The packed weights of one program: one arena, filled piece by piece by the thread team.

Knows no graph. The packed copy replaces the file's: source pages are released as they are packed,
so the peak is the packed model and one portion of the file, below 16 MiB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeinfer import platform
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.formats import FORMATS, GROUP_ROWS, packed_bytes
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.team import Op, Part, Team
from edgeinfer.quant import Weight, dequantize

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PORTION = 8 << 20  # source bytes after which pages are released, and the most of one piece
_PACK_CHUNK = 256 << 10  # packed bytes of one chunk
_ALIGN = 64


class PackedWeights:
    """Matrices in groups of 8 rows, vectors as floats; addresses are known before the bytes are."""

    def __init__(self, matrices: Iterable[Weight], vectors: Iterable[Weight]) -> None:
        self._matrices = {w.name: w for w in matrices}
        self._vectors = {w.name: w for w in vectors}
        self._offsets: dict[str, int] = {}
        self._doubles: list[np.ndarray] = []
        self.bytes_by_type: dict[str, int] = {}
        size = 0
        for weight in self._matrices.values():
            n_bytes = packed_bytes(weight.type.name.lower(), *weight.shape)
            size = self._place("m:" + weight.name, weight.type.name, size, n_bytes)
        for weight in self._vectors.values():
            n_bytes = 4 * layout.whole_vectors(weight.shape[0])
            size = self._place("v:" + weight.name, "F32", size, n_bytes)
        self.n_bytes = size
        self._memory = platform.Memory(size, huge=True)

    def _place(self, key: str, type_name: str, offset: int, n_bytes: int) -> int:
        self._offsets[key] = offset
        self.bytes_by_type[type_name] = self.bytes_by_type.get(type_name, 0) + n_bytes
        return offset + -(-n_bytes // _ALIGN) * _ALIGN

    @property
    def matrix_types(self) -> set[str]:
        """Names of the tensor types among the matrices."""
        return {w.type.name for w in self._matrices.values()}

    @property
    def address(self) -> int:
        return self._memory.address

    def matrix(self, weight: Weight) -> int:
        """Address of a packed matrix."""
        return self._memory.address + self._offsets["m:" + weight.name]

    def vector(self, weight: Weight) -> int:
        """Address of a vector of floats, padded with zeros to 8."""
        return self._memory.address + self._offsets["v:" + weight.name]

    def doubles(self, values: np.ndarray) -> int:
        """Address of a table of float64 that lives as long as the weights."""
        table = np.ascontiguousarray(values, np.float64)
        self._doubles.append(table)
        return table.ctypes.data

    def pack(
        self,
        team: Team,
        library: Library,
        n_threads: int,
        release: Callable[[memoryview], None],
        progress: Callable[[int, int], None],
    ) -> None:
        """Fill the arena; `progress(done, total)` counts source bytes, `release` gets read ones."""
        for weight in self._vectors.values():
            values = np.ascontiguousarray(dequantize(weight), np.float32)
            ctypes.memmove(self.vector(weight), values.ctypes.data, values.nbytes)
        total = sum(len(w.data) for w in self._matrices.values())
        done, portion, n_bytes = 0, list[_Piece](), 0
        progress(0, total)
        for piece in (piece for w in self._matrices.values() for piece in _pieces(w)):
            portion.append(piece)
            n_bytes += len(piece.data)
            if n_bytes >= _PORTION:
                self._pack(portion, team, library, n_threads, release)
                done, portion, n_bytes = done + n_bytes, [], 0
                progress(done, total)
        self._pack(portion, team, library, n_threads, release)
        progress(total, total)

    def _pack(
        self,
        pieces: list[_Piece],
        team: Team,
        library: Library,
        n_threads: int,
        release: Callable[[memoryview], None],
    ) -> None:
        if not pieces:
            return
        header = np.zeros(layout.HEADER_WORDS, np.int64)
        sources = [piece.whole_blocks() for piece in pieces]
        ops = [
            Op([self._pack_part(piece, source.ctypes.data, library)])
            for piece, source in zip(pieces, sources, strict=True)
        ]
        team.run_once(ops, header.ctypes.data, n_threads)
        del sources
        for piece in pieces:
            release(piece.up_to_here)

    def _pack_part(self, piece: _Piece, source: int, library: Library) -> Part:
        name = piece.weight.type.name.lower()
        n_groups, n_blocks = -(-piece.n_rows // GROUP_ROWS), piece.n_blocks
        group_bytes = n_blocks * FORMATS[name].packed_bytes
        to = self.matrix(piece.weight) + piece.first // GROUP_ROWS * group_bytes
        per_chunk = max(1, _PACK_CHUNK // group_bytes)
        args = [source, to, piece.n_rows, n_blocks, per_chunk]
        return Part(library.address(f"pack.{name}"), args, -(-n_groups // per_chunk))

    def close(self) -> None:
        self._memory.close()
        self._doubles.clear()


class _Piece(NamedTuple):
    """Rows of a matrix: whole groups, but for those at its end."""

    weight: Weight
    first: int
    n_rows: int
    row_bytes: int

    @property
    def data(self) -> memoryview:
        return self.up_to_here[self.first * self.row_bytes :]

    @property
    def up_to_here(self) -> memoryview:
        """From the matrix's first row on: reading a page brings some before it back."""
        return memoryview(self.weight.data)[: (self.first + self.n_rows) * self.row_bytes]

    @property
    def n_blocks(self) -> int:
        return FORMATS[self.weight.type.name.lower()].n_blocks(self.weight.shape[1])

    def whole_blocks(self) -> NDArray[np.uint8]:
        """The rows as the file has them, or where their last block isn't whole, with zeros."""
        rows = np.frombuffer(self.data, np.uint8).reshape(self.n_rows, self.row_bytes)
        missing = self.n_blocks * FORMATS[self.weight.type.name.lower()].file_bytes - self.row_bytes
        return np.pad(rows, ((0, 0), (0, missing))) if missing else rows


def _pieces(weight: Weight) -> Iterator[_Piece]:
    """A matrix in pieces of at most a portion, if 8 rows aren't more."""
    n_rows = weight.shape[0]
    row_bytes = len(weight.data) // n_rows
    step = max(1, _PORTION // (GROUP_ROWS * row_bytes)) * GROUP_ROWS
    for first in range(0, n_rows, step):
        yield _Piece(weight, first, min(step, n_rows - first), row_bytes)
