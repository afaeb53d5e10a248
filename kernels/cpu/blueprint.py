"""A program before it takes any memory: what it will run, load and reserve, and for what.

Knows no team and no machine; `program.py` makes it run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np

from edgeinfer.batch import SEGMENT_PAGES, STATE_ROW, StepLimits, cache_row
from edgeinfer.graph import (
    KV,
    Conv,
    DeltaNet,
    Segment,
)
from edgeinfer.kernels.buffers import Arena, Buffer, weights_of
from edgeinfer.kernels.cached import Bytes, Cached, HostPart, Pieces, layout_of
from edgeinfer.kernels.cpu import layout, page_layout
from edgeinfer.kernels.cpu.commands import KernelOp
from edgeinfer.kernels.cpu.host_sampler import SAMPLE, Sampling
from edgeinfer.kernels.cpu.layout import row_stride
from edgeinfer.kernels.cpu.lower import Lowering
from edgeinfer.kernels.cpu.lower_base import LayerCache, OpStates
from edgeinfer.kernels.cpu.team import KERNELS
from edgeinfer.kernels.cpu.weights import PackedWeights


class Blueprint:
    """A segment lowered for steps of up to `limits`. It becomes a program once."""

    def __init__(
        self, segment: Segment, limits: StepLimits, beside: PackedWeights | None = None
    ) -> None:
        """Weights that lie `beside` are those of another program, which lives longer."""
        self.segment, self.limits = segment, limits
        taps = [op.weight for op in segment.ops if isinstance(op, Conv)]
        self.weights = PackedWeights(*weights_of(segment), taps, beside)
        self.kv = Arena()
        self._caches = _place_caches(segment, self.kv, limits)
        self.states = _place_states(segment, self.kv, limits)
        lowering = Lowering(segment, limits, self.weights, self._caches, self.states)
        self.lowered = lowering.run()
        self.scratch = self.lowered.scratch
        self.sample = self._sample_op() if segment.is_last and beside is None else None
        self.draft: Blueprint | None = None
        if (block := segment.draft) is not None:
            self.draft = Blueprint(block, limits.of_draft(block.groups), self.weights)

    def kernels(self) -> set[str]:
        """Names of the kernels that the program loads."""
        names = self.lowered.kernels() | ({SAMPLE} if self.sample else set())
        names |= {f"pack.{name.lower()}" for name in self.weights.matrix_types}
        names |= self.draft.kernels() if self.draft else set()
        return names | {*KERNELS, "read"}

    def rows(self) -> dict[str, int]:
        """Bytes that the program reserves, by purpose."""
        weights = self.weights.bytes_by_type
        rows = {
            **{f"weights {kind}": n_bytes for kind, n_bytes in weights.items()},
            **self._cache_rows(),
            **self._state_rows(),
            **self._scratch_rows(),
        }
        for purpose, n_bytes in self.draft.rows().items() if self.draft else ():
            rows[purpose] = rows.get(purpose, 0) + n_bytes
        return rows

    def cached(self) -> Cached:
        """What the program keeps between steps, once the arena of pages has memory."""
        groups, n_states = [], self.limits.n_states
        for window, group in self.segment.groups.items():
            first, n_pages = self._caches[next(iter(group))], self.limits.n_pages[window]
            pages = [_part(first.k_base, n_pages, first.page_bytes)]
            groups.append(Pieces(n_pages, pages, partial(_positions, group.values())))
        slots = self.states.values() if n_states else ()
        parts = [_part(each.at, n_states, each.slot_bytes) for each in slots]
        return Cached(tuple(groups), Pieces(n_states, parts), layout_of("cpu 1", self.segment))

    def _scratch_rows(self) -> dict[str, int]:
        logits = self.lowered.logits
        n_bytes = 0 if logits is None else self.scratch.aligned(logits.n_bytes)
        rows = {"scratch": self.scratch.n_bytes - n_bytes}
        return {**rows, "logits": n_bytes} if n_bytes else rows

    def _cache_rows(self) -> dict[str, int]:
        return {
            cache_row(window): self.kv.aligned(_pages_bytes(group, self.limits.n_pages[window]))
            for window, group in self.segment.groups.items()
        }

    def _state_rows(self) -> dict[str, int]:
        sizes = [self.kv.aligned(states.at.n_bytes) for states in self.states.values()]
        return {STATE_ROW: sum(sizes)} if sizes else {}

    @property
    def step_weight_bytes(self) -> int:
        """Packed weights that a step reads: all matrices but a lone embedding."""
        return sum(part.weight_bytes for op in self.lowered.ops for part in op.parts)

    def _sample_op(self) -> KernelOp:
        logits, vocab = self.lowered.logits, self.segment.output.dim
        assert logits is not None
        sampling = Sampling(vocab, self.limits.n_threads)
        self.scratch.place(sampling.scratch)
        return sampling.op(logits, row_stride(vocab))


def _part(buffer: Buffer, n: int, n_bytes: int) -> HostPart:
    """A buffer as n pieces."""
    raw = (ctypes.c_uint8 * (n * n_bytes)).from_address(buffer.address)
    return HostPart(np.frombuffer(memoryview(raw), np.uint8).reshape(n, n_bytes))


def _pages_bytes(group: Mapping[int, KV], n_pages: int) -> int:
    """Bytes of pages of a cache group."""
    return n_pages * sum(sum(_layer_bytes(kv)) for kv in group.values())


def _layer_bytes(kv: KV) -> tuple[int, int]:
    """Bytes of a layer's K and V in a page."""
    v_bytes = 0 if kv.k_is_v else page_layout.v_bytes(kv.v_dim, kv.v_type)
    return kv.n_heads * page_layout.k_bytes(kv.k_dim, kv.k_type), kv.n_heads * v_bytes


def _positions(group: Iterable[KV]) -> Iterable[Bytes]:
    from edgeinfer.kernels.cpu.page_positions import positions_of  # what sessions need

    return positions_of(group)


def _place_caches(segment: Segment, arena: Arena, limits: StepLimits) -> dict[int, LayerCache]:
    """A run of pages for each group: a page holds its 32 positions of all the group's layers."""
    caches, tables_bytes = {}, limits.max_sequences * layout.TABLE_BYTES
    for i, (window, group) in enumerate(segment.groups.items()):
        n_pages = limits.n_pages[window]
        pages = Buffer("pages", _pages_bytes(group, n_pages), is_kept=True)
        offset, page_bytes = arena.place(pages).address, _pages_bytes(group, 1)
        for layer, kv in group.items():
            k_bytes, v_bytes = _layer_bytes(kv)
            k = arena.place(Buffer("K", 0, is_kept=True), offset)
            v = arena.place(Buffer("V", 0, is_kept=True), offset + k_bytes)
            max_segments = -(-n_pages // SEGMENT_PAGES) + 2
            caches[layer] = LayerCache(k, v, page_bytes, i * tables_bytes, max_segments)
            offset += k_bytes + v_bytes
    return caches


def _place_states(segment: Segment, arena: Arena, limits: StepLimits) -> dict[int, OpStates]:
    """Of every op with a state, by its value, the slots one beside the other."""
    states = {}
    for op in segment.ops:
        if isinstance(op, (Conv, DeltaNet)):
            n_bytes = _state_bytes(op)
            slots = Buffer("state", limits.n_states * n_bytes, is_kept=True)
            states[op.out.index] = OpStates(arena.place(slots), n_bytes)
    return states


def _state_bytes(op: Conv | DeltaNet) -> int:
    """Of one slot."""
    if isinstance(op, Conv):
        return (op.n_taps - 1) * row_stride(op.x.dim)
    return layout.delta_state_bytes(op.n_v_heads, op.dim)
