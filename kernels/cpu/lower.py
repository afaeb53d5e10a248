"""Lowers a recorded graph to CPU ops: which kernel runs on which buffers, in which order.

Knows kernels by name and argument layout only; runs nothing and allocates nothing. Shapes and
types are what `shapes.py` has let through.

What `edgeinfer.fusion` has put together runs as one kernel; every other op runs as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from edgeinfer.fused_ops import (
    Convs,
    ExpertMatmuls,
    GatedDeltaNet,
    Matmul,
    Matmuls,
    PinnedAttention,
    PinnedRotate,
    RotatedAttention,
    Step,
    SwiGlu,
    WholeNorm,
)
from edgeinfer.graph import (
    Activation,
    Add,
    Bias,
    Clamp,
    Embed,
    ExpertSum,
    Gain,
    Mul,
    MulParts,
    Op,
    RmsNorm,
    Rotate,
    Route,
    Scale,
    SelectRows,
    SoftCap,
    Value,
)
from edgeinfer.kernels.buffers import Buffer, reads_blocks
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.commands import (
    SHARE,
    KernelOp,
    KernelPart,
    Lowered,
    recut,
)
from edgeinfer.kernels.cpu.layout import row_stride
from edgeinfer.kernels.cpu.lower_attention import AttentionLowering
from edgeinfer.kernels.cpu.lower_base import (
    float_bits,
    format_of,
    row_bytes,
    type_name,
)
from edgeinfer.kernels.cpu.lower_experts import ExpertLowering
from edgeinfer.kernels.cpu.lower_states import StateLowering, generations
from edgeinfer.quant import Weight


class Lowering(AttentionLowering, ExpertLowering, StateLowering):
    """One pass over a segment's steps."""

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
        out.residuals = {i: self._floats[value] for i, value in segment.residuals.items()}
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
            case WholeNorm():
                self._whole_norm(step, layout.PICKED_ROWS)
            case Matmuls():
                self._matmuls(step, i)
            case SwiGlu():
                self._swiglu(step)
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
            case Gain():
                self._pointwise("mul", step, step.x, step.weight)
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
                args = self._copy(step.x, layout.PICKED_ROWS, self._sinks(step.out, "selected"))
                self._emit("select", "copy_rows", args, layout.COUNT_WANTED)
            case Convs():
                self._convs(step)
            case GatedDeltaNet():
                for alike in generations(step.made_by):
                    self._side_by_side(alike, i)
                self._delta_net(step.net)
            case _:
                _never(step)

    def _side_by_side(self, ops: Sequence[Op], i: int) -> None:
        """Ops none of which reads what another leaves, as one: threads wait but once."""
        first = len(self._out.ops)
        for op in ops:
            self._lower(op, i)  # type: ignore[arg-type]
        made = self._out.ops[first:]
        parts = [part for each in made for part in each.parts]
        self._out.ops[first:] = [KernelOp("+".join(each.group for each in made), parts)]

    def _embed(self, op: Embed) -> None:
        fmt = format_of(op.weight)
        x = self._float_buffer(op.out, "residual")
        args = layout.EMBED.pack(
            w=self._weights.matrix(op.weight), n_blocks=fmt.n_blocks(op.weight.shape[1]),
            out=x, stride=row_stride(op.out.dim), dim=op.out.dim,
        )  # fmt: skip
        self._emit("embed", f"embed.{type_name(op.weight)}", args)

    def _norm(self, op: RmsNorm) -> None:
        rows, rule = self._rows_of(op.x)
        if op.n_heads == 1 and op.weight is not None and rows == layout.ALL_ROWS:
            self._whole_norm(WholeNorm(op.layer, op.out, op.x, op.weight, op.eps), rows)
            return
        args = layout.NORM_HEADS.pack(
            *self._sinks(op.out, "norm"), x=self._floats[op.x], stride=row_stride(op.x.dim),
            weight=self._weights.vector(op.weight) if op.weight else 0, eps=float_bits(op.eps),
            n=op.n_heads, dim=op.x.dim // op.n_heads, rows=rows,
        )  # fmt: skip
        self._emit("norm", "norm_heads", args, rule)

    def _whole_norm(self, op: WholeNorm, rows: int) -> None:
        args = layout.NORM.pack(
            *self._sinks(op.out, "norm"), x=self._floats[op.x], stride=row_stride(op.x.dim),
            weight=self._weights.vector(op.weight), eps=float_bits(op.eps), dim=op.x.dim, rows=rows,
        )  # fmt: skip
        rule = layout.COUNT_WANTED if rows == layout.PICKED_ROWS else layout.COUNT_ROWS
        self._emit("norm", "norm", args, rule)

    def _pointwise(
        self,
        kind: str,
        op: Add | Mul | Bias | Gain | Scale | SoftCap | Activation | Clamp,
        a: Value,
        b: Value | Weight | None = None,
        parameter: float = 0.0,
        bound: float = 0.0,
    ) -> None:
        """out = f(a, b) or f(a, parameter, bound), value by value; a vector b is one for all."""
        rows, rule = self._rows_of(op.out)
        second: Buffer | int = 0
        if isinstance(b, Value):
            second = self._floats[b]
        elif b is not None:
            second = self._weights.vector(b)
        stride = row_stride(b.dim) if isinstance(b, Value) else 0
        args = layout.POINT.pack(
            *self._sinks(op.out, kind), a=self._floats[a], a_stride=row_stride(a.dim),
            b=second, b_stride=stride, dim=a.dim, rows=rows,
            parameter=float_bits(parameter) & 0xFFFFFFFF | float_bits(bound) << 32,
        )  # fmt: skip
        self._emit(kind, f"pointwise.{kind}", args, rule)

    def _swiglu(self, op: SwiGlu) -> None:
        args = layout.SWIGLU.pack(
            *self._sinks(op.out, "ffn"), gate=self._floats[op.gate], up=self._floats[op.up],
            stride=row_stride(op.up.dim), dim=op.up.dim,
        )  # fmt: skip
        self._emit("swiglu", "swiglu", args)

    def _mul_parts(self, op: MulParts) -> None:
        rows, rule = self._rows_of(op.out)
        n_parts = op.factors.dim
        args = layout.PARTS.pack(
            *self._sinks(op.out, "mul"), x=self._floats[op.x], stride=row_stride(op.x.dim),
            factors=self._floats[op.factors], factors_stride=row_stride(n_parts), n=n_parts,
            dim=op.x.dim // n_parts, rows=rows,
        )  # fmt: skip
        self._emit("mul_parts", "mul_parts", args, rule)

    # -- matmuls -------------------------------------------------------------------------------

    def _matmuls(self, step: Matmuls, i: int) -> None:
        """Matmuls of one input, side by side."""
        x = step.parts[0].x
        if any(map(reads_blocks, step.parts)) and x not in self._quantised:
            self._quantise(x)
        names = [op.weight.name.split(".")[-2] for op in step.parts]
        parts = [self._matmul(op, i) for op in step.parts]
        self._out.ops.append(KernelOp("+".join(names), parts))

    def _matmul(self, op: Matmul, i: int) -> KernelPart:
        """A matmul in one chunk."""
        fmt = format_of(op.weight)
        n_rows, n_cols = op.weight.shape
        n_groups, n_blocks = -(-n_rows // 8), fmt.n_blocks(n_cols)
        rows, _ = self._rows_of(op.x)
        residual, out = self._residual(op, i)
        x = (self._floats if fmt.activation == "f32" else self._quantised)[op.x]
        bias = self._weights.vector(op.bias) if op.bias else 0
        args = layout.MATMUL.pack(
            n_groups, w=self._weights.matrix(op.weight), n_blocks=n_blocks, x=x, out=out,
            stride=row_stride(n_rows), bias=bias, residual=residual or 0, rows=rows,
            x_row_bytes=row_bytes(fmt, n_cols), scratch=self._matmul_scratch, bounds=0,
        )  # fmt: skip
        n_bytes = n_groups * n_blocks * fmt.packed_bytes
        kernel = f"matmul.{type_name(op.weight)}"
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


def _never(step: NoReturn) -> NoReturn:
    raise AssertionError(f"no kernel for {step}")
