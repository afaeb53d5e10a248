"""The steps that lowering knows beside the ops of a graph: what `fusion` makes of several of them.

Letters are those of `ops`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from edgeinfer.graph import (
    KV,
    Activation,
    Add,
    Bias,
    Clamp,
    Conv,
    DeltaNet,
    Embed,
    ExpertLinear,
    ExpertSum,
    Gain,
    Mul,
    MulParts,
    Op,
    RmsNorm,
    Rope,
    Rotate,
    Route,
    Scale,
    SelectRows,
    SoftCap,
    Value,
)
from edgeinfer.quant import Weight


class Matmul(NamedTuple):
    """out = residual + (x W^T + bias)."""

    layer: int
    out: Value
    x: Value
    weight: Weight
    bias: Weight | None
    residual: Value | None


class Matmuls(NamedTuple):
    """Matmuls of one x, none of which reads what another leaves: they may run side by side."""

    parts: tuple[Matmul, ...]


class ExpertMatmuls(NamedTuple):
    """Products of one x with matrices of the same experts: they may run side by side."""

    parts: tuple[ExpertLinear, ...]


class SwiGlu(NamedTuple):
    """out = silu(gate) * up."""

    layer: int
    out: Value
    gate: Value
    up: Value


class SiluConv(NamedTuple):
    """out = silu of a convolution, whose state is known by the value that it left."""

    layer: int
    out: Value
    x: Value
    weight: Weight
    bias: Weight | None
    convolved: int  # index of that value


class Convs(NamedTuple):
    """Convolutions of as many taps, none of which reads what another leaves."""

    parts: tuple[Conv | SiluConv, ...]


class GatedDeltaNet(NamedTuple):
    """A delta net, and what makes its operands of q, k, decay and beta for nothing else.

    With an `eps` each head of q and k is normed, without a weight, and multiplied by a factor. With
    a `rate` decay is softplus(decay + bias) * rate, and beta the sigmoid of beta.
    """

    layer: int
    out: Value
    q: Value
    k: Value
    v: Value
    decay: Value
    beta: Value
    net: DeltaNet
    made_by: tuple[Op, ...]  # in the order of the segment
    eps: float | None
    q_factor: float
    k_factor: float
    bias: Weight | None
    rate: Weight | None


class WholeNorm(NamedTuple):
    """out = the norm of each of the wanted rows of x as a whole."""

    layer: int
    out: Value
    x: Value
    weight: Weight
    eps: float


class PinnedAttention(NamedTuple):
    """Attention as recorded, and the q by which pinned pages are read."""

    layer: int
    out: Value
    q: Value
    k: Value | None
    v: Value | None
    n_heads: int
    cache: KV
    scale: float
    soft_cap: float
    sinks: Weight | None
    source: int | None
    pinned_q: Value


class PinnedRotate(NamedTuple):
    """As Rotate, by the position that a row has for pinned pages."""

    layer: int
    out: Value
    x: Value
    n_heads: int
    rope: Rope


class RotatedAttention(NamedTuple):
    """Attention that norms and rotates the heads of q and k itself.

    Nobody else reads q and k, so it may do that in place.
    """

    layer: int
    out: Value
    q: Value
    k: Value | None
    v: Value | None
    n_heads: int
    cache: KV
    scale: float
    soft_cap: float
    sinks: Weight | None
    source: int | None
    rope: Rope
    q_norm: Weight | None  # (k_dim,)
    k_norm: Weight | None
    eps: float


Step: TypeAlias = (
    Embed | RmsNorm | Matmuls | Rotate | PinnedRotate | PinnedAttention | RotatedAttention | Add
    | Mul | Bias | Gain | Scale | SoftCap | Activation | Clamp | MulParts | Route | ExpertMatmuls
    | ExpertSum | Convs | GatedDeltaNet | SelectRows | WholeNorm | SwiGlu
)  # fmt: skip
