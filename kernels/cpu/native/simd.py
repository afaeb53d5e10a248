"""SIMD vectors as Numba values, and the portable operations on them.

Knows no instruction set: what differs between machines is in `isa.py`.

`Vec` is one vector register. `Tile` is n of them, one per token of a matmul tile; every
arithmetic operation maps over a tile, and a plain vector beside a tile is shared by all its rows.
So a kernel reads the same for one token and for eight, and adds in the same order for both.
Addresses are plain integers. Nothing here carries fast-math flags (contract 1 of the design:
LLVM would order sums differently per tile width).
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_ELEMENTS = {"i8": I8, "i16": I16, "i32": I32, "f16": F16, "f32": F32, "f64": F64}
intp = types.intp


class Vec(types.Type):
    """A vector register of `lanes` elements."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vec({element}x{lanes})")

    @property
    def ir(self) -> ir.VectorType:
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)


class Tile(types.Type):
    """`n` vectors of one type, one per token."""

    def __init__(self, vec: Vec, n: int) -> None:
        self.vec, self.n = vec, n
        super().__init__(name=f"Tile({vec.name}, {n})")

    @property
    def ir(self) -> ir.ArrayType:
        return ir.ArrayType(self.vec.ir, self.n)


@register_model(Vec)
@register_model(Tile)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir)


u8x32, u8x16, u8x8 = Vec("i8", 32), Vec("i8", 16), Vec("i8", 8)
i16x16, i32x8 = Vec("i16", 16), Vec("i32", 8)
f32x8, f64x8 = Vec("f32", 8), Vec("f64", 8)


# -- building blocks for intrinsics --------------------------------------------------------------


def call(builder, name, result, *args):
    """Call an LLVM intrinsic, or a placeholder `ei.*` that the build turns into one."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def load_ir(builder, address, kind, align=1):
    value = builder.load(pointer(builder, address, kind))
    value.align = align
    return value


def store_ir(builder, address, value, align=1):
    builder.store(value, pointer(builder, address, value.type)).align = align


def splat_ir(builder, x, lanes):
    one = builder.insert_element(ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined), x, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, one, zeros)


def joined_ir(builder, vectors):
    """One vector of the lanes of one or of two."""
    if len(vectors) == 1:
        return vectors[0]
    n = sum(vector.type.count for vector in vectors)
    return builder.shuffle_vector(*vectors, ir.Constant(ir.VectorType(I32, n), list(range(n))))


def const_ir(vec, x):
    return ir.Constant(vec.ir, [x] * vec.lanes)


def offset_ir(builder, address, stride, i):
    return builder.add(address, builder.mul(stride, ir.Constant(stride.type, i)))


def _row(builder, kind, value, i):
    return builder.extract_value(value, i) if isinstance(kind, Tile) else value


def _vec(kind):
    return kind.vec if isinstance(kind, Tile) else kind


def tile_ir(builder, kind, rows):
    """An LLVM array value from `kind.n` vectors."""
    value = ir.Constant(kind.ir, ir.Undefined)
    for i, row in enumerate(rows):
        value = builder.insert_value(value, row, i)
    return value


def mapped(arity: int, result: Callable[..., Vec], emit: Callable[..., ir.Value]):
    """An intrinsic over `arity` vectors that maps over tiles.

    `result(*vecs)` gives the type of one result, `emit(builder, *values)` its instruction.
    """

    def define(kinds):
        if not all(isinstance(k, (Vec, Tile)) for k in kinds):
            return None
        one = result(*map(_vec, kinds))
        sizes = {k.n for k in kinds if isinstance(k, Tile)}
        if len(sizes) > 1:
            return None
        out = Tile(one, sizes.pop()) if sizes else one

        def codegen(context, builder, signature, values):
            if isinstance(out, Vec):
                return emit(builder, *values)
            rows = (
                emit(builder, *(_row(builder, k, v, i) for k, v in zip(kinds, values, strict=True)))
                for i in range(out.n)
            )
            return tile_ir(builder, out, rows)

        return out(*kinds), codegen

    if arity == 1:
        return intrinsic(lambda typingctx, a: define([a]))
    if arity == 2:
        return intrinsic(lambda typingctx, a, b: define([a, b]))
    return intrinsic(lambda typingctx, a, b, c: define([a, b, c]))


def scalar(result, args, emit):
    """An intrinsic on scalars (addresses included) with fixed types; `emit` may return None."""

    def codegen(context, builder, signature, values):
        out = emit(builder, *values)
        return context.get_dummy_value() if out is None else out

    signature = result(*args)
    if len(args) == 0:
        return intrinsic(lambda typingctx: (signature, codegen))
    if len(args) == 1:
        return intrinsic(lambda typingctx, a: (signature, codegen))
    if len(args) == 2:
        return intrinsic(lambda typingctx, a, b: (signature, codegen))
    if len(args) == 3:
        return intrinsic(lambda typingctx, a, b, c: (signature, codegen))
    return intrinsic(lambda typingctx, a, b, c, d, e, f: (signature, codegen))


def _same(*vecs):
    return vecs[0]


# -- arithmetic, over vectors and tiles ----------------------------------------------------------

add_f = mapped(2, _same, lambda b, x, y: b.fadd(x, y))
sub_f = mapped(2, _same, lambda b, x, y: b.fsub(x, y))
mul_f = mapped(2, _same, lambda b, x, y: b.fmul(x, y))
div_f = mapped(2, _same, lambda b, x, y: b.fdiv(x, y))
neg_f = mapped(1, _same, lambda b, x: b.fneg(x))
add_i = mapped(2, _same, lambda b, x, y: b.add(x, y))
sub_i = mapped(2, _same, lambda b, x, y: b.sub(x, y))
mul_i = mapped(2, _same, lambda b, x, y: b.mul(x, y))
and_i = mapped(2, _same, lambda b, x, y: b.and_(x, y))
or_i = mapped(2, _same, lambda b, x, y: b.or_(x, y))


def fma_ir(b, x, y, z):
    suffix = {"float": "f32", "double": "f64"}[str(x.type.element)]
    return call(b, f"llvm.fma.v{x.type.count}{suffix}", x.type, x, y, z)


def _larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _smaller(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def _intrinsic(name):
    def emit(b, x):
        suffix = {"float": "f32", "double": "f64"}[str(x.type.element)]
        return call(b, f"llvm.{name}.v{x.type.count}{suffix}", x.type, x)

    return emit


fma = mapped(3, _same, fma_ir)  # x * y + z, rounded once
max_f = mapped(2, _same, _larger)
min_f = mapped(2, _same, _smaller)
abs_f = mapped(1, _same, _intrinsic("fabs"))
round_f = mapped(1, _same, _intrinsic("roundeven"))


def _converted(element, emit):
    """`emit(builder, x, type)`: each lane to `element`."""
    kind = _ELEMENTS[element]
    return mapped(
        1,
        lambda v: Vec(element, v.lanes),
        lambda b, x: emit(b, x, ir.VectorType(kind, x.type.count)),
    )


to_f32 = _converted("f32", lambda b, x, kind: b.sitofp(x, kind))
to_i32 = _converted("i32", lambda b, x, kind: b.fptosi(x, kind))
bits_f32 = _converted("f32", lambda b, x, kind: b.bitcast(x, kind))


def _shift(emit):
    """Shift by a literal count: `shift(v, 4)`."""

    @intrinsic(prefer_literal=True)
    def shift(typingctx, v, count):
        if not isinstance(count, types.IntegerLiteral) or not isinstance(v, (Vec, Tile)):
            return None

        def codegen(context, builder, signature, values):
            vec = _vec(v)
            n = const_ir(vec, count.literal_value)
            if isinstance(v, Vec):
                return emit(builder, values[0], n)
            rows = [emit(builder, _row(builder, v, values[0], i), n) for i in range(v.n)]
            return tile_ir(builder, v, rows)

        return v(v, count), codegen

    return shift


shift_left = _shift(lambda b, x, n: b.shl(x, n))
shift_right = _shift(lambda b, x, n: b.lshr(x, n))  # zeros come in


# -- constants -----------------------------------------------------------------------------------


def _constant(vec):
    @intrinsic(prefer_literal=True)
    def splat(typingctx, x):
        if not isinstance(x, types.Literal) and not isinstance(x, types.Number):
            return None
        literal = getattr(x, "literal_value", None)

        def codegen(context, builder, signature, values):
            if literal is not None:
                return const_ir(vec, literal)
            element = types.float32 if vec.element == "f32" else getattr(types, _NUMBA[vec.element])
            value = context.cast(builder, values[0], signature.args[0], element)
            return splat_ir(builder, value, vec.lanes)

        return vec(x), codegen

    return splat


_NUMBA = {"i8": "int8", "i16": "int16", "i32": "int32", "f32": "float32", "f64": "float64"}
splat_u8 = _constant(u8x32)  # splat_u8(15): a vector of one value
splat_i16 = _constant(i16x16)
splat_i32 = _constant(i32x8)
splat_f32 = _constant(f32x8)
splat_f64 = _constant(f64x8)


def zeros(vec):
    """`zeros(f32x8)(n)` is a tile of n zero vectors."""

    @intrinsic(prefer_literal=True)
    def tile(typingctx, n):
        if not isinstance(n, types.IntegerLiteral):
            return None
        kind = Tile(vec, n.literal_value)

        def codegen(context, builder, signature, values):
            zero = const_ir(vec, 0.0 if vec.element.startswith("f") else 0)
            return tile_ir(builder, kind, [zero] * kind.n)

        return kind(n), codegen

    return tile


def zero(vec):
    """`zero(i32x8)()` is a vector of zeros."""
    return scalar(vec, (), lambda b: const_ir(vec, 0.0 if vec.element.startswith("f") else 0))


zeros_f32, zeros_f32x16 = zeros(f32x8), zeros(Vec("f32", 16))
zero_f32 = zero(f32x8)


# -- memory --------------------------------------------------------------------------------------


def _load(vec):
    return scalar(vec, (intp,), lambda b, p: load_ir(b, p, vec.ir))


def _load_splat(vec):
    element = _ELEMENTS[vec.element]
    return scalar(vec, (intp,), lambda b, p: splat_ir(b, load_ir(b, p, element), vec.lanes))


def load_f16_ir(b, p, kind):
    """Halves as floats."""
    return b.fpext(load_ir(b, p, ir.VectorType(F16, kind.count)), kind)


def _emit_prefetch(b, p):
    address = b.inttoptr(p, I8.as_pointer())
    call(b, "llvm.prefetch.p0", ir.VoidType(), address, I32(0), I32(3), I32(1))


load_u8x32 = _load(u8x32)
load_i32x8 = _load(i32x8)
load_f32x8 = _load(f32x8)
load_f16x8 = scalar(f32x8, (intp,), lambda b, p: load_f16_ir(b, p, f32x8.ir))
load_u8x8 = scalar(i32x8, (intp,), lambda b, p: b.zext(load_ir(b, p, u8x8.ir), i32x8.ir))
load_i8x8 = scalar(i32x8, (intp,), lambda b, p: b.sext(load_ir(b, p, u8x8.ir), i32x8.ir))
load_splat_f32 = _load_splat(f32x8)
store_f32x8 = scalar(types.void, (intp, f32x8), lambda b, p, v: store_ir(b, p, v))
store_f16x8 = scalar(
    types.void, (intp, f32x8), lambda b, p, v: store_ir(b, p, b.fptrunc(v, ir.VectorType(F16, 8)))
)
store_i32x8 = scalar(types.void, (intp, i32x8), lambda b, p, v: store_ir(b, p, v))
store_i8x8 = scalar(types.void, (intp, i32x8), lambda b, p, v: store_ir(b, p, b.trunc(v, u8x8.ir)))
prefetch = scalar(types.void, (intp,), _emit_prefetch)
# A vector with x in lane i, which need not be a constant.
insert_f32 = scalar(
    f32x8, (f32x8, types.float32, intp), lambda b, v, x, i: b.insert_element(v, x, b.trunc(i, I32))
)


@intrinsic(prefer_literal=True)
def row(typingctx, tile, i):
    """Vector i (a literal) of a tile."""
    if not isinstance(tile, Tile) or not isinstance(i, types.IntegerLiteral):
        return None

    def codegen(context, builder, signature, values):
        return builder.extract_value(values[0], i.literal_value)

    return tile.vec(tile, i), codegen


@intrinsic(prefer_literal=True)
def eight_f32(typingctx, tile, i):
    """Of every vector of a float tile the eight floats from 8 i (a literal) on."""
    if not isinstance(tile, Tile) or not isinstance(i, types.IntegerLiteral):
        return None
    kind = Tile(f32x8, tile.n)

    def codegen(context, builder, signature, values):
        first = 8 * i.literal_value
        lanes = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
        rows = (builder.extract_value(values[0], k) for k in range(tile.n))
        return tile_ir(builder, kind, [builder.shuffle_vector(v, v, lanes) for v in rows])

    return kind(tile, i), codegen


@intrinsic
def store_rows(typingctx, p, stride, tile):
    """Store row i of a float tile at p + i * stride."""
    if not isinstance(tile, Tile):
        return None

    def codegen(context, builder, signature, values):
        p, step, rows = values
        p = context.cast(builder, p, signature.args[0], intp)
        step = context.cast(builder, step, signature.args[1], intp)
        for i in range(tile.n):
            store_ir(builder, offset_ir(builder, p, step, i), builder.extract_value(rows, i))
        return context.get_dummy_value()

    return types.void(p, stride, tile), codegen


@intrinsic(prefer_literal=True)
def load_rows_f32(typingctx, p, stride, n):
    """A tile whose row i is the 8 floats at p + i * stride."""
    if not isinstance(n, types.IntegerLiteral):
        return None
    kind = Tile(f32x8, n.literal_value)

    def codegen(context, builder, signature, values):
        p, step, _ = values
        p = context.cast(builder, p, signature.args[0], intp)
        step = context.cast(builder, step, signature.args[1], intp)
        rows = (load_ir(builder, offset_ir(builder, p, step, i), f32x8.ir) for i in range(kind.n))
        return tile_ir(builder, kind, rows)

    return kind(p, stride, n), codegen


def local(n_bytes):
    """`local(n)()`: address of n bytes that live as long as the kernel runs.

    NOTE: under 4096 in all, or Windows needs a stack probe, which no object may call.
    """
    assert n_bytes < 4096, f"{n_bytes} bytes of stack: use scratch memory"

    @intrinsic
    def allocate(typingctx):
        def codegen(context, b, signature, values):
            with b.goto_entry_block():
                block = b.alloca(ir.ArrayType(I8, n_bytes))
            block.align = 64
            return b.ptrtoint(block, I64)

        return intp(), codegen

    return allocate


# -- across the lanes of one f32x8 ---------------------------------------------------------------


def _halves(b, v, combine):
    """Fold 8 lanes in the one fixed tree: l with l+4, then l+2, then l+1."""
    for width in (4, 2, 1):
        mask = ir.Constant(ir.VectorType(I32, 8), [(i + width) % 8 for i in range(8)])
        v = combine(b, v, b.shuffle_vector(v, v, mask))
    return b.extract_element(v, I32(0))


def _across(vec, result, combine):
    return scalar(result, (vec,), lambda b, v: _halves(b, v, combine))


sum_lanes = _across(f32x8, types.float32, lambda b, x, y: b.fadd(x, y))
max_lanes = _across(f32x8, types.float32, _larger)
sum_lanes_i32 = _across(i32x8, types.int32, lambda b, x, y: b.add(x, y))
