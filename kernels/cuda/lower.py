"""Lowers a recorded graph to launches: which kernel runs on which buffers, in which order.

Knows kernels by name and parameters only; runs nothing and allocates nothing. Shapes and types are
what `kernels/shapes.py` has let through.
"""

from __future__ import annotations

from typing import NoReturn

from edgeinfer.fusion import (
    ExpertMatmuls,
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
    ExpertLinear,
    ExpertSum,
    Mul,
    MulParts,
    RmsNorm,
    Rotate,
    Route,
    Scale,
    SelectRows,
    SoftCap,
    Value,
)
from edgeinfer.kernels.buffers import Buffer, reads_blocks
from edgeinfer.kernels.cuda import tiles
from edgeinfer.kernels.cuda.commands import ALL_ROWS, WANTED_ROWS, Arg, Lowered
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.lower_attention import AttentionLowering
from edgeinfer.kernels.cuda.lower_base import PLAIN, LaunchShape
from edgeinfer.kernels.cuda.tiles import row_stride
from edgeinfer.quant import Weight

_WARPS = 4  # that share a tile of a matrix


class Lowering(AttentionLowering):
    """One pass over a segment's steps."""

    def run(self) -> Lowered:
        out, segment = self._out, self._segment
        if segment.input is not None:
            out.input = self._float_buffer(segment.input, "input")
        for i, step in enumerate(self._steps):
            self._lower(step, i)
            if segment.hidden in self._floats and not out.head:
                out.head = len(out.launches)
        out.hidden = self._floats[segment.hidden]
        out.logits = self._floats[segment.output] if segment.is_last else None
        out.place()
        return out

    def _lower(self, step: Step, i: int) -> None:
        match step:
            case Embed():
                self._embed(step)
            case RmsNorm() | WholeNorm():
                self._norm(step)
            case Matmuls():
                for op in step.parts:
                    self._matmul(op, i)
            case Rotate() | PinnedRotate():
                self._rotate(step)
            case RotatedAttention():
                self._rotated_attention(step)
            case PinnedAttention():
                self._pinned_attention(step)
            case SwiGlu():
                self._pointwise("swiglu", step.out, step.gate, step.up)
            case Add():
                self._pointwise("add", step.out, step.a, step.b)
            case Mul():
                self._pointwise("mul", step.out, step.a, step.b)
            case Bias():
                self._pointwise("add", step.out, step.x, step.weight)
            case Scale():
                self._pointwise("scale", step.out, step.x, first=step.factor)
            case SoftCap():
                self._pointwise("soft_cap", step.out, step.x, first=step.cap)
            case Activation():
                self._pointwise(step.kind, step.out, step.x)
            case Clamp():
                self._pointwise("clamp", step.out, step.x, first=step.low, second=step.high)
            case MulParts():
                self._mul_parts(step)
            case Route():
                self._route(step)
            case ExpertMatmuls():
                for part in step.parts:
                    self._expert_matmul(part)
            case ExpertSum():
                self._expert_sum(step)
            case SelectRows():
                self._select(step)
            case _:
                _never(step)

    def _embed(self, op: Embed) -> None:
        n_rows, n_cols = op.weight.shape
        self._emit(
            Kernel.of("embed", TYPE=op.weight.type.name), ALL_ROWS, -(-n_cols // tiles.CHUNK), 32,
            ids=self._step.ids, w=self._weights.matrix(op.weight), n=n_rows, k=n_cols,
            y=self._float_buffer(op.out, "residual"),
        )  # fmt: skip

    def _norm(self, op: RmsNorm | WholeNorm) -> None:
        """Of every row of x; or of its wanted rows, where the result has only those."""
        rows, n_heads = self._rows_of(op.out), op.n_heads if isinstance(op, RmsNorm) else 1
        gathers = rows != self._rows_of(op.x)
        self._norm_rows(
            rows, op.x, self._float_buffer(op.out, "norm"), op.weight, op.eps, n_heads,
            self._step.wanted if gathers else 0,
        )  # fmt: skip

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
        rows = self._rows_of(out)
        self._emit(
            Kernel.of("pointwise", KIND=kind), rows, -(-a.dim // 1024), 256,
            rows=rows, a=self._floats[a], a_stride=row_stride(a.dim), b=operand, b_stride=stride,
            dim=a.dim, first=first, second=second, out=self._float_buffer(out, kind),
            out_stride=row_stride(out.dim),
        )  # fmt: skip

    def _mul_parts(self, op: MulParts) -> None:
        n_parts, rows = op.factors.dim, self._rows_of(op.out)
        self._emit(
            Kernel.of("mul_parts"), rows, -(-op.x.dim // 256), 256,
            rows=rows, x=self._floats[op.x], x_stride=row_stride(op.x.dim),
            factors=self._floats[op.factors], factors_stride=row_stride(n_parts),
            n_parts=n_parts, part_dim=op.x.dim // n_parts, out=self._float_buffer(op.out, "mul"),
            out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _select(self, op: SelectRows) -> None:
        self._emit(
            Kernel.of("select"), WANTED_ROWS, -(-op.x.dim // 256), 256,
            wanted=self._step.wanted, x=self._floats[op.x], x_stride=row_stride(op.x.dim),
            dim=op.x.dim, out=self._float_buffer(op.out, "selected"),
            out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    # -- products ------------------------------------------------------------------------------

    def _matmul(self, op: Matmul, i: int) -> None:
        n_rows, n_cols = op.weight.shape
        rows, kind = self._rows_of(op.x), op.weight.type
        residual, out = self._residual(op, i)
        common: dict[str, Arg] = {
            "rows": rows, "w": self._weights.matrix(op.weight), "n": n_rows, "k": n_cols,
            "bias": self._weights.vector(op.bias) if op.bias else 0,
            "residual": residual or 0, "y": out,
        }  # fmt: skip
        if reads_blocks(op):
            kernel = Kernel.of("matmul", TYPE=kind.name, WARPS=_WARPS, ROWS=1)
            blocks = -(-n_rows // tiles.TILE)
            self._emit(kernel, rows, blocks, 32 * _WARPS, PLAIN, x=self._x8(op.x), **common)
        else:
            kernel = Kernel.of("matmul_float", TYPE=kind.name, WARPS=_WARPS, ROWS=1)
            blocks = -(-n_rows // (8 * _WARPS))
            self._emit(kernel, rows, blocks, 32 * _WARPS, PLAIN, x=self._floats[op.x], **common)

    def _residual(self, op: Matmul, i: int) -> tuple[Buffer | None, Buffer]:
        """The rows to add to this matmul's result and the rows it leaves: often the same."""
        if op.residual is None:
            return None, self._float_buffer(op.out, "linear")
        residual = self._floats[op.residual]
        if op.residual is self._segment.input or not self._reads.is_last(op.residual, i):
            return residual, self._float_buffer(op.out, "residual")
        self._floats[op.out] = residual
        return residual, residual

    def _x8(self, x: Value) -> Buffer:
        """A value's rows quantised; the first who reads them quantises them."""
        if x not in self._quantised:
            n_bytes = tiles.x8_bytes(x.dim) * self._n_rows(x)
            rows, out = self._rows_of(x), Buffer("quantised", n_bytes)
            self._quantised[x] = out
            blocks = -(-x.dim // tiles.CHUNK)
            self._emit(
                Kernel.of("quantise"), rows, blocks, 256, rows=rows, x=self._floats[x], x8=out,
                k=x.dim,
            )  # fmt: skip
        return self._quantised[x]

    # -- experts -------------------------------------------------------------------------------

    def _route(self, op: Route) -> None:
        self._emit(
            Kernel.of("route", GATING=op.gating), ALL_ROWS, 1, 32,
            LaunchShape(shared_bytes=4 * (3 * op.x.dim + op.n_groups)),
            x=self._floats[op.x], x_stride=row_stride(op.x.dim), n_experts=op.x.dim,
            n_used=op.n_used, bias=self._weights.vector(op.bias) if op.bias else 0,
            n_groups=op.n_groups, n_groups_used=op.n_groups_used, norm=int(op.norm),
            scale=op.scale, out=self._float_buffer(op.out, "route"),
            out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _expert_matmul(self, op: ExpertLinear) -> None:
        _, n_rows, n_cols = op.weight.shape
        in_blocks = reads_blocks(op)
        tile_rows = tiles.TILE if in_blocks else 8 * _WARPS
        self._emit(
            Kernel.of("expert_matmul", TYPE=op.weight.type.name, WARPS=_WARPS), ALL_ROWS,
            (-(-n_rows // tile_rows), op.n_used), 32 * _WARPS,
            rows=ALL_ROWS, route=self._floats[op.route],
            x=self._x8(op.x) if in_blocks else self._floats[op.x],
            w=self._weights.matrix(op.weight),
            scale=self._weights.vector(op.scale) if op.scale else 0,
            bias=self._weights.vector(op.bias) if op.bias else 0,
            y=self._float_buffer(op.out, "experts"), n=n_rows, k=n_cols,
            n_parts=op.x.dim // n_cols,
        )  # fmt: skip

    def _expert_sum(self, op: ExpertSum) -> None:
        self._emit(
            Kernel.of("expert_sum"), ALL_ROWS, -(-op.out.dim // 256), 256,
            x=self._floats[op.x], x_stride=row_stride(op.x.dim), route=self._floats[op.route],
            route_stride=row_stride(op.route.dim), n_used=op.route.dim // 2, dim=op.out.dim,
            out=self._float_buffer(op.out, "experts"), out_stride=row_stride(op.out.dim),
        )  # fmt: skip


def _never(step: NoReturn) -> NoReturn:
    raise AssertionError(f"no kernel for {step}")
