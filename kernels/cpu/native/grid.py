"""Products of R groups of 8 weight rows with T tokens: every operation does all R x T of them.

Knows no quant type. What a type's `unpack` makes of 32 columns, a tuple of vectors of 32 bytes
("fields"), is read in one of two places: in registers, for one group or `join`ed for all, or in a
panel in memory, where field k of group r lies at (k * R + r) * 32. A panel is unpacked once for all
tokens of a step's tile, and each of its vectors is loaded once for T of them: with two tokens
beside each other, 256 products take 27 instructions, with one 36.

Values are tiles of vectors: for weights, for activations, and for sums, token by token. Where a
family has wider vectors for panels, one holds the same field of several groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.layout import A32_BYTES, A32_D, A32_DSUM, A32_SUMS
from edgeinfer.kernels.cpu.native import simd
from edgeinfer.kernels.cpu.native.isa import Isa
from edgeinfer.kernels.cpu.native.simd import (
    I16,
    I32,
    I64,
    Tile,
    Vec,
    f32x8,
    i16x16,
    i32x8,
    intp,
    u8x32,
)

VECTOR = 32  # bytes
PREFETCH = 1024  # bytes ahead: see tests/bench/TUNING.md


@dataclass(frozen=True)
class Product:
    """What a weight type offers to a matmul.

    `unpack(p, i)`: the fields of columns 32 i to 32 i + 31 of packed block p of one group, a tuple
    of `n_fields` vectors. `add(grid)` gives `add(fields, x, acc)`: acc, the sums of R x T, plus
    the products of the fields with the T a32 blocks at x, one for each token, in the order of
    additions that `reference.py` fixes.
    """

    n_fields: int
    unpack: Callable[..., Any]
    add: Callable[[Grid], Callable[..., Any]]
    n_tokens: int = 2  # beside each other: as many as keep their sums in 16 registers


@dataclass(frozen=True)
class Grid:
    """R groups times T tokens over one family's vocabulary."""

    isa: Isa
    n_groups: int
    n_tokens: int
    in_registers: bool = False

    @property
    def width(self) -> int:
        """Groups in one vector."""
        return min(self.n_groups, self.isa.panel_width)

    def _wide(self, vec):
        return Vec(vec.element, vec.lanes * self.width)

    def _sums(self, vec):
        return Tile(self._wide(vec), self.n_groups // self.width * self.n_tokens)

    # -- sums in memory ------------------------------------------------------------------------

    @property
    def load(self):
        """`load(p)`: the sums at p, those of one token and group after the other."""
        kind = self._sums(f32x8)

        def emit(b, p):
            places = (b.add(p, I64(VECTOR * self.width * i)) for i in range(kind.n))
            return simd.tile_ir(b, kind, [simd.load_ir(b, at, kind.vec.ir) for at in places])

        return simd.scalar(kind, (intp,), emit)

    @property
    def store(self):
        """`store(p, sums)`"""
        kind = self._sums(f32x8)

        def emit(b, p, sums):
            for i in range(kind.n):
                at = b.add(p, I64(VECTOR * self.width * i))
                simd.store_ir(b, at, b.extract_value(sums, i))

        return simd.scalar(types.void, (intp, kind), emit)

    # -- operations on floats ------------------------------------------------------------------

    def scale(self, field):
        """`scale(fields, x)`: that field times the activations' d."""
        return self._floats(field, A32_D, lambda b, w, x: b.fmul(w, x))

    def add_low(self, field):
        """`add_low(fields, x, acc)`: acc + that field * the activations' d * sum."""
        return self._floats(field, A32_DSUM, simd.fma_ir, adds=True)

    def _floats(self, field, at, emit, adds=False):
        def cells(b, fields, x, sums):
            floats = self._wide(f32x8).ir
            splats = [b.bitcast(v, floats) for v in self._splats(b, x, at)]
            weights = [b.bitcast(v, floats) for v in self._fields(b, fields, field)]
            return [emit(b, weights[r], splats[t], *sums[i : i + 1]) for i, t, r in self._cells()]

        return self._define(f32x8, cells, adds)

    @property
    def zeros(self):
        """`zeros()`: int32 sums of nothing."""
        kind = self._sums(i32x8)
        return simd.scalar(kind, (), lambda b: ir.Constant(kind.ir, None))

    # -- operations on integers ----------------------------------------------------------------

    def dots(self, field, largest, offset=0):
        """`dots(fields, x)`: int32 dots of 8 fields, whose bytes are at most `largest`,
        with 32 activations, plus offset times the sum of these."""
        isa = self.isa
        step = next(n for n in (8, 4, 2) if n <= isa.narrow_dots(largest))

        def cells(b, fields, x, _):
            def quad(j, r):
                return self._field(b, fields, field + j, r)

            total = self._offset_sums(b, x, offset)
            if isa.narrow_is_wide:
                return self._dot(b, total, isa.narrow_dot, quad, range(8), x)
            for j in range(0, 8, step):
                acc = [simd.const_ir(self._wide(isa.narrow), 0)] * len(total)
                acc = self._dot(b, acc, isa.narrow_dot, quad, range(j, j + step), x)
                total = [b.add(i, isa.narrow_sum(b, k)) for i, k in zip(total, acc, strict=True)]
            return total

        return self._define(i32x8, cells)

    def scaled_dots(self, scales, field, largest, is_short=False):
        """`dots(fields, x, total)`: int32 total plus, for both halves of 32 columns, their
        dot times one of the two fields from `scales` on. `is_short`: the dot fits in int16."""
        isa = self.isa
        step = next(n for n in (4, 2) if n <= isa.narrow_dots(largest))
        add = isa.add_short if is_short else isa.add_scaled

        def cells(b, fields, x, total):
            for j in range(0, 8, step):
                scales_here = self._fields(b, fields, scales + j // 4)
                quads = [self._splats(b, x, 4 * (j + k)) for k in range(step)]
                for r in range(self.n_groups // self.width):
                    weights = [self._field(b, fields, field + j + k, r) for k in range(step)]
                    for t in range(self.n_tokens):
                        acc = simd.const_ir(self._wide(isa.narrow), 0)
                        for k in range(step):
                            acc = isa.narrow_dot(b, acc, weights[k], quads[k][t])
                        i = t * (self.n_groups // self.width) + r
                        scale = b.bitcast(scales_here[r], acc.type)
                        total[i] = add(b, total[i], acc, scale)
            return total

        return self._define(i32x8, cells, adds=True)

    def pair_dots(self, field):
        """`dots(fields, x)`: int32 dots of pairs of int16 with the two sums of 16 q."""

        def cells(b, fields, x, _):
            words = self._wide(i16x16).ir
            pairs = [b.bitcast(v, words) for v in self._fields(b, fields, field)]
            sums, zero = self._splats(b, x, A32_SUMS), simd.const_ir(self._wide(i32x8), 0)
            return [self.isa.pair_dot(b, zero, pairs[r], sums[t]) for _, t, r in self._cells()]

        return self._define(i32x8, cells)

    def byte_dots(self, field):
        """`dots(fields, x)`: int32 dots of 8 lots of `byte_form` with 32 activations."""
        isa = self.isa

        n_parts = len(isa.byte_form(0))

        def cells(b, fields, x, _):
            def quad(j, r):
                first = field + n_parts * j
                return [self._field(b, fields, k, r) for k in range(first, first + n_parts)]

            total = self._offset_sums(b, x, -isa.byte_excess)
            return self._dot(b, total, isa.byte_dot, quad, range(8), x)

        return self._define(i32x8, cells)

    def _offset_sums(self, b, x, offset):
        """offset times each token's sum of 32 q, for every cell."""
        zero = simd.const_ir(self._wide(i32x8), 0)
        if offset == 0:
            return [zero] * self._sums(i32x8).n
        if self.width > 1:
            by_token = [self._offset_sum(b, x, offset, t) for t in range(self.n_tokens)]
        else:
            pairs = simd.const_ir(self._wide(i16x16), offset)
            by_token = [
                self.isa.pair_dot(b, zero, pairs, sums) for sums in self._splats(b, x, A32_SUMS)
            ]
        return [by_token[t] for _, t, _ in self._cells()]

    def _offset_sum(self, b, x, offset, t):
        """The same of token t by scalars: wide vectors leave room for these beside the dots."""
        at = I64(A32_BYTES * t + A32_SUMS)
        halves = (simd.load_ir(b, b.add(x, b.add(at, I64(i))), I16) for i in (0, 2))
        first, last = (b.sext(half, I32) for half in halves)
        return simd.splat_ir(b, b.mul(b.add(first, last), I32(offset)), 8 * self.width)

    def _dot(self, b, acc, emit, quad, which, x):
        """The weights of each of these quads, `quad(j, r)`, meet quad j of every token.

        Group by group: else LLVM loads the weights of all of them first, and spills sums.
        """
        n, acc = self.n_groups // self.width, list(acc)
        for j in which:
            splats = self._splats(b, x, 4 * j)
            for r in range(n):
                weights = quad(j, r)
                for t, splat in enumerate(splats):
                    acc[t * n + r] = emit(b, acc[t * n + r], weights, splat)
        return acc

    # -- operands ------------------------------------------------------------------------------

    def _cells(self):
        """(cell, token, vector of weights) in the order of tiles."""
        n = self.n_groups // self.width
        for t in range(self.n_tokens):
            for r in range(n):
                yield t * n + r, t, r

    def _fields(self, b, fields, k):
        """Field k of every group, as bytes."""
        return [self._field(b, fields, k, r) for r in range(self.n_groups // self.width)]

    def _field(self, b, fields, k, r):
        if self.in_registers:
            field = b.extract_value(fields, k * self.n_groups // self.width + r)
            return b.bitcast(field, self._wide(u8x32).ir)
        at = I64(VECTOR * (k * self.n_groups + r * self.width))
        return simd.load_ir(b, b.add(fields, at), self._wide(u8x32).ir, VECTOR)

    def _splats(self, b, x, at):
        """Four bytes of every token's block, in every lane, as bytes."""
        kind, lanes = self._wide(u8x32).ir, 8 * self.width
        starts = (A32_BYTES * t for t in range(self.n_tokens))
        return [b.bitcast(self.isa.splat(b, x, start, at, lanes), kind) for start in starts]

    def _define(self, vec, cells, adds=False):
        """`(fields, x)`, and the sums to add to where it `adds`, to a tile of all cells."""
        kind = self._sums(vec)

        def codegen(context, b, signature, values):
            fields, x = values[:2]
            x = context.cast(b, x, signature.args[1], intp)
            if not self.in_registers:
                fields = context.cast(b, fields, signature.args[0], intp)
            sums = [b.extract_value(values[2], i) for i in range(kind.n)] if adds else []
            return simd.tile_ir(b, kind, cells(b, fields, x, sums))

        if adds:
            return intrinsic(lambda _, fields, x, acc: (kind(fields, x, acc), codegen))
        return intrinsic(lambda _, fields, x: (kind(fields, x), codegen))


def join(isa, n_groups):
    """`fields(groups)`: those of all groups, given as a tuple of tuples, in wide registers."""
    width = isa.panel_width
    wide = Vec(u8x32.element, u8x32.lanes * width)

    @intrinsic
    def fields(typingctx, groups):
        n_fields = groups[0].count
        kind = types.UniTuple(wide, n_fields * n_groups // width)

        def codegen(context, b, signature, values):
            def vector(k, first):
                parts = (b.extract_value(values[0], (g, k)) for g in range(first, first + width))
                return simd.joined_ir(b, [b.bitcast(part, u8x32.ir) for part in parts])

            firsts = range(0, n_groups, width)
            vectors = [vector(k, first) for k in range(n_fields) for first in firsts]
            return context.make_tuple(b, kind, vectors)

        return kind(groups), codegen

    return fields


def keep(n_groups):
    """`keep(panel, group, fields)`: one group's fields, to its places in a panel."""

    @intrinsic
    def store(typingctx, panel, group, fields):
        def codegen(context, b, signature, values):
            panel, group, fields = values
            panel = context.cast(b, panel, signature.args[0], intp)
            group = context.cast(b, group, signature.args[1], intp)
            at = b.add(panel, b.mul(group, I64(VECTOR)))
            for k in range(signature.args[2].count):
                place = b.add(at, I64(VECTOR * n_groups * k))
                simd.store_ir(b, place, b.extract_value(fields, k), VECTOR)
            return context.get_dummy_value()

        return types.void(panel, group, fields), codegen

    return store
