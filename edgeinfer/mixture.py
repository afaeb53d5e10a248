"""Mixtures of experts: what `Graph.experts` records, by the names and numbers of a file."""

from __future__ import annotations

from typing import Any, Protocol

from edgeinfer.ops import (
    ActivationKind,
    ExpertLinear,
    ExpertSum,
    GatingKind,
    Route,
    Value,
)
from edgeinfer.quant import Weight
from edgeinfer.settings import Settings

# What `expert_gating_func` stands for; 0 leaves it to the family.
_GATINGS: dict[int, GatingKind] = {1: "softmax", 2: "sigmoid", 3: "raw", 4: "sqrt_softplus"}


class Recorder(Protocol):
    """What is needed of a `Graph`."""

    _settings: Settings
    _used: set[str]

    def count(self, name: str, default: int | None = None, low: int = 1) -> int: ...
    def number(self, name: str, default: float | None = None, low: float = ...) -> float: ...
    def flag(self, name: str, default: bool | None = None) -> bool: ...
    def has(self, name: str) -> bool: ...
    def linear(self, x: Value, name: str, out_dim: int) -> Value: ...
    def activation(self, kind: ActivationKind, x: Value) -> Value: ...
    def clamp(self, x: Value, low: float, high: float) -> Value: ...
    def mul_parts(self, x: Value, factors: Value) -> Value: ...
    def _weight(self, name: str, *shape: int) -> Weight: ...
    def _optional(self, name: str, *shape: int) -> Weight | None: ...
    def _record(self, op: Any, dim: int, /, **fields: object) -> Value: ...


def experts(
    g: Recorder,
    x: Value,
    blk: str,
    dim: int,
    gating: GatingKind,
    norm: bool,
    activation: ActivationKind,
    gated: bool,
    router: Value,
) -> Value:
    """The weighted sum of the chosen experts, and the shared expert where the file has one."""
    dim = g.count("expert_feed_forward_length", dim or None)
    out_dim, route = x.dim, _route(g, router, blk, gating, norm)
    clamp = g.number("swiglu_clamp_exp", 0.0, 0.0)
    if g.has(f"{blk}.ffn_gate_up_exps.weight"):
        both = f"{blk}.ffn_gate_up_exps", 2 * dim
        gate: Value | None = _expert_linear(g, x, route, *both, 0, dim)
        up = _expert_linear(g, x, route, *both, dim, 2 * dim)
    else:
        gate = _expert_linear(g, x, route, f"{blk}.ffn_gate_exps", dim) if gated else None
        up = _expert_linear(g, x, route, f"{blk}.ffn_up_exps", dim)
    inner = _gated(g, gate, up, activation, clamp)
    parts = _expert_linear(g, inner, route, f"{blk}.ffn_down_exps", out_dim)
    out = g._record(ExpertSum, out_dim, x=parts, route=route)
    if not g.has(f"{blk}.ffn_up_shexp.weight"):
        return out
    return out + _shared_expert(g, x, blk, dim, activation, gated)


def _route(g: Recorder, x: Value, blk: str, gating: GatingKind, norm: bool) -> Value:
    n, n_used = g.count("expert_count"), g.count("expert_used_count")
    if n_used > n:
        g._settings.wrong("expert_used_count", n_used, f"at most the {n} experts")
    kind = g.count("expert_gating_func", 0, low=0)
    if kind not in (0, *_GATINGS):
        g._settings.unsupported("expert_gating_func", f"gating function {kind}")
    n_groups, n_groups_used = _groups(g, n, n_used)
    return g._record(
        Route,
        2 * n_used,
        x=g.linear(x, f"{blk}.ffn_gate_inp", n),
        gating=_GATINGS.get(kind, gating),
        n_used=n_used,
        bias=g._optional(f"{blk}.exp_probs_b.bias", n),
        n_groups=n_groups,
        n_groups_used=n_groups_used,
        norm=g.flag("expert_weights_norm", norm),
        scale=g.number("expert_weights_scale", 1.0, 0.0) or 1.0,
    )


def _groups(g: Recorder, n: int, n_used: int) -> tuple[int, int]:
    """Groups of experts and how many of them are used; one holds all where there are none."""
    n_groups = g.count("expert_group_count", 1, low=0) or 1
    n_groups_used = g.count("expert_group_used_count", n_groups, low=0)
    if n_groups == 1:
        return 1, 1
    if n % n_groups or n == n_groups:
        wanted = f"a divisor of the {n} experts, of two or more each"
        g._settings.wrong("expert_group_count", n_groups, wanted)
    if not n_used <= n_groups_used * (n // n_groups) <= n:
        wanted = f"so many of the {n_groups} groups that they hold {n_used} experts"
        g._settings.wrong("expert_group_used_count", n_groups_used, wanted)
    return n_groups, n_groups_used


def _expert_linear(
    g: Recorder,
    x: Value,
    route: Value,
    name: str,
    dim: int,
    first: int = 0,
    last: int | None = None,
) -> Value:
    """Of each expert's matrix of `dim` rows those from first to last, with what lies beside it."""
    n, n_used = g.count("expert_count"), route.dim // 2
    in_dim = x.dim // n_used if name.endswith("ffn_down_exps") else x.dim
    weight = g._weight(f"{name}.weight", n, dim, in_dim)
    scale, bias = g._optional(f"{name}.scale", n), g._optional(f"{name}.bias", n, dim)
    g._used.add(f"{name}.input_scale")  # for activations of 4 bits
    last = dim if last is None else last
    return g._record(
        ExpertLinear,
        n_used * (last - first),
        x=x,
        route=route,
        weight=_part(weight, first, last),
        scale=scale,
        bias=None if bias is None else _part(bias, first, last),
    )


def _part(weight: Weight, first: int, last: int) -> Weight:
    return weight if last - first == weight.shape[1] else weight.parts(first, last)


def _gated(
    g: Recorder, gate: Value | None, up: Value, activation: ActivationKind, clamp: float = 0.0
) -> Value:
    """activation(gate) * up, the first kept below a clamp, the second within; or activation(up)."""
    if gate is None:
        return g.activation(activation, up)
    gate = g.activation(activation, gate)
    if clamp > 1e-6:
        gate, up = g.clamp(gate, float("-inf"), clamp), g.clamp(up, -clamp, clamp)
    return gate * up


def _shared_expert(
    g: Recorder, x: Value, blk: str, dim: int, activation: ActivationKind, gated: bool
) -> Value:
    """The expert that every row has; `ffn_gate_inp_shexp` may weigh it."""
    dim = g.count("expert_shared_feed_forward_length", dim)
    gate = g.linear(x, f"{blk}.ffn_gate_shexp", dim) if gated else None
    up = g.linear(x, f"{blk}.ffn_up_shexp", dim)
    inner = _gated(g, gate, up, activation, g.number("swiglu_clamp_shexp", 0.0, 0.0))
    out = g.linear(inner, f"{blk}.ffn_down_shexp", x.dim)
    if not g.has(f"{blk}.ffn_gate_inp_shexp.weight"):
        return out
    weight = g.linear(x, f"{blk}.ffn_gate_inp_shexp", 1)
    return g.mul_parts(out, g.activation("sigmoid", weight))
