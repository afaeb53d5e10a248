"""SIMD vectors as Numba values, and what intrinsics on them are made with.

The operations on them are in `operations.py`, what differs between machines in `isa.py`.

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
ELEMENTS = {"i8": I8, "i16": I16, "i32": I32, "f16": F16, "f32": F32, "f64": F64}
intp = types.intp


class Vec(types.Type):
    """A vector register of `lanes` elements."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vec({element}x{lanes})")

    @property
    def ir(self) -> ir.VectorType:
        return ir.VectorType(ELEMENTS[self.element], self.lanes)


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


def stream_ir(builder, address, value):
    """Store past the caches what nobody reads before they would have forgotten it.

    The address is one of whole vectors. Who sees the op of this store as done sees the store.
    """
    store = builder.store(value, pointer(builder, address, value.type))
    store.align = 4 * value.type.count
    store.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


def load_f16_ir(b, p, kind):
    """Halves as floats."""
    return b.fpext(load_ir(b, p, ir.VectorType(F16, kind.count)), kind)


def fma_ir(b, x, y, z):
    suffix = {"float": "f32", "double": "f64"}[str(x.type.element)]
    return call(b, f"llvm.fma.v{x.type.count}{suffix}", x.type, x, y, z)


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


def row_ir(builder, kind, value, i):
    return builder.extract_value(value, i) if isinstance(kind, Tile) else value


def vec_of(kind):
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
        one = result(*map(vec_of, kinds))
        sizes = {k.n for k in kinds if isinstance(k, Tile)}
        if len(sizes) > 1:
            return None
        out = Tile(one, sizes.pop()) if sizes else one

        def codegen(context, builder, signature, values):
            if isinstance(out, Vec):
                return emit(builder, *values)
            given = list(zip(kinds, values, strict=True))
            rows = (
                emit(builder, *(row_ir(builder, *each, i) for each in given)) for i in range(out.n)
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
