"""The packed weights of one program: one arena, filled piece by piece by the thread team.

Knows no graph. The packed copy replaces the file's, which is read portion by portion: the peak is
the packed model and two portions, below 16 MiB together.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from edgeinfer import platform
from edgeinfer.dequantize import dequantize
from edgeinfer.kernels.buffers import Arena, Buffer
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.formats import FORMATS, GROUP_ROWS, packed_bytes
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.team import Op, Part, Team
from edgeinfer.quant import Weight

_PORTION = 4 << 20  # source bytes after which packing begins, and the most of one piece
_ALIGNMENT = 64  # of pieces that have been read
_PACK_CHUNK = 256 << 10  # packed bytes of one chunk


class PackedWeights:
    """Matrices in groups of 8 rows, vectors as floats: laid out, then reserved, then filled.

    Of a stack of matrices or vectors each is as if it were alone, and they lie side by side. The
    taps of convolutions, (C, L), lie as L vectors.
    """

    def __init__(
        self,
        matrices: Iterable[Weight],
        vectors: Iterable[Weight],
        taps: Iterable[Weight] = (),
        beside: PackedWeights | None = None,
    ) -> None:
        """What lies `beside`, in another program of the same life, is not packed again."""
        known = {} if beside is None else {**beside._packed, **beside._floats}
        self._matrices = {w.name: w for w in matrices if w.name not in known}
        self._taps = {w.name: w for w in taps}
        elsewhere = known.keys() | self._taps.keys()
        self._vectors = {w.name: w for w in vectors if w.name not in elsewhere}
        self._tables: list[tuple[Buffer, np.ndarray]] = []
        self._arena = Arena()
        self._memory: platform.Memory | None = None
        self.bytes_by_type: dict[str, int] = {}
        self._packed: dict[str, Buffer] = {
            weight.name: self._place(weight.type.name, _packed_bytes(weight))
            for weight in self._matrices.values()
        }
        self._floats: dict[str, Buffer] = {
            weight.name: self._place(
                "F32", math.prod(weight.shape[:-1]) * layout.row_stride(weight.shape[-1])
            )
            for weight in self._vectors.values()
        }
        self._floats |= {
            weight.name: self._place("F32", weight.shape[1] * layout.row_stride(weight.shape[0]))
            for weight in self._taps.values()
        }
        self._found = {**known, **self._packed, **self._floats}

    def _place(self, type_name: str, n_bytes: int) -> Buffer:
        counts = self.bytes_by_type
        counts[type_name] = counts.get(type_name, 0) + self._arena.aligned(n_bytes)
        return self._arena.place(Buffer("weights", n_bytes, is_kept=True))

    @property
    def n_bytes(self) -> int:
        return self._arena.n_bytes

    def reserve(self) -> None:
        """Take the memory, once all that is to lie there is known."""
        self._memory = platform.Memory(self.n_bytes, huge=True)
        self._arena.settle(self.address)

    @property
    def matrix_types(self) -> set[str]:
        """Names of the tensor types among the matrices."""
        return {w.type.name for w in self._matrices.values()}

    @property
    def address(self) -> int:
        assert self._memory is not None, "no memory was reserved"
        return self._memory.address

    def matrix(self, weight: Weight) -> Buffer:
        """A packed matrix."""
        return self._found[weight.name]

    def vector(self, weight: Weight) -> Buffer:
        """A vector of floats, or a stack of them, each padded with zeros to 8."""
        return self._found[weight.name]

    def taps(self, weight: Weight) -> Buffer:
        """For each tap of a convolution a vector of channels, padded with zeros to 8."""
        return self._floats[weight.name]

    def doubles(self, values: np.ndarray) -> Buffer:
        """A table of float64, until memory is reserved."""
        table = np.ascontiguousarray(values, np.float64)
        self._tables.append((self._place("F32", table.nbytes), table))
        return self._tables[-1][0]

    @property
    def packing_bytes(self) -> int:
        """What `pack` takes for a while: two portions."""
        return _reading_bytes(list(_portions(self._matrices.values())))

    def pack(
        self,
        team: Team,
        library: Library,
        n_threads: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Fill the arena; `progress(done, total)` counts source bytes."""
        for weight in self._vectors.values():
            self._write(weight, np.atleast_2d(np.asarray(dequantize(weight), np.float32)))
        for weight in self._taps.values():
            self._write(weight, np.asarray(dequantize(weight), np.float32).T)
        for buffer, table in self._tables:
            ctypes.memmove(buffer.address, table.ctypes.data, table.nbytes)
        portions = list(_portions(self._matrices.values()))
        done, total = 0, sum(len(w.data) for w in self._matrices.values())
        progress(0, total)
        with _Reader(portions) as reader:
            for portion, address in reader.read():
                self._pack(portion, address, team, library, n_threads)
                done += sum(piece.n_bytes for piece in portion)
                progress(done, total)

    def _write(self, weight: Weight, values: np.ndarray) -> None:
        """Vectors, each padded to 8."""
        values = np.pad(values, ((0, 0), (0, -values.shape[1] % GROUP_ROWS)))
        values = np.ascontiguousarray(values)
        ctypes.memmove(self._floats[weight.name].address, values.ctypes.data, values.nbytes)

    def _pack(
        self, pieces: list[_Piece], at: int, team: Team, library: Library, n_threads: int
    ) -> None:
        """Pack pieces that have been read to `at`."""
        header, ops = np.zeros(layout.HEADER_WORDS, np.int64), list[Op]()
        for piece in pieces:
            ops.append(Op([self._pack_part(piece, at, library)]))
            at += piece.room
        team.run_once(ops, header.ctypes.data, n_threads)

    def _pack_part(self, piece: _Piece, source: int, library: Library) -> Part:
        name = piece.weight.type.name.lower()
        n_groups, n_blocks = -(-piece.n_rows // GROUP_ROWS), piece.n_blocks
        group_bytes = n_blocks * FORMATS[name].packed_bytes
        to = self.matrix(piece.weight).address + piece.first // GROUP_ROWS * group_bytes
        to += piece.matrix * _packed_bytes(piece.weight, 1)
        per_chunk = max(1, _PACK_CHUNK // group_bytes)
        args = layout.PACK.pack(
            src=source, dst=to, n_rows=piece.n_rows, n_blocks=n_blocks, per_chunk=per_chunk
        )
        return Part(library.address(f"pack.{name}"), args, -(-n_groups // per_chunk))

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()


class _Reader:
    """Reads portions in a thread of its own: the next one comes while one is packed."""

    def __init__(self, portions: list[list[_Piece]]) -> None:
        self._portions = portions
        n_bytes = _reading_bytes(portions)
        size = n_bytes // 2
        self._memory = platform.Memory(n_bytes, huge=True)
        self._free, self._filled = SimpleQueue[int | None](), SimpleQueue[int | BaseException]()
        for address in (self._memory.address, self._memory.address + size):
            self._free.put(address)
        self._thread = threading.Thread(target=self._fill, name="edgeinfer-read", daemon=True)

    def read(self) -> Iterator[tuple[list[_Piece], int]]:
        """Portions and where they are, until the next one is asked for."""
        for portion in self._portions:
            address = self._filled.get()
            if isinstance(address, BaseException):
                raise address
            yield portion, address
            self._free.put(address)

    def _fill(self) -> None:
        try:
            for portion in self._portions:
                if (address := self._free.get()) is None:
                    return
                at = address
                for piece in portion:
                    piece.read_to(at)
                    at += piece.room
                self._filled.put(address)
        except BaseException as error:
            self._filled.put(error)

    def __enter__(self) -> _Reader:
        try:
            self._thread.start()
        except BaseException:
            self._memory.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._free.put(None)
        self._thread.join()
        self._memory.close()


class _Piece(NamedTuple):
    """Rows of a matrix: whole groups, but for those at its end."""

    weight: Weight
    matrix: int  # of a stack
    first: int
    n_rows: int
    row_bytes: int

    @property
    def n_bytes(self) -> int:
        """In the file."""
        return self.n_rows * self.row_bytes

    @property
    def n_blocks(self) -> int:
        return FORMATS[self.weight.type.name.lower()].n_blocks(self.weight.shape[-1])

    @property
    def whole_row_bytes(self) -> int:
        return self.n_blocks * FORMATS[self.weight.type.name.lower()].file_bytes

    @property
    def room(self) -> int:
        """Bytes that `read_to` fills, aligned."""
        return -(-self.n_rows * self.whole_row_bytes // _ALIGNMENT) * _ALIGNMENT

    def read_to(self, address: int) -> None:
        """Read the rows as the file has them; where their last block isn't whole, with zeros."""
        start = (self.matrix * self.weight.shape[-2] + self.first) * self.row_bytes
        if self.whole_row_bytes == self.row_bytes:
            memory = (ctypes.c_ubyte * self.n_bytes).from_address(address)
            self.weight.read_into(memoryview(memory).cast("B"), start)
            return
        rows = np.frombuffer(self.weight.data[start : start + self.n_bytes], np.uint8)
        raw = (ctypes.c_ubyte * (self.n_rows * self.whole_row_bytes)).from_address(address)
        whole = np.frombuffer(memoryview(raw), np.uint8).reshape(self.n_rows, -1)
        whole[:, : self.row_bytes] = rows.reshape(self.n_rows, -1)
        whole[:, self.row_bytes :] = 0


def _portions(matrices: Iterable[Weight]) -> Iterator[list[_Piece]]:
    """Pieces, as many as are read before they are packed together."""
    portion, n_bytes = list[_Piece](), 0
    for piece in (piece for weight in matrices for piece in _pieces(weight)):
        portion.append(piece)
        n_bytes += piece.n_bytes
        if n_bytes >= _PORTION:
            yield portion
            portion, n_bytes = [], 0
    if portion:
        yield portion


def _reading_bytes(portions: list[list[_Piece]]) -> int:
    """Two portions: one is read while another is packed."""
    return 2 * max(map(_room, portions), default=0)


def _room(portion: list[_Piece]) -> int:
    return sum(piece.room for piece in portion)


def _pieces(weight: Weight) -> Iterator[_Piece]:
    """A matrix, or each of a stack, in pieces of at most a portion, if 8 rows aren't more."""
    n_matrices, n_rows = _n_matrices(weight), weight.shape[-2]
    row_bytes = len(weight.data) // (n_matrices * n_rows)
    step = max(1, _PORTION // (GROUP_ROWS * row_bytes)) * GROUP_ROWS
    for matrix in range(n_matrices):
        for first in range(0, n_rows, step):
            yield _Piece(weight, matrix, first, min(step, n_rows - first), row_bytes)


def _n_matrices(weight: Weight) -> int:
    return math.prod(weight.shape[:-2])


def _packed_bytes(weight: Weight, n_matrices: int | None = None) -> int:
    """Of a stack, or of some of its matrices."""
    n_matrices = _n_matrices(weight) if n_matrices is None else n_matrices
    return n_matrices * packed_bytes(weight.type.name.lower(), *weight.shape[-2:])
