"""The integer dot product of each instruction-set family, under the same names for all of them.

Knows no quant type and no tile. All but `pause` and `reset_float` emit LLVM instructions: they
take an IR builder and values. `u` is 32 unsigned bytes of weights, 8 rows x 4; `x` four signed
bytes of activations in every 32-bit lane. Lane r of a sum belongs to row r. A family offers:

- `narrow`, the type of sums, `narrow_dot(b, acc, u, x)`, `narrow_sum(b, acc)`: for u <= 63, at most
  `narrow_dots(largest u)` dots between zero and sum, because a family may add in int16;
- `scale_first(b, pairs)`, `scale_second(b, pairs)`, `add_scaled(b, total, acc, scale)`: total +
  scale * narrow_sum(acc), the scale of each row being one of a pair of int16; `short_first`,
  `short_second` and `add_short`: the same where narrow_sum(acc) fits in int16;
- `pair_dot(b, total, pairs, x)`: two int16 of each row times the two int16 in every lane of x;
- `byte_dot(b, acc, parts, x)`: the dot product of w + `byte_excess`, 0 or 128, and x, for signed
  bytes w as a family likes to have them: `byte_form(w)`, a tuple of vectors. `byte_parts(b, u)`
  makes it of u = w + 128;
- `look_up(b, table, v)`: for places v of 0 to 15, the bytes that a table of 16 holds there;
- `splat(b, x, start, at, lanes)`: of the block of activations at x + start the four bytes from `at`
  on, in 32-bit lanes.

Sums and the vectors that meet in them may be `panel_width` times as wide, for as many groups of 8
rows beside each other. All are exact, so every family gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llvmlite import ir
from numba import types

from edgeinfer.kernels.cpu.native import fields, simd
from edgeinfer.kernels.cpu.native.simd import I16, I32, I64, call, const_ir, i16x16, i32x8, u8x32

_I8x32, _I16x16, _I32x8 = u8x32.ir, i16x16.ir, i32x8.ir


def splat(b, x, start, at, lanes):
    return simd.splat_ir(b, simd.load_ir(b, b.add(x, I64(start + at)), I32), lanes)


@dataclass(frozen=True)
class Isa:
    """One family's vocabulary; see the module docstring."""

    name: str
    registers: int  # vector registers that a kernel may count on
    narrow: simd.Vec
    narrow_dot: Callable
    narrow_sum: Callable
    narrow_dots: Callable[[int], int]
    narrow_is_wide: bool  # the sums are int32 from the start
    scale_first: Callable
    scale_second: Callable
    add_scaled: Callable
    short_first: Callable
    short_second: Callable
    add_short: Callable
    pair_dot: Callable
    byte_form: Callable[[int], tuple[int, ...]]
    byte_parts: Callable
    byte_dot: Callable
    byte_excess: int
    look_up: Callable
    pause: Callable
    reset_float: Callable  # round to nearest, denormals kept, whatever this thread had before
    panel_width: int = 1  # groups in one vector of a panel; with 2 it fits in registers
    splat: Callable = splat


# -- AVX2: pairs into int16, then into int32 -----------------------------------------------------


def _pairs(b, u, s):
    """vpmaddubsw: unsigned times signed bytes, neighbours added with saturation into int16."""
    return call(b, "ei.x86.pmaddubsw", _I16x16, u, s)


def _pmaddwd(b, v, w):
    return call(b, "ei.x86.pmaddwd", _I32x8, v, w)


def _widen(b, v):
    return _pmaddwd(b, v, const_ir(i16x16, 1))


def _add_pmaddwd(b, acc, v, w):
    return b.add(acc, _pmaddwd(b, v, b.bitcast(w, _I16x16)))


def _add_pairs(b, acc, u, x):
    return b.add(acc, _pairs(b, u, x))


def _size_and_sign(b, u):
    """|w| and w. 128 * 127 * 2 just fits in int16."""
    w = b.xor(u, const_ir(u8x32, -128))
    negative = b.ashr(w, const_ir(u8x32, 7))
    return b.sub(b.xor(w, negative), negative), w


def _byte_avx2(b, acc, parts, x):
    """|w| times x with the sign of w."""
    size, w = parts
    return b.add(acc, _widen(b, _pairs(b, size, call(b, "ei.x86.psignb", _I8x32, x, w))))


def _look_up_x86(b, table, v):
    both = ir.Constant(_I8x32, list(table) * 2)  # each half of a register has its own
    return call(b, "ei.x86.pshufb", _I8x32, both, v)


_MXCSR_DEFAULT = 0x1F80


def _emit_reset_float(b):
    slot = b.alloca(I32)
    b.store(I32(_MXCSR_DEFAULT), slot)
    call(b, "ei.x86.ldmxcsr", ir.VoidType(), slot)


_pause_x86 = simd.scalar(
    types.void, (), lambda b: (call(b, "ei.x86.pause", ir.VoidType()), None)[1]
)
_reset_float_x86 = simd.scalar(types.void, (), _emit_reset_float)

AVX2 = Isa(
    "avx2",
    16,
    narrow=i16x16,
    narrow_dot=_add_pairs,
    narrow_sum=_widen,
    narrow_dots=lambda u: 32767 // (2 * 127 * u),
    narrow_is_wide=False,
    scale_first=fields.first_twice,
    scale_second=fields.second_twice,
    add_scaled=_add_pmaddwd,
    short_first=fields.first_twice,
    short_second=fields.second_twice,
    add_short=_add_pmaddwd,
    pair_dot=_add_pmaddwd,
    byte_form=lambda w: (abs(w), w),
    byte_parts=_size_and_sign,
    byte_dot=_byte_avx2,
    byte_excess=0,
    look_up=_look_up_x86,
    pause=_pause_x86,
    reset_float=_reset_float_x86,
)


# -- AVX-VNNI and AVX-512 VNNI: one instruction into int32 ---------------------------------------


def _vpdpbusd(b, acc, u, s):
    return call(b, f"ei.x86.vpdpbusd.{32 * acc.type.count}", acc.type, acc, u, s)


def _vpdpwssd(b, acc, v, w):
    pairs = ir.VectorType(I16, 2 * acc.type.count)
    name = f"ei.x86.vpdpwssd.{32 * acc.type.count}"
    return call(b, name, acc.type, acc, b.bitcast(v, pairs), b.bitcast(w, pairs))


def _as_words(b, v, each):
    """v as int32, and a vector of `each`."""
    n = v.type.count * v.type.element.width // 32
    return b.bitcast(v, ir.VectorType(I32, n)), ir.Constant(ir.VectorType(I32, n), [each] * n)


def _first_word(b, pairs):
    words, sixteen = _as_words(b, pairs, 16)
    return b.ashr(b.shl(words, sixteen), sixteen)


def _second_word(b, pairs):
    return b.ashr(*_as_words(b, pairs, 16))


def _first_alone(b, pairs):
    return b.and_(*_as_words(b, pairs, 0xFFFF))


def _second_alone(b, pairs):
    return b.lshr(*_as_words(b, pairs, 16))


# What families that add in int32 from the start have in common.
_WORDS = dict(
    narrow=i32x8,
    narrow_sum=lambda b, acc: acc,
    narrow_dots=lambda u: 256,
    narrow_is_wide=True,
    scale_first=_first_word,
    scale_second=_second_word,
    add_scaled=lambda b, total, acc, scale: b.add(total, b.mul(acc, scale)),
    short_first=_first_alone,
    short_second=_second_alone,
    byte_parts=lambda b, u: (u,),
    byte_form=lambda w: (w + 128,),
    byte_excess=128,
)

VNNI = Isa(
    "vnni",
    16,
    **_WORDS,
    narrow_dot=_vpdpbusd,
    add_short=_vpdpwssd,  # the upper halves are multiplied by zero
    pair_dot=_vpdpwssd,
    byte_dot=lambda b, acc, parts, x: _vpdpbusd(b, acc, *parts, x),
    look_up=_look_up_x86,
    pause=_pause_x86,
    reset_float=_reset_float_x86,
)


# The same instructions on more registers, and on twice as wide ones for two groups at a time: their
# port bound is half, and no processor has less than half as many of them.
AVX512 = replace(VNNI, name="avx512", registers=32, panel_width=2)


# -- any machine: plain vector arithmetic --------------------------------------------------------


def _dot4(b, acc, u, x):
    """Multiply in int16, which 255 * 127 fits, and add the four products of each row."""
    n = acc.type.count
    kind = ir.VectorType(I16, 4 * n)
    products = b.sext(b.mul(b.zext(u, kind), b.sext(x, kind)), ir.VectorType(I32, 4 * n))
    for k in range(4):
        lanes = ir.Constant(ir.VectorType(I32, n), [4 * r + k for r in range(n)])
        acc = b.add(acc, b.shuffle_vector(products, products, lanes))
    return acc


def _dot2(b, acc, w, x):
    first = b.mul(_first_word(b, w), _first_word(b, x))
    second = b.mul(_second_word(b, w), _second_word(b, x))
    return b.add(acc, b.add(first, second))


def _add_short_generic(b, total, acc, scale):
    return b.add(total, b.mul(acc, _first_word(b, scale)))


def _look_up_generic(b, table, v):
    """Halve the table by each bit of the place."""
    left, one = [const_ir(u8x32, entry) for entry in table], const_ir(u8x32, 1)
    for bit in range(4):
        is_set = b.and_(b.lshr(v, const_ir(u8x32, bit)), one)
        mask = b.sub(const_ir(u8x32, 0), is_set)
        pairs = zip(left[::2], left[1::2], strict=True)
        left = [b.xor(x, b.and_(b.xor(x, y), mask)) for x, y in pairs]
    return left[0]


GENERIC = Isa(
    "generic",
    16,
    **_WORDS,
    narrow_dot=_dot4,
    add_short=_add_short_generic,
    pair_dot=_dot2,
    byte_dot=lambda b, acc, parts, x: _dot4(b, acc, *parts, x),
    look_up=_look_up_generic,
    pause=simd.scalar(types.void, (), lambda b: None),
    reset_float=simd.scalar(types.void, (), lambda b: None),
)

FAMILIES = {isa.name: isa for isa in (AVX2, VNNI, AVX512, GENERIC)}
