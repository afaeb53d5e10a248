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
from edgeinfer.kernels.cpu.native import floats
from edgeinfer.kernels.cpu.native.formats import PRODUCTS
from edgeinfer.kernels.cpu.native.grid import PREFETCH, VECTOR, Grid, join, keep
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    eight_f32,
    load_f32x8,
    load_rows_f32,
    load_u8x32,
    prefetch,
    store_f32x8,
    store_rows,
    zero_f32,
    zeros_f32,
    zeros_f32x16,
)
from edgeinfer.kernels.cpu.native.sink import n_rows_of
from edgeinfer.kernels.cpu.native.words import word

jit = njit(error_model="numpy")


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
    kind = _quantised if type_name in PRODUCTS else floats.tiles
    return kind(isa, type_name, finish_of)


@jit
def _load_ahead(p):
    prefetch(p + PREFETCH)
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
    packed_bytes, finish, token_bytes = form.packed_bytes, finish_of(1), PANEL_GROUPS * VECTOR
    few = _few_in_pairs if isa.panel_width > 1 else _few_in_turns
    one, two, three, four = (few(isa, product, form, n, finish_of(n)) for n in (1, 2, 3, 4))
    panel_sums = _panel_sums(isa, product, form)

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


def _prefetch_scales(form):
    """Of a block: the weight loads do not touch them."""
    n_lines = 3 * (form.block == 256)

    @jit
    def prefetch_scales(p):
        for i in range(n_lines):
            prefetch(p + PREFETCH + 64 * i)

    return prefetch_scales


def _few_in_turns(isa, product, form, n, finish):
    """All groups of a chunk for n tokens, two groups in turns: their sums stay in registers.

    The two lie half a chunk apart, because memory serves far streams faster. One body does
    both: in a body of its own for each, LLVM would unpack both at once and spill.
    """
    packed_bytes, n_parts, unpack = form.packed_bytes, form.block // 32, product.unpack
    add, prefetch_scales = product.add(Grid(isa, 1, n, in_registers=True)), _prefetch_scales(form)

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


def _few_in_pairs(isa, product, form, n, finish):
    """The same where vectors are wide: the two groups are the halves of each."""
    packed_bytes, n_parts, unpack = form.packed_bytes, form.block // 32, product.unpack
    add, prefetch_scales = product.add(Grid(isa, 2, n, in_registers=True)), _prefetch_scales(form)
    join_two = join(isa, 2)

    @jit
    def tile(args, first, last):
        n_blocks = word(args + MATMUL_N_BLOCKS)
        group_bytes = n_blocks * packed_bytes
        half = (last - first + 1) // 2
        for group in range(first, first + half):
            far = group + half if group + half < last else group
            w = word(args + MATMUL_W)
            p, q = w + group * group_bytes, w + far * group_bytes
            x, sums = word(args + MATMUL_X), zeros_f32x16(n)
            for turn in range(n_blocks * n_parts):
                i = turn & (n_parts - 1)
                if i == 0:
                    prefetch_scales(p)
                    prefetch_scales(q)
                sums = add(join_two((unpack(p, i), unpack(q, i))), x, sums)
                x += n * A32_BYTES
                step = packed_bytes if i == n_parts - 1 else 0
                p += step
                q += step
            finish(args, group, 0, eight_f32(sums, 0))
            if far != group:
                finish(args, far, 0, eight_f32(sums, 1))

    return tile


def _panel_sums(isa, product, form):
    """`panel_sums(p, apart, n_groups, n_blocks, x, n, acc)`: writes the sums of n tokens and a
    panel of groups at acc, token by token."""
    packed_bytes, n_parts, beside = form.packed_bytes, form.block // 32, product.n_tokens
    add_beside, add_last = (
        _into(product, Grid(isa, PANEL_GROUPS, n, in_registers=isa.panel_width > 1))
        for n in (beside, 1)
    )
    token_bytes = PANEL_GROUPS * VECTOR  # of sums
    unpack_panel, prefetch_scales = _panel(isa, product.unpack), _prefetch_scales(form)
    assert product.n_fields <= PANEL_FIELDS

    @jit
    def panel_sums(p, apart, n_groups, n_blocks, x, n, acc):
        for at in range(acc, acc + n * token_bytes, VECTOR):
            store_f32x8(at, zero_f32())
        for _ in range(n_blocks):
            for g in range(n_groups):
                prefetch_scales(p + g * apart)
            for i in range(n_parts):
                panel = unpack_panel(acc + MATMUL_SUMS_BYTES, p, apart, n_groups, i)
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

    return panel_sums


def _panel(isa, unpack):
    """`panel(at, p, apart, n_groups, i)`: the fields of 32 columns of up to PANEL_GROUPS groups.

    They are in memory at `at`, or in registers where these are wide: then a group that is not
    there is the last one again, and nobody reads its sums.
    """
    keep_fields, join_four = keep(PANEL_GROUPS), join(isa, PANEL_GROUPS)
    assert PANEL_GROUPS == 4

    @jit
    def in_memory(at, p, apart, n_groups, i):
        for g in range(n_groups):
            keep_fields(at, g, unpack(p + g * apart, i))
        return at

    @jit
    def in_registers(at, p, apart, n_groups, i):
        last = (n_groups - 1) * apart
        q, r, s = p + min(apart, last), p + min(2 * apart, last), p + last
        return join_four((unpack(p, i), unpack(q, i), unpack(r, i), unpack(s, i)))

    return in_registers if isa.panel_width > 1 else in_memory
