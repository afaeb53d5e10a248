"""The operations that a forward pass is recorded in, and the values between them.

Shape letters: T tokens in this step, S cached positions, D dim, H query heads, K key/value heads,
d head dim, F feed-forward dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from edgeinfer.quant import Weight, dequantize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RopeKind: TypeAlias = Literal["norm", "neox"]
ActivationKind: TypeAlias = Literal["silu", "gelu", "sigmoid", "softplus", "relu2"]


class Yarn(NamedTuple):
    """Rotation of a longer context than was trained, n_ctx (Peng et al. 2023).

    Pairs that turn more than beta_fast times in n_ctx positions turn as they did, those that turn
    less than beta_slow times are slowed by the rope's scale, and between them it is a blend.
    """

    n_ctx: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class Rope(NamedTuple):
    """Rotary position embedding (Su et al. 2021) of the first `n_dims` of a head.

    `kind` pairs neighbours (2i, 2i+1: "norm") or halves (i, i + n_dims/2: "neox"). The angle of
    pair i at position p is p * frequencies()[i]; what is turned is also multiplied by `magnitude`.
    """

    kind: RopeKind
    n_dims: int
    base: float
    scale: float = 1.0
    factors: Weight | None = None  # (n_dims / 2,), Llama 3's `rope_freqs`
    yarn: Yarn | None = None
    magnitude: float = 1.0

    def frequencies(self) -> NDArray[np.float64]:
        """Radians a position of each pair: scale / (base ** (2i / n_dims) * factors[i])."""
        import numpy as np

        i = np.arange(self.n_dims // 2, dtype=np.float64)
        wave: NDArray[np.float64] = np.float64(self.base) ** (2 * i / self.n_dims)
        if self.factors is not None:
            wave = wave * dequantize(self.factors)
        slowed = self.scale / wave
        if self.yarn is None:
            return slowed
        kept = self._kept(i, self.yarn)
        return slowed * (1 - kept) + 1 / wave * kept

    def _kept(self, i: NDArray[np.float64], yarn: Yarn) -> NDArray[np.float64]:
        """How much of each pair's own frequency stays, from 1 for the fastest to 0."""

        def pair(n_turns: float) -> float:
            ratio = math.log(yarn.n_ctx / (n_turns * 2 * math.pi))
            return self.n_dims * ratio / (2 * math.log(self.base))

        first = max(0, math.floor(pair(yarn.beta_fast)))
        last = min(self.n_dims - 1, math.ceil(pair(yarn.beta_slow)))
        kept: NDArray[np.float64] = 1 - ((i - first) / max(0.001, last - first)).clip(0, 1)
        return kept


class Hparams(NamedTuple):
    """The numbers that every model has; all others are its model file's affair."""

    architecture: str
    n_layers: int
    dim: int
    vocab_size: int
    n_ctx_train: int


class KV(NamedTuple):
    """The cache that one attention layer keeps: per position K heads of k_dim and of v_dim."""

    n_heads: int
    k_dim: int
    v_dim: int


class Recording(Protocol):
    """The graph that a value belongs to."""

    hparams: Hparams

    def add(self, a: Value, b: Value) -> Value: ...

    def mul(self, a: Value, b: Value) -> Value: ...


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
    """

    layer: int
    out: Value
    q: Value
    k: Value
    v: Value
    n_heads: int
    cache: KV
    scale: float


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


class SelectRows(NamedTuple):
    """out = the rows of x whose result the step was asked for."""

    layer: int
    out: Value
    x: Value


Op: TypeAlias = (
    Embed | RmsNorm | Linear | Rotate | Attention | Add | Mul | Bias | Scale | SoftCap | Activation
    | SelectRows
)  # fmt: skip


def inputs(op: Op) -> list[Value]:
    """The values that an op reads, one that it reads twice twice."""
    return [field for field in op[2:] if isinstance(field, Value)]


class Segment(NamedTuple):
    """A range of layers of one graph, the unit that a backend compiles.

    `input` is None where the segment starts with token ids, else the residual stream that enters
    it. `output` is the value it yields: logits of the selected rows, or the residual stream.
    `hidden` is what steps yield that want no logits: what the head reads, or the output.
    """

    graph: Recording
    ops: tuple[Op, ...]
    input: Value | None
    output: Value
    hidden: Value
    is_last: bool

    @property
    def caches(self) -> dict[int, KV]:
        """The cache of each attention layer in this segment, by layer."""
        return {op.layer: op.cache for op in self.ops if isinstance(op, Attention)}
