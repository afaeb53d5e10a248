"""matmul.<type>: packed weights times a step's activations, for any number of tokens.

Knows nothing of a type's blocks beyond their sizes. One product serves decode and prefill: the
number of tokens in a tile changes how often weights are unpacked, never the order in which the
products of one row and token are added.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.formats import FORMATS as SIZES
from edgeinfer.kernels.cpu.layout import (
    A32_BYTES,
    MATMUL_BIAS,
    MATMUL_BOUNDS,
    MATMUL_N_BLOCKS,
    MATMUL_OUT,
    MATMUL_RESIDUAL,
    MATMUL_ROWS,
    MATMUL_SCRATCH,
    MATMUL_SCRATCH_BYTES,
    MATMUL_STRIDE,
    MATMUL_SUMS_BYTES,
    MATMUL_W,
    MATMUL_X,
    MATMUL_X_ROW_BYTES,
    MAX_TILE,
    PANEL_FIELDS,
    PANEL_GROUPS,
    WORD,
)
from edgeinfer.kernels.cpu.native.formats import FLOATS, PRODUCTS
from edgeinfer.kernels.cpu.native.grid import VECTOR, Grid, keep
from edgeinfer.kernels.cpu.native.simd import (
    add_f,
    fma,
    load_f32x8,
    load_rows_f32,
    load_splats_f32,
    load_u8x32,
    prefetch,
    store_f32x8,
    store_rows,
    zero_f32,
    zeros_f32,
)
from edgeinfer.kernels.cpu.native.sink import n_rows_of
from edgeinfer.kernels.cpu.native.words import word

jit = njit(error_model="numpy")

_PREFETCH = 1024  # bytes ahead: see tests/bench/TUNING.md
_SPAN = 2048  # bytes of a group of floats between two changes of sums
_TOKENS = 16  # of floats that the second-level cache holds beside weights


def make(isa, type_name):
    tiles = tiles_of(isa, type_name, _finish)

    def kernel(header, args, chunk, thread):
        rows = n_rows_of(header, word(args + MATMUL_ROWS))
        bounds = args + MATMUL_BOUNDS + WORD * chunk
        first, last = word(bounds), word(bounds + WORD)
        tiles(args, first, last, rows, thread)

    return kernel


def tiles_of(isa, type_name, finish_of):
    """`tiles(args, first, last, rows, thread)`: groups of weights times all rows.

    `finish_of(n)` gives `finish(args, group, t, sums)` for the sums of one group and n rows from t
    on; the other words of args are those of a matmul.
    """
    kind = _quantised if type_name in PRODUCTS else _floats
    return kind(isa, type_name, finish_of)


@jit
def _load_ahead(p):
    prefetch(p + _PREFETCH)
    return load_u8x32(p)


def _finish(n):
    """Puts the sums of 8 weight rows and of n tokens from t on where the op wants them."""

    @jit
    def finish(args, group, t, acc):
        stride, bias = word(args + MATMUL_STRIDE), word(args + MATMUL_BIAS)
        at, residual = 32 * group + t * stride, word(args + MATMUL_RESIDUAL)
        if bias:
            acc = add_f(acc, load_f32x8(bias + 32 * group))
        if residual:
            acc = add_f(load_rows_f32(residual + at, stride, n), acc)
        store_rows(word(args + MATMUL_OUT) + at, stride, acc)

    return finish


# -- integer products ------------------------------------------------------------------------------


def _into(product, grid):
    """Adds the products of a grid to the sums at an address."""
    add, load, store = product.add(grid), grid.load, grid.store

    @jit
    def add_into(at, fields, x):
        store(at, add(fields, x, load(at)))

    return add_into


def _quantised(isa, type_name, finish_of):
    """Up to 4 tokens meet the weights as they are unpacked, more a panel of unpacked groups."""
    form, product = SIZES[type_name], PRODUCTS[type_name](isa, _load_ahead)
    packed_bytes, n_parts, unpack = form.packed_bytes, form.block // 32, product.unpack
    n_lines = 3 * (form.block == 256)  # of scales, which the weight loads do not touch
    finish, keep_fields = finish_of(1), keep(PANEL_GROUPS)
    beside = product.n_tokens
    add_beside, add_last = (_into(product, Grid(isa, PANEL_GROUPS, n)) for n in (beside, 1))
    token_bytes = PANEL_GROUPS * VECTOR  # of sums
    assert product.n_fields <= PANEL_FIELDS

    @jit
    def prefetch_scales(p):
        for i in range(n_lines):
            prefetch(p + _PREFETCH + 64 * i)

    def few(n):
        """All groups of a chunk for n tokens, two groups in turns: their sums stay in registers.

        The two lie half a chunk apart, because memory serves far streams faster. One body does
        both: in a body of its own for each, LLVM would unpack both at once and spill.
        """
        add, finish = product.add(Grid(isa, 1, n, in_registers=True)), finish_of(n)

        @jit
        def tile(args, first, last):
            n_blocks = word(args + MATMUL_N_BLOCKS)
            group_bytes = n_blocks * packed_bytes
            half = (last - first + 1) // 2
            for group in range(first, first + half):
                far = group + half if group + half < last else group
                w = word(args + MATMUL_W)
                p, q = w + group * group_bytes, w + far * group_bytes
                x, here, there = word(args + MATMUL_X), zeros_f32(n), zeros_f32(n)
                for turn in range(2 * n_blocks * n_parts):
                    i = (turn >> 1) & (n_parts - 1)
                    if i == 0:
                        prefetch_scales(p)
                    here, there = there, add(unpack(p, i), x, here)
                    p, q = q, p + (packed_bytes if i == n_parts - 1 else 0)
                    x += (turn & 1) * n * A32_BYTES
                finish(args, group, 0, here)
                if far != group:
                    finish(args, far, 0, there)

        return tile

    one, two, three, four = few(1), few(2), few(3), few(4)

    @jit
    def panel_sums(p, apart, n_groups, n_blocks, x, n, acc):
        """Writes the sums of n tokens and a panel of groups at acc, token by token."""
        panel = acc + MATMUL_SUMS_BYTES
        for at in range(acc, acc + n * token_bytes, VECTOR):
            store_f32x8(at, zero_f32())
        for _ in range(n_blocks):
            for g in range(n_groups):
                prefetch_scales(p + g * apart)
            for i in range(n_parts):
                for g in range(n_groups):
                    keep_fields(panel, g, unpack(p + g * apart, i))
                at = acc
                for _ in range(n // beside):
                    add_beside(at, panel, x)
                    at += beside * token_bytes
                    x += beside * A32_BYTES
                for _ in range(n % beside):
                    add_last(at, panel, x)
                    at += token_bytes
                    x += A32_BYTES
            p += packed_bytes

    @jit
    def tiles(args, first, last, rows, thread):
        if rows <= 4:
            if rows == 4:
                four(args, first, last)
            elif rows == 3:
                three(args, first, last)
            elif rows == 2:
                two(args, first, last)
            elif rows == 1:
                one(args, first, last)
            return
        w, n_blocks = word(args + MATMUL_W), word(args + MATMUL_N_BLOCKS)
        x, acc = word(args + MATMUL_X), word(args + MATMUL_SCRATCH) + thread * MATMUL_SCRATCH_BYTES
        group_bytes = n_blocks * packed_bytes
        # A panel's groups lie as far apart as they can: memory serves far streams faster.
        far = (last - first + PANEL_GROUPS - 1) // PANEL_GROUPS
        for t in range(0, rows, MAX_TILE):
            n = min(MAX_TILE, rows - t)
            for group in range(first, first + far):
                n_groups = (last - group + far - 1) // far
                w_panel, apart = w + group * group_bytes, far * group_bytes
                panel_sums(w_panel, apart, n_groups, n_blocks, x, n, acc)
                for i in range(n):
                    for g in range(n_groups):
                        at = acc + token_bytes * i + VECTOR * g
                        finish(args, group + g * far, t + i, load_rows_f32(at, VECTOR, 1))
            x += MAX_TILE * word(args + MATMUL_X_ROW_BYTES)

    return tiles


# -- products of floats ----------------------------------------------------------------------------


def _floats(isa, type_name, finish_of):
    """One and two tokens with their 4 sums in registers, more in tiles of 4 and one of 3."""
    four, three = (_float_tile(type_name, n, finish_of(n)) for n in (4, 3))
    two, one = (_few_floats(type_name, n, finish_of(n)) for n in (2, 1))

    @jit
    def tiles(args, first, last, rows, thread):
        # Groups that meet the same tokens lie half a chunk apart, as those of quantised weights.
        half, rest = (last - first + 1) // 2, rows & 3
        end = rows - rest
        for start in range(0, rows, _TOKENS):
            for group in range(first, first + half):
                far = group + half if group + half < last else group
                for t in range(start, min(start + _TOKENS, end), 4):
                    four(args, group, far, t, thread)
                if rest == 3 and start + _TOKENS >= rows:
                    three(args, group, far, end, thread)
        if rest == 2:
            two(args, first, last, end)
        elif rest == 1:
            one(args, first, last, end)

    return tiles


def _few_floats(type_name, n, finish):
    """All groups of a chunk for n tokens from t on."""
    load, packed_bytes = FLOATS[type_name], SIZES[type_name].packed_bytes
    column_bytes = packed_bytes // 4

    @jit
    def tile(args, first, last, t):
        w, n_blocks = word(args + MATMUL_W), word(args + MATMUL_N_BLOCKS)
        stride = word(args + MATMUL_X_ROW_BYTES)
        for group in range(first, last):
            p, x = w + group * n_blocks * packed_bytes, word(args + MATMUL_X) + t * stride
            a, b, c, d = zeros_f32(n), zeros_f32(n), zeros_f32(n), zeros_f32(n)
            for _ in range(n_blocks):
                for line in range(0, packed_bytes, 64):
                    prefetch(p + _PREFETCH + line)
                a = fma(load(p), load_splats_f32(x, stride, n), a)
                b = fma(load(p + column_bytes), load_splats_f32(x + 4, stride, n), b)
                c = fma(load(p + 2 * column_bytes), load_splats_f32(x + 8, stride, n), c)
                d = fma(load(p + 3 * column_bytes), load_splats_f32(x + 12, stride, n), d)
                p += packed_bytes
                x += 16
            finish(args, group, t, add_f(add_f(a, b), add_f(c, d)))

    return tile


def _float_tile(type_name, n, finish):
    """Two groups for n tokens from t on, with one of the 4 sums in registers at a time.

    All 4 would be 16 vectors for 4 tokens and one group. The sums change after every
    _SPAN bytes of a group, which the first-level cache holds. 4 tokens lie side by side, 3 apart.
    """
    load, packed_bytes = FLOATS[type_name], SIZES[type_name].packed_bytes
    column_bytes, sums_bytes = packed_bytes // 4, n * VECTOR
    n_lines = 2 * packed_bytes // 64  # of both groups' blocks
    lanes = 4 if n == 4 else 1  # values of x beside each other

    @jit
    def load_sums(at):
        return load_rows_f32(at, VECTOR, n)

    @jit
    def total(acc):
        a, b = load_sums(acc), load_sums(acc + 2 * sums_bytes)
        c, d = load_sums(acc + 4 * sums_bytes), load_sums(acc + 6 * sums_bytes)
        return add_f(add_f(a, b), add_f(c, d))

    @jit
    def tile(args, group, far, t, thread):
        group_bytes = word(args + MATMUL_N_BLOCKS) * packed_bytes
        w = word(args + MATMUL_W)
        p, q = w + group * group_bytes, w + far * group_bytes
        stride = word(args + MATMUL_X_ROW_BYTES)
        x = word(args + MATMUL_X) + t * stride
        acc = word(args + MATMUL_SCRATCH) + thread * MATMUL_SCRATCH_BYTES
        for at in range(acc, acc + 8 * sums_bytes, VECTOR):
            store_f32x8(at, zero_f32())
        for start in range(0, group_bytes, _SPAN):
            end = min(start + _SPAN, group_bytes)
            for k in range(4):
                at, column = acc + 2 * k * sums_bytes, column_bytes * k
                here, there = load_sums(at), load_sums(at + sums_bytes)
                values, soon = x + 4 * lanes * k, (q if k & 1 else p) + _SPAN + 64 * (k >> 1)
                for block in range(start, end, packed_bytes):
                    if k < n_lines:
                        prefetch(soon + block)
                    splats = load_splats_f32(values, 4 if n == 4 else stride, n)
                    here = fma(load(p + block + column), splats, here)
                    there = fma(load(q + block + column), splats, there)
                    values += 16 * lanes
                store_rows(at, VECTOR, here)
                store_rows(at + sums_bytes, VECTOR, there)
            x += (end - start) // packed_bytes * 16 * lanes
        finish(args, group, t, total(acc))
        if far != group:
            finish(args, far, t, total(acc + sums_bytes))

    return tile
