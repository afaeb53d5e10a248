"""Every kernel and every type of weights by itself, in graphs of a few operations.

Knows nothing of whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias, get_args

from edgeinfer import quant
from edgeinfer.backend import Program
from edgeinfer.graph import (
    KV,
    ActivationKind,
    GatingKind,
    Graph,
    Growth,
    Hparams,
    Rope,
    Segment,
    Value,
    Yarn,
)
from edgeinfer.quant import QuantType
from edgeinfer.selftest.cases import Case, Results, Rows, Sequences, logits
from edgeinfer.selftest.made_up import MadeUp

_Layer: TypeAlias = "Callable[[Graph, Value, str], Value]"
_COUNTS = (1, 3, 8, 13, 40)  # of rows: each has a kernel of its own

# Odd sizes that a type can have: rows and columns of a matrix, by the type's block.
_SHAPES = {1: ((33, 100), (100, 7)), 32: ((33, 96), (100, 288)), 256: ((33, 256), (100, 768))}


def cases() -> list[Case]:
    """All of them."""
    return [Case(name, make, _results) for name, make in _segments()]


def _results(program: Program, segment: Segment) -> Results:
    """Of steps of few and of many rows, which begin where the ones before have ended."""
    step, first, results = Sequences(segment).step, 0, {}
    for n in _COUNTS:
        results[f"{n} rows"] = logits(program, step(Rows(0, first, n)))
        first += n
    return results


def _segments() -> Iterator[tuple[str, Callable[[], Segment]]]:
    for kind in quant.RUNNABLE:
        for n, k in _SHAPES[kind.block]:
            yield f"matrix {kind.name} {n}x{k}", partial(_matrix, kind, n, k)
        yield f"network {kind.name}", partial(_layers, kind, _network)
        yield f"experts {kind.name}", partial(_layers, kind, _experts)
    for gating in get_args(GatingKind):
        yield f"route {gating}", partial(_layers, quant.F32, partial(_routed, gating))
    for activation in get_args(ActivationKind):
        layer = partial(_pointwise, activation)
        yield f"values {activation}", partial(_layers, quant.F32, layer)
    for i, cache in enumerate(_CACHES):
        yield f"attention {i}", partial(_layers, quant.F32, partial(_attention, cache, _ROPES[i]))


def _matrix(kind: QuantType, n: int, k: int) -> Segment:
    """Rows of a matrix times all of its rows: an embedding that is the head, too."""
    graph = MadeUp(Hparams("matrix", 1, k, n, 4096), {}, lambda name: kind, has_more="")
    x = graph.embed()
    for _ in graph.layers():
        x = graph.layer_output(x)
    graph.head(graph.select_rows(x))
    return graph.segment()


_EXPERTS = {"expert_count": 6, "expert_used_count": 2, "feed_forward_length": 64}


def _layers(kind: QuantType, layer: _Layer) -> Segment:
    """Two layers, alike but for their weights, which are of a type."""
    dim, has_more = 256 if kind.block == 256 else 96, r"output\.weight|.*\.bias|.*_shexp\.weight"
    graph = MadeUp(Hparams("layers", 2, dim, 100, 4096), _EXPERTS, lambda _: kind, has_more)
    x = graph.embed()
    for blk in graph.layers():
        h = graph.rms_norm(x, f"{blk}.norm")
        x = graph.layer_output(x + layer(graph, h, blk))
    graph.head(graph.rms_norm(graph.select_rows(x), "output_norm"), scale=0.5, soft_cap=3.0)
    return graph.segment()


def _network(g: Graph, h: Value, blk: str) -> Value:
    """Products of one input, SwiGLU, and a product that is added."""
    gate, up = g.linear(h, f"{blk}.ffn_gate", 256), g.linear(h, f"{blk}.ffn_up", 256)
    return g.linear(g.silu(gate) * up, f"{blk}.ffn_down", h.dim)


def _experts(g: Graph, h: Value, blk: str) -> Value:
    return g.experts(h, blk, 256)


def _routed(gating: GatingKind, g: Graph, h: Value, blk: str) -> Value:
    return g.experts(h, blk, 64, gating=gating, norm=gating != "raw")


def _pointwise(kind: ActivationKind, g: Graph, h: Value, blk: str) -> Value:
    """Operations on single values, and of parts of a row."""
    a, b = g.activation(kind, h), g.linear(h, f"{blk}.b", h.dim)
    x = g.clamp(a, -0.5, 0.5) * b + g.soft_cap(g.scale(b, 3.0), 2.0)
    x = g.mul_parts(g.add_vector(x, f"{blk}.vector"), g.linear(h, f"{blk}.factors", 4))
    return g.rms_norm(x, None, 4)


# Widths of heads, a window, whether V is K; what rotates them, beside it.
_CACHES = (
    KV(2, 128, 128, 0),
    KV(1, 80, 72, 0),
    KV(2, 64, 64, 20),
    KV(2, 6, 20, 33),
    KV(1, 64, 64, 0, True),
)
_ROPES = (
    Rope("neox", 128, 500000.0),
    Rope("norm", 80, 10000.0, 0.25, None, Yarn(64, 8.0, 0.5), 1.2, Growth(0.5, 13)),
    Rope("neox", 20, 10000.0),
    Rope("norm", 6, 100.0),
    Rope("norm", 64, 10000.0),
)


def _attention(cache: KV, rope: Rope, g: Graph, h: Value, blk: str) -> Value:
    """Heads are normed, and there are a cap and sinks, in the first layer only.

    In the second, what is rotated is also read by others: in pieces, that are kernels of their own.
    """
    n_heads, is_first = 3 * cache.n_heads, blk.endswith("0")
    q = g.linear(h, f"{blk}.attn_q", n_heads * cache.k_dim)
    k = g.linear(h, f"{blk}.attn_k", cache.n_heads * cache.k_dim)
    v = None if cache.k_is_v else g.linear(h, f"{blk}.attn_v", cache.n_heads * cache.v_dim)
    if is_first:
        q = g.rms_norm(q, f"{blk}.attn_q_norm", n_heads)
        k = g.rms_norm(k, f"{blk}.attn_k_norm", cache.n_heads)
    q, k = g.rotate(q, n_heads, rope), g.rotate(k, cache.n_heads, rope)
    options: dict[str, Any] = {"soft_cap": 3.0, "sinks": f"{blk}.sinks"} if is_first else {}
    out = g.attention(q if is_first else g.scale(q, 0.7), k, v, cache=cache, **options)
    out = g.linear(out, f"{blk}.attn_output", h.dim)
    return out if is_first else out + g.linear(k, f"{blk}.of_k", h.dim)
