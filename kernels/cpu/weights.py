"""The packed weights of one program: one arena, filled tensor by tensor by the thread team.

Knows no graph. The packed copy replaces the file's, which is read portion by portion, so the peak
is the packed model and one portion of the file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import numpy as np

from edgeinfer import platform
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.formats import FORMATS, packed_bytes
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.team import Op, Part, Team
from edgeinfer.quant import Weight, dequantize

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
            n_bytes = -(-weight.shape[0] // 8) * 8 * 4
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
        done, pending, pending_bytes = 0, list[Weight](), 0
        progress(0, total)
        for weight in self._matrices.values():
            pending.append(weight)
            pending_bytes += len(weight.data)
            if pending_bytes >= _PORTION:
                self._pack(pending, team, library, n_threads)
                done, pending, pending_bytes = done + pending_bytes, [], 0
                progress(done, total)
        self._pack(pending, team, library, n_threads)
        progress(total, total)

    def _pack(
        self,
        weights: list[Weight],
        team: Team,
        library: Library,
        n_threads: int,
    ) -> None:
        if not weights:
            return
        header = np.zeros(layout.HEADER_WORDS, np.int64)
        sources = [np.frombuffer(weight.data[:], np.uint8) for weight in weights]
        ops = [
            Op([self._pack_part(weight, source.ctypes.data, library)])
            for weight, source in zip(weights, sources, strict=True)
        ]
        team.run_once(ops, header.ctypes.data, n_threads)

    def _pack_part(self, weight: Weight, source: int, library: Library) -> Part:
        fmt = FORMATS[weight.type.name.lower()]
        n_rows, n_cols = weight.shape
        n_groups, n_blocks = -(-n_rows // 8), n_cols // fmt.block
        per_chunk = max(1, _PACK_CHUNK // (n_blocks * fmt.packed_bytes))
        args = [source, self.matrix(weight), n_rows, n_blocks, per_chunk]
        return Part(
            library.address(f"pack.{weight.type.name.lower()}"), args, -(-n_groups // per_chunk)
        )

    def close(self) -> None:
        self._memory.close()
        self._doubles.clear()
