"""What compiled kernels rely on about shapes and types, checked once before a graph is lowered.

Any width runs. Kernels trust what is said here and look at nothing again; what they expect of
memory is said in the `layout.py` of each machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import (
    KV,
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
    Growth,
    KVType,
    Linear,
    Mul,
    MulParts,
    Op,
    RmsNorm,
    Rope,
    Rotate,
    Route,
    Scale,
    Segment,
    SelectRows,
    SoftCap,
    Value,
    Yarn,
)
from edgeinfer.known import Known, check, fields
from edgeinfer.quant import Weight, check_runnable

MAX_DELTA_DIM = 512  # of a head of a delta net: its square is kept

KNOWN: Known = {
    Embed: fields("weight"),
    RmsNorm: fields("x weight eps n_heads"),
    Linear: fields("x weight bias"),
    Rotate: fields("x n_heads rope"),
    Rope: fields("kind n_dims base scale factors yarn magnitude growth", kind=("norm", "neox")),
    Growth: fields("factor n_ctx"),
    Yarn: fields("n_ctx beta_fast beta_slow"),
    Attention: fields("q k v n_heads cache scale soft_cap sinks source"),
    KV: fields(
        "n_heads k_dim v_dim window k_is_v k_type v_type",
        k_type=get_args(KVType),
        v_type=get_args(KVType),
    ),
    Add: fields("a b"),
    Mul: fields("a b"),
    Bias: fields("x weight"),
    Gain: fields("x weight"),
    Scale: fields("x factor"),
    SoftCap: fields("x cap"),
    Activation: fields("x kind", kind=("silu", "gelu", "sigmoid", "softplus", "relu2")),
    Clamp: fields("x low high"),
    MulParts: fields("x factors"),
    Route: fields(
        "x gating n_used bias n_groups n_groups_used norm scale",
        gating=("softmax", "sigmoid", "raw", "sqrt_softplus"),
    ),
    ExpertLinear: fields("x route weight scale bias"),
    ExpertSum: fields("x route"),
    Conv: fields("x weight bias"),
    DeltaNet: fields(
        "q k v decay beta n_k_heads n_v_heads dim pairing", pairing=("tiled", "interleaved")
    ),
    SelectRows: fields("x"),
}


def check_shapes(segment: Segment, backend: str) -> None:
    """Raise UnsupportedModelError for the first op, shape or type that no kernel can be given."""
    check(segment, KNOWN, backend)
    for part in filter(None, (segment, segment.draft)):
        routes = {op.out: op for op in part.ops if isinstance(op, Route)}
        for op in part.ops:
            _check_op(op)
            if isinstance(op, (ExpertLinear, ExpertSum)):
                _check_along(op, routes)


def _check_op(op: Op) -> None:
    if isinstance(op, Linear):
        _check_matrix(op.weight, op.out.dim, op.x.dim)
        if op.bias is not None:
            _check_vector(op.bias, op.out.dim)
    elif isinstance(op, Embed):
        _check_matrix(op.weight, op.weight.shape[0], op.out.dim)
    elif isinstance(op, RmsNorm):
        name = op.weight.name if op.weight else f"a norm in layer {op.layer}"
        _check_parts(f"the input of {name}", op.x.dim, op.n_heads)
        if op.weight is not None:
            _check_vector(op.weight, op.x.dim // op.n_heads)
    elif isinstance(op, Rotate):
        _check_parts(f"the rotated row of layer {op.layer}", op.x.dim, op.n_heads)
        _check_rope(op.rope, op.x.dim // op.n_heads)
    elif isinstance(op, Attention):
        _check_attention(op)
    elif isinstance(op, (Add, Mul)) and not op.a.dim == op.b.dim == op.out.dim:
        what = f"an operand of {type(op).__name__} in layer {op.layer}"
        raise _unsupported(what, f"{op.b.dim} wide", f"the width of the other, {op.a.dim}")
    elif isinstance(op, (Bias, Gain)):
        _check_vector(op.weight, op.x.dim)
    elif isinstance(op, MulParts):
        what = f"the row whose parts are multiplied in layer {op.layer}"
        _check_parts(what, op.x.dim, op.factors.dim)
    elif isinstance(op, Route):
        _check_route(op)
    elif isinstance(op, Conv):
        _check_conv(op)
    elif isinstance(op, DeltaNet):
        _check_delta_net(op)


def _check_route(op: Route) -> None:
    n, where = op.x.dim, f"of the route in layer {op.layer}"
    if not 1 <= op.n_used <= n or op.out.dim != 2 * op.n_used:
        raise _unsupported(f"the number of experts {where}", str(op.n_used), f"1 to {n}")
    if op.bias is not None:
        _check_vector(op.bias, n)
    if op.n_groups != 1:
        _check_parts(f"the number of experts {where}", n, op.n_groups)
        if n < 2 * op.n_groups:
            raise _unsupported(f"a group {where}", "1 expert", "2 and more")
        room = op.n_groups_used * (n // op.n_groups)
        if not op.n_used <= room <= n:
            raise _unsupported(f"the choice {where}", f"out of {room}", f"{op.n_used} to {n}")


def _check_along(op: ExpertLinear | ExpertSum, routes: Mapping[Value, Route]) -> None:
    """What runs along a route: its numbers must be those of matrices."""
    route, where = routes.get(op.route), f"of {type(op).__name__} in layer {op.layer}"
    where += f" ({op.weight.name})" if isinstance(op, ExpertLinear) else ""
    if route is None:
        raise _unsupported(f"the route {where}", "another value", "what a Route leaves")
    if isinstance(op, ExpertSum):
        if op.x.dim != route.n_used * op.out.dim:
            found = f"{op.x.dim} wide"
            raise _unsupported(f"the input {where}", found, f"{route.n_used} times {op.out.dim}")
        return
    n, n_rows, n_cols = (op.weight.shape + (0, 0, 0))[:3]
    if op.x.dim not in (n_cols, route.n_used * n_cols) or op.out.dim != route.n_used * n_rows:
        found = f"{op.x.dim} wide"
        raise _unsupported(f"the input {where}", found, f"{n_cols}, or so much for each expert")
    _check_matrix(op.weight, n_rows, n_cols, (route.x.dim,))
    if op.scale is not None:
        _check_vector(op.scale, n)
    if op.bias is not None:
        _check_shape(op.bias, (n, n_rows))


def _check_matrix(weight: Weight, n_rows: int, n_cols: int, stack: tuple[int, ...] = ()) -> None:
    """Columns are whole blocks of the type."""
    _check_shape(weight, (*stack, n_rows, n_cols))
    check_runnable(weight.name, weight.type)
    if n_cols % weight.type.block:
        what = f"{weight.name} of type {weight.type.name}"
        supported = f"multiples of {weight.type.block}"
        raise _unsupported(what, f"{n_cols} columns wide", supported)


def _check_vector(weight: Weight, n: int) -> None:
    _check_shape(weight, (n,))


def _check_shape(weight: Weight, shape: tuple[int, ...]) -> None:
    if weight.shape != shape or min(shape) < 1:
        raise _unsupported(weight.name, f"of shape {weight.shape}", f"{shape} here")


def _check_attention(op: Attention) -> None:
    kv, where = op.cache, f"of attention in layer {op.layer}"
    _check_parts(f"the number of query heads {where}", op.n_heads, kv.n_heads)
    for name, value, width in (
        ("query", op.q, op.n_heads * kv.k_dim),
        ("key", op.k, kv.n_heads * kv.k_dim),
        ("value", op.v, kv.n_heads * kv.v_dim),
        ("result", op.out, op.n_heads * kv.v_dim),
    ):
        if value is not None and (value.dim != width or width < 1):
            raise _unsupported(f"the {name} {where}", f"{value.dim} wide", f"a width of {width}")
    if kv.k_is_v and kv.k_type != kv.v_type:
        found = f"in {kv.k_type} and {kv.v_type}"
        raise _unsupported(f"the cache {where}", found, "one type where K serves as V")
    if kv.window < 0:
        raise _unsupported(f"the window {where}", str(kv.window), "0 (none) and more")
    if not 0 <= op.soft_cap < math.inf:
        raise _unsupported(f"the soft-cap {where}", str(op.soft_cap), "0 (none) and more")
    if op.sinks is not None:
        _check_vector(op.sinks, op.n_heads)


def _check_conv(op: Conv) -> None:
    _check_shape(op.weight, (op.x.dim, op.n_taps))
    if op.n_taps < 2 or op.out.dim != op.x.dim:
        found = f"{op.n_taps} wide, of {op.x.dim} channels to {op.out.dim}"
        raise _unsupported(f"the convolution {op.weight.name}", found, "2 and wider, to as many")
    if op.bias is not None:
        _check_vector(op.bias, op.x.dim)


def _check_delta_net(op: DeltaNet) -> None:
    where = f"of the delta net in layer {op.layer}"
    if not 1 <= op.dim <= MAX_DELTA_DIM or min(op.n_k_heads, op.n_v_heads) < 1:
        found = f"{op.n_k_heads} and {op.n_v_heads} of {op.dim}"
        raise _unsupported(f"the number of heads {where}", found, f"1 and more, to {MAX_DELTA_DIM}")
    for name, value, width in (
        ("query", op.q, op.n_k_heads * op.dim),
        ("key", op.k, op.n_k_heads * op.dim),
        ("value", op.v, op.n_v_heads * op.dim),
        ("decay", op.decay, op.n_v_heads),
        ("beta", op.beta, op.n_v_heads),
        ("result", op.out, op.n_v_heads * op.dim),
    ):
        if value.dim != width:
            raise _unsupported(f"the {name} {where}", f"{value.dim} wide", f"a width of {width}")


def _check_rope(rope: Rope, head_dim: int) -> None:
    if rope.n_dims % 2 or not 0 <= rope.n_dims <= head_dim:
        raise _unsupported("the rotated part", f"{rope.n_dims} wide", f"even up to {head_dim}")
    if rope.factors is not None:
        _check_vector(rope.factors, rope.n_dims // 2)


def _check_parts(what: str, n: int, n_parts: int) -> None:
    if n_parts < 1 or n < 1 or n % n_parts:
        raise _unsupported(what, str(n), f"multiples of {n_parts}")


def _unsupported(what: str, found: str, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what} is {found}; kernels run {supported}", missing=[found])
