"""The recorded forward pass of a model: a straight-line list of operations, symbolic in T.

Knows no device, no file format and no text. A model file in `edgeinfer.models` calls the methods
of `Graph` once, at load time, asks it for the numbers and tensors that it needs, and thereby says
which take part; a backend lowers the recorded list to whatever it runs.
Operations and shape letters: `ops.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from edgeinfer import draft
from edgeinfer.draft import Draft
from edgeinfer.errors import InvalidModelError
from edgeinfer.hparams import Hparams
from edgeinfer.model_reader import Heads, ModelReader, without_leading_ones
from edgeinfer.ops import (
    KV,
    Activation,
    ActivationKind,
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
    GatingKind,
    KVType,
    Linear,
    Mul,
    MulParts,
    Op,
    Pairing,
    RmsNorm,
    Rotate,
    Route,
    Scale,
    SelectRows,
    SoftCap,
    State,
    Value,
    inputs,
)
from edgeinfer.quant import Weight
from edgeinfer.rope import Growth, Rope, RopeKind, Yarn
from edgeinfer.segment import Segment, in_context, of_types
from edgeinfer.settings import Settings

__all__ = [
    "Activation", "ActivationKind", "Add", "Attention", "Bias", "Clamp", "Conv", "DeltaNet",
    "Embed", "ExpertLinear", "ExpertSum", "Gain", "GatingKind", "Graph", "Growth", "Heads",
    "Hparams", "KV", "KVType", "Linear", "Mul", "MulParts", "Op", "Pairing", "RmsNorm", "Rope",
    "RopeKind", "Rotate", "Route", "Scale", "Segment", "SelectRows", "Settings", "SoftCap", "State",
    "Value", "Yarn", "inputs", "without_leading_ones",
]  # fmt: skip


class Graph(ModelReader):
    """Records the operations of one forward pass.

    Weights are asked for by GGUF name without suffix (`blk.0.attn_q`); what a file carries beside
    a weight (a bias, a scale, rope factors) takes part because it is there, not because a flag
    says so. Settings are asked for by their key without the architecture's prefix; inside
    `layers`, an array of one value a layer answers with that layer's.
    """

    def __init__(self, hparams: Hparams, settings: Settings, weights: Mapping[str, Weight]) -> None:
        super().__init__(hparams, settings, weights)
        self.ops: list[Op] = []
        self.logits: Value | None = None
        self.hidden: Value | None = None  # what the head reads
        self._n_values = 0
        self._boundaries: list[Value] = []  # the residual stream leaving layer i
        self._draft: Draft | None = None

    # -- structure ---------------------------------------------------------------------------

    def layers(self) -> Iterator[str]:
        """Yield the name prefix of each layer; ops recorded meanwhile belong to that layer."""
        for i in range(self.hparams.n_layers):
            self._layer = i
            yield f"blk.{i}"
        self._layer = self.hparams.n_layers

    def drafts(self) -> Iterator[tuple[str, Value]]:
        """Yield the prefix of a block that guesses tokens, and what the head reads before each.

        What is recorded meanwhile, its `head` too, is the draft's.
        """
        yield from draft.record(self)

    def layer_output(self, x: Value) -> Value:
        """Mark x as the residual stream that leaves this layer: where a graph can be cut."""
        self._boundaries.append(x)
        return x

    def segment(
        self,
        first: int = 0,
        last: int | None = None,
        n_ctx: int | None = None,
        residuals: Iterable[int] = (),
        kv_types: tuple[KVType, KVType] = ("f16", "f16"),
        drafts: bool = False,
    ) -> Segment:
        """Layers first <= i < last; the embedding rides with layer 0, the head with the last.

        For sequences of up to n_ctx positions; without that, as many as it was trained for. Steps
        may also yield the streams that enter the layers `residuals`, all from `first` to `last`.
        Caches keep K and V in `kv_types`; InvalidRequestError where a layer has but one for both.
        With `drafts` a whole model has the `draft` that its file holds, if any.
        """
        n = self.hparams.n_layers
        last = n if last is None else last
        if not 0 <= first < last <= n:
            raise ValueError(f"layers {first}:{last} are not within 0:{n}")
        low = -1 if first == 0 else first
        high = n if last == n else last - 1
        ops = tuple(op for op in self.ops_for(n_ctx, kv_types) if low <= op.layer <= high)
        output = self.logits if last == n else self.boundary(last - 1)
        hidden = self.hidden if last == n else output
        assert output is not None and hidden is not None, "the model's forward() recorded no head"
        entering = None if first == 0 else self.boundary(first - 1)
        layers = sorted(set(residuals))
        if layers and not first <= layers[0] <= layers[-1] <= last:
            raise ValueError(f"residuals {layers} are not within {first}:{last}")
        kept = {layer: self.residual(layer) for layer in layers}
        found = Segment(self, ops, entering, output, hidden, last == n, kept)
        if not drafts or self._draft is None or last - first < n:
            return found
        return self._draft.beside(found, self.ops_for(n_ctx, kv_types, of_draft=True))

    def ops_for(
        self, n_ctx: int | None, kv_types: tuple[KVType, KVType], *, of_draft: bool = False
    ) -> tuple[Op, ...]:
        """All that was recorded, for contexts of that length and caches of these types."""
        ops: Iterable[Op] = self.ops
        if of_draft:
            assert self._draft is not None, "there is none"
            ops = self._draft.block.ops
        n_ctx = self.hparams.n_ctx_train if n_ctx is None else n_ctx
        return tuple(of_types(in_context(op, n_ctx), kv_types) for op in ops)

    def residual(self, layer: int) -> Value:
        """The residual stream that enters a layer; that of layer `n_layers` enters the head."""
        if layer:
            return self.boundary(layer - 1)
        return [op.out for op in self.ops if op.layer < 0][-1]

    def boundary(self, layer: int) -> Value:
        """The residual stream that leaves a layer."""
        return self._boundaries[layer]

    # -- operations --------------------------------------------------------------------------

    def embed(self, name: str = "token_embd") -> Value:
        weight = self._weight(f"{name}.weight", self.hparams.vocab_size, self.dim)
        return self._times_twin(self._record(Embed, weight.shape[1], weight=weight), name)

    def rms_norm(
        self, x: Value, name: str | None, n_heads: int = 1, eps: float | None = None
    ) -> Value:
        """Over each of `n_heads` parts of a row; without a name there is no weight.

        `eps` is that of `attention.layer_norm_rms_epsilon` if no other is given.
        """
        weight = None if name is None else self._weight(f"{name}.weight", x.dim // n_heads)
        key = "attention.layer_norm_rms_epsilon"
        eps = self._settings.number(key, low=1e-30, high=0.99) if eps is None else eps
        return self._record(RmsNorm, x.dim, x=x, weight=weight, eps=eps, n_heads=n_heads)

    def linear(self, x: Value, name: str, out_dim: int) -> Value:
        weight = self._weight(f"{name}.weight", out_dim, x.dim)
        bias = self._optional(f"{name}.bias", out_dim)
        return self._linear(x, weight, bias, name)

    def linear_of(self, parts: Sequence[Value], name: str, out_dim: int) -> Value:
        """A matrix times values that lie beside each other, part by part."""
        return draft.linear_of(self, parts, name, out_dim)

    def linears(self, x: Value, fused: str, parts: Mapping[str, int]) -> list[Value]:
        """Linears of one x by name and width, which a file may hold as one matrix, `fused`."""
        if not self.has(f"{fused}.weight"):
            return [self.linear(x, name, dim) for name, dim in parts.items()]
        weight = self._weight(f"{fused}.weight", sum(parts.values()), x.dim)
        bias = self._optional(f"{fused}.bias", weight.shape[0])
        values, end = list[Value](), 0
        for dim in parts.values():
            start, end = end, end + dim
            rows = bias.rows(start, end) if bias else None
            values.append(self._linear(x, weight.rows(start, end), rows, fused))
        return values

    def linears_by_head(
        self, x: Value, name: str, n_heads: int, dims: Sequence[int]
    ) -> list[Value]:
        """Linears whose rows lie in one matrix, head by head: of each head so many for each."""
        weight = self._weight(f"{name}.weight", n_heads * sum(dims), x.dim)
        bias = self._optional(f"{name}.bias", n_heads * sum(dims))
        values, end = list[Value](), 0
        for dim in dims:
            start, end = end, end + dim
            rows = _of_heads(weight, n_heads, start, end)
            of_rows = _of_heads(bias, n_heads, start, end) if bias else None
            values.append(self._linear(x, rows, of_rows, name))
        return values

    def qkv(self, x: Value, blk: str, heads: Heads) -> tuple[Value, Value, Value]:
        """Queries (T, H * k_dim), keys (T, K * k_dim) and values (T, K * v_dim) of a layer."""
        parts = {
            f"{blk}.attn_q": heads.n * heads.k_dim,
            f"{blk}.attn_k": heads.n_kv * heads.k_dim,
            f"{blk}.attn_v": heads.n_kv * heads.v_dim,
        }
        q, k, v = self.linears(x, f"{blk}.attn_qkv", parts)
        return q, k, v

    def gate_up(self, x: Value, blk: str) -> tuple[Value, Value]:
        """Gate and up (T, F) of a feed-forward network; `ffn_up` alone holds both, gate first."""
        gate, up, dim = f"{blk}.ffn_gate", f"{blk}.ffn_up", self.count("feed_forward_length")
        whole = self._weights.get(f"{up}.weight")
        is_fused = whole is not None and whole.shape[-2:-1] == (2 * dim,)
        if self.has(f"{gate}.weight") or not is_fused:
            return self.linear(x, gate, dim), self.linear(x, up, dim)
        first, second = self.linears(x, up, {gate: dim, up: dim})
        return first, second

    def rotate(self, x: Value, n_heads: int, rope: Rope) -> Value:
        return self._record(Rotate, x.dim, x=x, n_heads=n_heads, rope=rope)

    def attention(
        self,
        q: Value,
        k: Value | None = None,
        v: Value | None = None,
        *,
        cache: KV,
        scale: float | None = None,
        soft_cap: float = 0.0,
        sinks: str | None = None,
        source: int | None = None,
    ) -> Value:
        """Without k the cache of layer `source` is read, without v K serves as V.

        `scale` is k_dim ** -0.5 by default. `sinks` names a vector of one score for each head,
        which has no value.
        """
        n_heads = q.dim // cache.k_dim
        scale = cache.k_dim**-0.5 if scale is None else scale
        weight = None if sinks is None else self._weight(f"{sinks}.weight", n_heads)
        return self._record(
            Attention,
            n_heads * cache.v_dim,
            q=q, k=k, v=v, n_heads=n_heads, cache=cache, scale=scale, soft_cap=soft_cap,
            sinks=weight, source=source,
        )  # fmt: skip

    def add(self, a: Value, b: Value) -> Value:
        return self._record(Add, a.dim, a=a, b=b)

    def mul(self, a: Value, b: Value) -> Value:
        return self._record(Mul, a.dim, a=a, b=b)

    def add_vector(self, x: Value, name: str) -> Value:
        """x plus a tensor (full name) of one row."""
        return self._record(Bias, x.dim, x=x, weight=self._weight(name, x.dim))

    def mul_vector(self, x: Value, name: str) -> Value:
        """x times a tensor (full name) of one row, element by element."""
        return self._record(Gain, x.dim, x=x, weight=self._weight(name, x.dim))

    def convs(self, values: Sequence[Value], name: str, n_taps: int) -> list[Value]:
        """Causal convolutions of values whose channels lie side by side in one weight (C, L)."""
        n_channels = sum(x.dim for x in values)
        weight = self._weight(f"{name}.weight", n_channels, n_taps)
        bias = self._optional(f"{name}.bias", n_channels)
        outs, end = list[Value](), 0
        for x in values:
            start, end = end, end + x.dim
            of_x = bias.rows(start, end) if bias else None
            outs.append(self._record(Conv, x.dim, x=x, weight=weight.rows(start, end), bias=of_x))
        return outs

    def delta_net(
        self,
        q: Value,
        k: Value,
        v: Value,
        *,
        decay: Value,
        beta: Value,
        n_k_heads: int,
        pairing: Pairing,
    ) -> Value:
        """The gated delta rule, as `DeltaNet` says; decay and beta have one value for each head."""
        return self._record(
            DeltaNet, v.dim, q=q, k=k, v=v, decay=decay, beta=beta, n_k_heads=n_k_heads,
            n_v_heads=beta.dim, dim=v.dim // beta.dim, pairing=pairing,
        )  # fmt: skip

    def scale(self, x: Value, factor: float) -> Value:
        return x if factor == 1 else self._record(Scale, x.dim, x=x, factor=factor)

    def soft_cap(self, x: Value, cap: float) -> Value:
        return self._record(SoftCap, x.dim, x=x, cap=cap)

    def activation(self, kind: ActivationKind, x: Value) -> Value:
        return self._record(Activation, x.dim, x=x, kind=kind)

    def silu(self, x: Value) -> Value:
        return self.activation("silu", x)

    def clamp(self, x: Value, low: float, high: float) -> Value:
        return self._record(Clamp, x.dim, x=x, low=low, high=high)

    def mul_parts(self, x: Value, factors: Value) -> Value:
        """x with each of as many parts of a row as there are factors multiplied by its factor."""
        return self._record(MulParts, x.dim, x=x, factors=factors)

    def experts(
        self,
        x: Value,
        blk: str,
        dim: int,
        *,
        gating: GatingKind = "softmax",
        norm: bool = True,
        activation: ActivationKind = "silu",
        gated: bool = True,
        router: Value | None = None,
    ) -> Value:
        """A feed-forward network of experts, and the shared one where the file has one.

        What is given is what the family does where the file says nothing; `dim` is the width of
        an expert. The router chooses by x if `router` is no other value.
        """
        from edgeinfer import mixture  # 1 ms that models without experts don't need

        router = x if router is None else router
        return mixture.experts(self, x, blk, dim, gating, norm, activation, gated, router)

    def select_rows(self, x: Value) -> Value:
        return self._record(SelectRows, x.dim, x=x)

    def head(
        self, x: Value, scale: float = 1.0, soft_cap: float = 0.0, name: str = "output"
    ) -> None:
        """Logits from a matrix, or from the embedding where the file ties the two.

        They are multiplied by `scale`, then kept below `soft_cap` where there is one.
        """
        name = self.first(name, "token_embd")
        self.hidden = x
        logits = self.scale(self.linear(x, name, self.hparams.vocab_size), scale)
        self.logits = self.soft_cap(logits, soft_cap) if soft_cap else logits

    # -- recording ---------------------------------------------------------------------------

    def _linear(self, x: Value, weight: Weight, bias: Weight | None, name: str) -> Value:
        """A product, times the scale that the file may hold beside the matrix, then the bias."""
        out_dim = weight.shape[0]
        if not self.has(f"{name}.scale"):
            out = self._record(Linear, out_dim, x=x, weight=weight, bias=bias)
            return self._times_twin(out, name)
        out = self._record(Linear, out_dim, x=x, weight=weight, bias=None)
        out = self._times_twin(out, name)
        return out if bias is None else self._record(Bias, out_dim, x=out, weight=bias)

    def _times_twin(self, x: Value, name: str) -> Value:
        """x times the scale beside a matrix. Its `input_scale` is for activations of 4 bits."""
        self._used.add(f"{name}.input_scale")
        if not self.has(f"{name}.scale"):
            return x
        from edgeinfer.dequantize import dequantize  # NumPy, which recording needs nowhere else

        twin = self._weight(f"{name}.scale", 1)
        factor = float(dequantize(twin)[0]) if twin.type.is_runnable else 1.0
        if not math.isfinite(factor):
            raise InvalidModelError("not a finite number; download the file again", field=twin.name)
        return self.scale(x, factor)

    def _record(self, op: type[Op], dim: int, /, **fields: object) -> Value:
        out = Value(self, self._n_values, dim)
        self._n_values += 1
        self.ops.append(op(layer=self._layer, out=out, **fields))  # type: ignore[arg-type]
        return out


def _of_heads(weight: Weight, n_heads: int, first: int, last: int) -> Weight:
    """Of the rows of every head, those from first to last."""
    n_rows, *rest = weight.shape
    part = replace(weight, shape=(n_heads, n_rows // n_heads, *rest)).parts(first, last)
    return replace(part, shape=(n_heads * (last - first), *rest))
