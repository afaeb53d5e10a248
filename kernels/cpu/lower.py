"""Lowers a recorded graph to CPU ops: which kernel runs on which buffers, in which order.

Knows kernels by name and argument layout only; runs nothing and allocates nothing. Shapes and
types are what `shapes.py` has let through.

What `edgeinfer.fusion` has put together runs as one kernel; every other op runs as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from edgeinfer.batch import StepLimits
from edgeinfer.fusion import (
    ExpertMatmuls,
    Matmul,
    Matmuls,
    PinnedAttention,
    PinnedRotate,
    RotatedAttention,
    SelectedNorm,
    Step,
    SwiGlu,
    fuse,
)
from edgeinfer.graph import (
    KV,
    Activation,
    Add,
    Attention,
    Bias,
    Clamp,
    Embed,
    ExpertLinear,
    ExpertSum,
    Mul,
    MulParts,
    RmsNorm,
    Rope,
    RopeKind,
    Rotate,
    Route,
    Scale,
    Segment,
    SelectRows,
    SoftCap,
    Value,
)
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.commands import (
    SHARE,
    Args,
    Buffer,
    KernelOp,
    KernelPart,
    Lowered,
    recut,
)
from edgeinfer.kernels.cpu.formats import FORMATS, Format
from edgeinfer.kernels.cpu.layout import row_stride
from edgeinfer.kernels.cpu.lower_experts import ExpertLowering
from edgeinfer.known import selected
from edgeinfer.quant import Weight


class LayerCache(NamedTuple):
    """Where one layer's K and V lie inside a page of the arena."""

    k_base: Buffer
    v_base: Buffer
    page_bytes: int
    tables: int  # where its page tables begin
    max_segments: int  # that a query may see


class WeightAddresses(Protocol):
    """Where packed weights will lie."""

    def matrix(self, weight: Weight) -> Buffer: ...
    def vector(self, weight: Weight) -> Buffer: ...
    def doubles(self, values: np.ndarray) -> Buffer: ...


def float_bits(x: float) -> int:
    """The bits of a float32, as an argument word."""
    return int(np.float32(x).view(np.int32))


class _Heads(NamedTuple):
    """Heads of rows of floats, and the norm that is to be taken of each."""

    rows: Buffer | int
    stride: int
    n: int
    dim: int
    norm: Weight | None = None


_NO_HEADS = _Heads(0, 0, 0, 0)
_NO_BUFFER = Buffer("none", 0, is_kept=True)
_NO_CACHE = LayerCache(_NO_BUFFER, _NO_BUFFER, 0, 0, 0)


class _Reads:
    """Which steps read a value, and as what."""

    def __init__(self, steps: Sequence[Step], kept: set[Value]) -> None:
        self._reads: dict[Value, list[int]] = {}  # the steps that read it, ascending
        self._as_floats, self._as_a32 = set(kept), set[Value]()
        self._kept = kept
        for i, step in enumerate(steps):
            for op in step.parts if isinstance(step, (Matmuls, ExpertMatmuls)) else [step]:
                for name, value in zip(op._fields[2:], op[2:], strict=True):
                    if isinstance(value, Value):
                        self._reads.setdefault(value, []).append(i)
                        is_a32 = (
                            isinstance(op, (Matmul, ExpertLinear))
                            and name == "x"
                            and _reads_a32(op)
                        )
                        (self._as_a32 if is_a32 else self._as_floats).add(value)

    def is_last(self, value: Value, i: int) -> bool:
        """Whether step i reads a value as the only one from there on, and once."""
        reads = self._reads[value]
        return value not in self._kept and reads[-1] == i and reads.count(i) == 1

    def is_quantised(self, value: Value) -> bool:
        return value in self._as_a32

    def is_quantised_only(self, value: Value) -> bool:
        return value in self._as_a32 and value not in self._as_floats


class Lowering(ExpertLowering):
    """One pass over a segment's steps."""

    def __init__(
        self,
        segment: Segment,
        limits: StepLimits,
        weights: WeightAddresses,
        caches: Mapping[int, LayerCache],
    ) -> None:
        super().__init__()
        self._segment, self._limits = segment, limits
        self._weights, self._caches = weights, caches
        self._steps = fuse(segment)
        self._reads = _Reads(self._steps, {segment.output, segment.hidden})
        self._selected = selected(segment)
        self._floats: dict[Value, Buffer] = {}  # where a value's f32 rows are
        self._quantised: dict[Value, Buffer] = {}
        self._fours: dict[Value, Buffer] = {}  # what matmuls of floats read
        self._angles: dict[tuple[Rope, int], tuple[Buffer, Buffer]] = {}
        self._attention_plans: dict[tuple[int, int], Buffer] = {}
        self._tables = {
            op.layer: caches[op.cache_layer].tables
            for op in segment.ops
            if isinstance(op, Attention)
        }
        scratch_bytes = limits.n_threads * layout.MATMUL_SCRATCH_BYTES
        self._matmul_scratch = Buffer("matmul scratch", scratch_bytes)
        self._out = Lowered()

    def run(self) -> Lowered:
        out, segment = self._out, self._segment
        if segment.input is not None:
            out.input = self._float_buffer(segment.input, "input")
        for i, step in enumerate(self._steps):
            self._lower(step, i)
            if segment.hidden in self._floats and not out.head:
                out.head = len(out.ops)
        out.ops = [
            recut(op, self._limits.n_threads, SHARE) if op.reads_weights else op for op in out.ops
        ]
        out.hidden = self._floats[segment.hidden]
        out.logits = self._floats[segment.output] if segment.is_last else None
        out.place()
        return out

    # -- one step ------------------------------------------------------------------------------

    def _lower(self, step: Step, i: int) -> None:
        match step:
            case Embed():
                self._embed(step)
            case RmsNorm():
                self._norm(step)
            case SelectedNorm():
                self._whole_norm(step, layout.WANTED_ROWS)
            case Matmuls():
                self._matmuls(step, i)
            case SwiGlu():
                args = self._pair(step.gate, step.up)
                self._emit("swiglu", "swiglu", [*args, *self._sinks(step.out, "ffn")])
            case Rotate() | PinnedRotate():
                self._rotate(step)
            case RotatedAttention():
                self._rotated_attention(step)
            case PinnedAttention():
                self._pinned_attention(step)
            case Add():
                self._pointwise("add", step, step.a, step.b)
            case Mul():
                self._pointwise("mul", step, step.a, step.b)
            case Bias():
                self._pointwise("add", step, step.x, step.weight)
            case Scale():
                self._pointwise("scale", step, step.x, parameter=step.factor)
            case SoftCap():
                self._pointwise("soft_cap", step, step.x, parameter=step.cap)
            case Activation():
                self._pointwise(step.kind, step, step.x)
            case Clamp():
                self._pointwise("clamp", step, step.x, parameter=step.low, bound=step.high)
            case MulParts():
                self._mul_parts(step)
            case Route():
                self._route(step)
            case ExpertMatmuls():
                self._expert_matmuls(step)
            case ExpertSum():
                self._expert_sum(step)
            case SelectRows():
                args = self._copied(step.x, layout.WANTED_ROWS)
                args += self._sinks(step.out, "selected")
                self._emit("select", "copy_rows", args, layout.COUNT_WANTED)
            case _:
                _never(step)

    def _embed(self, op: Embed) -> None:
        fmt = _format(op.weight)
        x = self._float_buffer(op.out, "residual")
        args: Args = [
            self._weights.matrix(op.weight), fmt.n_blocks(op.weight.shape[1]), x,
        ]  # fmt: skip
        args += [row_stride(op.out.dim), op.out.dim]
        self._emit("embed", f"embed.{_type(op.weight)}", args)

    def _norm(self, op: RmsNorm) -> None:
        rows, rule = self._rows_of(op.x)
        if op.n_heads == 1 and op.weight is not None and rows == layout.ALL_ROWS:
            self._whole_norm(SelectedNorm(op.layer, op.out, op.x, op.weight, op.eps), rows)
            return
        args: Args = [
            self._floats[op.x], row_stride(op.x.dim),
            self._weights.vector(op.weight) if op.weight else 0, float_bits(op.eps),
            op.n_heads, op.x.dim // op.n_heads, rows, *self._sinks(op.out, "norm"),
        ]  # fmt: skip
        self._emit("norm", "norm_heads", args, rule)

    def _whole_norm(self, op: SelectedNorm, rows: int) -> None:
        args: Args = [
            self._floats[op.x], row_stride(op.x.dim), self._weights.vector(op.weight),
        ]  # fmt: skip
        args += [float_bits(op.eps), op.x.dim, rows, *self._sinks(op.out, "norm")]
        rule = layout.COUNT_WANTED if rows == layout.WANTED_ROWS else layout.COUNT_ROWS
        self._emit("norm", "norm", args, rule)

    def _pointwise(
        self,
        kind: str,
        op: Add | Mul | Bias | Scale | SoftCap | Activation | Clamp,
        a: Value,
        b: Value | Weight | None = None,
        parameter: float = 0.0,
        bound: float = 0.0,
    ) -> None:
        """out = f(a, b) or f(a, parameter, bound), value by value; a vector b is one for all."""
        rows, rule = self._rows_of(op.out)
        other: Args = [0, 0]
        if isinstance(b, Value):
            other = [self._floats[b], row_stride(b.dim)]
        elif b is not None:
            other = [self._weights.vector(b), 0]
        args: Args = [
            self._floats[a], row_stride(a.dim), *other,
            float_bits(parameter) & 0xFFFFFFFF | float_bits(bound) << 32, a.dim, rows,
            *self._sinks(op.out, kind),
        ]  # fmt: skip
        self._emit(kind, f"pointwise.{kind}", args, rule)

    def _mul_parts(self, op: MulParts) -> None:
        rows, rule = self._rows_of(op.out)
        n_parts = op.factors.dim
        args: Args = [
            self._floats[op.x], row_stride(op.x.dim), self._floats[op.factors], row_stride(n_parts),
            n_parts, op.x.dim // n_parts, rows, *self._sinks(op.out, "mul"),
        ]  # fmt: skip
        self._emit("mul_parts", "mul_parts", args, rule)

    def _copied(self, x: Value, rows: int) -> Args:
        return [self._floats[x], row_stride(x.dim), x.dim, rows]

    def _pair(self, a: Value, b: Value) -> Args:
        return [self._floats[a], self._floats[b], row_stride(b.dim), b.dim]

    # -- matmuls -------------------------------------------------------------------------------

    def _matmuls(self, step: Matmuls, i: int) -> None:
        """Matmuls of one input, side by side."""
        x = step.parts[0].x
        if any(map(_reads_a32, step.parts)) and x not in self._quantised:
            self._quantise(x)
        if not all(map(_reads_a32, step.parts)) and x not in self._fours:
            self._lay_in_fours(x)
        names = [op.weight.name.split(".")[-2] for op in step.parts]
        parts = [self._matmul(op, i) for op in step.parts]
        self._out.ops.append(KernelOp("+".join(names), parts))

    def _matmul(self, op: Matmul, i: int) -> KernelPart:
        """A matmul in one chunk."""
        fmt = _format(op.weight)
        n_rows, n_cols = op.weight.shape
        n_groups, n_blocks = -(-n_rows // 8), fmt.n_blocks(n_cols)
        rows, _ = self._rows_of(op.x)
        residual, out = self._residual(op, i)
        if fmt.activation == "f32":
            x, row_bytes = self._fours[op.x], row_stride(n_cols)
        else:
            x, row_bytes = self._quantised[op.x], _a32_bytes(n_cols)
        bias = self._weights.vector(op.bias) if op.bias else 0
        args: Args = [
            self._weights.matrix(op.weight), n_blocks, x, out, row_stride(n_rows),
            bias, residual or 0, rows, row_bytes, self._matmul_scratch, 0, n_groups,
        ]  # fmt: skip
        n_bytes = n_groups * n_blocks * fmt.packed_bytes
        kernel = f"matmul.{_type(op.weight)}"
        return KernelPart(kernel, args, 1, n_bytes, n_rows * n_cols, rows)

    def _residual(self, op: Matmul, i: int) -> tuple[Buffer | None, Buffer]:
        """The rows to add to this matmul's result and the rows it leaves: often the same."""
        if op.residual is None:
            return None, self._float_buffer(op.out, "linear")
        residual = self._floats[op.residual]
        if op.residual is self._segment.input or not self._reads.is_last(op.residual, i):
            return residual, self._float_buffer(op.out, "residual")
        self._floats[op.out] = residual
        return residual, residual

    def _quantise(self, x: Value) -> None:
        """A value whose rows nothing has quantised on their way."""
        rows, rule = self._rows_of(x)
        floats, stride = self._floats[x], row_stride(x.dim)
        quantised = self._quantised_buffer(x, "quantised")
        args: Args = [floats, stride, x.dim, rows, floats, stride, 0, quantised]
        self._emit("quantise", "quantise", args, rule)

    def _lay_in_fours(self, x: Value) -> None:
        """A value whose rows matmuls of floats read."""
        rows, rule = self._rows_of(x)
        stride = row_stride(x.dim)
        fours = self._fours[x] = Buffer("fours", stride * self._n_rows(x))
        self._emit("fours", "fours", [self._floats[x], stride, x.dim, rows, fours], rule)

    # -- attention -----------------------------------------------------------------------------

    def _rotate(self, op: Rotate | PinnedRotate) -> None:
        """The heads of a value in a place of their own."""
        stride = row_stride(op.x.dim)
        out = self._float_buffer(op.out, "rotated")
        self._emit("copy", "copy_rows", [*self._copied(op.x, layout.ALL_ROWS), out, stride, 0, 0])
        angles, pinned_angles = self._angles_of(op)
        heads = _Heads(out, stride, op.n_heads, op.x.dim // op.n_heads)
        angles = pinned_angles if isinstance(op, PinnedRotate) else angles
        self._heads(op.rope.kind, q=heads, n_pairs=op.rope.n_dims // 2, angles=angles)

    def _rotated_attention(self, op: RotatedAttention) -> None:
        kv, n_pairs = op.cache, op.rope.n_dims // 2
        angles, pinned_angles = self._angles_of(op)
        q = _Heads(self._floats[op.q], row_stride(op.q.dim), op.n_heads, kv.k_dim, op.q_norm)
        k, v = self._stored(op)
        pinned_q = Buffer("pinned q", q.stride * self._limits.max_rows)
        self._heads(
            op.rope.kind, q, pinned_q, k._replace(norm=op.k_norm), v, n_pairs, angles,
            pinned_angles, op.eps, self._cache_of(op),
        )  # fmt: skip
        self._attend(op, pinned_q)

    def _pinned_attention(self, op: PinnedAttention) -> None:
        k, v = self._stored(op)
        if k.n:
            self._heads("norm", k=k, v=v, cache=self._cache_of(op))
        self._attend(op, self._floats[op.pinned_q])

    def _stored(self, op: RotatedAttention | PinnedAttention) -> tuple[_Heads, _Heads]:
        """The heads of k and v, none where another layer's are read."""
        kv = op.cache
        if op.k is None or op.v is None:
            return _NO_HEADS, _NO_HEADS
        return (
            _Heads(self._floats[op.k], row_stride(op.k.dim), kv.n_heads, kv.k_dim),
            _Heads(self._floats[op.v], row_stride(op.v.dim), kv.n_heads, kv.v_dim),
        )

    def _cache_of(self, op: RotatedAttention | PinnedAttention) -> LayerCache:
        return self._caches[op.layer if op.source is None else op.source]

    def _heads(
        self,
        kind: RopeKind,
        q: _Heads = _NO_HEADS,
        pinned_q: Buffer | int = 0,
        k: _Heads = _NO_HEADS,
        v: _Heads = _NO_HEADS,
        n_pairs: int = 0,
        angles: Buffer | int = 0,
        pinned_angles: Buffer | int = 0,
        eps: float = 0.0,
        cache: LayerCache = _NO_CACHE,
    ) -> None:
        """Norm and rotate heads in place, and store those of k and v."""
        args: Args = [
            q.rows, q.stride, k.rows, k.stride, v.rows, v.stride, pinned_q, q.n, k.n,
            k.dim or q.dim, v.dim, n_pairs, angles, pinned_angles,
            *(self._weights.vector(heads.norm) if heads.norm else 0 for heads in (q, k)),
            float_bits(eps), cache.k_base, cache.page_bytes, cache.v_base, cache.page_bytes,
            cache.tables,
        ]  # fmt: skip
        self._emit("rotate", f"rotate.{kind}", args)

    def _attend(self, op: RotatedAttention | PinnedAttention, pinned_q: Buffer) -> None:
        limits, kv, cache = self._limits, op.cache, self._cache_of(op)
        parts = Buffer(
            "attention parts",
            layout.parts_bytes(limits.max_rows, op.n_heads, kv.k_dim, kv.v_dim, cache.max_segments),
        )
        common: Args = [
            self._plan(kv, cache), self._floats[op.q], row_stride(op.q.dim), pinned_q,
            op.n_heads, kv.n_heads, float_bits(op.scale), cache.k_base, cache.page_bytes,
            cache.v_base, cache.page_bytes, parts, kv.k_dim, kv.v_dim, cache.tables, kv.window,
            float_bits(op.soft_cap), self._weights.vector(op.sinks) if op.sinks else 0,
        ]  # fmt: skip
        kernel = f"attend.{kv.k_dim}.{kv.v_dim}"
        kernel += ".window" * (kv.window > 0) + ".cap" * (op.soft_cap > 0)
        self._emit("attend", kernel, common, layout.COUNT_ITEMS)
        fold = [*common, *self._sinks(op.out, "attention")]
        self._emit("fold", "fold.sinks" if op.sinks else "fold", fold)

    def _plan(self, kv: KV, cache: LayerCache) -> Buffer:
        """The step's attention work, planned once for all layers whose queries see alike."""
        key = kv.n_heads, kv.window
        if key not in self._attention_plans:
            n_bytes = layout.attention_plan_bytes(self._limits.max_rows, cache.max_segments)
            plan = self._out.scratch.place(Buffer("attention plan", n_bytes, is_kept=True))
            self._attention_plans[key] = plan
            args: Args = [plan, kv.n_heads, cache.max_segments, kv.window, cache.tables]
            self._out.prologue.append(KernelPart("plan_attention", args, 1))
        return self._attention_plans[key]

    def _angles_of(self, op: Rotate | PinnedRotate | RotatedAttention) -> tuple[Buffer, Buffer]:
        """The step's rotation angles, made once for all layers that rotate alike.

        Those for pinned pages depend on the tables of the layer's attention, too.
        """
        rope, key = op.rope, (op.rope, self._tables.get(op.layer, 0))
        if key not in self._angles:
            n_pairs = rope.n_dims // 2
            size = n_pairs * 2 * 4 * self._limits.max_rows
            pair = Buffer("angles", size), Buffer("pinned angles", size)
            self._angles[key] = pair
            args: Args = [self._weights.doubles(rope.frequencies()), n_pairs, *pair, key[1]]
            if rope.magnitude == 1 and rope.growth is None:
                self._emit("angles", "angles", args)
            else:
                table, span = rope.magnitudes(), rope.growth.n_ctx if rope.growth else 1
                args += [self._weights.doubles(table), span, len(table)]
                self._emit("angles", "angles.scaled", args)
        return self._angles[key]

    # -- values and buffers --------------------------------------------------------------------

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
        buffer = Buffer(f"{name} a32", _a32_bytes(value.dim) * self._n_rows(value))
        self._quantised[value] = buffer
        return buffer

    def _emit(self, group: str, kernel: str, args: Args, rule: int = layout.COUNT_ROWS) -> None:
        self._out.ops.append(KernelOp(group, [KernelPart(kernel, args, rule)]))


def _a32_bytes(dim: int) -> int:
    """Bytes of one quantised row."""
    return dim // 32 * layout.A32_BYTES


def _type(weight: Weight) -> str:
    return weight.type.name.lower()


def _reads_a32(op: Matmul | ExpertLinear) -> bool:
    return _format(op.weight).activation == "a32"


def _format(weight: Weight) -> Format:
    return FORMATS[_type(weight)]


def _never(step: NoReturn) -> NoReturn:
    raise AssertionError(f"no kernel for {step}")
