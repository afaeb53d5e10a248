"""Lowers the ops that keep states of sequences: convolutions and delta nets."""

from __future__ import annotations

from collections.abc import Iterable

from edgeinfer.fused_ops import Convs, SiluConv
from edgeinfer.graph import Conv, DeltaNet, Op, Value, inputs
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.commands import Args, KernelOp, KernelPart
from edgeinfer.kernels.cpu.layout import row_stride
from edgeinfer.kernels.cpu.lower_base import LoweringBase


class StateLowering(LoweringBase):
    """The steps of recurrent ops."""

    def _convs(self, step: Convs) -> None:
        parts = [self._conv(op) for op in step.parts]
        self._out.ops.append(KernelOp("conv", parts))

    def _conv(self, op: Conv | SiluConv) -> KernelPart:
        stride, out = row_stride(op.x.dim), self._float_buffer(op.out, "convolved")
        args = self._of_runs(op, -(-stride // layout.CONV_BYTES)) + layout.CONV.pack(
            x=self._floats[op.x], stride=stride, weight=self._weights.taps(op.weight),
            bias=self._weights.vector(op.bias) if op.bias else 0,
            n_taps=op.weight.shape[-1], out=out,
        )  # fmt: skip
        kernel = "conv.silu" if isinstance(op, SiluConv) else "conv"
        return KernelPart(kernel, args, layout.COUNT_ITEMS)

    def _delta_net(self, op: DeltaNet) -> None:
        n_groups = layout.whole_vectors(op.dim) // 8
        per_run = op.n_v_heads * -(-n_groups // layout.DELTA_GROUPS)
        scratch = self._limits.n_threads * layout.delta_scratch_bytes(op.dim)
        args = self._of_runs(op, per_run) + layout.DELTA.pack(
            q=self._floats[op.q], k=self._floats[op.k], key_stride=row_stride(op.q.dim),
            v=self._floats[op.v], out=self._float_buffer(op.out, "delta net"),
            stride=row_stride(op.v.dim), decay=self._floats[op.decay],
            beta=self._floats[op.beta], gate_stride=row_stride(op.beta.dim),
            n_heads=op.n_v_heads, n_key_heads=op.n_k_heads, is_tiled=int(op.pairing == "tiled"),
            dim=op.dim, scratch=Buffer("delta net of each thread", scratch),
        )  # fmt: skip
        self._emit("delta_net", "delta_net", args, layout.COUNT_ITEMS)

    def _of_runs(self, op: Conv | SiluConv | DeltaNet, per_run: int) -> Args:
        """The words that all ops with states begin with."""
        if self._runs is None:
            n_bytes = layout.runs_bytes(self._limits.max_sequences)
            self._runs = self._out.scratch.place(Buffer("runs", n_bytes, is_kept=True))
            args = layout.RUNS.pack(at=self._runs)
            self._out.prologue.append(KernelPart("plan_runs", args, 1))
        made = op.convolved if isinstance(op, SiluConv) else op.out.index
        states = self._states[made]
        assert states.slot_bytes % 32 == 0, "kernels keep whole vectors"
        return layout.OF_RUNS.pack(
            at=self._runs, per_run=per_run, states=states.at, slot_bytes=states.slot_bytes
        )


def generations(ops: Iterable[Op]) -> list[list[Op]]:
    """Ops in runs none of whose members reads what another leaves, each as early as can be."""
    runs: list[list[Op]] = []
    places: dict[Value, int] = {}
    for op in ops:
        places[op.out] = place = max((places[x] + 1 for x in inputs(op) if x in places), default=0)
        runs += [[]] if place == len(runs) else []
        runs[place].append(op)
    return runs
