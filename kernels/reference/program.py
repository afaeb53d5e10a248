"""Runs the ops of a segment one after the other, in either mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import (
    PAGE,
    Batch,
    Outputs,
    PageTable,
    Sampler,
    StepLimits,
)
from edgeinfer.dequantize import dequantize
from edgeinfer.errors import ClosedError
from edgeinfer.fusion import Uses, pinned_query
from edgeinfer.graph import (
    KV,
    Activation,
    Add,
    Attention,
    Bias,
    Clamp,
    Conv,
    DeltaNet,
    Embed,
    ExpertLinear,
    ExpertSum,
    Gain,
    KVType,
    Linear,
    Mul,
    MulParts,
    Op,
    RmsNorm,
    Rotate,
    Route,
    Scale,
    Segment,
    SelectRows,
    SoftCap,
    inputs,
)
from edgeinfer.kernels.cached import (
    Cached,
    CacheVerbs,
    HostPart,
    Pieces,
    layout_of,
    position_runs,
)
from edgeinfer.kernels.reference.exact import Exact
from edgeinfer.kernels.reference.experts import add_parts, choose, multiply_chosen
from edgeinfer.kernels.reference.numerics import Floats, Ints, Numerics, embed, rotate, scaled
from edgeinfer.kernels.reference.recurrent import convolve, delta_net
from edgeinfer.sampling.params import SampleTable


class ReferenceProgram(CacheVerbs):
    """A segment made runnable: its weights, and the KV pages of its layers."""

    def __init__(
        self, segment: Segment, limits: StepLimits, numerics: Numerics, sampler: Sampler | None
    ) -> None:
        self._segment, self._limits = segment, limits
        self._numerics, self._sampler = numerics, sampler
        self._weights: dict[str, Any] = {}
        for op in segment.ops:
            if isinstance(op, Linear) and op.weight.name not in self._weights:
                self._weights[op.weight.name] = numerics.load(op.weight)
            if isinstance(op, ExpertLinear):
                stack = [op.weight.matrix(i) for i in range(op.weight.shape[0])]
                self._weights[op.weight.name] = list(map(numerics.load, stack))
        self._pages = {
            layer: _Pages.of(limits.n_pages[kv.window], kv, numerics)
            for layer, kv in segment.caches.items()
        }
        self._states = {
            op.out.index: np.zeros((limits.n_states, *op.state.shape), np.float32)
            for op in segment.ops
            if isinstance(op, (Conv, DeltaNet))
        }
        self._groups = {window: i for i, window in enumerate(segment.groups)}
        self._cached = self._cache_bytes()
        uses = Uses(segment)
        self._pinned = {
            op.out.index: pinned_query(op, uses) for op in segment.ops if isinstance(op, Attention)
        }
        self._ticket: ReferenceTicket | None = None
        self._is_closed = False
        self.draft: ReferenceProgram | None = None
        if (block := segment.draft) is not None:
            self.draft = ReferenceProgram(block, limits.of_draft(block.groups), numerics, sampler)

    def submit(self, batch: Batch) -> ReferenceTicket:
        """Queue a step; it runs when it is waited for, at the latest before the next one."""
        if self._is_closed:
            raise ClosedError("the program was closed")
        assert batch.n_rows <= self._limits.max_rows
        assert len(batch.wanted) <= self._limits.max_outputs
        assert len(batch.tables) <= self._limits.max_sequences
        batch.check()
        if self._ticket is not None:
            self._ticket.wait()
        self._ticket = ReferenceTicket(self, batch.snapshot())
        return self._ticket

    def sample(self, logits: Floats, table: SampleTable) -> None:
        assert self._sampler is not None, "this ReferenceBackend was given no sampler"
        self._sampler.sample(logits, table)

    def describe(self) -> dict[str, Any]:
        """What it runs on."""
        is_exact = isinstance(self._numerics, Exact)
        return {"device": "reference" if is_exact else "law"}

    def close(self) -> None:
        if self.draft is not None:
            self.draft.close()
        self._is_closed, self._ticket, self._cached = True, None, None
        self._weights.clear()
        self._pages.clear()

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of the matrices that a step of one row reads."""
        sizes = {}
        for op in self._segment.ops:
            if isinstance(op, Linear):
                sizes[op.weight.name] = 4 * op.weight.n_elements
            elif isinstance(op, ExpertLinear):
                sizes[op.weight.name] = 4 * op.weight.n_elements // op.weight.shape[0] * op.n_used
        return sum(sizes.values())

    def __enter__(self) -> ReferenceProgram:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cache_bytes(self) -> Cached:
        groups = tuple(
            Pieces(
                self._limits.n_pages[window],
                [HostPart(part) for layer in group for part in self._pages[layer].bytes()],
                partial(self._positions, group),
            )
            for window, group in self._segment.groups.items()
        )
        machine = f"reference 1 {type(self._numerics).__name__.lower()}"
        states = Pieces(self._limits.n_states, map(HostPart, map(_as_bytes, self._states.values())))
        return Cached(groups, states, layout_of(machine, self._segment))

    def _positions(self, group: Iterable[int]) -> Iterator[NDArray[np.uint8]]:
        for layer in group:
            for part in self._pages[layer].bytes():
                yield position_runs(1, part.shape[1] // PAGE)

    def run(self, batch: Batch, ticket: ReferenceTicket) -> Outputs:
        """Compute the step that `ticket` stands for."""
        values: dict[int, Floats] = {}
        if self._segment.input is not None:
            assert batch.hidden is not None, "this segment starts from batch.hidden"
            values[self._segment.input.index] = batch.hidden
        # A broken model may overflow: its logits say so, a warning would not help.
        with np.errstate(all="ignore"):
            for op in self._segment.ops:
                if ticket.is_aborted:
                    return self._outputs(aborted=True)
                if all(len(values[x.index]) for x in inputs(op)):
                    values[op.out.index] = self._run_op(op, values, batch, batch.pos)
                else:  # nobody wants a row
                    values[op.out.index] = np.empty((0, op.out.dim), np.float32)
            return self._collect(values, batch)

    def _run_op(self, op: Op, values: Mapping[int, Floats], batch: Batch, pos: Ints) -> Floats:
        """The value that an op makes, of rows at positions `pos`."""
        numerics = self._numerics
        match op:
            case Embed():
                return embed(op.weight, batch.ids)
            case RmsNorm():
                rows = values[op.x.index].reshape(-1, op.x.dim // op.n_heads)
                weight = None if op.weight is None else dequantize(op.weight)
                return numerics.rms_norm(rows, weight, op.eps).reshape(-1, op.x.dim)
            case Linear():
                out = numerics.matmul(values[op.x.index], self._weights[op.weight.name])
                return out if op.bias is None else out + dequantize(op.bias)
            case Rotate():
                return rotate(numerics, op, values[op.x.index], pos)
            case Attention():
                return self._attend(op, values, batch)
            case Add():
                return values[op.a.index] + values[op.b.index]
            case Mul():
                return values[op.a.index] * values[op.b.index]
            case Bias():
                return values[op.x.index] + dequantize(op.weight)
            case Gain():
                return values[op.x.index] * dequantize(op.weight)
            case Scale():
                return scaled(values[op.x.index], op.factor)
            case SoftCap():
                return numerics.soft_cap(values[op.x.index], op.cap)
            case Activation():
                return numerics.activation(op.kind, values[op.x.index])
            case Clamp():
                return values[op.x.index].clip(np.float32(op.low), np.float32(op.high))
            case MulParts():
                x, factors = values[op.x.index], values[op.factors.index]
                return (x.reshape(*factors.shape, -1) * factors[..., None]).reshape(x.shape)
            case Route():
                return choose(numerics, op, values[op.x.index])
            case ExpertLinear():
                x, route = values[op.x.index], values[op.route.index]
                return multiply_chosen(numerics, op, x, route, self._weights[op.weight.name])
            case ExpertSum():
                return add_parts(values[op.x.index], values[op.route.index])
            case Conv():
                return convolve(numerics, op, values[op.x.index], batch, self._states[op.out.index])
            case DeltaNet():
                given = [values[x.index] for x in inputs(op)]
                return delta_net(numerics, op, given, batch, self._states[op.out.index])
            case SelectRows():
                return values[op.x.index][batch.wanted]

    def _attend(self, op: Attention, values: Mapping[int, Floats], batch: Batch) -> Floats:
        """Store this step's K and V, then let every row read the pages that it sees."""
        n_rows, cache, pages = batch.n_rows, op.cache, self._pages[op.cache_layer]
        group, numerics = self._groups[cache.window], self._numerics
        rows = [
            (batch.tables[i][group], pos)
            for i, pos in zip(batch.seq, batch.pos.tolist(), strict=True)
        ]
        self._store(op, values, rows)
        pinned_pos = np.array([table.pinned_pos(pos) for table, pos in rows], np.int64)
        pinned = dict(values)
        for each in self._pinned[op.out.index]:
            pinned[each.out.index] = self._run_op(each, pinned, batch, pinned_pos)
        q, pinned_q = values[op.q.index], pinned[op.q.index]
        shape = n_rows, op.n_heads, cache.k_dim
        q, pinned_q = q.reshape(shape), pinned_q.reshape(shape)
        if cache.transforms_k:
            q, pinned_q = numerics.hadamard(q), numerics.hadamard(pinned_q)
        kv_head = np.arange(op.n_heads) // (op.n_heads // cache.n_heads)
        out = np.empty((n_rows, op.n_heads, cache.v_dim), np.float32)
        sinks = None if op.sinks is None else dequantize(op.sinks)
        for i, (table, pos) in enumerate(rows):
            pages_seen = table.visible(pos, cache.window)
            absolute = np.array(pages_seen, np.int64)
            arena = table.pages[[table.slot(page) for page in pages_seen]]
            is_pinned = (absolute < table.n_pinned)[:, None, None]
            out[i] = numerics.attend(
                np.where(is_pinned, pinned_q[i], q[i]),
                pages.k[arena].transpose(0, 2, 1, 3)[:, kv_head],
                pages.v[arena].transpose(0, 2, 1, 3)[:, kv_head],
                absolute,
                np.array([table.sees(pos, page, cache.window) for page in pages_seen]),
                op.scale,
                op.soft_cap,
                sinks,
            )[:, : cache.v_dim]
        if cache.transforms_v:
            out = numerics.hadamard(out)
        return out.reshape(n_rows, -1)

    def _store(
        self, op: Attention, values: Mapping[int, Floats], rows: Sequence[tuple[PageTable, int]]
    ) -> None:
        """This step's K and V, at their positions."""
        cache, pages, numerics = op.cache, self._pages[op.cache_layer], self._numerics
        for value, arena, kind, transforms in (
            (op.k, pages.k, cache.k_type, cache.transforms_k),
            (op.v, pages.v, cache.v_type, cache.transforms_v),
        ):
            if value is None:
                continue
            heads = values[value.index].reshape(len(rows), cache.n_heads, -1)
            heads = numerics.hadamard(heads) if transforms else heads
            for (table, pos), row in zip(rows, numerics.stored(heads, kind), strict=True):
                arena[table.pages[table.slot(pos // PAGE)], pos % PAGE] = row

    def _collect(self, values: Mapping[int, Floats], batch: Batch) -> Outputs:
        """What the batch asked for; "hidden" of the last segment is what enters the head."""
        segment, out = self._segment, self._outputs()
        result, kept = values[segment.output.index], segment.residuals
        out.residuals = {layer: values[kept[layer].index] for layer in batch.residuals}
        if batch.output == "hidden" or batch.with_hidden or not segment.is_last:
            out.hidden = values[segment.hidden.index]
        if batch.output == "logits" and segment.is_last:
            out.logits = result[:, : batch.n_logits or None]
        elif batch.output == "ids" and segment.is_last:
            assert batch.samples is not None
            self.sample(result, batch.samples)
            out.ids = batch.samples.ids[: len(result)].copy()
        return out

    def _outputs(self, *, aborted: bool = False) -> Outputs:
        """Nothing yet."""
        hp = self._segment.graph.hparams
        no_logits, no_hidden = (np.empty((0, n), np.float32) for n in (hp.vocab_size, hp.dim))
        return Outputs(no_logits, no_hidden, np.empty(0, np.int32), aborted=aborted)


class ReferenceTicket:
    """One submitted step."""

    def __init__(self, program: ReferenceProgram, batch: Batch) -> None:
        self._program, self._batch = program, batch
        self._outputs: Outputs | None = None
        self.is_aborted = False

    def wait(self) -> Outputs:
        """The outputs of the step; computed on the first call."""
        if self._outputs is None:
            self._outputs = self._program.run(self._batch, self)
        return self._outputs

    def abort(self) -> None:
        """Stop before the next op; from any thread."""
        self.is_aborted = True


@dataclass(frozen=True, slots=True)
class _Pages:
    """The KV arena of one layer: (page, position in page, kv head, head dim or blocks)."""

    k: NDArray[Any]
    v: NDArray[Any]

    @classmethod
    def of(cls, n_pages: int, kv: KV, numerics: Numerics) -> _Pages:
        def pages(dim: int, kind: KVType) -> NDArray[Any]:
            row = numerics.stored(np.zeros((1, kv.n_heads, dim), np.float32), kind)
            return np.zeros((n_pages, PAGE, *row.shape[1:]), row.dtype)

        k = pages(kv.k_dim, kv.k_type)
        return cls(k, k if kv.k_is_v else pages(kv.v_dim, kv.v_type))

    def bytes(self) -> list[NDArray[np.uint8]]:
        """Of K, and of V where it is kept: (page, bytes)."""
        kept = [self.k] if self.v is self.k else [self.k, self.v]
        return [_as_bytes(each) for each in kept]


def _as_bytes(pieces: NDArray[Any]) -> NDArray[np.uint8]:
    """The same memory as (piece, bytes)."""
    n_bytes = math.prod(pieces.shape[1:]) * pieces.itemsize
    return pieces.reshape(-1).view(np.uint8).reshape(len(pieces), n_bytes)
