"""Lowers what keeps a state of each sequence: convolutions and delta nets."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from edgeinfer.fusion import SiluConv, Step
from edgeinfer.graph import Activation, Bias, Conv, DeltaNet, Gain, RmsNorm, Scale, Value
from edgeinfer.kernels.cuda.commands import ALL_ROWS, Arg
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.lower_base import PLAIN, LaunchShape, LoweringBase
from edgeinfer.kernels.cuda.tiles import row_stride
from edgeinfer.quant import Weight

_COLUMNS = 32  # of a delta net's matrix, of a block of threads
_Made = TypeVar("_Made")


class _Keys(NamedTuple):
    """Queries or keys: `x`, with a norm of each head and a factor if it has those."""

    x: Value
    norm: RmsNorm | None
    factor: float
    steps: tuple[int, ...]  # that make them of x


class _Gates(NamedTuple):
    """Decay = softplus(x + bias) * rate and beta = sigmoid(y), or both as they are."""

    decay: Value
    beta: Value
    bias: Weight | None = None
    rate: Weight | None = None
    steps: tuple[int, ...] = ()


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

    def _delta_net(self, op: DeltaNet, i: int) -> None:
        """With what only makes its operands: a row is too little work for launches of their own."""
        (q, k), gates = self._keys(op, i), self._gates(op, i)
        self._emit(
            Kernel.of("delta_net", DIM=op.dim), ALL_ROWS, (-(-op.dim // _COLUMNS), op.n_v_heads),
            128, LaunchShape(most_blocks=self._limits.max_sequences),
            q=self._floats[q.x], k=self._floats[k.x], key_stride=row_stride(op.q.dim),
            is_normed=int(q.norm is not None), eps=q.norm.eps if q.norm else 0.0,
            q_factor=q.factor, k_factor=k.factor,
            v=self._floats[op.v], v_stride=row_stride(op.v.dim), decay=self._floats[gates.decay],
            beta=self._floats[gates.beta], head_stride=row_stride(op.n_v_heads),
            bias=self._weights.vector(gates.bias) if gates.bias else 0,
            rate=self._weights.vector(gates.rate) if gates.rate else 0,
            **self._state_args(op.out.index), n_key_heads=op.n_k_heads,
            tiled=int(op.pairing == "tiled"), out=self._float_buffer(op.out, "delta net"),
            out_stride=row_stride(op.out.dim),
        )  # fmt: skip

    def _state_args(self, made: int) -> dict[str, Arg]:
        step, slots = self._step, self._states[made]
        return {"spans": step.spans, "states": step.states, "kept": step.kept, "slots": slots}

    # -- what a delta net's kernel makes by itself -----------------------------------------------

    def _left_to_delta_nets(self) -> set[int]:
        """Steps that need no launch."""
        left = set[int]()
        for i, step in enumerate(self._steps):
            if isinstance(step, DeltaNet):
                q, k = self._keys(step, i)
                left.update(q.steps + k.steps + self._gates(step, i).steps)
        return left

    def _keys(self, op: DeltaNet, i: int) -> tuple[_Keys, _Keys]:
        """Both are normed alike, or both are taken as they are."""
        found = [self._normed(value, op, i) for value in (op.q, op.k)]
        norms = [each.norm for each in found]
        if None in norms or len({norm.eps for norm in norms if norm}) > 1:
            return _Keys(op.q, None, 1.0, ()), _Keys(op.k, None, 1.0, ())
        return found[0], found[1]

    def _normed(self, value: Value, op: DeltaNet, i: int) -> _Keys:
        scale, at = self._only_maker(Scale, value, i)
        norm, first = self._only_maker(RmsNorm, scale.x if scale else value, at)
        if norm is None or norm.weight is not None or norm.n_heads != op.n_k_heads:
            return _Keys(value, None, 1.0, ())
        steps = (first, at) if scale else (first,)
        return _Keys(norm.x, norm, scale.factor if scale else 1.0, steps)

    def _gates(self, op: DeltaNet, i: int) -> _Gates:
        gain, last = self._only_maker(Gain, op.decay, i)
        softplus, middle = self._only_maker(Activation, gain.x if gain else op.decay, last)
        bias, first = self._only_maker(Bias, softplus.x if softplus else op.decay, middle)
        sigmoid, at = self._only_maker(Activation, op.beta, i)
        if gain is None or softplus is None or bias is None or sigmoid is None:
            return _Gates(op.decay, op.beta)
        if (softplus.kind, sigmoid.kind) != ("softplus", "sigmoid"):
            return _Gates(op.decay, op.beta)
        steps = first, middle, last, at
        return _Gates(bias.x, sigmoid.x, bias.weight, gain.weight, steps)

    def _only_maker(self, kind: type[_Made], value: Value, i: int) -> tuple[_Made | None, int]:
        """The step of a kind that makes a value for step i alone, and its number, or that of i."""
        at = self._makers.get(value, -1)
        step: Step | None = self._steps[at] if at >= 0 else None
        if isinstance(step, kind) and self._reads.is_only(value, i):
            return step, at
        return None, i
