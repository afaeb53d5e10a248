"""The packed weights of one program: one arena, filled piece by piece by the thread team.

Knows no graph. The packed copy replaces the file's, which is read portion by portion, so the peak
is the packed model and one portion of the file.
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

_PORTION = 8 << 20  # source bytes that are held at a time
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
        progress: Callable[[int, int], None],
    ) -> None:
        """Fill the arena; `progress(done, total)` counts source bytes."""
        for weight in self._vectors.values():
            values = np.ascontiguousarray(dequantize(weight), np.float32)
            ctypes.memmove(self.vector(weight), values.ctypes.data, values.nbytes)
        total = sum(len(w.data) for w in self._matrices.values())
        done, portion, n_bytes = 0, list[_Piece](), 0
        progress(0, total)
        pieces = [piece for w in self._matrices.values() for piece in _pieces(w)]
        buffer = np.empty(max([_PORTION, *(piece.n_bytes for piece in pieces)]), np.uint8)
        for piece in pieces:
            if n_bytes + piece.n_bytes > len(buffer):
                self._pack(portion, buffer, team, library, n_threads)
                done, portion, n_bytes = done + n_bytes, [], 0
                progress(done, total)
            portion.append(piece)
            n_bytes += piece.n_bytes
        self._pack(portion, buffer, team, library, n_threads)
        progress(total, total)

    def _pack(
        self,
        pieces: list[_Piece],
        buffer: NDArray[np.uint8],
        team: Team,
        library: Library,
        n_threads: int,
    ) -> None:
        if not pieces:
            return
        header = np.zeros(layout.HEADER_WORDS, np.int64)
        sources = _read(pieces, buffer)
        ops = [
            Op([self._pack_part(piece, source.ctypes.data, library)])
            for piece, source in zip(pieces, sources, strict=True)
        ]
        team.run_once(ops, header.ctypes.data, n_threads)

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
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes

    @property
    def n_blocks(self) -> int:
        return FORMATS[self.weight.type.name.lower()].n_blocks(self.weight.shape[1])


def _pieces(weight: Weight) -> Iterator[_Piece]:
    """A matrix in pieces of at most a portion, if 8 rows aren't more."""
    n_rows = weight.shape[0]
    row_bytes = len(weight.data) // n_rows
    step = max(1, _PORTION // (GROUP_ROWS * row_bytes)) * GROUP_ROWS
    for first in range(0, n_rows, step):
        yield _Piece(weight, first, min(step, n_rows - first), row_bytes)


def _read(pieces: Iterable[_Piece], buffer: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The pieces' rows, one piece behind the other; zeros where a last block isn't whole."""
    sources, at = [], 0
    for piece in pieces:
        rows = buffer[at : at + piece.n_bytes]
        piece.weight.read_into(rows.data, piece.first * piece.row_bytes)
        at += piece.n_bytes
        file_bytes = FORMATS[piece.weight.type.name.lower()].file_bytes
        if missing := piece.n_blocks * file_bytes - piece.row_bytes:
            rows = np.pad(rows.reshape(piece.n_rows, -1), ((0, 0), (0, missing)))
        sources.append(rows)
    return sources
