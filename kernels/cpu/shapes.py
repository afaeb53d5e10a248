"""What the CPU kernels rely on about shapes and types, checked once before a graph is lowered.

Any width runs. Kernels trust what is said here and look at nothing again; what they expect of
memory is said in `layout.py`.
"""

from __future__ import annotations

from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import (
    KV,
    Activation,
    Add,
    Attention,
    Bias,
    Embed,
    Growth,
    Linear,
    Mul,
    Op,
    RmsNorm,
    Rope,
    Rotate,
    Scale,
    Segment,
    SelectRows,
    SoftCap,
    Yarn,
)
from edgeinfer.kernels.cpu.formats import FORMATS
from edgeinfer.known import Known, check, fields
from edgeinfer.quant import Weight

KNOWN: Known = {
    Embed: fields("weight"),
    RmsNorm: fields("x weight eps n_heads"),
    Linear: fields("x weight bias"),
    Rotate: fields("x n_heads rope"),
    Rope: fields("kind n_dims base scale factors yarn magnitude growth", kind=("norm", "neox")),
    Growth: fields("factor n_ctx"),
    Yarn: fields("n_ctx beta_fast beta_slow"),
    Attention: fields("q k v n_heads cache scale soft_cap sinks source"),
    KV: fields("n_heads k_dim v_dim window"),
    Add: fields("a b"),
    Mul: fields("a b"),
    Bias: fields("x weight"),
    Scale: fields("x factor"),
    SoftCap: fields("x cap"),
    Activation: fields("x kind", kind=("silu", "gelu", "sigmoid", "softplus", "relu2")),
    SelectRows: fields("x"),
}


def check_shapes(segment: Segment) -> None:
    """Raise UnsupportedModelError for the first op, shape or type that no kernel can be given."""
    check(segment, KNOWN, "cpu")
    for op in segment.ops:
        _check_op(op)


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
    elif isinstance(op, Bias):
        _check_vector(op.weight, op.x.dim)


def _check_matrix(weight: Weight, n_rows: int, n_cols: int) -> None:
    """Columns are whole blocks of the type but for floats, whose blocks are ours."""
    _check_shape(weight, (n_rows, n_cols))
    fmt = FORMATS.get(weight.type.name.lower())
    if fmt is None:
        raise _unsupported(
            weight.name, weight.type.name, ", ".join(name.upper() for name in FORMATS)
        )
    if fmt.activation != "f32" and n_cols % fmt.block:
        what = f"{weight.name} of type {weight.type.name}"
        raise _unsupported(what, f"{n_cols} columns wide", f"multiples of {fmt.block}")


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
    if op.sinks is not None:
        _check_vector(op.sinks, op.n_heads)


def _check_rope(rope: Rope, head_dim: int) -> None:
    if rope.n_dims % 2 or not 0 <= rope.n_dims <= head_dim:
        raise _unsupported("the rotated part", f"{rope.n_dims} wide", f"even up to {head_dim}")
    if rope.factors is not None:
        _check_vector(rope.factors, rope.n_dims // 2)


def _check_parts(what: str, n: int, n_parts: int) -> None:
    if n_parts < 1 or n < 1 or n % n_parts:
        raise _unsupported(what, str(n), f"multiples of {n_parts}")


def _unsupported(what: str, found: str, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} is {found}; the cpu backend runs {supported}", missing=[found]
    )
