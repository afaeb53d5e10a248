"""What all lowering to launches shares: where values lie, and what has been emitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np

from edgeinfer.batch import Numerics, StepLimits
from edgeinfer.fusion import fuse
from edgeinfer.graph import Attention, Rope, Segment, Value
from edgeinfer.kernels.buffers import Buffer, Reads
from edgeinfer.kernels.cuda.commands import (
    ALL_ROWS,
    ANY_NUMBER,
    WANTED_ROWS,
    Arg,
    Launch,
    Lowered,
    Segments,
)
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.tiles import row_stride, x8_bytes
from edgeinfer.known import selected
from edgeinfer.quant import Weight

FEW_ROWS = 16  # of a step whose attention is cut into parts


class LayerCache(NamedTuple):
    """Where the pages of one layer lie, and of its group the tables."""

    k: Buffer
    v: Buffer
    tables: Buffer
    max_segments: int  # that a query may see


class SampleBuffers(NamedTuple):
    """Where a step says how tokens are picked: `samples.py`."""

    rows: Buffer  # and the words that they refer to
    goes_on: Buffer


class StepBuffers(NamedTuple):
    """Where a step says what it computes."""

    step: Buffer
    ids: Buffer
    pos: Buffer
    seq: Buffer
    wanted: Buffer
    pages: Buffer
    samples: SampleBuffers
    sampled: Buffer  # the tokens that the device picks, their statuses, and mu as doubles
    status: Buffer
    mu: Buffer
    counters: Buffer  # zeros, between steps too
    spans: Buffer  # these three where the segment has states
    states: Buffer
    kept: Buffer


class LaunchShape(NamedTuple):
    """What few launches need: see `Launch`."""

    shared_bytes: int = 0
    rows_per_block: int = 1
    least_rows: int = 1
    most_rows: int = ANY_NUMBER
    most_blocks: int = ANY_NUMBER
    values_per_block: int = 0


PLAIN = LaunchShape()


class WeightAddresses(Protocol):
    """Where weights will lie."""

    def matrix(self, weight: Weight) -> Buffer: ...
    def vector(self, weight: Weight) -> Buffer: ...
    def doubles(self, values: np.ndarray) -> Buffer: ...


class LoweringBase:
    """The state of one pass over a segment's steps."""

    def __init__(
        self,
        segment: Segment,
        limits: StepLimits,
        weights: WeightAddresses,
        caches: Mapping[int, LayerCache],
        states: Mapping[int, Buffer],
        step: StepBuffers,
        arch: int,
        numerics: Numerics,
        *,
        joins: bool,
    ) -> None:
        """`joins`: launches for one row are to become parts of one kernel, see `joined.py`."""
        self._segment, self._limits = segment, limits
        self._weights, self._caches, self._step = weights, caches, step
        self._states, self._arch = states, arch  # slots, by number of what an op leaves
        self._is_fast, self._joins = numerics == "fast", joins
        self._steps = fuse(segment)
        self._reads = Reads(self._steps, segment.kept)
        self._selected = selected(segment)
        self._floats: dict[Value, Buffer] = {}  # where a value's f32 rows are
        self._quantised: dict[Value, Buffer] = {}
        self._halved: dict[Value, Buffer] = {}
        # Angles that layers share: by position, and by that for pinned pages of a group.
        self._angles: dict[tuple[Rope, Buffer | None], Buffer] = {}
        self._frequencies: dict[Rope, tuple[Buffer, ...]] = {}  # and magnitudes
        self._tables = {
            op.layer: caches[op.cache_layer].tables
            for op in segment.ops
            if isinstance(op, Attention)
        }
        self._max_segments = max((cache.max_segments for cache in caches.values()), default=1)
        self._out = Lowered()
        self._least_rows = 1  # of steps that are lowered for now

    @contextmanager
    def _from_rows(self, least: int) -> Iterator[None]:
        """What is emitted is for steps of at least so many rows: fewer have another kernel."""
        self._least_rows = least
        yield
        self._least_rows = 1

    def _rows_of(self, value: Value) -> int:
        return WANTED_ROWS if value in self._selected else ALL_ROWS

    def _n_rows(self, value: Value) -> int:
        is_selected = value in self._selected
        return self._limits.max_outputs if is_selected else self._limits.max_rows

    def _float_buffer(self, value: Value, name: str) -> Buffer:
        self._floats[value] = self._rows_buffer(value, name)
        return self._floats[value]

    def _results(self, value: Value, name: str, can_quantise: bool = True) -> tuple[Arg, Arg]:
        """Where a kernel leaves a value: as floats, quantised for products, or both; 0 for not."""
        floats: Arg = 0
        x8: Arg = 0
        quantises = can_quantise and self._reads.is_quantised(value)
        if quantises:
            n_bytes = x8_bytes(value.dim) * self._n_rows(value)
            x8 = self._quantised[value] = Buffer(f"quantised {name}", n_bytes)
        if not quantises or not self._reads.is_quantised_only(value):
            floats = self._float_buffer(value, name)
        return floats, x8

    def _rows_buffer(self, value: Value, name: str) -> Buffer:
        return Buffer(name, 4 * row_stride(value.dim) * self._n_rows(value))

    def _emit(
        self,
        kernel: Kernel,
        rows: int,
        blocks: int | tuple[int | Segments, ...],
        threads: int,
        /,
        shape: LaunchShape = PLAIN,
        **args: Arg,
    ) -> None:
        """Launch a kernel for some rows of a step, if there are as many as is lowered for."""
        shape = shape._replace(least_rows=max(shape.least_rows, self._least_rows))
        if shape.least_rows > shape.most_rows:
            return
        sizes = blocks if isinstance(blocks, tuple) else (blocks,)
        given = {"step": self._step.step, **args}
        self._out.launches.append(Launch(kernel, given, rows, sizes, threads, *shape))

    def _pointwise(
        self,
        kind: str,
        out: Value,
        a: Value,
        b: Value | Weight | None = None,
        first: float = 0.0,
        second: float = 0.0,
    ) -> None:
        """out = f(a, b) or f(a, first, second), value by value; a vector b is one for all."""
        operand, stride = self._floats[a], row_stride(a.dim)
        if isinstance(b, Value):
            operand = self._floats[b]
        elif b is not None:
            operand, stride = self._weights.vector(b), 0
        rows, x = self._rows_of(out), self._floats[a]
        floats, x8 = self._results(out, kind)
        self._emit(
            Kernel.of("pointwise", KIND=kind), rows, -(-a.dim // 1024), 256, PLAIN,
            rows=rows, a=x, a_stride=row_stride(a.dim), b=operand, b_stride=stride,
            dim=a.dim, first=first, second=second, out=floats, out_stride=row_stride(out.dim),
            x8=x8,
        )  # fmt: skip
