"""Scalars in memory and as values, and what threads share: atomics, calls. Knows no layout."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.native.simd import (
    F16,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    call,
    intp,
    load_ir,
    pointer,
    scalar,
    store_ir,
)

# -- scalars in memory ---------------------------------------------------------------------------


def _load_scalar(kind, numba_kind):
    return scalar(numba_kind, (intp,), lambda b, p: load_ir(b, p, kind))


def _store_scalar(numba_kind):
    return scalar(types.void, (intp, numba_kind), lambda b, p, v: store_ir(b, p, v))


word = scalar(intp, (intp,), lambda b, p: load_ir(b, p, I64, 8))
set_word = scalar(types.void, (intp, intp), lambda b, p, v: store_ir(b, p, v, 8))
load_f32 = _load_scalar(F32, types.float32)
load_f64 = _load_scalar(F64, types.float64)
load_i32 = _load_scalar(I32, types.int32)
load_i8 = _load_scalar(I8, types.int8)
load_u8 = _load_scalar(I8, types.uint8)
load_u16 = _load_scalar(I16, types.uint16)
load_u32 = _load_scalar(I32, types.uint32)
store_f32 = _store_scalar(types.float32)
store_f64 = _store_scalar(types.float64)
store_i32 = _store_scalar(types.int32)
store_u32 = _store_scalar(types.uint32)
store_i16 = _store_scalar(types.int16)
store_u16 = _store_scalar(types.uint16)
store_i8 = _store_scalar(types.int8)
store_u8 = _store_scalar(types.uint8)
load_f16 = scalar(types.float32, (intp,), lambda b, p: b.fpext(load_ir(b, p, F16), F32))
load_bf16 = scalar(
    types.float32,
    (intp,),
    lambda b, p: b.bitcast(b.shl(b.zext(load_ir(b, p, I16), I32), I32(16)), F32),
)
store_f16 = scalar(
    types.void, (intp, types.float32), lambda b, p, v: store_ir(b, p, b.fptrunc(v, F16))
)
sqrt_f32 = scalar(types.float32, (types.float32,), lambda b, x: call(b, "llvm.sqrt.f32", F32, x))
fma_f32 = scalar(
    types.float32, (types.float32,) * 3, lambda b, x, y, z: call(b, "llvm.fma.f32", F32, x, y, z)
)
fma_f64 = scalar(
    types.float64, (types.float64,) * 3, lambda b, x, y, z: call(b, "llvm.fma.f64", F64, x, y, z)
)
round_f64 = scalar(
    types.float64, (types.float64,), lambda b, x: call(b, "llvm.roundeven.f64", F64, x)
)


# -- atomics and calls, for the thread team ------------------------------------------------------

_WORD = I64


def _emit_store_release(b, p, v):
    b.store_atomic(v, pointer(b, p, _WORD), "release", 8)


def _emit_cas(b, p, old, new):
    pair = b.cmpxchg(pointer(b, p, _WORD), old, new, "seq_cst", "seq_cst")
    return b.zext(b.extract_value(pair, 1), I64)


def _emit_invoke(b, function, *args):
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(args)).as_pointer()
    b.call(b.inttoptr(function, kind), args)


def _emit_call_os(b, function, *args):
    kind = ir.FunctionType(I64, [I64] * len(args)).as_pointer()
    return b.call(b.inttoptr(function, kind), args)


load_acquire = scalar(intp, (intp,), lambda b, p: b.load_atomic(pointer(b, p, _WORD), "acquire", 8))
store_release = scalar(types.void, (intp, intp), _emit_store_release)
swap = scalar(
    intp, (intp, intp), lambda b, p, v: b.atomic_rmw("xchg", pointer(b, p, _WORD), v, "seq_cst")
)
fetch_add = scalar(
    intp, (intp, intp), lambda b, p, v: b.atomic_rmw("add", pointer(b, p, _WORD), v, "seq_cst")
)
compare_and_swap = scalar(intp, (intp,) * 3, _emit_cas)  # 1 where it took place


@intrinsic
def invoke(typingctx, function, header, args, chunk, thread):
    """Call a kernel by address."""

    def codegen(context, builder, signature, values):
        _emit_invoke(builder, *values)
        return context.get_dummy_value()

    return types.void(intp, intp, intp, intp, intp), codegen


call_os = scalar(intp, (intp,) * 6, _emit_call_os)  # a C function of five words
