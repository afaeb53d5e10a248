"""The recorded forward pass of a model: a straight-line list of operations, symbolic in T.

Knows no device, no file format and no text. A model file in `edgeinfer.models` calls the methods
of `Graph` once, at load time; a backend lowers the recorded list to whatever it runs.

Shape letters: T tokens in this step, S cached positions, D dim, H query heads, K key/value heads,
d head dim, F feed-forward dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias

from edgeinfer.errors import InvalidModelError
from edgeinfer.quant import Weight

RopeKind: TypeAlias = Literal["norm", "neox"]
ActivationKind: TypeAlias = Literal["silu", "gelu", "sigmoid", "softplus", "relu2"]


class Rope(NamedTuple):
    """Rotary position embedding (Su et al. 2021) of the first `n_dims` of a head.

    `kind` pairs neighbours (2i, 2i+1: "norm") or halves (i, i + n_dims/2: "neox"). The angle of
    pair i at position p is p * scale / (base ** (2i / n_dims) * factors[i]).
    """

    kind: RopeKind
    n_dims: int
    base: float
    scale: float = 1.0
    factors: Weight | None = None  # (n_dims / 2,), Llama 3's `rope_freqs`


class Hparams(NamedTuple):
    """The numbers of one model, from its metadata."""

    architecture: str
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    n_ctx_train: int
    norm_eps: float
    rope_dims: int
    rope_base: float
    rope_scale: float = 1.0


class KV(NamedTuple):
    """The cache that one attention layer keeps: per position K heads of k_dim and of v_dim."""

    n_heads: int
    k_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One activation of the recorded pass, (T, dim), made by exactly one op."""

    graph: Graph = field(repr=False)
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

    graph: Graph
    ops: tuple[Op, ...]
    input: Value | None
    output: Value
    hidden: Value
    is_last: bool

    @property
    def caches(self) -> dict[int, KV]:
        """The cache of each attention layer in this segment, by layer."""
        return {op.layer: op.cache for op in self.ops if isinstance(op, Attention)}


class Graph:
    """Records the operations of one forward pass.

    Weights are asked for by GGUF name without suffix (`blk.0.attn_q`); what a file carries beside
    a weight (a bias, rope factors) takes part because it is there, not because a flag says so.
    """

    def __init__(self, hparams: Hparams, weights: Mapping[str, Weight]) -> None:
        self.hparams = hparams
        self.ops: list[Op] = []
        self.logits: Value | None = None
        self.hidden: Value | None = None  # what the head reads
        self._weights = dict(weights)
        self._used: set[str] = set()
        self._n_values = 0
        self._layer = -1
        self._boundaries: list[Value] = []  # the residual stream leaving layer i

    # -- structure ---------------------------------------------------------------------------

    def layers(self) -> Iterator[str]:
        """Yield the name prefix of each layer; ops recorded meanwhile belong to that layer."""
        for i in range(self.hparams.n_layers):
            self._layer = i
            yield f"blk.{i}"
        self._layer = self.hparams.n_layers

    def layer_output(self, x: Value) -> Value:
        """Mark x as the residual stream that leaves this layer: where a graph can be cut."""
        self._boundaries.append(x)
        return x

    def segment(self, first: int = 0, last: int | None = None) -> Segment:
        """Layers first <= i < last; the embedding rides with layer 0, the head with the last."""
        n = self.hparams.n_layers
        last = n if last is None else last
        if not 0 <= first < last <= n:
            raise ValueError(f"layers {first}:{last} are not within 0:{n}")
        low = -1 if first == 0 else first
        high = n if last == n else last - 1
        ops = tuple(op for op in self.ops if low <= op.layer <= high)
        output = self.logits if last == n else self._boundaries[last - 1]
        hidden = self.hidden if last == n else output
        assert output is not None and hidden is not None, "the model's forward() recorded no head"
        entering = None if first == 0 else self._boundaries[first - 1]
        return Segment(self, ops, entering, output, hidden, last == n)

    @property
    def unused(self) -> list[str]:
        """Names of tensors in the file that no op reads: a sign of an unsupported variant."""
        return sorted(set(self._weights) - self._used)

    # -- operations --------------------------------------------------------------------------

    def embed(self, name: str = "token_embd") -> Value:
        weight = self._weight(f"{name}.weight", self.hparams.vocab_size, self.hparams.dim)
        return self._record(Embed, weight.shape[1], weight=weight)

    def rms_norm(self, x: Value, name: str | None, n_heads: int = 1) -> Value:
        """Over each of `n_heads` parts of a row; without a name there is no weight."""
        weight = None if name is None else self._weight(f"{name}.weight", x.dim // n_heads)
        return self._record(
            RmsNorm, x.dim, x=x, weight=weight, eps=self.hparams.norm_eps, n_heads=n_heads
        )

    def linear(self, x: Value, name: str, out_dim: int) -> Value:
        weight = self._weight(f"{name}.weight", out_dim, x.dim)
        bias = self._weight(f"{name}.bias", out_dim) if self.has(f"{name}.bias") else None
        return self._record(Linear, out_dim, x=x, weight=weight, bias=bias)

    def rope(self, kind: RopeKind) -> Rope:
        """The model's rotation, with the factors of `rope_freqs.weight` where the file has them."""
        hp, name = self.hparams, "rope_freqs.weight"
        factors = self._weight(name, hp.rope_dims // 2) if self.has(name) else None
        return Rope(kind, hp.rope_dims, hp.rope_base, hp.rope_scale, factors)

    def rotate(self, x: Value, n_heads: int, rope: Rope) -> Value:
        return self._record(Rotate, x.dim, x=x, n_heads=n_heads, rope=rope)

    def attention(
        self, q: Value, k: Value, v: Value, *, cache: KV, scale: float | None = None
    ) -> Value:
        n_heads = q.dim // cache.k_dim
        scale = cache.k_dim**-0.5 if scale is None else scale
        return self._record(
            Attention,
            n_heads * cache.v_dim,
            q=q, k=k, v=v, n_heads=n_heads, cache=cache, scale=scale,
        )  # fmt: skip

    def add(self, a: Value, b: Value) -> Value:
        return self._record(Add, a.dim, a=a, b=b)

    def mul(self, a: Value, b: Value) -> Value:
        return self._record(Mul, a.dim, a=a, b=b)

    def add_vector(self, x: Value, name: str) -> Value:
        """x plus a tensor (full name) of one row."""
        return self._record(Bias, x.dim, x=x, weight=self._weight(name, x.dim))

    def scale(self, x: Value, factor: float) -> Value:
        return self._record(Scale, x.dim, x=x, factor=factor)

    def soft_cap(self, x: Value, cap: float) -> Value:
        return self._record(SoftCap, x.dim, x=x, cap=cap)

    def activation(self, kind: ActivationKind, x: Value) -> Value:
        return self._record(Activation, x.dim, x=x, kind=kind)

    def silu(self, x: Value) -> Value:
        return self.activation("silu", x)

    def select_rows(self, x: Value) -> Value:
        return self._record(SelectRows, x.dim, x=x)

    def head(self, x: Value, scale: float = 1.0, soft_cap: float = 0.0) -> None:
        """Logits from `output.weight`, or from the embedding where the file ties the two.

        They are multiplied by `scale`, then kept below `soft_cap` where there is one.
        """
        name = "output" if self.has("output.weight") else "token_embd"
        self.hidden, logits = x, self.linear(x, name, self.hparams.vocab_size)
        logits = logits if scale == 1 else self.scale(logits, scale)
        self.logits = self.soft_cap(logits, soft_cap) if soft_cap else logits

    def has(self, name: str) -> bool:
        """Whether the file holds this tensor (full name)."""
        return name in self._weights

    # -- recording ---------------------------------------------------------------------------

    def _record(self, op: type[Op], dim: int, **fields: object) -> Value:
        out = Value(self, self._n_values, dim)
        self._n_values += 1
        self.ops.append(op(layer=self._layer, out=out, **fields))  # type: ignore[arg-type]
        return out

    def _weight(self, name: str, *shape: int) -> Weight:
        weight = self._weights.get(name)
        if weight is None:
            raise InvalidModelError(
                f"the file lacks a tensor that {self.hparams.architecture} needs", field=name
            )
        if weight.shape != shape:
            if without_leading_ones(weight.shape) != without_leading_ones(shape):
                raise InvalidModelError(
                    f"shape is {weight.shape}, the metadata asks for {shape}", field=name
                )
            weight = self._weights[name] = replace(weight, shape=shape)
        self._used.add(name)
        return weight


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Files may write a vector (n,) as (1, n): what counts is the rest."""
    n_ones = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return shape[n_ones:]
