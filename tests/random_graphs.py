"""Graphs of all ops in all orders, drawn by hypothesis: what a model file of tomorrow may record.

Blocks look like those of real models, with one thing or another done otherwise; between them
stand ops that no model has in that place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, get_args

import numpy as np
from hypothesis import strategies as st

from edgeinfer.graph import (
    KV,
    ActivationKind,
    ExpertLinear,
    ExpertSum,
    GatingKind,
    Graph,
    Growth,
    Hparams,
    KVType,
    Pairing,
    Rope,
    Route,
    Segment,
    Value,
    Yarn,
)
from edgeinfer.quant import QUANT_TYPES, Weight
from tests.bench.blocks import quantize

TYPES = {kind.name: kind for kind in QUANT_TYPES.values()}
KINDS = get_args(ActivationKind)
# Widths of key and of value heads: each pair is a kernel to be built, which takes 2 s.
HEADS = ((8, 8), (6, 20), (64, 64))
WINDOWS = (1, 4, 33, 500)
ROPES = (
    Rope("norm", 6, 100.0),
    Rope("neox", 6, 100.0),
    Rope("neox", 4, 10000.0, 0.5),
    Rope("norm", 6, 100.0, 0.25, None, Yarn(64, 8.0, 0.5), 1.2, Growth(0.5, 3)),
    Rope("neox", 6, 100.0, 1.0, None, Yarn(64, 8.0, 0.5), 1.2),
)


class Loose(NamedTuple):
    """An op on values made before, picked by number."""

    op: str
    a: int
    b: int
    choice: int


class Experts(NamedTuple):
    """A feed-forward network of experts; what is done between its products is `inner`."""

    n: int
    n_used: int
    dim: int
    gating: GatingKind
    groups: int  # none, or of this size
    norm: bool
    scale: float
    inner: int
    shared: int  # another network beside it: none, plain, weighed
    router: int  # what chooses: the input, what the experts of a first choice leave


class Layer(NamedTuple):
    """How a layer goes; numbers choose among variants, 0 is what models do today."""

    heads: int  # of HEADS
    n_kv: int
    group: int  # query heads of a key/value head
    q_norm: int  # heads, none, whole row, without weight, of another epsilon
    k_norm: int
    ropes: int  # alike, q alone, k alone, two, none
    after: int  # what is done to q behind its rotation
    again: int  # who else reads q
    v: int  # own, k before its norm, k as it is stored, k stored once
    cache: int  # own, or that of an earlier layer alike
    window: int  # none, or of WINDOWS
    cap: int  # none, or a soft-cap of 3
    sinks: int
    residual: int
    ffn: int
    experts: Experts | None
    before: tuple[Loose, ...]
    between: tuple[Loose, ...]


@dataclass(frozen=True)
class Drawn:
    """A model; `seed` draws its weights and their types."""

    layers: tuple[Layer, ...]
    dim: int
    end: int  # how rows are selected and normed
    cap: bool
    tied: bool
    types: tuple[str, ...]
    n_prompt: int
    seed: int
    kv_types: tuple[KVType, KVType] = ("f16", "f16")


_OPS = (
    "linear", "norm", "rotate", "add", "mul", "activation", "scale", "soft_cap", "bias", "gain",
    "clamp", "parts", "conv", "delta",
)  # fmt: skip
_NUMBER = st.integers(0, 7)
_LOOSE = st.lists(
    st.builds(Loose, st.sampled_from(_OPS), _NUMBER, _NUMBER, _NUMBER), max_size=4
).map(tuple)


def _upto(n: int) -> st.SearchStrategy[int]:
    return st.integers(0, n)


def _mostly_0(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([0] * n + [*range(n + 1)])


_EXPERTS = st.builds(
    Experts,
    n=st.sampled_from([4, 6, 8, 12]),
    n_used=st.integers(1, 4),
    dim=st.sampled_from([32, 64, 7]),
    gating=st.sampled_from(get_args(GatingKind)),
    groups=st.sampled_from([0, 0, 2, 3, 4]),
    norm=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    inner=_upto(7),
    shared=_upto(2),
    router=_mostly_0(1),
)


def _models(
    heads: tuple[int, ...], most_v: int, windows: int, caps: int, kv_types: tuple[KVType, KVType]
) -> st.SearchStrategy[Drawn]:
    """Models of these heads, up to a variant of v and so many windows and soft-caps."""
    layer = st.builds(
        Layer, st.sampled_from(heads), st.integers(1, 2), st.integers(1, 3), _upto(4), _upto(4),
        _mostly_0(4), _mostly_0(4), _mostly_0(3), _mostly_0(most_v), _upto(1), _upto(windows),
        _mostly_0(caps), _upto(1), _upto(4), _upto(7),
        st.sampled_from([0, 0, 1]).flatmap(lambda has: _EXPERTS if has else st.none()), _LOOSE,
        _LOOSE,
    )  # fmt: skip
    return st.builds(
        Drawn,
        layers=st.lists(layer, min_size=1, max_size=3).map(tuple),
        dim=st.sampled_from([32, 64, 7]),
        end=_upto(6),
        cap=st.booleans(),
        tied=st.booleans(),
        types=st.sampled_from([("F32",), ("Q4_0",), ("Q4_0", "F32"), ("Q8_0", "F16")]),
        n_prompt=st.integers(1, 5),
        seed=st.integers(0, 99),
        kv_types=st.just(kv_types),
    )


MODELS = _models((0, 1), 3, len(WINDOWS), 1, ("f16", "f16"))
# What stores and reads them differs by type; what stands around does not.
TYPED_MODELS = _models((1, 2), 2, 0, 0, ("q8_0", "q4_0"))


class Given:
    """Settings of a file that has every default, an epsilon of its norms, and some experts."""

    counts = {"expert_count": 4, "expert_used_count": 2}

    def has(self, name: str) -> bool:
        return False

    is_array = has

    def number(self, name: str, default: Any = None, **limits: Any) -> float:
        return 1e-5 if name.endswith("_epsilon") else float(default)

    def count(self, name: str, default: Any = None, **limits: Any) -> int:
        return int(self.counts.get(name, default))

    def flag(self, name: str, default: Any = None, **limits: Any) -> bool:
        return bool(default)

    def text(self, name: str, default: Any = None) -> str:
        return str(default)

    def wrong(self, name: str, value: object, wanted: str) -> NoReturn:
        raise AssertionError(name)

    def unsupported(self, name: str, operation: str) -> NoReturn:
        raise AssertionError(name)


class RandomGraph(Graph):
    """A graph that finds any tensor it asks for, random and of the shape that it must have."""

    def __init__(
        self,
        n_layers: int = 1,
        dim: int = 32,
        types: tuple[str, ...] = ("F32",),
        tied: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(Hparams("made-up", n_layers, dim, 40, 512), Given(), {})
        self._types, self._tied, self._rng = types, tied, np.random.default_rng(seed)
        self._made: dict[str, Weight] = {}

    def has(self, name: str) -> bool:
        if name == "output.weight":
            return not self._tied
        may_be = name.endswith((".bias", "_exps.scale"))
        return may_be and sum(name.encode()) % 3 == 0

    def _weight(self, name: str, *shape: int) -> Weight:
        if name not in self._made:
            values = self._rng.standard_normal(shape, np.float32)
            if len(shape) == 1:
                kind, rows = "F32", (1 + values / 4).astype(np.float32)
            else:
                types = ["F32"] if name.endswith(".bias") else self._types
                fitting = [t for t in types if shape[-1] % TYPES[t].block == 0]
                kind = str(self._rng.choice(fitting or ["F32"]))
                values = values.reshape(-1, shape[-1]) / np.float32(shape[-1] ** 0.5)
                rows = quantize(values, kind)
            self._made[name] = Weight(name, shape, TYPES[kind], memoryview(rows.tobytes()))
        return self._made[name]


class Recorder:
    """Records what was drawn."""

    def __init__(self, drawn: Drawn) -> None:
        d = self.drawn = drawn
        self.g = RandomGraph(len(d.layers), d.dim, d.types, d.tied, d.seed)
        self._n_names = 0
        self.blk = ""
        self._caches: list[KV] = []  # of the layers so far

    def segment(self) -> Segment:
        g, end = self.g, self.drawn.end
        x = g.embed()
        for blk, layer in zip(g.layers(), self.drawn.layers, strict=True):
            self.blk = blk
            x = self._layer(x, layer)
        if end == 3:  # the norm before the rows
            x = g.select_rows(g.rms_norm(x, "output_norm"))
        else:
            x = g.select_rows(x)
            x = [
                lambda: g.rms_norm(x, "output_norm"),
                lambda: x,
                lambda: g.rms_norm(x, None),
                lambda: x,
                lambda: self._plain(self._linear(x, x.dim), KINDS[1]) + x,
                lambda: g.rms_norm(x, "output_norm") + x,
                lambda: g.rms_norm(x, "output_norm", 4 if x.dim % 4 == 0 else 7),
            ][end]()
        g.head(x, scale=0.5 if self.drawn.cap else 1.0, soft_cap=3.0 if self.drawn.cap else 0.0)
        return g.segment(kv_types=self.drawn.kv_types)

    def name(self) -> str:
        self._n_names += 1
        return f"{self.blk}.t{self._n_names}"

    def _linear(self, x: Value, dim: int) -> Value:
        return self.g.linear(x, self.name(), dim)

    def _plain(self, x: Value, kind: Any) -> Value:
        return self.g.activation(kind, x)

    def _layer(self, x: Value, s: Layer) -> Value:
        g = self.g
        x = self._loose(x, s.before)
        x = self._residual(x, self._attention(g.rms_norm(x, self.name()), s), s.residual)
        x = self._loose(x, s.between)
        h = g.rms_norm(x, self.name())
        if s.experts is not None:
            return g.layer_output(x + self._experts(h, s.experts))
        x = self._residual(x, self._ffn(h, s.ffn), s.residual)
        return g.layer_output(x)

    def _residual(self, x: Value, branch: Value, way: int) -> Value:
        g = self.g
        out = self._linear(branch, x.dim)
        if way == 1:
            return out + x
        if way == 2:  # nothing is added
            return out
        if way == 3:  # two matmuls are added up, then what was there
            return self._linear(branch, x.dim) + out + x
        if way == 4:  # a norm and a multiplier before the addition
            return x + g.scale(g.rms_norm(out, self.name()), 0.25)
        return x + out

    def _attention(self, h: Value, s: Layer) -> Value:
        g, n_kv = self.g, s.n_kv
        k_dim, v_dim = HEADS[s.heads]
        window, k_is_v = (0, *WINDOWS)[s.window], s.v == 3 and k_dim == v_dim
        n_heads, cache = n_kv * s.group, KV(n_kv, k_dim, v_dim, window, k_is_v)
        alike = [i for i, each in enumerate(self._caches) if each == cache]
        source = alike[0] if alike and s.cache else None
        self._caches.append(cache if source is None else KV(0, 0, 0))
        q, raw = self._linear(h, n_heads * k_dim), self._linear(h, n_kv * k_dim)
        v = self._linear(h, n_kv * v_dim) if s.v == 0 or k_dim != v_dim else raw
        q, k = self._norm(q, n_heads, s.q_norm), self._norm(raw, n_kv, s.k_norm)
        first, second = (ROPES[(s.after + i) % len(ROPES)] for i in (0, 1))
        if s.ropes in (0, 1, 3):
            q = g.rotate(q, n_heads, first)
        turned = q
        if s.ropes in (0, 2, 3):
            k = g.rotate(k, n_kv, second if s.ropes == 3 else first)
        v = k if s.v == 2 and k_dim == v_dim else v
        if s.after == 1:
            q = g.scale(q, 0.7)
        elif s.after == 2:
            q = g.rms_norm(q, self.name(), n_heads)
        elif s.after == 3:
            q = q * g.silu(self._linear(h, q.dim))
        elif s.after == 4:
            q = q + self._linear(h, q.dim)
        a = g.attention(
            q,
            None if source is not None else k,
            None if source is not None or k_is_v else v,
            cache=cache,
            soft_cap=3.0 if s.cap else 0.0,
            sinks=self.name() if s.sinks else None,
            source=source,
        )
        if s.again == 1:
            return a * self._plain(self._linear(turned, a.dim), "sigmoid")
        if s.again == 2 and a.dim == q.dim:
            return a + q
        if s.again == 3:
            return a + self._linear(k, a.dim)
        return a

    def _norm(self, x: Value, n_heads: int, way: int) -> Value:
        if way == 1:
            return x
        if way == 3:
            return self.g.rms_norm(x, None, n_heads)
        eps = 0.5 if way == 4 else None
        return self.g.rms_norm(x, self.name(), 1 if way == 2 else n_heads, eps)

    def _ffn(self, h: Value, way: int) -> Value:
        g = self.g
        gate, up = self._linear(h, 64), self._linear(h, 64)
        if way == 1:
            return up * g.silu(gate)
        if way == 2:
            return self._plain(gate, "gelu") * up
        if way == 3:  # the activation is read twice
            gate = g.silu(gate)
            return gate * up + gate
        if way == 4:
            return g.silu(gate) * g.silu(up)
        if way == 5:
            return self._plain(gate, "relu2")
        if way == 6:
            return g.silu(gate) * gate
        if way == 7:
            return self._linear(h, h.dim) + h
        return g.silu(gate) * up

    def _experts(self, h: Value, s: Experts) -> Value:
        g = self.g
        route = self._route(h, s)
        gate = self._along(h, route, s, s.dim)
        if s.inner == 1:
            inner = g.silu(gate) * self._along(h, route, s, s.dim)
        elif s.inner == 2:
            inner = self._plain(gate, "relu2")
        elif s.inner == 3:
            inner = g.clamp(g.silu(gate), -9.0, 0.5) * g.clamp(gate, -0.5, 0.5)
        elif s.inner == 4:  # a part for each expert, normed and weighed
            weights = self._linear(h, route.dim // 2)
            inner = g.mul_parts(g.rms_norm(gate, None, route.dim // 2), weights)
        elif s.inner == 5:  # another route reads it
            inner = gate + self._along(h, self._route(gate, s), s, s.dim)
        elif s.inner == 6:  # in two products
            inner = self._along(gate, route, s, s.dim)
        else:
            inner = gate
        out = g._record(ExpertSum, h.dim, x=self._along(inner, route, s, h.dim), route=route)
        if s.router == 1:
            again = self._route(out, s)
            out = out + g._record(ExpertSum, s.dim, x=gate, route=again) if s.dim == h.dim else out
        if s.shared:
            shared = self._linear(g.silu(self._linear(h, 32)), h.dim)
            weight = self._plain(self._linear(h, 1), "sigmoid")
            out = out + (g.mul_parts(shared, weight) if s.shared == 2 else shared)
        return out

    def _route(self, x: Value, s: Experts) -> Value:
        g, n_used, name = self.g, min(s.n_used, s.n), self.name()
        size = s.groups if s.groups > 1 and s.n % s.groups == 0 and s.n > s.groups else s.n
        n_groups_used = -(-n_used // size)
        has_bias = g.has(f"{name}.exp_probs_b.bias")
        return g._record(
            Route, 2 * n_used, x=self._linear(x, s.n), gating=s.gating, n_used=n_used,
            bias=g._weight(f"{name}.exp_probs_b.bias", s.n) if has_bias else None,
            n_groups=s.n // size, n_groups_used=n_groups_used, norm=s.norm, scale=s.scale,
        )  # fmt: skip

    def _along(self, x: Value, route: Value, s: Experts, dim: int) -> Value:
        g, name, n_used = self.g, f"{self.name()}_exps", route.dim // 2
        n_cols = x.dim // n_used if x.dim == n_used * s.dim else x.dim
        twins = {
            twin: g._weight(f"{name}.{twin}", *shape) if g.has(f"{name}.{twin}") else None
            for twin, shape in (("scale", (s.n,)), ("bias", (s.n, dim)))
        }
        weight = g._weight(f"{name}.weight", s.n, dim, n_cols)
        return g._record(ExpertLinear, n_used * dim, x=x, route=route, weight=weight, **twins)

    def _loose(self, x: Value, ops: tuple[Loose, ...]) -> Value:
        """x, with what was made of it added where it is as wide."""
        values = [x]
        for each in ops:
            values.append(self._one(each, values))
        last = values[-1]
        return x + last if last is not x and last.dim == x.dim else x

    def _one(self, each: Loose, values: list[Value]) -> Value:
        g = self.g
        a = values[each.a % len(values)]
        alike = [value for value in values if value.dim == a.dim]
        b = alike[each.b % len(alike)]
        parts = [n for n in (1, 2, 4) if a.dim % n == 0]
        n = parts[each.b % len(parts)]
        if each.op == "linear":
            return self._linear(a, (32, 7, self.drawn.dim)[each.choice % 3])
        if each.op == "norm":
            return g.rms_norm(a, self.name() if each.choice % 2 else None, n)
        if each.op == "rotate":
            rope = ROPES[each.choice % len(ROPES)]
            return g.rotate(a, n, rope) if a.dim // n >= rope.n_dims else a
        if each.op == "add":
            return a + b
        if each.op == "mul":
            return a * b
        if each.op == "activation":
            return self._plain(a, KINDS[each.choice % len(KINDS)])
        if each.op == "gain":
            return g.mul_vector(a, self.name())
        if each.op == "scale":
            return g.scale(a, 0.3)
        if each.op == "clamp":
            return g.clamp(a, -0.75, 0.5)
        if each.op == "parts":
            return g.mul_parts(a, self._linear(b, n))
        if each.op == "conv":
            out = g.convs([a], self.name(), 2 + each.b % 4)[0]
            return g.silu(out) if each.choice % 2 else out
        if each.op == "delta":
            return self._delta_net(a, each)
        if each.op == "soft_cap":
            return g.soft_cap(a, 2.0)
        return g.add_vector(a, self.name())

    def _delta_net(self, x: Value, each: Loose) -> Value:
        """Of heads whose states fade, or, where nothing says so, whose rows are wild."""
        n_k, n_v, dim = 1 + each.b % 3, 1 + each.a % 4, (8, 5, 20, 36)[each.choice % 4]
        decay, beta = self._linear(x, n_v), self._linear(x, n_v)
        if each.choice < 6:
            decay = self.g.scale(self._plain(decay, "softplus"), -0.5)
            beta = self._plain(beta, "sigmoid")
        q, k = (self.g.rms_norm(self._linear(x, n_k * dim), None, n_k) for _ in range(2))
        return self.g.delta_net(
            q, k, self._linear(x, n_v * dim), decay=decay, beta=beta, n_k_heads=n_k,
            pairing=get_args(Pairing)[each.choice % 2],
        )  # fmt: skip
