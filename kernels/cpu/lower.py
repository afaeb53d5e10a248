"""Lowers a recorded graph to CPU ops: which kernel runs on which buffers, in which order.

Knows kernels by name and argument layout only; runs nothing and allocates nothing. Shapes and
types are what `shapes.py` has let through.

Fusion happens here: projections of one input run side by side in one op, an addition rides in
the matmul that feeds it, q/k norms ride in the rotation, and whatever feeds a quantised matmul
leaves its row quantised on the way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from edgeinfer.batch import StepLimits
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import (
    Add,
    Attention,
    Embed,
    Linear,
    Mul,
    Op,
    RmsNorm,
    Rope,
    Rotate,
    Segment,
    SelectRows,
    Silu,
    Value,
)
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.formats import FORMATS, Format
from edgeinfer.quant import Weight, dequantize

# Weight bytes of a matmul's chunks: long ones read memory fastest, short ones even out the end.
# Measured in tests/bench/TUNING.md, "Chunks".
_MOST_CHUNK, _LEAST_CHUNK = 1 << 20, 32 << 10
SHARE = 2.0  # how many times smaller a chunk is than a thread's even share of the rest


@dataclass(eq=False, slots=True)
class Buffer:
    """Scratch memory of one step; its address is set once all lifetimes are known."""

    name: str
    n_bytes: int
    address: int = 0


Args: TypeAlias = "list[int | Buffer]"  # argument words; a buffer stands for its address


class KernelPart(NamedTuple):
    """One kernel with its argument words (a Buffer stands for its address) and chunk rule.

    Weight bytes, and multiplications per row of `rows`, are for benchmarks.
    """

    kernel: str
    args: Args
    rule: int
    weight_bytes: int = 0
    macs: int = 0
    rows: int = layout.ALL_ROWS


class KernelOp(NamedTuple):
    """Kernels that may run side by side. `group` names what the op is, for benchmarks."""

    group: str
    parts: list[KernelPart]

    @property
    def reads_weights(self) -> bool:
        """Whether these are matmuls."""
        return self.parts[0].kernel.startswith("matmul.")

    def buffers(self) -> Iterable[Buffer]:
        for part in self.parts:
            for arg in part.args:
                if isinstance(arg, Buffer):
                    yield arg


class LayerCache(NamedTuple):
    """Where one layer's K and V lie inside a page of the arena."""

    k_base: int
    v_base: int
    page_bytes: int


class WeightAddresses(Protocol):
    """Where packed weights will lie."""

    def matrix(self, weight: Weight) -> int: ...
    def vector(self, weight: Weight) -> int: ...
    def doubles(self, values: np.ndarray) -> int: ...


@dataclass(slots=True)
class Lowered:
    """The ops of a segment and the buffers by which a program talks to them."""

    ops: list[KernelOp] = field(default_factory=list)
    prologue: KernelPart | None = None
    head: int = 0  # ops before the logits: a step that wants hidden rows stops there
    input: Buffer | None = None
    hidden: Buffer | None = None
    logits: Buffer | None = None
    scratch: list[Buffer] = field(default_factory=list)
    scratch_bytes: int = 0

    def kernels(self) -> set[str]:
        names = {part.kernel for op in self.ops for part in op.parts}
        return names | ({self.prologue.kernel} if self.prologue else set())


def row_stride(dim: int) -> int:
    """Bytes between rows of floats."""
    return 4 * layout.whole_vectors(dim)


def float_bits(x: float) -> int:
    """The bits of a float32, as an argument word."""
    return int(np.float32(x).view(np.int32))


class Lowering:
    """One pass over a segment's ops."""

    def __init__(
        self,
        segment: Segment,
        limits: StepLimits,
        weights: WeightAddresses,
        caches: Mapping[int, LayerCache],
        max_segments: int,
    ) -> None:
        self._segment, self._limits = segment, limits
        self._weights, self._caches = weights, caches
        self._max_segments = max_segments
        self._producer = {op.out: op for op in segment.ops}
        self._consumers: dict[Value, list[Op]] = {}
        for op in segment.ops:
            for value in _inputs(op):
                self._consumers.setdefault(value, []).append(op)
        self._order = {op.out: i for i, op in enumerate(segment.ops)}
        self._floats: dict[Value, Buffer] = {}  # where a value's f32 rows are
        self._quantised: dict[Value, Buffer] = {}
        self._rows: dict[Value, int] = {}  # ALL_ROWS or WANTED_ROWS
        self._angles: dict[Rope, tuple[Buffer, Buffer]] = {}
        scratch_bytes = limits.n_threads * layout.MATMUL_SCRATCH_BYTES
        self._matmul_scratch = Buffer("matmul scratch", scratch_bytes)
        self._out = Lowered()

    def run(self) -> Lowered:
        out, segment = self._out, self._segment
        if segment.input is not None:
            out.input = self._float_buffer(segment.input, "input")
        for op in segment.ops:
            self._lower(op)
        if segment.is_last:
            out.logits = self._floats[segment.output]
            head = self._producer[segment.output]
            assert isinstance(head, Linear)
            out.hidden = self._floats[head.x]
        else:
            out.hidden = self._floats[segment.output]
            out.head = len(out.ops)
        self._place()
        return out

    # -- one op --------------------------------------------------------------------------------

    def _lower(self, op: Op) -> None:
        if isinstance(op, Linear):
            if op.out not in self._floats:
                self._linears(self._siblings(op))
        elif isinstance(op, RmsNorm):
            if not self._is_fused_norm(op):
                self._norm(op)
        elif isinstance(op, Attention):
            self._attention(op)
        elif isinstance(op, Mul):
            self._swiglu(op)
        elif isinstance(op, Embed):
            self._embed(op)
        elif isinstance(op, Add):
            if op.out not in self._floats:
                raise _missing("an addition that no matmul feeds")
        elif isinstance(op, SelectRows):
            self._rows[op.out] = layout.WANTED_ROWS
            self._floats[op.out] = self._floats[op.x]
            if any(not isinstance(c, RmsNorm) for c in self._consumers.get(op.out, [])):
                raise _missing("selected rows that no norm reads")
        elif isinstance(op, Silu):
            if any(not isinstance(c, Mul) for c in self._consumers.get(op.out, [])):
                raise _missing("a SiLU that is not part of a SwiGLU")
        elif isinstance(op, Rotate):
            if any(not isinstance(c, Attention) for c in self._consumers.get(op.out, [])):
                raise _missing("a rotation that no attention reads")

    def _embed(self, op: Embed) -> None:
        fmt = _format(op.weight)
        x = self._float_buffer(op.out, "residual")
        args: Args = [
            self._weights.matrix(op.weight), fmt.n_blocks(op.weight.shape[1]), x,
        ]  # fmt: skip
        args += [row_stride(op.out.dim), op.out.dim]
        self._emit("embed", f"embed.{_type(op.weight)}", args, layout.COUNT_ROWS)

    def _norm(self, op: RmsNorm) -> None:
        if op.n_heads != 1:
            raise _missing("a norm per head that no rotation reads")
        rows = self._rows_of(op.x)
        self._rows[op.out] = rows
        args: Args = [
            self._floats[op.x], row_stride(op.x.dim), self._weights.vector(op.weight),
        ]  # fmt: skip
        args += [float_bits(op.eps), op.x.dim, rows, *self._sinks(op.out, "norm")]
        rule = layout.COUNT_WANTED if rows == layout.WANTED_ROWS else layout.COUNT_ROWS
        self._emit("norm", "norm", args, rule)

    def _swiglu(self, op: Mul) -> None:
        silu, up = self._producer.get(op.a), op.b
        if not isinstance(silu, Silu):
            silu, up = self._producer.get(op.b), op.a
        if not isinstance(silu, Silu):
            raise _missing("a product that is not a SwiGLU")
        args: Args = [
            self._floats[silu.x], self._floats[up], row_stride(up.dim), up.dim,
        ]  # fmt: skip
        args += self._sinks(op.out, "ffn")
        self._emit("swiglu", "swiglu", args, layout.COUNT_ROWS)

    def _linears(self, ops: list[Linear]) -> None:
        """Matmuls of one input, side by side."""
        if ops[0].out is self._segment.output:
            self._out.head = len(self._out.ops)
        group = (
            ops[0].weight.name.rsplit(".", 2)[-2]
            if len(ops) == 1
            else "+".join(op.weight.name.split(".")[-2] for op in ops)
        )
        whole = KernelOp(group, [self._linear(op) for op in ops])
        self._out.ops.append(recut(whole, self._limits.n_threads, SHARE))

    def _linear(self, op: Linear) -> KernelPart:
        """A matmul in one chunk."""
        fmt = _format(op.weight)
        n_rows, n_cols = op.weight.shape
        n_groups, n_blocks = -(-n_rows // 8), fmt.n_blocks(n_cols)
        rows = self._rows_of(op.x)
        self._rows[op.out] = rows
        residual, out = self._residual(op)
        if fmt.activation == "f32":
            x, row_bytes = self._floats[op.x], row_stride(n_cols)
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

    def _residual(self, op: Linear) -> tuple[Buffer | None, Buffer]:
        """The rows to add to this matmul's result and the rows it leaves: often the same."""
        consumers = self._consumers.get(op.out, [])
        if len(consumers) != 1 or not isinstance(consumers[0], Add):
            return None, self._float_buffer(op.out, "linear")
        add = consumers[0]
        other = add.b if add.a is op.out else add.a
        if other not in self._floats:
            raise _missing("an addition whose other side comes later")
        residual = self._floats[other]
        last_use = max(self._order[c.out] for c in self._consumers[other])
        in_place = last_use == self._order[add.out] and other is not self._segment.input
        out = residual if in_place else self._float_buffer(add.out, "residual")
        self._floats[op.out] = self._floats[add.out] = out
        return residual, out

    def _attention(self, op: Attention) -> None:
        q, k = self._producer[op.q], self._producer[op.k]
        if not isinstance(q, Rotate) or not isinstance(k, Rotate) or op.rope is None:
            raise _missing("attention without rotary positions")
        (q_x, q_norm), (k_x, k_norm) = self._normed(q.x), self._normed(k.x)
        kv, cache, n_pairs = op.cache, self._caches[op.layer], op.rope.n_dims // 2
        angles, pinned_angles = self._angles_of(op.rope)
        eps = next((n.eps for n in (q_norm, k_norm) if n), 0.0)
        q_stride = row_stride(op.q.dim)
        q_buffer = self._floats[q_x]
        pinned_q = Buffer("pinned q", q_stride * self._limits.max_rows)
        args: Args = [
            q_buffer, q_stride, self._floats[k_x], row_stride(op.k.dim),
            self._floats[op.v], row_stride(op.v.dim), pinned_q, op.n_heads, kv.n_heads,
            kv.k_dim, kv.v_dim, n_pairs, angles, pinned_angles,
            self._weights.vector(q_norm.weight) if q_norm else 0,
            self._weights.vector(k_norm.weight) if k_norm else 0,
            float_bits(eps), cache.k_base, cache.page_bytes, cache.v_base, cache.page_bytes,
        ]  # fmt: skip
        self._emit("rotate", f"rotate.{op.rope.kind}", args, layout.COUNT_ROWS)
        limits = self._limits
        parts = Buffer(
            "attention parts",
            layout.parts_bytes(limits.max_rows, op.n_heads, kv.k_dim, kv.v_dim, self._max_segments),
        )
        common: Args = [
            q_buffer, q_stride, pinned_q, op.n_heads, kv.n_heads, float_bits(op.scale),
            cache.k_base, cache.page_bytes, cache.v_base, cache.page_bytes, parts,
            self._max_segments, kv.k_dim, kv.v_dim,
        ]  # fmt: skip
        self._emit("attend", f"attend.{kv.k_dim}.{kv.v_dim}", common, layout.COUNT_ITEMS)
        fold = [*common, *self._sinks(op.out, "attention")]
        self._emit("fold", "fold", fold, layout.COUNT_ROWS)
        if self._out.prologue is None:
            self._out.prologue = KernelPart("plan_attention", list(common), 1)

    def _angles_of(self, rope: Rope) -> tuple[Buffer, Buffer]:
        """The step's rotation angles, made once for all layers that rotate alike."""
        if rope not in self._angles:
            n_pairs = rope.n_dims // 2
            size = n_pairs * 2 * 4 * self._limits.max_rows
            pair = Buffer("angles", size), Buffer("pinned angles", size)
            self._angles[rope] = pair
            freqs = self._weights.doubles(frequencies(rope))
            self._emit("angles", "angles", [freqs, n_pairs, *pair], layout.COUNT_ROWS)
        return self._angles[rope]

    # -- values and buffers --------------------------------------------------------------------

    def _siblings(self, first: Linear) -> list[Linear]:
        """The run of linears that start here and share their input."""
        start, run = self._order[first.out], []
        for op in self._segment.ops[start:]:
            if not isinstance(op, Linear) or op.x is not first.x:
                break
            run.append(op)
        return run

    def _normed(self, x: Value) -> tuple[Value, RmsNorm | None]:
        """x, or what it was before a norm per head that the rotation takes over."""
        op = self._producer.get(x)
        if isinstance(op, RmsNorm):
            return op.x, op
        return x, None

    def _is_fused_norm(self, op: RmsNorm) -> bool:
        consumers = self._consumers.get(op.out, [])
        return bool(consumers) and all(isinstance(c, Rotate) for c in consumers)

    def _rows_of(self, x: Value) -> int:
        return self._rows.get(x, layout.ALL_ROWS)

    def _n_rows(self, x: Value) -> int:
        wanted = self._rows_of(x) == layout.WANTED_ROWS
        return self._limits.max_outputs if wanted else self._limits.max_rows

    def _sinks(self, out: Value, name: str) -> Args:
        """Sink words for a value: floats, and their quantised form where a consumer reads that."""
        consumers = self._consumers.get(out, [])
        quantised = [
            isinstance(c, Linear) and _format(c.weight).activation == "a32" for c in consumers
        ]
        is_hidden = any(c.out is self._segment.output for c in consumers)
        stride = row_stride(out.dim)
        if all(quantised) and quantised and not is_hidden:
            row = Buffer(f"{name} of each thread", stride * self._limits.n_threads)
            words: Args = [row, 0, stride, 0]
        else:
            words = [self._float_buffer(out, name), stride, 0, 0]
        if any(quantised):
            buffer = Buffer(f"{name} a32", _a32_bytes(out.dim) * self._n_rows(out))
            self._quantised[out] = words[layout.SINK_A32 // layout.WORD] = buffer
        return words

    def _float_buffer(self, value: Value, name: str) -> Buffer:
        buffer = Buffer(name, row_stride(value.dim) * self._n_rows(value))
        self._floats[value] = buffer
        return buffer

    def _emit(self, group: str, kernel: str, args: Args, rule: int) -> None:
        self._out.ops.append(KernelOp(group, [KernelPart(kernel, args, rule)]))

    def _place(self) -> None:
        """Offsets for every buffer; one that is no longer read gives its place to the next."""
        out = self._out
        n_ops = len(out.ops)
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for i, op in enumerate(out.ops):
            for buffer in op.buffers():
                first.setdefault(buffer, i)
                last[buffer] = i
        for kept in (out.input, out.hidden, out.logits):
            if kept is not None:
                first[kept], last[kept] = 0, n_ops
        starting, ending = _by_op(first, n_ops), _by_op(last, n_ops)
        free: dict[int, list[int]] = {}
        for i in range(n_ops):
            for buffer in starting[i]:
                places = free.get(buffer.n_bytes)
                if places:
                    buffer.address = places.pop()
                else:
                    buffer.address = out.scratch_bytes
                    out.scratch_bytes += _aligned(buffer.n_bytes)
            for buffer in ending[i]:
                free.setdefault(buffer.n_bytes, []).append(buffer.address)
        out.scratch = list(first)


def cut(
    n_groups: int, group_bytes: int, left: int, n_threads: int, share: float = SHARE
) -> list[int]:
    """Bounds of chunks of n_groups groups of 8 weight rows, the first of `left` bytes to be read.

    Whoever comes next takes 1 / `share` of what would be a thread's even share of the rest (guided
    self-scheduling, Polychronopoulos and Kuck 1987), in whole panels of groups.
    """
    bounds = [0]
    while bounds[-1] < n_groups:
        n_bytes = max(_LEAST_CHUNK, min(left / (share * n_threads), _MOST_CHUNK))
        n_panels = max(1, round(n_bytes / (group_bytes * layout.PANEL_GROUPS)))
        bounds.append(min(bounds[-1] + n_panels * layout.PANEL_GROUPS, n_groups))
        left -= (bounds[-1] - bounds[-2]) * group_bytes
    return bounds


def recut(op: KernelOp, n_threads: int, share: float) -> KernelOp:
    """The same matmuls in other chunks."""
    parts = []
    left = sum(part.weight_bytes for part in op.parts)
    for part in op.parts:
        first = layout.MATMUL_BOUNDS // layout.WORD
        n_groups = part.args[-1]
        assert isinstance(n_groups, int)
        bounds = cut(n_groups, part.weight_bytes // n_groups, left, n_threads, share)
        left -= part.weight_bytes
        parts.append(part._replace(args=[*part.args[:first], *bounds], rule=len(bounds) - 1))
    return KernelOp(op.group, parts)


def _by_op(when: Mapping[Buffer, int], n_ops: int) -> list[list[Buffer]]:
    lists: list[list[Buffer]] = [[] for _ in range(n_ops + 1)]
    for buffer, i in when.items():
        lists[i].append(buffer)
    return lists


def frequencies(rope: Rope) -> np.ndarray:
    """Radians per position of each pair, in float64; the linear scale is folded in."""
    exponents = np.arange(rope.n_dims // 2, dtype=np.float64) * 2 / rope.n_dims
    factors = np.ones(rope.n_dims // 2)
    if rope.factors is not None:
        factors = dequantize(rope.factors).astype(np.float64)
    freqs: np.ndarray = rope.scale / (np.float64(rope.base) ** exponents * factors)
    return freqs


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // 64) * 64


def _a32_bytes(dim: int) -> int:
    """Bytes of one quantised row."""
    return dim // 32 * layout.A32_BYTES


def _type(weight: Weight) -> str:
    return weight.type.name.lower()


def _format(weight: Weight) -> Format:
    return FORMATS[_type(weight)]


def _missing(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the cpu backend has no kernel for {what}", missing=[what])


def _inputs(op: Op) -> list[Value]:
    if isinstance(op, Attention):
        return [op.q, op.k, op.v]
    if isinstance(op, (Add, Mul)):
        return [op.a, op.b]
    return [] if isinstance(op, Embed) else [op.x]
