"""Lowers what keeps a state of each sequence: convolutions and delta nets."""

from __future__ import annotations

from collections.abc import Sequence

from edgeinfer.fused_ops import Convs, GatedDeltaNet, SiluConv
from edgeinfer.graph import Conv
from edgeinfer.kernels.cuda.commands import ALL_ROWS, Arg
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.lower_base import PLAIN, LaunchShape, LoweringBase
from edgeinfer.kernels.cuda.tiles import row_stride

_COLUMNS = 32  # of a delta net's matrix, of a block of threads
_CHANNELS = 256  # of a convolution, of one
_MOST_PARTS = 3  # convolutions of one launch


class RecurrentLowering(LoweringBase):
    """The steps that go on from the row before."""

    def _convs(self, step: Convs) -> None:
        for first in range(0, len(step.parts), _MOST_PARTS):
            self._some_convs(step.parts[first : first + _MOST_PARTS])

    def _some_convs(self, parts: Sequence[Conv | SiluConv]) -> None:
        args = dict[str, Arg]()
        for n in range(_MOST_PARTS):
            names = ("x", "weight", "bias", "slots", "out", "dim")
            args |= {f"{name}_{n}": 0 for name in names}
        for n, part in enumerate(parts):
            made = part.convolved if isinstance(part, SiluConv) else part.out.index
            args |= {
                f"x_{n}": self._floats[part.x], f"weight_{n}": self._weights.vector(part.weight),
                f"bias_{n}": self._weights.vector(part.bias) if part.bias else 0,
                f"slots_{n}": self._states[made], f"dim_{n}": part.x.dim,
                f"out_{n}": self._float_buffer(part.out, "convolved"),
            }  # fmt: skip
        blocks = sum(-(-part.x.dim // _CHANNELS) for part in parts)
        self._emit(
            Kernel.of("conv"), ALL_ROWS, blocks, _CHANNELS, PLAIN, seq=self._step.seq,
            **self._slots(), n_taps=parts[0].weight.shape[-1],
            silu=int(isinstance(parts[0], SiluConv)), **args,
        )  # fmt: skip

    def _delta_net(self, step: GatedDeltaNet) -> None:
        """With what makes its operands: a row is too little work for launches of their own."""
        op, is_normed = step.net, step.eps is not None
        self._emit(
            Kernel.of("delta_net", DIM=op.dim), ALL_ROWS, (-(-op.dim // _COLUMNS), op.n_v_heads),
            128, LaunchShape(most_blocks=self._limits.max_sequences),
            q=self._floats[step.q], k=self._floats[step.k], key_stride=row_stride(op.q.dim),
            is_normed=int(is_normed), eps=step.eps or 0.0, q_factor=step.q_factor,
            k_factor=step.k_factor, v=self._floats[op.v], v_stride=row_stride(op.v.dim),
            decay=self._floats[step.decay], beta=self._floats[step.beta],
            head_stride=row_stride(op.n_v_heads),
            bias=self._weights.vector(step.bias) if step.bias else 0,
            rate=self._weights.vector(step.rate) if step.rate else 0,
            **self._slots(), slots=self._states[op.out.index], n_key_heads=op.n_k_heads,
            tiled=int(op.pairing == "tiled"), out=self._float_buffer(op.out, "delta net"),
            out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _slots(self) -> dict[str, Arg]:
        """Which slots of state a step reads and writes."""
        step = self._step
        return {"spans": step.spans, "states": step.states, "kept": step.kept}
