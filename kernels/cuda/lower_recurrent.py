"""Lowers what keeps a state of each sequence: convolutions and delta nets."""

from __future__ import annotations

from edgeinfer.fusion import SiluConv
from edgeinfer.graph import Conv, DeltaNet
from edgeinfer.kernels.cuda.commands import ALL_ROWS, Arg
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.lower_base import PLAIN, LaunchShape, LoweringBase
from edgeinfer.kernels.cuda.tiles import row_stride

_COLUMNS = 32  # of a delta net's matrix, of a block of threads


class RecurrentLowering(LoweringBase):
    """The steps that go on from the row before."""

    def _conv(self, op: Conv | SiluConv) -> None:
        silu, made = (1, op.convolved) if isinstance(op, SiluConv) else (0, op.out.index)
        self._emit(
            Kernel.of("conv"), ALL_ROWS, -(-op.x.dim // 256), 256, PLAIN,
            x=self._floats[op.x], x_stride=row_stride(op.x.dim),
            weight=self._weights.vector(op.weight),
            bias=self._weights.vector(op.bias) if op.bias else 0, seq=self._step.seq,
            **self._state_args(made), n_taps=op.weight.shape[-1], dim=op.x.dim, silu=silu,
            out=self._float_buffer(op.out, "convolved"), out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _delta_net(self, op: DeltaNet) -> None:
        self._emit(
            Kernel.of("delta_net", DIM=op.dim), ALL_ROWS, (-(-op.dim // _COLUMNS), op.n_v_heads),
            128, LaunchShape(most_blocks=self._limits.max_sequences),
            q=self._floats[op.q], k=self._floats[op.k], key_stride=row_stride(op.q.dim),
            v=self._floats[op.v], v_stride=row_stride(op.v.dim), decay=self._floats[op.decay],
            beta=self._floats[op.beta], head_stride=row_stride(op.n_v_heads),
            **self._state_args(op.out.index), n_key_heads=op.n_k_heads,
            tiled=int(op.pairing == "tiled"), out=self._float_buffer(op.out, "delta net"),
            out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _state_args(self, made: int) -> dict[str, Arg]:
        step, slots = self._step, self._states[made]
        return {"spans": step.spans, "states": step.states, "kept": step.kept, "slots": slots}
