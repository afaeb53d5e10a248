"""The ops of a segment rewritten for speed, for every lowering to read.

A pattern puts one step in the place of several ops whose result nobody else reads. It states all
that it needs; where a part of that is missing the ops stay as they were recorded, and a backend
runs the plain kernel of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from edgeinfer.errors import UnsupportedModelError
from edgeinfer.fused_ops import (
    Convs,
    ExpertMatmuls,
    GatedDeltaNet,
    Matmul,
    Matmuls,
    PinnedAttention,
    PinnedRotate,
    RotatedAttention,
    SiluConv,
    Step,
    SwiGlu,
    WholeNorm,
)
from edgeinfer.graph import (
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
    Value,
    inputs,
)


def fuse(segment: Segment) -> list[Step]:
    """What computes the same as the segment's ops, in an order that respects who reads what."""
    uses, absorbed, steps = Uses(segment), set[Value](), list[_Single]()
    # From the end, so that the op that ends a pattern is met before those that it takes in.
    for op in reversed(segment.ops):
        if op.out not in absorbed:
            new, taken = _rewritten(op, uses)
            absorbed.update(taken)
            steps += reversed(new)
    return list(_side_by_side(steps[::-1]))


_Made = TypeVar("_Made")


class Uses:
    """Who makes a value, and who reads it."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.makers = {op.out: op for op in segment.ops}
        self._kept = segment.kept
        self.layers: dict[int, list[Op]] = {}
        for op in segment.ops:
            self.layers.setdefault(op.layer, []).append(op)
        self._readers: dict[Value, list[Op]] = {}
        for op in segment.ops:
            for value in inputs(op):
                self._readers.setdefault(value, []).append(op)
        for op in segment.ops:  # what is done again for pinned pages reads again
            for each in pinned_query(op, self) if isinstance(op, Attention) else ():
                for value in inputs(each) if not isinstance(each, Rotate) else ():
                    self._readers[value].append(each)

    def are_only(self, value: Value, reader: Op) -> bool:
        """Whether a value made here is read once, by this op, and not by who runs the segment."""
        readers = self._readers.get(value, [])
        is_inner = value in self.makers and value not in self._kept
        return is_inner and len(readers) == 1 and readers[0] is reader

    def only(self, kind: type[_Made], value: Value, reader: Op) -> _Made | None:
        """The op of a kind that makes a value for this op alone, None where there is none."""
        made = self.makers.get(value)
        return made if isinstance(made, kind) and self.are_only(value, reader) else None


_Part: TypeAlias = Matmul | ExpertLinear | Conv | SiluConv  # some of which are one step
_Single: TypeAlias = "Step | _Part"
_Rewritten: TypeAlias = "tuple[Sequence[_Single], Sequence[Value]]"  # steps, values taken in


def _rewritten(op: Op, uses: Uses) -> _Rewritten:
    if isinstance(op, Attention):
        return _rotated_attention(op, uses) or _pinned_attention(op, uses)
    if isinstance(op, Linear):
        return [Matmul(*op, residual=None)], []
    if isinstance(op, Add):
        return _residual(op, uses) or ([op], [])
    if isinstance(op, Mul):
        return _swiglu(op, uses) or ([op], [])
    if isinstance(op, Activation):
        return _silu_conv(op, uses) or ([op], [])
    if isinstance(op, RmsNorm):
        return _selected_norm(op, uses) or ([op], [])
    if isinstance(op, DeltaNet):
        return _gated_delta_net(op, uses)
    return [op], []


def _residual(op: Add, uses: Uses) -> _Rewritten | None:
    """An addition to what a matmul leaves for nothing else."""
    for value, other in ((op.a, op.b), (op.b, op.a)):
        linear = uses.makers.get(value)
        if isinstance(linear, Linear) and uses.are_only(value, op):
            return [Matmul(op.layer, op.out, linear.x, linear.weight, linear.bias, other)], [value]
    return None


def _silu_conv(op: Activation, uses: Uses) -> _Rewritten | None:
    conv = uses.makers.get(op.x)
    if op.kind != "silu" or not isinstance(conv, Conv) or not uses.are_only(op.x, op):
        return None
    return [SiluConv(op.layer, op.out, conv.x, conv.weight, conv.bias, conv.out.index)], [op.x]


def _swiglu(op: Mul, uses: Uses) -> _Rewritten | None:
    for value, up in ((op.a, op.b), (op.b, op.a)):
        silu = uses.makers.get(value)
        if isinstance(silu, Activation) and silu.kind == "silu" and uses.are_only(value, op):
            return [SwiGlu(op.layer, op.out, silu.x, up)], [value]
    return None


def _selected_norm(op: RmsNorm, uses: Uses) -> _Rewritten | None:
    select = uses.makers.get(op.x)
    if not isinstance(select, SelectRows) or not uses.are_only(op.x, op):
        return None
    if op.n_heads != 1 or op.weight is None:
        return None
    return [WholeNorm(op.layer, op.out, select.x, op.weight, op.eps)], [op.x]


def _gated_delta_net(op: DeltaNet, uses: Uses) -> _Rewritten:
    """q and k that are normed alike, and the usual gates; either of these two, or neither."""
    step = GatedDeltaNet(*op[:7], op, (), None, 1.0, 1.0, None, None)
    made_by: list[Op] = []
    q, k = (_normed_heads(value, op, uses) for value in (op.q, op.k))
    if q is not None and k is not None and q.norm.eps == k.norm.eps:
        step = step._replace(
            q=q.norm.x, k=k.norm.x, eps=q.norm.eps, q_factor=q.factor, k_factor=k.factor
        )
        made_by += [*q.made_by, *k.made_by]
    if (gates := _gates(op, uses)) is not None:
        bias, _, gain, sigmoid = gates
        step = step._replace(decay=bias.x, beta=sigmoid.x, bias=bias.weight, rate=gain.weight)
        made_by += gates
    step = step._replace(made_by=tuple(sorted(made_by, key=lambda each: each.out.index)))
    return [step], [each.out for each in made_by]


class _NormedHeads(NamedTuple):
    """Heads that are normed without a weight, then maybe multiplied by a factor."""

    norm: RmsNorm
    scale: Scale | None

    @property
    def factor(self) -> float:
        return 1.0 if self.scale is None else self.scale.factor

    @property
    def made_by(self) -> list[Op]:
        return [self.norm] if self.scale is None else [self.norm, self.scale]


def _normed_heads(value: Value, op: DeltaNet, uses: Uses) -> _NormedHeads | None:
    scale = uses.only(Scale, value, op)
    norm = uses.only(RmsNorm, value, op) if scale is None else uses.only(RmsNorm, scale.x, scale)
    if norm is None or norm.weight is not None or norm.n_heads != op.n_k_heads:
        return None
    return _NormedHeads(norm, scale)


def _gates(op: DeltaNet, uses: Uses) -> tuple[Bias, Activation, Gain, Activation] | None:
    """softplus(x + bias) * rate for the decay, and a sigmoid for beta."""
    gain, sigmoid = uses.only(Gain, op.decay, op), uses.only(Activation, op.beta, op)
    if gain is None or sigmoid is None or sigmoid.kind != "sigmoid":
        return None
    softplus = uses.only(Activation, gain.x, gain)
    if softplus is None or softplus.kind != "softplus":
        return None
    bias = uses.only(Bias, softplus.x, softplus)
    return None if bias is None else (bias, softplus, gain, sigmoid)


def _rotated_attention(op: Attention, uses: Uses) -> _Rewritten | None:
    """q and k that are rotated alike, head by head, for this attention alone; or q without a k."""
    rotations = [(op.q, op.n_heads), *([(op.k, op.cache.n_heads)] if op.k is not None else [])]
    found: list[tuple[Rotate, RmsNorm | None]] = []
    for value, n_heads in rotations:
        turn = uses.makers.get(value)
        if not isinstance(turn, Rotate) or turn.n_heads != n_heads:
            return None
        if not (uses.are_only(turn.out, op) and uses.are_only(turn.x, turn)):
            return None
        found.append((turn, _head_norm(turn, uses)))
    if len({turn.rope for turn, _ in found}) > 1:
        return None
    norms = [norm for _, norm in found if norm]
    if len({norm.eps for norm in norms}) > 1:
        found, norms = [(turn, None) for turn, _ in found], []
    (q, q_norm), *rest = [(norm or turn, norm and norm.weight) for turn, norm in found]
    k, k_norm = (rest[0][0].x, rest[0][1]) if rest else (None, None)
    step = RotatedAttention(
        op.layer, op.out, q.x, k, *op[4:], found[0][0].rope, q_norm, k_norm,
        norms[0].eps if norms else 0.0,
    )  # fmt: skip
    return [step], [*(turn.out for turn, _ in found), *(norm.out for norm in norms)]


def _head_norm(rotation: Rotate, uses: Uses) -> RmsNorm | None:
    """The norm of the very heads that are rotated, of a value that nobody else reads."""
    norm = uses.makers.get(rotation.x)
    if not isinstance(norm, RmsNorm) or norm.weight is None:
        return None
    fits = norm.n_heads == rotation.n_heads and uses.are_only(norm.x, norm)
    return norm if fits else None


def _pinned_attention(op: Attention, uses: Uses) -> _Rewritten:
    """Attention as it stands, behind what makes its q for pinned pages."""
    steps: list[Step] = []
    made: dict[Value, Value] = {}
    for each in pinned_query(op, uses):
        made[each.out] = Value(each.out.graph, each.out.index, each.out.dim)
        fields = [made.get(field, field) if isinstance(field, Value) else field for field in each]
        kind = PinnedRotate if isinstance(each, Rotate) else type(each)
        steps.append(kind(*fields))  # type: ignore[arg-type]
    steps.append(PinnedAttention(*op, made.get(op.q, op.q)))
    return steps, []


# What is done anew to a query on its way from its rotation to its attention, and what makes another
# value of it, which has no rotation. An op is one or the other, or can't stand there.
_REDONE = (RmsNorm, Add, Mul, Bias, Gain, Scale, SoftCap, Activation, Clamp, MulParts)
_ENDS = (Embed, Linear, Attention, Route, ExpertLinear, ExpertSum, Conv, DeltaNet, SelectRows)


def pinned_query(op: Attention, uses: Uses) -> list[Op]:
    """The ops to repeat for pinned pages, at `PageTable.pinned_pos`: what makes q of its position.

    That is its rotation, and what is done to it afterwards inside the layer, value by value.
    UnsupportedModelError names an op that nothing says of whether it can be repeated.
    """
    turned: dict[Value, Op] = {}
    for each in uses.layers[op.layer]:
        if each is op:
            break
        if isinstance(each, Rotate):
            turned[each.out] = each
        elif any(x in turned for x in inputs(each)):
            if isinstance(each, _REDONE):
                turned[each.out] = each
            elif not isinstance(each, _ENDS):
                name = type(each).__name__
                raise UnsupportedModelError(
                    f"layer {op.layer} has {name} behind a rotation, and nothing says what it does "
                    "to a query there; edgeinfer.fusion has to know",
                    missing=[name],
                )
    needed = {op.q}
    for value in reversed(turned):
        if value in needed:
            needed.update(inputs(turned[value]))
    return [each for value, each in turned.items() if value in needed]


def _side_by_side(steps: Sequence[_Single]) -> Iterator[Step]:
    """Products and convolutions that need not wait for each other become one step."""
    run: list[_Part] = []
    for step in [*steps, None]:
        if run and not (step is not None and _joins(step, run)):
            yield _together(run)
            run = []
        if isinstance(step, (Matmul, ExpertLinear, Conv, SiluConv)):
            run.append(step)
        elif step is not None:
            yield step


def _joins(step: _Single, run: Sequence[_Part]) -> bool:
    first = run[0]
    if isinstance(step, Matmul) and isinstance(first, Matmul):
        return step.x is first.x and all(step.residual is not each.out for each in run)
    if isinstance(step, ExpertLinear) and isinstance(first, ExpertLinear):
        return step.x is first.x and step.route is first.route
    if isinstance(step, (Conv, SiluConv)) and type(step) is type(first):
        is_alike = step.weight.shape[-1] == first.weight.shape[-1]
        return is_alike and all(step.x is not each.out for each in run)
    return False


def _together(run: Sequence[_Part]) -> Step:
    """Parts of one kind as a step."""
    kinds = {Matmul: Matmuls, ExpertLinear: ExpertMatmuls, Conv: Convs, SiluConv: Convs}
    step: Step = kinds[type(run[0])](tuple(run))
    return step


def parts_of(step: Step) -> Sequence[Step | _Part]:
    """What a step does side by side: mostly it is one thing."""
    return step.parts if isinstance(step, (Matmuls, ExpertMatmuls, Convs)) else (step,)
