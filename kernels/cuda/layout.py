"""What lies where in a device's memory: pages of a cache, parts of attention, what a step says.

The kernels read the same from `dev.cuh`, `attend.cuh` and their own parameters; rows of values and
matrices are in `tiles.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, Batch, StepLimits
from edgeinfer.graph import KV, KVType
from edgeinfer.kernels.cached import position_runs
from edgeinfer.ops import KV_BLOCK

ALIGNMENT = 256  # of every buffer: what a device's own allocator gives


KV_TYPES: dict[KVType, int] = {"f16": 0, "q8_0": 1, "q4_0": 2}  # as kv_types.cuh numbers them
_BLOCK_BYTES = {"q8_0": KV_BLOCK + 2, "q4_0": KV_BLOCK // 2 + 2}


def page_bytes(kv: KV) -> tuple[int, int]:
    """Bytes of a layer's K and V in a page of 32 positions; no V where K is V."""
    k_bytes, v_bytes = _head_bytes(kv.k_dim, kv.k_type), _head_bytes(kv.v_dim, kv.v_type)
    return kv.n_heads * k_bytes, 0 if kv.k_is_v else kv.n_heads * v_bytes


def _head_bytes(dim: int, kind: KVType) -> int:
    """Of a head in a page: whole runs of 8 halves, or whole blocks."""
    if kind == "f16":
        return 2 * PAGE * (-(-dim // 8) * 8)
    return PAGE * -(-dim // KV_BLOCK) * _BLOCK_BYTES[kind]


def page_positions(kv: KV) -> list[NDArray[np.uint8]]:
    """Of K, and of V where it is kept: which position of a page each byte belongs to.

    `kv_types.cuh` has the order: codes of a head in units of 16 bytes, then the scales of blocks.
    """
    k, v = _head_bytes(kv.k_dim, kv.k_type), _head_bytes(kv.v_dim, kv.v_type)
    k_scales, v_scales = _scale_bytes(kv.k_dim, kv.k_type), _scale_bytes(kv.v_dim, kv.v_type)
    keys = [
        position_runs((k - k_scales) // (16 * PAGE), 16),
        position_runs(k_scales // (2 * PAGE), 2),
    ]
    values = [position_runs(1, (v - v_scales) // PAGE), position_runs(1, v_scales // PAGE)]
    kept = [keys] if kv.k_is_v else [keys, values]
    return [np.tile(np.concatenate(parts), kv.n_heads) for parts in kept]


def _scale_bytes(dim: int, kind: KVType) -> int:
    return 0 if kind == "f16" else 2 * PAGE * -(-dim // KV_BLOCK)


_STEP = np.dtype([(name, np.int32) for name in ("n_rows", "n_wanted", "n_sequences", "abort")])
_TABLE = np.dtype([(n, np.int32) for n in ("first", "n_pages", "n_pinned", "n_visible")])


class StepArrays:
    """All that a step says to kernels, in host memory as it will lie on the device.

    The page numbers of every table are one list, the last array: only as many as there are go
    to the device.
    """

    def __init__(self, limits: StepLimits, windows: Collection[int], has_states: bool) -> None:
        """Sequences have a table for each of the `windows`."""
        n_groups, n_sequences = len(windows), limits.max_sequences
        self._n_states, self._has_states = limits.n_states, has_states
        n_recurrent = n_sequences if has_states else 0
        n_pages = n_sequences * sum(limits.n_pages[window] for window in windows)
        self._shapes = {
            "step": ((1,), _STEP),
            "ids": ((limits.max_rows,), np.dtype(np.int32)),
            "pos": ((limits.max_rows,), np.dtype(np.int64)),
            "seq": ((limits.max_rows,), np.dtype(np.int32)),
            "wanted": ((limits.max_outputs,), np.dtype(np.int32)),
            "tables": ((n_groups, n_sequences), _TABLE),
            "spans": ((n_recurrent, 2), np.dtype(np.int32)),  # first row of a sequence, and rows
            "states": ((n_recurrent,), np.dtype(np.int32)),
            "kept": ((limits.max_rows * has_states,), np.dtype(np.int32)),
            "pages": ((n_pages,), np.dtype(np.int32)),
        }
        self._offsets, end = dict[str, int](), 0
        for name, (shape, dtype) in self._shapes.items():
            self._offsets[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.most_bytes = end
        self._n_pages = 0
        self._table_bytes = n_sequences * _TABLE.itemsize

    @cached_property
    def memory(self) -> NDArray[np.uint8]:
        """All of it, taken when first asked for: a plan is drawn for steps of any size."""
        return np.zeros(self.most_bytes, np.uint8)

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            name: np.ndarray(shape, dtype, self.memory.data, self._offsets[name])
            for name, (shape, dtype) in self._shapes.items()
        }

    def offset(self, name: str, group: int = 0) -> int:
        """Where an array begins; of "tables", those of one cache group."""
        return self._offsets[name] + (group * self._table_bytes if name == "tables" else 0)

    @property
    def abort_offset(self) -> int:
        """Where the word lies by which a step is cut short."""
        fields = _STEP.fields
        assert fields is not None
        return self._offsets["step"] + int(fields["abort"][1])

    def fill(self, batch: Batch) -> int:
        """Take in a step; returns how many bytes of `memory` say it."""
        arrays, n_rows, n_wanted = self._arrays, batch.n_rows, len(batch.wanted)
        arrays["step"][0] = n_rows, n_wanted, len(batch.tables), 0
        arrays["pos"][:n_rows], arrays["seq"][:n_rows] = batch.pos, batch.seq
        arrays["wanted"][:n_wanted] = batch.wanted
        if len(batch.ids):
            arrays["ids"][:n_rows] = batch.ids
        if self._has_states:
            self._fill_states(batch)
        pages, end = arrays["pages"], 0
        for i, tables in enumerate(batch.tables):
            for group, table in zip(arrays["tables"], tables, strict=True):
                first, end = end, end + len(table.pages)
                pages[first:end] = table.pages
                group[i] = first, len(table.pages), table.n_pinned, table.n_visible
        self._n_pages = end
        return self.n_bytes

    def _fill_states(self, batch: Batch) -> None:
        states, kept, seq = batch.states, batch.kept, batch.seq
        assert states is not None and kept is not None, "this segment has states"
        slots = np.concatenate([states, kept])
        assert ((slots >= -1) & (slots < self._n_states)).all(), f"{self._n_states} slots"
        self._arrays["states"][: len(states)], self._arrays["kept"][: len(kept)] = states, kept
        first = np.flatnonzero(np.diff(seq, prepend=-1))  # rows of a sequence are consecutive
        n_rows = np.diff(first, append=len(seq))
        self._arrays["spans"][: len(states)] = 0
        self._arrays["spans"][seq[first]] = np.stack([first, n_rows], axis=1)

    @property
    def n_bytes(self) -> int:
        """How much of `memory` says the step that was filled in."""
        return self._offsets["pages"] + 4 * self._n_pages

    def go_on(self) -> None:
        """The step that follows where every sequence gets one token more; its ids are not known."""
        n_rows, *_ = self._arrays["step"][0]
        self._arrays["pos"][:n_rows] += 1

    def set_ids(self, ids: NDArray[np.int32]) -> None:
        self._arrays["ids"][: len(ids)] = ids

    def says_the_same(self, other: StepArrays) -> bool:
        """Whether both have the same step."""
        ours, theirs = self._used(), other._used()
        return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def _used(self) -> list[NDArray[Any]]:
        arrays = self._arrays
        n_rows, n_wanted, n_sequences, _ = arrays["step"][0]
        rows = [arrays[name][:n_rows] for name in ("ids", "pos", "seq")]
        others = arrays["wanted"][:n_wanted], arrays["tables"][:, :n_sequences]
        return [*rows, *others, arrays["pages"][: self._n_pages]]
