"""What all lowering shares: where values lie, how they are read, and what has been emitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from edgeinfer.batch import StepLimits
from edgeinfer.fusion import fuse
from edgeinfer.graph import Attention, Rope, Segment, Value
from edgeinfer.kernels.buffers import Buffer, Reads
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.commands import Args, KernelOp, KernelPart, Lowered
from edgeinfer.kernels.cpu.formats import FORMATS, Format
from edgeinfer.kernels.cpu.layout import row_stride
from edgeinfer.known import selected
from edgeinfer.quant import Weight


class LayerCache(NamedTuple):
    """Where one layer's K and V lie inside a page of the arena."""

    k_base: Buffer
    v_base: Buffer
    page_bytes: int
    tables: int  # where its page tables begin
    max_segments: int  # that a query may see


class OpStates(NamedTuple):
    """Where one op's part of every state slot lies, one beside the other."""

    at: Buffer
    slot_bytes: int


class WeightAddresses(Protocol):
    """Where packed weights will lie."""

    def matrix(self, weight: Weight) -> Buffer: ...
    def vector(self, weight: Weight) -> Buffer: ...
    def taps(self, weight: Weight) -> Buffer: ...
    def doubles(self, values: np.ndarray) -> Buffer: ...


def float_bits(x: float) -> int:
    """The bits of a float32, as an argument word."""
    return int(np.float32(x).view(np.int32))


class LoweringBase:
    """The state of one pass over a segment's steps."""

    def __init__(
        self,
        segment: Segment,
        limits: StepLimits,
        weights: WeightAddresses,
        caches: Mapping[int, LayerCache],
        states: Mapping[int, OpStates],
    ) -> None:
        self._segment, self._limits = segment, limits
        self._weights, self._caches, self._states = weights, caches, states
        self._steps = fuse(segment)
        self._reads = Reads(self._steps, segment.kept)
        self._selected = selected(segment)
        self._floats: dict[Value, Buffer] = {}  # where a value's f32 rows are
        self._quantised: dict[Value, Buffer] = {}
        # What layers share: angles, work items by window, and along routes what was planned for
        # each and the rows that were gathered.
        self._angles: dict[tuple[Rope, int | None], tuple[Buffer, Buffer | int]] = {}
        self._items: dict[int, Buffer] = {}
        self._runs: Buffer | None = None
        self._dispatched: dict[Value, Buffer] = {}
        self._gathered: dict[tuple[Value, Value, int, str], Buffer] = {}
        self._tables = {
            op.layer: caches[op.cache_layer].tables
            for op in segment.ops
            if isinstance(op, Attention)
        }
        scratch_bytes = limits.n_threads * layout.MATMUL_SCRATCH_BYTES
        self._matmul_scratch = Buffer("matmul scratch", scratch_bytes)
        self._out = Lowered()

    def _rows_of(self, value: Value) -> tuple[int, int]:
        """Which rows a value has, and the rule that counts them."""
        if value in self._selected:
            return layout.WANTED_ROWS, layout.COUNT_WANTED
        return layout.ALL_ROWS, layout.COUNT_ROWS

    def _n_rows(self, value: Value) -> int:
        is_selected = value in self._selected
        return self._limits.max_outputs if is_selected else self._limits.max_rows

    def _sinks(self, out: Value, name: str) -> Args:
        """Sink words for a value: floats, and their quantised form where a matmul reads that."""
        stride = row_stride(out.dim)
        if self._reads.is_quantised_only(out):
            row = Buffer(f"{name} of each thread", stride * self._limits.n_threads)
            words: Args = [row, 0, stride, 0]
        else:
            words = [self._float_buffer(out, name), stride, 0, 0]
        if self._reads.is_quantised(out):
            words[layout.SINK_A32 // layout.WORD] = self._quantised_buffer(out, name)
        return words

    def _float_buffer(self, value: Value, name: str) -> Buffer:
        buffer = Buffer(name, row_stride(value.dim) * self._n_rows(value))
        self._floats[value] = buffer
        return buffer

    def _quantised_buffer(self, value: Value, name: str) -> Buffer:
        buffer = Buffer(f"{name} a32", a32_bytes(value.dim) * self._n_rows(value))
        self._quantised[value] = buffer
        return buffer

    def _emit(self, group: str, kernel: str, args: Args, rule: int = layout.COUNT_ROWS) -> None:
        self._out.ops.append(KernelOp(group, [KernelPart(kernel, args, rule)]))

    def _copy(self, x: Value, rows: int, sinks: Args) -> Args:
        return layout.COPY.pack(
            *sinks, x=self._floats[x], stride=row_stride(x.dim), dim=x.dim, rows=rows
        )

    # -- matmuls -------------------------------------------------------------------------------

    def _quantise(self, x: Value) -> None:
        """A value whose rows nothing has quantised on their way."""
        rows, rule = self._rows_of(x)
        floats, stride = self._floats[x], row_stride(x.dim)
        quantised = self._quantised_buffer(x, "quantised")
        sinks: Args = [floats, stride, 0, quantised]
        args = layout.QUANTISE.pack(*sinks, x=floats, stride=stride, dim=x.dim, rows=rows)
        self._emit("quantise", "quantise", args, rule)


def a32_bytes(dim: int) -> int:
    """Bytes of one quantised row."""
    return dim // 32 * layout.A32_BYTES


def row_bytes(fmt: Format, dim: int) -> int:
    """Bytes of one row as matmuls of a format read it."""
    return a32_bytes(dim) if fmt.activation == "a32" else row_stride(dim)


def type_name(weight: Weight) -> str:
    return weight.type.name.lower()


def format_of(weight: Weight) -> Format:
    return FORMATS[type_name(weight)]
