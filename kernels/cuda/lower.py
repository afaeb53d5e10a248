"""Lowers a recorded graph to launches: which kernel runs on which buffers, in which order.

Knows kernels by name and parameters only; runs nothing and allocates nothing. Shapes and types are
what `kernels/shapes.py` has let through.
"""

from __future__ import annotations

from typing import NoReturn

from edgeinfer.fused_ops import (
    Convs,
    ExpertMatmuls,
    GatedDeltaNet,
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
    RmsNorm,
    Rotate,
    Route,
    Scale,
    SelectRows,
    SoftCap,
)
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cuda import tiles
from edgeinfer.kernels.cuda.commands import ALL_ROWS, WANTED_ROWS, Arg, Launch, Lowered
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.lower_fused import FusedLowering
from edgeinfer.kernels.cuda.lower_recurrent import RecurrentLowering
from edgeinfer.kernels.cuda.tiles import row_stride


class Lowering(FusedLowering, RecurrentLowering):
    """One pass over a segment's steps."""

    def run(self, *, samples: bool) -> Lowered:
        """Of the last segment also what picks the likeliest tokens, and what `samples` them."""
        out, segment = self._out, self._segment
        if segment.input is not None:
            out.input = self._float_buffer(segment.input, "input")
        i = 0
        while i < len(self._steps):
            n_fused = self._fused(i)
            if not n_fused:
                self._lower(self._steps[i], i)
            i += n_fused or 1
            if segment.hidden in self._floats and not out.head:
                out.head = len(out.launches)
        out.hidden = self._floats[segment.hidden]
        out.residuals = {i: self._floats[value] for i, value in segment.residuals.items()}
        out.logits = self._floats[segment.output] if segment.is_last else None
        if out.logits is not None:
            out.argmax = self._argmax(out.logits)
            out.sample = self._sample(out.logits) if samples else None
        out.place()
        return out

    def _argmax(self, logits: Buffer) -> Launch:
        n_vocab = self._segment.output.dim
        args: dict[str, Arg] = {
            "step": self._step.step, "logits": logits, "logits_stride": row_stride(n_vocab),
            "n_vocab": n_vocab, "ids": self._step.sampled, "status": self._step.status,
        }  # fmt: skip
        return Launch(Kernel.of("argmax"), args, WANTED_ROWS, (1,), 1024)

    def _sample(self, logits: Buffer) -> Launch:
        n_vocab, step = self._segment.output.dim, self._step
        order = Buffer("order", 4 * n_vocab * self._limits.max_outputs)
        self._out.scratch.place(order)
        args: dict[str, Arg] = {
            "step": step.step, "logits": logits, "logits_stride": row_stride(n_vocab),
            "n_vocab": n_vocab, "rows": step.samples.rows, "words": step.samples.rows,
            "goes_on": step.samples.goes_on, "order": order, "ids": step.sampled,
            "status": step.status, "mu": step.mu,
        }  # fmt: skip
        return Launch(Kernel.of("sample"), args, WANTED_ROWS, (1,), 512)

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
            case Gain():
                self._pointwise("mul", step.out, step.x, step.weight)
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
            case Convs():
                self._convs(step)
            case GatedDeltaNet():
                self._delta_net(step)
            case _:
                _never(step)

    def _embed(self, op: Embed) -> None:
        n_rows, n_cols = op.weight.shape
        self._emit(
            Kernel.of("embed", TYPE=op.weight.type.name), ALL_ROWS, -(-n_cols // tiles.CHUNK), 32,
            ids=self._step.ids, w=self._weights.matrix(op.weight), n=n_rows, k=n_cols,
            y=self._float_buffer(op.out, "residual"),
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


def _never(step: NoReturn) -> NoReturn:
    raise AssertionError(f"no kernel for {step}")
