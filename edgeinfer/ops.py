"""The operations that a forward pass is recorded in, and the values between them.

Shape letters: T tokens in this step, S cached positions, D dim, H query heads, K key/value heads,
d head dim, F feed-forward dim, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias

from edgeinfer.hparams import Hparams
from edgeinfer.quant import Weight
from edgeinfer.rope import Rope

ActivationKind: TypeAlias = Literal["silu", "gelu", "sigmoid", "softplus", "relu2"]
# Which key head a value head h reads: h % n_k_heads, or h * n_k_heads // n_v_heads.
Pairing: TypeAlias = Literal["tiled", "interleaved"]
GatingKind: TypeAlias = Literal["softmax", "sigmoid", "raw", "sqrt_softplus"]
KVType: TypeAlias = Literal["f16", "q8_0", "q4_0"]

KV_BLOCK = 32  # values of a head that share a scale, in types that have one
HADAMARD = 64  # the order of the transform; heads that are no multiple of it are stored as they are


class KV(NamedTuple):
    """The cache that one attention layer keeps: per position K heads of k_dim and of v_dim.

    With a window, queries see the last `window` positions, their own among them. Where K serves as
    V, the values of a head are the first v_dim of its keys, and nothing else is stored.

    Values of the types q8_0 and q4_0 are stored in blocks of KV_BLOCK along a head, the last one
    filled up with zeros.
    """

    n_heads: int
    k_dim: int
    v_dim: int
    window: int = 0  # 0: all
    k_is_v: bool = False
    k_type: KVType = "f16"
    v_type: KVType = "f16"

    @property
    def transforms_k(self) -> bool:
        """Whether queries and keys pass a Hadamard transform before they are quantised."""
        both_fit = not self.k_is_v or self.v_dim % HADAMARD == 0
        return self.k_type != "f16" and self.k_dim % HADAMARD == 0 and both_fit

    @property
    def transforms_v(self) -> bool:
        """Whether values do, and what attention makes of them passes it back."""
        if self.k_is_v:
            return self.transforms_k
        return self.v_type != "f16" and self.v_dim % HADAMARD == 0


class State(NamedTuple):
    """What a recurrent op keeps of a sequence from one row to the next: floats of a shape.

    Zeros before its first row.
    """

    kind: Literal["conv", "delta_net"]
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return 4 * math.prod(self.shape)


class Recording(Protocol):
    """The graph that a value belongs to."""

    hparams: Hparams

    def add(self, a: Value, b: Value) -> Value: ...

    def mul(self, a: Value, b: Value) -> Value: ...

    def boundary(self, layer: int) -> Value:
        """The residual stream that leaves a layer."""
        ...

    def ops_for(
        self, n_ctx: int | None, kv_types: tuple[KVType, KVType], *, of_draft: bool = False
    ) -> tuple[Op, ...]:
        """All that was recorded, for contexts of that length and caches of these types."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One activation of the recorded pass, (T, dim), made by exactly one op."""

    graph: Recording = field(repr=False)
    index: int
    dim: int

    def __add__(self, other: Value) -> Value:
        return self.graph.add(self, other)

    def __mul__(self, other: Value) -> Value:
        return self.graph.mul(self, other)


class Embed(NamedTuple):
    """out = weight[token id]; weight (V, D)."""

    layer: int
    out: Value
    weight: Weight


class RmsNorm(NamedTuple):
    """out = x / sqrt(mean(x^2) + eps) * weight over each of `n_heads` equal parts of a row."""

    layer: int
    out: Value
    x: Value
    weight: Weight | None  # (x dim / n_heads,); None is all ones
    eps: float
    n_heads: int


class Linear(NamedTuple):
    """out = x W^T + bias; weight (out dim, in dim), bias (out dim,) or None."""

    layer: int
    out: Value
    x: Value
    weight: Weight
    bias: Weight | None


class Rotate(NamedTuple):
    """out = x with each of `n_heads` heads rotated by its row's position."""

    layer: int
    out: Value
    x: Value
    n_heads: int
    rope: Rope


class Attention(NamedTuple):
    """Store k and v of this step in the layer's cache, then out = softmax(q K^T * scale) V, causal.

    q (T, H * k_dim), k (T, K * k_dim), v (T, K * v_dim), out (T, H * v_dim); query head h reads
    key/value head h // (H / K). Pinned pages of a slid cache are read by q as it would be at
    another position: see `pinned_query`.

    A layer without k reads the cache that layer `source` has filled before it. A soft-cap c
    makes a score s c * tanh(s / c). Sinks, one for each query head, are scores without a value.
    """

    layer: int
    out: Value
    q: Value
    k: Value | None
    v: Value | None
    n_heads: int
    cache: KV
    scale: float
    soft_cap: float = 0.0  # 0: none
    sinks: Weight | None = None  # (H,)
    source: int | None = None

    @property
    def cache_layer(self) -> int:
        """The layer whose cache it reads."""
        return self.layer if self.source is None else self.source


class Add(NamedTuple):
    """out = a + b."""

    layer: int
    out: Value
    a: Value
    b: Value


class Mul(NamedTuple):
    """out = a * b, element by element."""

    layer: int
    out: Value
    a: Value
    b: Value


class Bias(NamedTuple):
    """out = x + weight in every row; weight (x dim,)."""

    layer: int
    out: Value
    x: Value
    weight: Weight


class Gain(NamedTuple):
    """out = x * weight in every row; weight (x dim,)."""

    layer: int
    out: Value
    x: Value
    weight: Weight


class Scale(NamedTuple):
    """out = x * factor, a float32."""

    layer: int
    out: Value
    x: Value
    factor: float


class SoftCap(NamedTuple):
    """out = cap * tanh(x / cap): values beyond +-cap fade into it."""

    layer: int
    out: Value
    x: Value
    cap: float


class Activation(NamedTuple):
    """out = f(x), element by element.

    silu: x / (1 + exp(-x)); gelu: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)));
    sigmoid: 1 / (1 + exp(-x)); softplus: log(1 + exp(x)); relu2: max(x, 0)^2.
    """

    layer: int
    out: Value
    x: Value
    kind: ActivationKind


class Clamp(NamedTuple):
    """out = x, what is below `low` or above `high` put there."""

    layer: int
    out: Value
    x: Value
    low: float
    high: float


class MulParts(NamedTuple):
    """out = x with each of `factors.dim` equal parts of a row multiplied by its factor."""

    layer: int
    out: Value
    x: Value
    factors: Value


class Route(NamedTuple):
    """The experts of each row: out (T, 2 * n_used) holds their numbers, then their weights.

    x (T, E) holds logits, and p is their softmax, sigmoid, or sqrt(softplus), or the logits
    themselves ("raw"). The n_used experts of largest p + bias are chosen, the largest first, the
    lower number among equals. Where there are groups of neighbours, they come from those
    `n_groups_used` whose two largest p + bias add up to most.
    A weight is p ("raw": its softmax over the chosen), with `norm` divided by the sum of the
    chosen or SMALLEST_SUM, then multiplied by `scale`. The bias (E,) has no part in it.
    """

    layer: int
    out: Value
    x: Value
    gating: GatingKind
    n_used: int
    bias: Weight | None
    n_groups: int
    n_groups_used: int
    norm: bool
    scale: float


SMALLEST_SUM = 2.0**-14  # of weights that are divided by it


class ExpertLinear(NamedTuple):
    """out = (x W^T) * scale + bias of every expert in a row's route, one beside the other.

    weight (E, n, in dim), scale (E,) and bias (E, n), the last two or None; x (T, in dim) for all
    experts or (T, n_used * in dim), one part each; out (T, n_used * n).
    """

    layer: int
    out: Value
    x: Value
    route: Value
    weight: Weight
    scale: Weight | None
    bias: Weight | None

    @property
    def n_used(self) -> int:
        """Experts of a row."""
        return self.route.dim // 2


class ExpertSum(NamedTuple):
    """out = the parts of x, each times its expert's weight, added up in the order of the route.

    x (T, n_used * out dim).
    """

    layer: int
    out: Value
    x: Value
    route: Value


class Conv(NamedTuple):
    """Causal convolution of each channel: out_t = sum over j of weight[:, j] x_(t-L+1+j) + bias.

    weight (C, L), bias (C,) or None. The state is what the next row sees of those before it: the
    last L - 1 rows of x, the oldest first. L is 2 or more.
    """

    layer: int
    out: Value
    x: Value
    weight: Weight
    bias: Weight | None = None

    @property
    def n_taps(self) -> int:
        """L."""
        return self.weight.shape[-1]

    @property
    def state(self) -> State:
        return State("conv", (self.n_taps - 1, self.x.dim))


class DeltaNet(NamedTuple):
    """The gated delta rule: each value head h writes into a matrix S (dim, dim) and reads it.

    For each row: S = exp(decay) S; S = S + k (beta (v - S^T k))^T; out = S^T q. q and k
    (T, n_k_heads * dim) are those of the key head that h is paired with, v and out
    (T, n_v_heads * dim), decay and beta (T, n_v_heads). The state is S of every head.
    """

    layer: int
    out: Value
    q: Value
    k: Value
    v: Value
    decay: Value
    beta: Value
    n_k_heads: int
    n_v_heads: int
    dim: int
    pairing: Pairing

    def key_head(self, h: int) -> int:
        """The key head of value head h."""
        return (
            h % self.n_k_heads if self.pairing == "tiled" else h * self.n_k_heads // self.n_v_heads
        )

    @property
    def state(self) -> State:
        return State("delta_net", (self.n_v_heads, self.dim, self.dim))


class SelectRows(NamedTuple):
    """out = the rows of x whose result the step was asked for."""

    layer: int
    out: Value
    x: Value


Op: TypeAlias = (
    Embed | RmsNorm | Linear | Rotate | Attention | Add | Mul | Bias | Gain | Scale | SoftCap
    | Activation | Clamp | MulParts | Route | ExpertLinear | ExpertSum | Conv | DeltaNet
    | SelectRows
)  # fmt: skip


def inputs(op: Op) -> list[Value]:
    """The values that an op reads, one that it reads twice twice."""
    return [value for _, value in named_inputs(op)]


def named_inputs(op: NamedTuple) -> list[tuple[str, Value]]:
    """The same with the fields that hold them, of an op or what is made of some."""
    fields = zip(op._fields, op, strict=True)
    return [(name, field) for name, field in fields if isinstance(field, Value) and name != "out"]
