"""Products of floats: packed F16, BF16 or F32 weights times rows of floats, for any number of rows.

A row of weights and a row of x have 4 sums, one for each k % 4 (`kernels/reference/quantised.py`).
They lie beside each other in a vector, as 4 values of a row do in memory: so x is read as it lies,
and nothing moves between lanes before the sums are whole. Layouts: `layout.py`, `formats.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from edgeinfer.kernels.cpu.formats import FORMATS as SIZES
from edgeinfer.kernels.cpu.layout import (
    MATMUL_N_BLOCKS,
    MATMUL_SCRATCH,
    MATMUL_SCRATCH_BYTES,
    MATMUL_W,
    MATMUL_X,
    MATMUL_X_ROW_BYTES,
)
from edgeinfer.kernels.cpu.native import simd
from edgeinfer.kernels.cpu.native.formats import FLOATS
from edgeinfer.kernels.cpu.native.grid import PREFETCH, VECTOR
from edgeinfer.kernels.cpu.native.isa import Isa
from edgeinfer.kernels.cpu.native.operations import prefetch
from edgeinfer.kernels.cpu.native.simd import F32, I32, I64, Tile, Vec, f32x8, intp
from edgeinfer.kernels.cpu.native.words import word

jit = njit(error_model="numpy")

_VECTORS = 4  # that a block of 4 columns takes, or two blocks where they are twice as wide
_TOKENS = 24  # that the second-level cache holds beside weights
# Tokens of a tile at most: 32 registers hold the sums of 6. Where there are 16, 6 meet one half of
# a group's rows after the other, which pays where floats take more than one instruction to make.
_MOST = {"f16": 3, "bf16": 6, "f32": 3}
_MOST_WIDE = 6


@dataclass(frozen=True)
class _Grid:
    """Vectors of weights times n tokens; sums are a tile of vectors, token by token."""

    isa: Isa
    type_name: str
    n: int

    @property
    def n_parts(self) -> int:
        """In how many parts the rows of a group meet the tokens."""
        fits = _VECTORS * self.n + min(_VECTORS, self.n) + 1 <= self.isa.registers
        return 1 if fits else 2

    @property
    def _n_vectors(self) -> int:
        return _VECTORS // self.n_parts

    @property
    def _vec(self) -> Vec:
        return Vec("f32", f32x8.lanes * self.isa.panel_width)

    @property
    def _sums(self) -> Tile:
        return Tile(self._vec, self._n_vectors * self.n)

    @property
    def zeros(self):
        """`zeros()`: sums of nothing."""
        return simd.scalar(self._sums, (), lambda b: ir.Constant(self._sums.ir, None))

    @property
    def add(self):
        """`add(p, q, x, stride, sums)`: and the products of 4 columns, those of the first group's
        block at p and the second's at q, with 4 values of each row from x on."""
        kind = self._sums

        def codegen(context, b, signature, values):
            p, q, x, stride, sums = values

            def row(t):
                return self._four(b, simd.offset_ir(b, x, stride, t))

            def weights(v):
                return self._weights(b, p, q, v)

            total = [b.extract_value(sums, i) for i in range(kind.n)]
            for v, t, w, four in _pairs(self._n_vectors, self.n, weights, row):
                i = self._n_vectors * t + v
                total[i] = simd.fma_ir(b, w, four, total[i])
            return simd.tile_ir(b, kind, total)

        return intrinsic(
            lambda _, p, q, x, stride, sums: (kind(intp, intp, intp, intp, kind), codegen)
        )

    def _four(self, b, p):
        """4 floats, over and over."""
        row = simd.load_ir(b, p, ir.VectorType(F32, 4))
        return b.shuffle_vector(row, row, _places(i % 4 for i in range(self._vec.lanes)))

    def _weights(self, b, p, q, v):
        """Vector v of the blocks at p and q."""
        each = _VECTORS // self.isa.panel_width  # of a block
        n_bytes = SIZES[self.type_name].packed_bytes // each
        at = b.add((p, q)[v // each], I64(n_bytes * (v % each)))
        return FLOATS[self.type_name](b, at, self._vec.ir)

    @property
    def store(self):
        """`store(p, sums)`: to p, with room for all parts of a token."""
        kind, each = self._sums, self._n_vectors

        def emit(b, p, sums):
            for i in range(kind.n):
                place = _VECTORS * (i // each) + i % each
                at = b.add(p, I64(VECTOR * self.isa.panel_width * place))
                simd.store_ir(b, at, b.extract_value(sums, i))

        return simd.scalar(types.void, (intp, kind), emit)


def _pairs(n_vectors, n_tokens, weights, row):
    """All pairs (v, t, weights(v), row(t)): the fewer are made first, the others one by one."""
    if n_vectors < n_tokens:
        held = [weights(v) for v in range(n_vectors)]
        for t in range(n_tokens):
            four = row(t)
            yield from ((v, t, w, four) for v, w in enumerate(held))
    else:
        rows = [row(t) for t in range(n_tokens)]
        for v in range(n_vectors):
            w = weights(v)
            yield from ((v, t, w, four) for t, four in enumerate(rows))


def _total(isa, group):
    """`total(p)`: (a0 + a1) + (a2 + a3) of each row of a group, from the sums of a token at p."""
    kind, each = Vec("f32", f32x8.lanes * isa.panel_width), _VECTORS // isa.panel_width

    def emit(b, p):
        first = VECTOR * isa.panel_width * each * group
        places = (b.add(p, I64(first + VECTOR * isa.panel_width * v)) for v in range(each))
        sums = [simd.load_ir(b, at, kind.ir) for at in places]
        return simd.tile_ir(b, Tile(f32x8, 1), _add_neighbours(b, _add_neighbours(b, sums)))

    return simd.scalar(Tile(f32x8, 1), (intp,), emit)


def _add_neighbours(b, vectors):
    """Each sum of two lanes that lie beside each other, in half as many vectors or half a one."""
    pairs, lanes = zip(vectors[::2], vectors[1::2], strict=True), vectors[0].type.count
    if len(vectors) == 1:
        pairs, lanes = [2 * vectors], lanes // 2
    even, odd = (_places(range(i, 2 * lanes, 2)) for i in (0, 1))
    return [b.fadd(b.shuffle_vector(x, y, even), b.shuffle_vector(x, y, odd)) for x, y in pairs]


def _places(lanes):
    lanes = list(lanes)
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)


def tiles(isa, type_name, finish_of):
    """See `matmul.tiles_of`."""
    n_beside = isa.panel_width  # groups
    most = _MOST_WIDE if isa.registers == 32 else _MOST[type_name]
    tile, finish = _up_to(most, isa, type_name), finish_of(1)
    first_total, last_total = _total(isa, 0), _total(isa, n_beside - 1)
    token_bytes = _VECTORS * VECTOR * n_beside  # of sums
    assert most * token_bytes <= MATMUL_SCRATCH_BYTES

    @jit
    def run(args, first, last, rows, thread):
        # Groups that meet the same tokens lie half a chunk apart, as those of quantised weights.
        part = (last - first + n_beside - 1) // n_beside
        sums = word(args + MATMUL_SCRATCH) + thread * MATMUL_SCRATCH_BYTES
        for start in range(0, rows, _TOKENS):
            end = min(start + _TOKENS, rows)
            for group in range(first, first + part):
                far, t = group + part if group + part < last else group, start
                while t < end:
                    n = _even(end - t, most)
                    tile(n, args, group, far, t, sums)
                    for i in range(n):
                        finish(args, group, t + i, first_total(sums + i * token_bytes))
                        if far != group:
                            finish(args, far, t + i, last_total(sums + i * token_bytes))
                    t += n

    return run


@jit
def _even(left, most):
    """How many tokens of those that are left are the next tile, the last two tiles being alike."""
    return left if left <= most else min(most, (left + 1) // 2)


def _up_to(most, isa, type_name):
    """`tile(n, args, group, far, t, sums)` of n <= most tokens: see `_tile`."""
    whole = _tile(_Grid(isa, type_name, most))
    fewer = _up_to(most - 1, isa, type_name) if most > 1 else None

    @jit
    def tile(n, args, group, far, t, sums):
        if n == most:
            whole(args, group, far, t, sums)
        else:
            fewer(n, args, group, far, t, sums)

    @jit
    def one(n, args, group, far, t, sums):
        whole(args, group, far, t, sums)

    return one if fewer is None else tile


def _tile(grid):
    """Leaves the sums of the tokens from t on and two groups, or one that is named twice."""
    packed_bytes, n_beside = SIZES[grid.type_name].packed_bytes, grid.isa.panel_width
    n_parts, zeros, add, store = grid.n_parts, grid.zeros, grid.add, grid.store
    part_bytes = packed_bytes // n_parts
    sums_bytes = _VECTORS * VECTOR * n_beside // n_parts  # of a part

    @jit
    def prefetch_part(p):
        for line in range(0, part_bytes, 64):
            prefetch(p + PREFETCH + line)

    @jit
    def tile(args, group, far, t, sums):
        n_blocks, stride = word(args + MATMUL_N_BLOCKS), word(args + MATMUL_X_ROW_BYTES)
        for part in range(n_parts):
            w = word(args + MATMUL_W) + part * part_bytes
            p, q = w + group * n_blocks * packed_bytes, w + far * n_blocks * packed_bytes
            x, acc = word(args + MATMUL_X) + t * stride, zeros()
            for _ in range(n_blocks):
                prefetch_part(p)
                if n_beside > 1:
                    prefetch_part(q)
                acc = add(p, q, x, stride, acc)
                p += packed_bytes
                q += packed_bytes
                x += 16
            store(sums + part * sums_bytes, acc)

    return tile
