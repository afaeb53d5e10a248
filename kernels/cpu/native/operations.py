"""The portable operations on the vectors of `simd.py`: arithmetic, constants, memory, lanes."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.native.simd import (
    ELEMENTS,
    F16,
    I8,
    I32,
    I64,
    Tile,
    Vec,
    call,
    const_ir,
    f32x8,
    f64x8,
    fma_ir,
    i16x16,
    i32x8,
    intp,
    load_f16_ir,
    load_ir,
    mapped,
    offset_ir,
    row_ir,
    scalar,
    splat_ir,
    store_ir,
    stream_ir,
    tile_ir,
    u8x8,
    u8x32,
    vec_of,
)


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


def _larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _smaller(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def _larger_size(b, x, y):
    """The larger of two without a sign, by their bits: what is no number is larger than any."""
    kind = ir.VectorType(I32, x.type.count)
    sizes = (b.bitcast(v, kind) for v in (x, y))
    return b.bitcast(call(b, f"llvm.smax.v{kind.count}i32", kind, *sizes), x.type)


def _intrinsic(name):
    def emit(b, x):
        suffix = {"float": "f32", "double": "f64"}[str(x.type.element)]
        return call(b, f"llvm.{name}.v{x.type.count}{suffix}", x.type, x)

    return emit


fma = mapped(3, _same, fma_ir)  # x * y + z, rounded once
max_f = mapped(2, _same, _larger)
max_size = mapped(2, _same, _larger_size)
min_f = mapped(2, _same, _smaller)
abs_f = mapped(1, _same, _intrinsic("fabs"))
round_f = mapped(1, _same, _intrinsic("roundeven"))


def _converted(element, emit):
    """`emit(builder, x, type)`: each lane to `element`."""
    kind = ELEMENTS[element]
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
            vec = vec_of(v)
            n = const_ir(vec, count.literal_value)
            if isinstance(v, Vec):
                return emit(builder, values[0], n)
            rows = [emit(builder, row_ir(builder, v, values[0], i), n) for i in range(v.n)]
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
    element = ELEMENTS[vec.element]
    return scalar(vec, (intp,), lambda b, p: splat_ir(b, load_ir(b, p, element), vec.lanes))


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
stream_f32x8 = scalar(types.void, (intp, f32x8), lambda b, p, v: stream_ir(b, p, v))
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
max_size_lanes = _across(f32x8, types.float32, _larger_size)
sum_lanes_i32 = _across(i32x8, types.int32, lambda b, x, y: b.add(x, y))
