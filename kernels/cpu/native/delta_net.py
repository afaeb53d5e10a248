"""The gated delta rule: each row decays, reads and writes a matrix for each head.

Columns are independent of each other: 8 are a vector. Those of a chunk stay in the processor's
nearest cache for all rows of a run. Knows no model.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu.layout import (
    DELTA_BETA,
    DELTA_DECAY,
    DELTA_DIM,
    DELTA_GATE_STRIDE,
    DELTA_GROUPS,
    DELTA_IS_TILED,
    DELTA_K,
    DELTA_KEY_STRIDE,
    DELTA_N_HEADS,
    DELTA_N_KEY_HEADS,
    DELTA_OUT,
    DELTA_Q,
    DELTA_SCRATCH,
    DELTA_STRIDE,
    DELTA_V,
    delta_scratch_bytes,
    group_bytes,
    whole_vectors,
)
from edgeinfer.kernels.cpu.native.math import exp
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    fma,
    load_f32x8,
    load_splat_f32,
    mul_f,
    neg_f,
    splat_f32,
    store_f32x8,
    stream_f32x8,
)
from edgeinfer.kernels.cpu.native.runs import first_state, kept_state, rows_of, run_of
from edgeinfer.kernels.cpu.native.words import load_f32, store_f32, word

jit = njit(error_model="numpy")
_scratch_bytes, _group_bytes = jit(delta_scratch_bytes), jit(group_bytes)
_whole_vectors = jit(whole_vectors)


@jit
def _dot(k, q, n):
    """k . q in every lane."""
    c0 = c1 = c2 = c3 = splat_f32(0.0)
    for i in range(0, 4 * (n & -4), 16):
        c0 = fma(load_splat_f32(k + i), load_splat_f32(q + i), c0)
        c1 = fma(load_splat_f32(k + i + 4), load_splat_f32(q + i + 4), c1)
        c2 = fma(load_splat_f32(k + i + 8), load_splat_f32(q + i + 8), c2)
        c3 = fma(load_splat_f32(k + i + 12), load_splat_f32(q + i + 12), c3)
    end = 4 * (n & -4)
    if n & 3 > 0:
        c0 = fma(load_splat_f32(k + end), load_splat_f32(q + end), c0)
    if n & 3 > 1:
        c1 = fma(load_splat_f32(k + end + 4), load_splat_f32(q + end + 4), c1)
    if n & 3 > 2:
        c2 = fma(load_splat_f32(k + end + 8), load_splat_f32(q + end + 8), c2)
    return add_f(add_f(c0, c1), add_f(c2, c3))


@jit
def _read(s, k, q, n):
    """S^T k and S^T q of 8 columns."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat_f32(0.0)
    for i in range(0, 4 * (n & -4), 16):
        v = load_f32x8(s + 8 * i)
        a0 = fma(v, load_splat_f32(k + i), a0)
        b0 = fma(v, load_splat_f32(q + i), b0)
        v = load_f32x8(s + 8 * i + 32)
        a1 = fma(v, load_splat_f32(k + i + 4), a1)
        b1 = fma(v, load_splat_f32(q + i + 4), b1)
        v = load_f32x8(s + 8 * i + 64)
        a2 = fma(v, load_splat_f32(k + i + 8), a2)
        b2 = fma(v, load_splat_f32(q + i + 8), b2)
        v = load_f32x8(s + 8 * i + 96)
        a3 = fma(v, load_splat_f32(k + i + 12), a3)
        b3 = fma(v, load_splat_f32(q + i + 12), b3)
    end = 4 * (n & -4)
    if n & 3 > 0:
        v = load_f32x8(s + 8 * end)
        a0 = fma(v, load_splat_f32(k + end), a0)
        b0 = fma(v, load_splat_f32(q + end), b0)
    if n & 3 > 1:
        v = load_f32x8(s + 8 * end + 32)
        a1 = fma(v, load_splat_f32(k + end + 4), a1)
        b1 = fma(v, load_splat_f32(q + end + 4), b1)
    if n & 3 > 2:
        v = load_f32x8(s + 8 * end + 64)
        a2 = fma(v, load_splat_f32(k + end + 8), a2)
        b2 = fma(v, load_splat_f32(q + end + 8), b2)
    return add_f(add_f(a0, a1), add_f(a2, a3)), add_f(add_f(b0, b1), add_f(b2, b3))


def _storing(writes, keeps):
    """`store(s, to, kept, k, g, delta, n)`: 8 columns that have decayed, plus k delta^T.

    It writes them to `to`, for the next row, and keeps them in a slot: that is read by the next
    step, behind all the model's weights.
    """

    @jit
    def store(s, to, kept, k, g, delta, n):
        for i in range(0, 4 * n, 4):
            v = fma(load_splat_f32(k + i), delta, mul_f(load_f32x8(s + 8 * i), g))
            if writes:
                store_f32x8(to + 8 * i, v)
            if keeps:
                stream_f32x8(kept + 8 * i, v)

    return store


_write, _keep, _write_and_keep = _storing(True, False), _storing(False, True), _storing(True, True)


@jit
def _load_columns(v, n, spare):
    """n floats, and zeros in the places of others."""
    if n == 8:
        return load_f32x8(v)
    store_f32x8(spare, splat_f32(0.0))
    for i in range(0, 4 * n, 4):
        store_f32(spare + i, load_f32(v + i))
    return load_f32x8(spare)


@jit
def _store_columns(out, o, n, spare):
    if n == 8:
        store_f32x8(out, o)
        return
    store_f32x8(spare, o)
    for i in range(0, 4 * n, 4):
        store_f32(out + i, load_f32(spare + i))


@jit
def _clear(at, n_bytes):
    for i in range(0, n_bytes, 32):
        store_f32x8(at + i, splat_f32(0.0))


@jit
def _row(s, to, kept, q, k, v, out, decay, beta, dim, first, last, spare):
    """Groups first <= j < last of one head and row.

    to: where S is left for the next row; kept: its part of a slot; 0 for nowhere.
    """
    g, beta, c, size = exp(load_splat_f32(decay)), load_splat_f32(beta), _dot(k, q, dim), 32 * dim
    for j in range(first, last):
        n, at = min(8, dim - 8 * j), (j - first) * size
        a, b = _read(s + at, k, q, dim)
        delta = mul_f(fma(neg_f(g), a, _load_columns(v + 32 * j, n, spare)), beta)
        _store_columns(out + 32 * j, fma(c, delta, mul_f(g, b)), n, spare)
        if to != 0 and kept != 0:
            _write_and_keep(s + at, to + at, kept + at, k, g, delta, dim)
        elif to != 0:
            _write(s + at, to + at, kept + at, k, g, delta, dim)
        elif kept != 0:
            _keep(s + at, to + at, kept + at, k, g, delta, dim)


def make(isa):
    def kernel(h, a, chunk, thread):
        run, part = run_of(a, chunk)
        first_row, n_rows = rows_of(run)
        dim, n_key_heads = word(a + DELTA_DIM), word(a + DELTA_N_KEY_HEADS)
        n_groups = _whole_vectors(dim) // 8
        per_head = (n_groups + DELTA_GROUPS - 1) // DELTA_GROUPS
        head, first = part // per_head, part % per_head * DELTA_GROUPS
        last = min(first + DELTA_GROUPS, n_groups)
        if word(a + DELTA_IS_TILED):
            key_head = head % n_key_heads
        else:
            key_head = head * n_key_heads // word(a + DELTA_N_HEADS)
        key_stride, stride = word(a + DELTA_KEY_STRIDE), word(a + DELTA_STRIDE)
        gate_stride = word(a + DELTA_GATE_STRIDE)
        q = word(a + DELTA_Q) + 4 * dim * key_head + first_row * key_stride
        k = word(a + DELTA_K) + 4 * dim * key_head + first_row * key_stride
        v = word(a + DELTA_V) + 4 * dim * head + first_row * stride
        out = word(a + DELTA_OUT) + 4 * dim * head + first_row * stride
        decay = word(a + DELTA_DECAY) + 4 * head + first_row * gate_stride
        beta = word(a + DELTA_BETA) + 4 * head + first_row * gate_stride
        scratch = word(a + DELTA_SCRATCH) + thread * _scratch_bytes(dim)
        spare = scratch + DELTA_GROUPS * _group_bytes(dim)
        at = (head * n_groups + first) * _group_bytes(dim)
        s = first_state(a, run)
        if s != 0:
            s += at
        else:
            s = scratch
            _clear(scratch, (last - first) * _group_bytes(dim))
        for i in range(n_rows):
            kept = kept_state(h, a, first_row + i)
            if kept != 0:
                kept += at
            to = scratch if i < n_rows - 1 else 0
            _row(s, to, kept, q, k, v, out, decay, beta, dim, first, last, spare)
            s = to
            q, k, v, out = q + key_stride, k + key_stride, v + stride, out + stride
            decay, beta = decay + gate_stride, beta + gate_stride

    return kernel
