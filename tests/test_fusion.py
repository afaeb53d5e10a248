"""Patterns that look like the usual ones but for one thing run as recorded; unknown ops do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest

from edgeinfer import fusion
from edgeinfer.batch import StepRequest
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.fused_ops import Matmuls, PinnedAttention, RotatedAttention, Step, SwiGlu
from edgeinfer.fusion import fuse
from edgeinfer.graph import (
    KV,
    Activation,
    Add,
    Attention,
    Bias,
    Clamp,
    Gain,
    Graph,
    Mul,
    MulParts,
    Op,
    RmsNorm,
    Rope,
    Rotate,
    Scale,
    Segment,
    SoftCap,
    Value,
)
from edgeinfer.kernels import shapes
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.kernels.reference import backend as reference
from edgeinfer.known import Known

from .random_graphs import ROPES, RandomGraph
from .test_graphs import backend, batch, check, limits, results

N_HEADS, N_KV, D = 4, 2, 8
CACHE = KV(N_KV, D, D)
NORM, NEOX = ROPES[0], ROPES[1]
Body = Callable[[Graph, Value, str], Value]  # of a layer: what it adds to the residual stream


def record(body: Body, n_layers: int = 1, **options: Any) -> Segment:
    g = RandomGraph(n_layers, **options)
    x = g.embed()
    for blk in g.layers():
        x = g.layer_output(x + body(g, g.rms_norm(x, f"{blk}.attn_norm"), blk))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))
    return g.segment()


def qkv(g: Graph, h: Value, blk: str, n_kv: int = N_KV) -> tuple[Value, Value, Value]:
    q, k, v = (
        g.linear(h, f"{blk}.attn_{name}", n * D)
        for name, n in (("q", N_HEADS), ("k", n_kv), ("v", n_kv))
    )
    return q, k, v


def kinds(segment: Segment) -> list[type[Step]]:
    return [type(step) for step in fuse(segment)]


# -- what looks like a pattern -------------------------------------------------------------------


def plain(g: Graph, h: Value, blk: str) -> Value:
    """What models do."""
    q, k, v = qkv(g, h, blk)
    q = g.rms_norm(q, f"{blk}.attn_q_norm", N_HEADS)
    q, k = g.rotate(q, N_HEADS, NEOX), g.rotate(k, N_KV, NEOX)
    return g.linear(g.attention(q, k, v, cache=CACHE), f"{blk}.attn_output", h.dim)


def norm_over_the_whole_of_q(g: Graph, h: Value, blk: str) -> Value:
    q, k, v = qkv(g, h, blk)
    q = g.rms_norm(q, f"{blk}.attn_q_norm")
    q, k = g.rotate(q, N_HEADS, NEOX), g.rotate(k, N_KV, NEOX)
    return g.linear(g.attention(q, k, v, cache=CACHE), f"{blk}.attn_output", h.dim)


def q_is_read_again_behind_its_rotation(g: Graph, h: Value, blk: str) -> Value:
    q, k, v = qkv(g, h, blk)
    turned, k = g.rotate(q, N_HEADS, NEOX), g.rotate(k, N_KV, NEOX)
    a = g.attention(turned, k, v, cache=CACHE)
    return g.linear(a * q, f"{blk}.attn_output", h.dim)


def q_is_rotated_otherwise_than_k(g: Graph, h: Value, blk: str) -> Value:
    q, k, v = qkv(g, h, blk)
    q, k = g.rotate(q, N_HEADS, NORM), g.rotate(k, N_KV, NEOX)
    return g.linear(g.attention(q, k, v, cache=CACHE), f"{blk}.attn_output", h.dim)


def nothing_is_rotated(g: Graph, h: Value, blk: str) -> Value:
    a = g.attention(*qkv(g, h, blk), cache=CACHE)
    return g.linear(a, f"{blk}.attn_output", h.dim)


def rotated_in_other_heads(g: Graph, h: Value, blk: str) -> Value:
    q, k, v = qkv(g, h, blk)
    q, k = g.rotate(q, N_HEADS // 2, NEOX), g.rotate(k, N_KV, NEOX)
    return g.linear(g.attention(q, k, v, cache=CACHE), f"{blk}.attn_output", h.dim)


def keys_serve_as_values(g: Graph, h: Value, blk: str) -> Value:
    q, k, _ = qkv(g, h, blk)
    q, turned = g.rotate(q, N_HEADS, NEOX), g.rotate(k, N_KV, NEOX)
    return g.linear(g.attention(q, turned, k, cache=CACHE), f"{blk}.attn_output", h.dim)


def q_is_normed_behind_its_rotation(g: Graph, h: Value, blk: str) -> Value:
    q, k, v = qkv(g, h, blk)
    q, k = g.rotate(q, N_HEADS, NEOX), g.rotate(k, N_KV, NEOX)
    q = g.rms_norm(q, f"{blk}.attn_q_norm", N_HEADS)
    return g.linear(g.attention(q, k, v, cache=CACHE), f"{blk}.attn_output", h.dim)


LIKE_ATTENTION = [
    norm_over_the_whole_of_q, q_is_read_again_behind_its_rotation, q_is_rotated_otherwise_than_k,
    nothing_is_rotated, rotated_in_other_heads, keys_serve_as_values,
    q_is_normed_behind_its_rotation,
]  # fmt: skip


def a_matmul_adds_its_own_input(g: Graph, h: Value, blk: str) -> Value:
    return g.linear(h, f"{blk}.ffn_up", h.dim) + h


def a_matmul_adds_what_its_neighbour_leaves(g: Graph, h: Value, blk: str) -> Value:
    first, second = (g.linear(h, f"{blk}.ffn_{name}", h.dim) for name in ("gate", "up"))
    return first + second


def a_matmul_is_doubled(g: Graph, h: Value, blk: str) -> Value:
    out = g.linear(h, f"{blk}.ffn_up", h.dim)
    return out + out


def an_activation_is_read_twice(g: Graph, h: Value, blk: str) -> Value:
    gate = g.silu(g.linear(h, f"{blk}.ffn_gate", h.dim))
    return gate * g.linear(h, f"{blk}.ffn_up", h.dim) + gate


def a_matmul_reads_a_matmul(g: Graph, h: Value, blk: str) -> Value:
    return g.linear(g.linear(h, f"{blk}.ffn_up", 64), f"{blk}.ffn_down", h.dim)


LIKE_FEED_FORWARD = [
    a_matmul_adds_its_own_input, a_matmul_adds_what_its_neighbour_leaves, a_matmul_is_doubled,
    an_activation_is_read_twice, a_matmul_reads_a_matmul,
]  # fmt: skip


@pytest.mark.parametrize("types", [("F32",), ("Q4_0",)])
@pytest.mark.parametrize("body", [plain, *LIKE_ATTENTION, *LIKE_FEED_FORWARD])
def test_what_differs_in_one_thing_from_the_usual_has_the_references_bits(
    body: Body, types: tuple[str, ...]
) -> None:
    check(record(body, 2, types=types))


def test_pinned_pages_are_read_by_all_that_was_done_to_q_behind_its_rotation() -> None:
    """A power of two may stand before a rotation or behind it."""

    def body(is_before: bool, g: Graph, h: Value, blk: str) -> Value:
        q, k, v = qkv(g, h, blk)
        q = g.scale(q, 0.25) if is_before else q
        q, k = g.rotate(q, N_HEADS, NEOX), g.rotate(k, N_KV, NEOX)
        q = q if is_before else g.scale(g.scale(q, 0.5), 0.5)
        return g.linear(g.attention(q, k, v, cache=CACHE), f"{blk}.attn_output", h.dim)

    rows = []
    for is_before in (True, False):
        segment = record(partial(body, is_before))
        check(segment)
        with ReferenceBackend().compile(segment, limits(segment), mode="quantised") as program:
            rows.append(np.concatenate(results(program, 5, 1)[:2]))
    np.testing.assert_array_equal(*rows)


def test_the_usual_is_put_together_and_no_more() -> None:
    assert kinds(record(plain)).count(RotatedAttention) == 1
    for body in LIKE_ATTENTION:
        is_norm_alone = body is norm_over_the_whole_of_q  # beside it, heads are rotated as usual
        assert (RotatedAttention in kinds(record(body))) == is_norm_alone
    assert SwiGlu not in kinds(record(an_activation_is_read_twice))
    neighbours = record(a_matmul_adds_what_its_neighbour_leaves)
    sizes = [len(step.parts) for step in fuse(neighbours) if isinstance(step, Matmuls)]
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("marks_product", [True, False])
def test_what_a_segment_yields_is_neither_taken_in_nor_written_over(marks_product: bool) -> None:
    """A residual stream, or a part of it, that its own layer goes on to read."""
    g = RandomGraph(2)
    x = g.embed()
    for blk in g.layers():
        product = g.linear(g.rms_norm(x, f"{blk}.attn_norm"), f"{blk}.attn_output", x.dim)
        x = x + product
        g.layer_output(product if marks_product else x)
        x = x + g.linear(g.rms_norm(x, f"{blk}.ffn_norm"), f"{blk}.ffn_down", x.dim)
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))
    segment, rows = g.segment(0, 1), batch(5, 0, list(range(5)), 0)
    with ReferenceBackend().compile(segment, limits(segment), mode="quantised") as reference:
        expected = reference.submit(rows).wait().hidden
    with backend().compile(segment, limits(segment)) as program:
        np.testing.assert_array_equal(program.submit(rows).wait().hidden, expected)


# -- what a backend does not know ----------------------------------------------------------------


# What may be done to a query behind its rotation.
BEHIND: dict[type, Callable[[Graph, Value], Value]] = {
    RmsNorm: lambda g, q: g.rms_norm(q, None, N_HEADS),
    Add: lambda g, q: q + q,
    Mul: lambda g, q: q * q,
    Bias: lambda g, q: g.add_vector(q, "blk.0.attn_q.bias"),
    Gain: lambda g, q: g.mul_vector(q, "blk.0.attn_q.bias"),
    Scale: lambda g, q: g.scale(q, 0.5),
    SoftCap: lambda g, q: g.soft_cap(q, 2.0),
    Activation: lambda g, q: g.silu(q),
    Clamp: lambda g, q: g.clamp(q, -1.0, 1.0),
    MulParts: lambda g, q: g.mul_parts(q, g.linear(q, "blk.0.attn_gate", N_HEADS)),
}


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("kind", BEHIND)
def test_what_nobody_has_thought_of_may_not_stand_behind_a_rotation(
    name: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each were new and forgotten: pages would be read by another query than is meant."""

    def body(g: Graph, h: Value, blk: str) -> Value:
        q, k, v = qkv(g, h, blk)
        q, k = g.rotate(q, N_HEADS, NEOX), g.rotate(k, N_KV, NEOX)
        q = BEHIND[kind](g, q)
        return g.linear(g.attention(q, k, v, cache=CACHE), f"{blk}.attn_output", h.dim)

    assert set(BEHIND) == set(fusion._REDONE)
    assert {*fusion._REDONE, *fusion._ENDS, Rotate} == set(get_args(Op))
    less = tuple(each for each in fusion._REDONE if each is not kind)
    monkeypatch.setattr(fusion, "_REDONE", less)
    segment = record(body)
    with pytest.raises(
        UnsupportedModelError, match=f"layer 0 has {kind.__name__} behind a rotation"
    ):
        compile_on(name, segment)


class Ghost(NamedTuple):
    """An op of tomorrow."""

    layer: int
    out: Value
    x: Value


class SunkKV(NamedTuple):
    """A cache of tomorrow."""

    n_heads: int
    k_dim: int
    v_dim: int
    sinks: int


def compile_on(name: str, segment: Segment) -> None:
    """As a load does: what building takes is asked for first."""
    machine: Any = backend() if name == "cpu" else ReferenceBackend()
    machine.demand(segment, StepRequest(64, 1, 1))
    machine.compile(segment, limits(segment)).close()


def with_op(segment: Segment, i: int, op: Any) -> Segment:
    ops = list(segment.ops)
    ops[i] = op
    return segment._replace(ops=tuple(ops))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_an_op_that_a_backend_does_not_know_is_named(name: str) -> None:
    segment = record(plain)
    i, norm = next((i, op) for i, op in enumerate(segment.ops) if "attn_q_norm" in str(op[3:]))
    said = rf"Ghost in layer 0 \(blk.0.attn_q.weight\): the {name} backend has no kernel for Ghost"
    with pytest.raises(UnsupportedModelError, match=said):
        compile_on(name, with_op(segment, i, Ghost(0, norm.out, norm.x)))  # type: ignore[attr-defined]
    i, attention = next((i, op) for i, op in enumerate(segment.ops) if CACHE in op)
    sunk = attention._replace(cache=SunkKV(*CACHE[:3], 4))
    with pytest.raises(UnsupportedModelError, match="no kernel for SunkKV"):
        compile_on(name, with_op(segment, i, sunk))


@pytest.mark.parametrize(
    "change", [{"soft_cap": -1.0}, {"soft_cap": float("nan")}, {"cache": KV(N_KV, D, D, -1)}]
)
def test_attention_of_no_sense_is_refused(change: dict[str, Any]) -> None:
    segment = record(nothing_is_rotated)
    i, op = next((i, op) for i, op in enumerate(segment.ops) if isinstance(op, Attention))
    with pytest.raises(UnsupportedModelError, match="of attention in layer 0"):
        compile_on("cpu", with_op(segment, i, op._replace(**change)))


def test_fused_steps_begin_as_the_ops_that_they_stand_for() -> None:
    """They are made of their fields in this order."""
    n = len(Attention._fields)
    assert PinnedAttention._fields[:n] == RotatedAttention._fields[:n] == Attention._fields


@pytest.mark.parametrize(("name", "module"), [("cpu", shapes), ("reference", reference)])
def test_every_field_that_a_backend_does_not_know_is_named(
    name: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each were new: a backend that isn't told of it may not run without it."""
    known: Known = module.KNOWN
    segment = record(all_ops)
    for kind in known:
        for field in known[kind]:
            if (kind, field) == (Rope, "factors"):  # no such graph has them
                continue
            less = {**known, kind: {n: v for n, v in known[kind].items() if n != field}}
            monkeypatch.setattr(module, "KNOWN", less)
            said = f"in .*: the {name} backend does not know {field} of {kind.__name__}"
            with pytest.raises(UnsupportedModelError, match=said):
                compile_on(name, segment)


def all_ops(g: Graph, h: Value, blk: str) -> Value:
    windowed = CACHE._replace(window=5, k_is_v=True, k_type="q8_0", v_type="q8_0")
    q, k, _ = qkv(g, h, blk)
    q = g.rotate(q, N_HEADS, NEOX)
    a = g.attention(q, k, cache=windowed, soft_cap=2.0, sinks=f"{blk}.attn_sinks")
    a = a + g.attention(q, cache=windowed, source=0)
    a = g.rotate(g.linear(a, f"{blk}.attn_output", h.dim), 4, ROPES[3])
    a = g.add_vector(g.soft_cap(g.scale(a, 0.5), 2.0), f"{blk}.attn_output.bias")
    a = g.mul_vector(g.mul_parts(g.clamp(a, -1.0, 1.0), h), f"{blk}.gain")
    (a,) = g.convs([a], f"{blk}.conv1", 3)  # which has a bias
    a = g.delta_net(a, a, a, decay=h, beta=h, n_k_heads=h.dim, pairing="tiled")
    return a * g.silu(h) + g.experts(h, blk, 32)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_name_that_a_backend_does_not_know_is_named(name: str) -> None:
    odd: Any = "sine"

    def activated(g: Graph, h: Value, blk: str) -> Value:
        return g.activation(odd, h)

    def rotated(g: Graph, h: Value, blk: str) -> Value:
        return g.rotate(h, 4, NEOX._replace(kind=odd))

    def routed(g: Graph, h: Value, blk: str) -> Value:
        return g.experts(h, blk, 32, gating=odd)

    for body in (activated, rotated, routed):
        said = f"the {name} backend .* (kind|gating) 'sine'"
        with pytest.raises(UnsupportedModelError, match=said):
            compile_on(name, record(body))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_rows_that_do_not_belong_together_are_refused(name: str) -> None:
    def combined(g: Graph, h: Value, blk: str) -> Value:
        return g.select_rows(h) + h

    def attended(g: Graph, h: Value, blk: str) -> Value:
        return plain(g, g.select_rows(h), blk)

    g = RandomGraph()
    x = g.embed()
    for _ in g.layers():
        x = g.layer_output(x)
    g.head(g.rms_norm(x, "output_norm"))

    def chosen(g: Graph, h: Value, blk: str) -> Value:
        return g.experts(g.select_rows(h), blk, 32)

    for segment in (record(combined), record(attended), record(chosen), g.segment()):
        with pytest.raises(UnsupportedModelError, match="rows"):
            compile_on(name, segment)


def test_other_head_counts_in_another_layer_have_the_references_bits() -> None:
    def body(g: Graph, h: Value, blk: str) -> Value:
        n_kv = 1 if blk == "blk.0" else 2
        q, k, v = qkv(g, h, blk, n_kv)
        q, k = g.rotate(q, N_HEADS, NEOX), g.rotate(k, n_kv, NEOX)
        a = g.attention(q, k, v, cache=KV(n_kv, D, D))
        return g.linear(a, f"{blk}.attn_output", h.dim)

    check(record(body, 2))


def test_a_layer_without_keys_reads_those_of_another() -> None:
    def body(g: Graph, h: Value, blk: str) -> Value:
        if blk != "blk.1":
            return plain(g, h, blk)
        q = g.rotate(g.linear(h, f"{blk}.attn_q", N_HEADS * D), N_HEADS, NEOX)
        return g.linear(g.attention(q, cache=CACHE, source=0), f"{blk}.attn_output", h.dim)

    segment = record(body, 3)
    assert kinds(segment).count(RotatedAttention) == 3
    assert segment.caches == {0: CACHE, 2: CACHE}
    check(segment)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_cache_that_was_not_filled_is_not_read(name: str) -> None:
    def later(g: Graph, h: Value, blk: str) -> Value:
        q = g.linear(h, f"{blk}.attn_q", N_HEADS * D)
        return g.linear(g.attention(q, cache=CACHE, source=1), f"{blk}.attn_output", h.dim)

    def other(g: Graph, h: Value, blk: str) -> Value:
        h = plain(g, h, blk)
        q = g.linear(h, f"{blk}.attn_q", N_HEADS * D)
        a = g.attention(q, cache=CACHE._replace(window=8), source=0)
        return g.linear(a, f"{blk}.attn_output", h.dim)

    def half(g: Graph, h: Value, blk: str) -> Value:
        q, k, _ = qkv(g, h, blk)
        return g.linear(g.attention(q, k, cache=CACHE), f"{blk}.attn_output", h.dim)

    for body, said in ((later, "layer 1, filled"), (other, "like its own"), (half, "keys and val")):
        with pytest.raises(UnsupportedModelError, match=said):
            compile_on(name, record(body))


def test_a_second_attention_in_a_layer_is_refused() -> None:
    def body(g: Graph, h: Value, blk: str) -> Value:
        return plain(g, plain(g, h, blk), f"{blk}.again")

    for name in ("cpu", "reference"):
        with pytest.raises(UnsupportedModelError, match="one cache a layer"):
            compile_on(name, record(body))
