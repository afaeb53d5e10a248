"""The weights of one program on a device: one arena, filled piece by piece.

Knows no graph. Rows go up as the file has them and are laid in tiles there, so the host holds two
pieces at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeinfer.dequantize import dequantize
from edgeinfer.kernels.buffers import Arena, Buffer
from edgeinfer.kernels.cuda import tiles
from edgeinfer.kernels.cuda.device import Device
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.layout import ALIGNMENT
from edgeinfer.quant import Weight

PIECE = 8 << 20  # bytes that go up at a time, if a tile's rows aren't more


class TiledWeights:
    """Matrices in tiles of 32 rows, vectors as floats: laid out, then reserved, then filled.

    Of a stack of matrices each is as if it were alone, and they lie side by side.
    """

    def __init__(
        self,
        matrices: Iterable[Weight],
        vectors: Iterable[Weight],
        beside: TiledWeights | None = None,
    ) -> None:
        """What lies `beside`, in another program of the same life, does not go up again."""
        tiled: dict[str, Buffer] = {} if beside is None else beside._tiled
        floats: dict[str, Buffer] = {} if beside is None else beside._floats
        self._matrices = {w.name: w for w in matrices if w.name not in tiled}
        self._vectors = {w.name: w for w in vectors if w.name not in floats}
        self._tables: list[tuple[Buffer, NDArray[np.float64]]] = []
        self.arena = Arena(ALIGNMENT)
        self.bytes_by_type: dict[str, int] = {}
        self._tiled: dict[str, Buffer] = tiled | {
            weight.name: self._place(weight.type.name, _n_matrices(weight) * matrix_bytes(weight))
            for weight in self._matrices.values()
        }
        self._floats: dict[str, Buffer] = floats | {
            weight.name: self._place("F32", 4 * weight.n_elements)
            for weight in self._vectors.values()
        }
        sizes = [piece.n_bytes for weight in self._matrices.values() for piece in _pieces(weight)]
        self.staging = Buffer("rows on their way", max(sizes, default=0), is_kept=True)

    def _place(self, type_name: str, n_bytes: int) -> Buffer:
        counts = self.bytes_by_type
        counts[type_name] = counts.get(type_name, 0) + self.arena.aligned(n_bytes)
        return self.arena.place(Buffer("weights", n_bytes, is_kept=True))

    def kernels(self) -> set[Kernel]:
        return {_repack(weight) for weight in self._matrices.values()}

    def matrix(self, weight: Weight) -> Buffer:
        """A matrix in tiles."""
        return self._tiled[weight.name]

    def vector(self, weight: Weight) -> Buffer:
        """Floats in the order that the file has them."""
        return self._floats[weight.name]

    def doubles(self, values: NDArray[np.float64]) -> Buffer:
        """A table of float64, until memory is reserved."""
        table = np.ascontiguousarray(values, np.float64)
        self._tables.append((self._place("F32", table.nbytes), table))
        return self._tables[-1][0]

    def upload(self, device: Device, step: int, progress: Callable[[int, int], None]) -> None:
        """Fill the arena, with a step that is not aborted; `progress` counts the file's bytes."""
        for weight in self._vectors.values():
            device.write(self.vector(weight).address, np.asarray(dequantize(weight), np.float32))
        for buffer, table in self._tables:
            device.write(buffer.address, table)
        done, total = 0, sum(len(w.data) for w in self._matrices.values())
        progress(0, total)
        pieces = [piece for weight in self._matrices.values() for piece in _pieces(weight)]
        for piece, rows in _read_ahead(pieces):
            self._upload(piece, rows, device, step)
            if not device.facts.has_own_memory:
                piece.weight.forget(piece.start, piece.n_bytes)
            done += piece.n_bytes
            progress(done, total)

    def _upload(self, piece: _Piece, rows: NDArray[np.uint8], device: Device, step: int) -> None:
        weight = piece.weight
        device.write(self.staging.address, rows)
        to = self.matrix(weight).address + piece.matrix * matrix_bytes(weight)
        n_rows, n_cols = weight.shape[-2:]
        args = {
            "step": step, "raw": self.staging.address, "w": to, "n": n_rows, "k": n_cols,
            "first": piece.first, "n_there": piece.n_rows,
        }  # fmt: skip
        grid = -(-piece.n_rows // tiles.TILE), _repack_blocks(weight), 1
        device.launch(_repack(weight), grid, 256, 0, args)


class _Piece(NamedTuple):
    """Rows of a matrix: whole tiles, but for those at its end."""

    weight: Weight
    matrix: int  # of a stack
    first: int
    n_rows: int
    row_bytes: int

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes

    @property
    def start(self) -> int:
        """Where they begin among the bytes of the weight."""
        return (self.matrix * self.weight.shape[-2] + self.first) * self.row_bytes

    def read(self, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The rows as the file has them, in a part of a buffer."""
        rows = buffer[: self.n_bytes]
        self.weight.read_into(rows.data, self.start)
        return rows


def _read_ahead(pieces: Sequence[_Piece]) -> Iterator[tuple[_Piece, NDArray[np.uint8]]]:
    """Pieces and their rows, until the next one is asked for; meanwhile that one is being read."""
    most = max((piece.n_bytes for piece in pieces), default=0)
    buffers = cycle([np.empty(most, np.uint8), np.empty(most, np.uint8)])
    with ThreadPoolExecutor(1, "edgeinfer-read") as reader:
        reads = (reader.submit(piece.read, next(buffers)) for piece in pieces)
        coming = next(reads, None)
        for piece in pieces:
            assert coming is not None
            rows = coming.result()
            coming = next(reads, None)
            yield piece, rows


def _pieces(weight: Weight) -> Iterator[_Piece]:
    """A matrix, or each of a stack, in pieces of at most so many bytes, if a tile isn't more."""
    n_matrices, n_rows = _n_matrices(weight), weight.shape[-2]
    row_bytes = len(weight.data) // (n_matrices * n_rows)
    step = max(1, PIECE // (tiles.TILE * row_bytes)) * tiles.TILE
    for matrix in range(n_matrices):
        for first in range(0, n_rows, step):
            yield _Piece(weight, matrix, first, min(step, n_rows - first), row_bytes)


def _n_matrices(weight: Weight) -> int:
    return math.prod(weight.shape[:-2])


def matrix_bytes(weight: Weight) -> int:
    """Of one matrix in tiles, of a stack too."""
    return tiles.matrix_bytes(weight.type, *weight.shape[-2:])


def _repack_blocks(weight: Weight) -> int:
    """Blocks of threads beside each other: of 256 columns, or of 8 times 64 bytes of floats."""
    n_cols, kind = weight.shape[-1], weight.type
    return -(-n_cols // (512 // kind.block_bytes if kind.block == 1 else tiles.CHUNK))


def _repack(weight: Weight) -> Kernel:
    return Kernel.of("repack", TYPE=weight.type.name)
