"""experts.<type>: the packed matrix of each chosen expert times the rows that chose it.

The products are those of `matmul.py`; what is done here is to find an item's weights and rows,
and to put the results where their rows want them.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    DISPATCH_EXPERT,
    DISPATCH_FIRST,
    DISPATCH_ITEM_BYTES,
    DISPATCH_ITEMS,
    DISPATCH_N_ROWS,
    DISPATCH_RECORD_BYTES,
    DISPATCH_ROW,
    DISPATCH_SLOT,
    EXPERTS_BIAS,
    EXPERTS_BYTES,
    EXPERTS_DIM,
    EXPERTS_N_BLOCKS,
    EXPERTS_N_GROUPS,
    EXPERTS_N_USED,
    EXPERTS_OUT,
    EXPERTS_SCALE,
    EXPERTS_SCRATCH,
    EXPERTS_STRIDE,
    EXPERTS_W,
    EXPERTS_X,
    EXPERTS_X_ROW_BYTES,
    MATMUL_BOUNDS,
    MATMUL_N_BLOCKS,
    MATMUL_SCRATCH,
    MATMUL_W,
    MATMUL_X,
    MATMUL_X_ROW_BYTES,
    PANEL_GROUPS,
    PLANNED_AT,
    PLANNED_N_EXPERTS,
    PLANNED_PER_ITEM,
    WORD,
    dispatch_records,
    whole_vectors,
)
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.grid import VECTOR
from edgeinfer.kernels.cpu.native.matmul import tiles_of
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    load_f32x8,
    load_splat_f32,
    local,
    mul_f,
    store_f32x8,
    store_rows,
)
from edgeinfer.kernels.cpu.native.sink import clear_behind
from edgeinfer.kernels.cpu.native.words import set_word, word

jit = njit(error_model="numpy")
_dispatch_records, _whole_vectors = jit(dispatch_records), jit(whole_vectors)

# Arguments as a matmul has them, and behind these what is needed to finish: the op's own
# arguments, the number of the expert, the item's first record, room for 4 vectors.
_OP, _EXPERT, _RECORDS, _ROOM = (MATMUL_BOUNDS + i * WORD for i in range(4))
_ARGS_BYTES = _ROOM + 4 * VECTOR


def _finish(n):
    """Puts the sums of 8 weight rows and of n rows of an item, from t on, where these belong."""

    @jit
    def finish(args, group, t, acc):
        op, expert, room = word(args + _OP), word(args + _EXPERT), args + _ROOM
        dim, stride, n_used = (
            word(op + EXPERTS_DIM),
            word(op + EXPERTS_STRIDE),
            word(op + EXPERTS_N_USED),
        )
        scale, bias = word(op + EXPERTS_SCALE), word(op + EXPERTS_BIAS)
        if scale:
            acc = mul_f(acc, load_splat_f32(scale + 4 * expert))
        if bias:
            acc = add_f(acc, load_f32x8(bias + 4 * expert * _whole_vectors(dim) + 32 * group))
        store_rows(room, VECTOR, acc)
        left = dim - 8 * group
        record = word(args + _RECORDS) + DISPATCH_RECORD_BYTES * t
        for i in range(n):
            row, slot = word(record + DISPATCH_ROW), word(record + DISPATCH_SLOT)
            out = word(op + EXPERTS_OUT) + row * stride
            to = out + 4 * dim * slot + 32 * group
            if left >= 8:
                store_f32x8(to, load_f32x8(room + VECTOR * i))
            else:
                copy(room + VECTOR * i, to, left)
                if slot == n_used - 1:
                    clear_behind(out, dim * n_used)
            record += DISPATCH_RECORD_BYTES

    return finish


def make(isa, type_name):
    tiles, allocate = tiles_of(isa, type_name, _finish), local(_ARGS_BYTES)

    def kernel(h, a, chunk, thread):
        plan, per_item, args = word(a + PLANNED_AT), word(a + PLANNED_PER_ITEM), allocate()
        item = plan + DISPATCH_ITEMS + DISPATCH_ITEM_BYTES * (chunk // per_item)
        expert, start = word(item + DISPATCH_EXPERT), word(item + DISPATCH_FIRST)
        row_bytes = word(a + EXPERTS_X_ROW_BYTES)
        records = plan + _dispatch_records(word(a + PLANNED_N_EXPERTS))
        set_word(args + MATMUL_W, word(a + EXPERTS_W) + expert * word(a + EXPERTS_BYTES))
        set_word(args + MATMUL_N_BLOCKS, word(a + EXPERTS_N_BLOCKS))
        set_word(args + MATMUL_X, word(a + EXPERTS_X) + start * row_bytes)
        set_word(args + MATMUL_X_ROW_BYTES, row_bytes)
        set_word(args + MATMUL_SCRATCH, word(a + EXPERTS_SCRATCH))
        set_word(args + _OP, a)
        set_word(args + _EXPERT, expert)
        set_word(args + _RECORDS, records + DISPATCH_RECORD_BYTES * start)
        n_groups = word(a + EXPERTS_N_GROUPS)
        n_panels, part = (n_groups + PANEL_GROUPS - 1) // PANEL_GROUPS, chunk % per_item
        first = n_panels * part // per_item * PANEL_GROUPS
        last = min(n_groups, n_panels * (part + 1) // per_item * PANEL_GROUPS)
        tiles(args, first, last, word(item + DISPATCH_N_ROWS), thread)

    return kernel
