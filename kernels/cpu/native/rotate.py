"""Heads of one row: norm, rotation, and storing K and V in the row's page.

Knows no attention. `neox` pairs dims i and i + n_pairs, `norm` neighbours.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit

from edgeinfer.kernels.cpu.attention_layout import (
    ROTATE_ANGLES,
    ROTATE_EPS,
    ROTATE_K,
    ROTATE_K_BASE,
    ROTATE_K_DIM,
    ROTATE_K_HEAD_BYTES,
    ROTATE_K_NORM,
    ROTATE_K_PAGE_BYTES,
    ROTATE_K_STRIDE,
    ROTATE_N_HEADS,
    ROTATE_N_KV_HEADS,
    ROTATE_N_PAIRS,
    ROTATE_PINNED_ANGLES,
    ROTATE_PINNED_Q,
    ROTATE_Q,
    ROTATE_Q_NORM,
    ROTATE_Q_STRIDE,
    ROTATE_TABLES,
    ROTATE_TRANSFORMS_K,
    ROTATE_TRANSFORMS_V,
    ROTATE_V,
    ROTATE_V_BASE,
    ROTATE_V_DIM,
    ROTATE_V_HEAD_BYTES,
    ROTATE_V_PAGE_BYTES,
    ROTATE_V_STRIDE,
)
from edgeinfer.kernels.cpu.layout import PAGE
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.kv_store import KEYS, VALUES
from edgeinfer.kernels.cpu.native.kv_store import scratch as scratch_of
from edgeinfer.kernels.cpu.native.norm import normalise
from edgeinfer.kernels.cpu.native.operations import fma, load_f32x8, mul_f, neg_f, store_f32x8
from edgeinfer.kernels.cpu.native.pages import arena_page, n_gone, position, table_of
from edgeinfer.kernels.cpu.native.simd import I32, f32x8, mapped
from edgeinfer.kernels.cpu.native.words import (
    fma_f32,
    load_f32,
    store_f32,
    word,
)

jit = njit(error_model="numpy")


def _shuffle(*lanes):
    """Lanes of two vectors, by number: the second's count from 8."""
    mask = ir.Constant(ir.VectorType(I32, 8), lanes)
    return mapped(2, lambda x, y: f32x8, lambda b, x, y: b.shuffle_vector(x, y, mask))


_evens, _odds = _shuffle(0, 2, 4, 6, 8, 10, 12, 14), _shuffle(1, 3, 5, 7, 9, 11, 13, 15)
_low, _high = _shuffle(0, 8, 1, 9, 2, 10, 3, 11), _shuffle(4, 12, 5, 13, 6, 14, 7, 15)


@jit
def _turn(x0, x1, c, s):
    return fma(x0, c, neg_f(mul_f(x1, s))), fma(x0, s, mul_f(x1, c))


@jit
def _turn_scalar(src, dst, i0, i1, angles, i, n_pairs):
    c, s = load_f32(angles + 4 * i), load_f32(angles + 4 * (n_pairs + i))
    x0, x1 = load_f32(src + 4 * i0), load_f32(src + 4 * i1)
    store_f32(dst + 4 * i0, fma_f32(x0, c, -(x1 * s)))
    store_f32(dst + 4 * i1, fma_f32(x0, s, x1 * c))


@jit
def _rotate_neox(src, dst, angles, n_pairs):
    i = 0
    while i + 8 <= n_pairs:
        c, s = load_f32x8(angles + 4 * i), load_f32x8(angles + 4 * (n_pairs + i))
        high = 4 * (n_pairs + i)
        y0, y1 = _turn(load_f32x8(src + 4 * i), load_f32x8(src + high), c, s)
        store_f32x8(dst + 4 * i, y0)
        store_f32x8(dst + high, y1)
        i += 8
    while i < n_pairs:
        _turn_scalar(src, dst, i, n_pairs + i, angles, i, n_pairs)
        i += 1


@jit
def _rotate_norm(src, dst, angles, n_pairs):
    i = 0
    while i + 8 <= n_pairs:
        c, s = load_f32x8(angles + 4 * i), load_f32x8(angles + 4 * (n_pairs + i))
        a, b = load_f32x8(src + 8 * i), load_f32x8(src + 8 * i + 32)
        y0, y1 = _turn(_evens(a, b), _odds(a, b), c, s)
        store_f32x8(dst + 8 * i, _low(y0, y1))
        store_f32x8(dst + 8 * i + 32, _high(y0, y1))
        i += 8
    while i < n_pairs:
        _turn_scalar(src, dst, 2 * i, 2 * i + 1, angles, i, n_pairs)
        i += 1


def make(isa, style, k_type="f16", v_type="f16"):
    rotate = {"neox": _rotate_neox, "norm": _rotate_norm}[style]
    store_k, store_v, scratch = KEYS[k_type], VALUES[v_type], scratch_of(k_type, v_type)

    @jit
    def queries(h, a, t, slid):
        n_heads, k_dim = word(a + ROTATE_N_HEADS), word(a + ROTATE_K_DIM)
        n_pairs, norm = word(a + ROTATE_N_PAIRS), word(a + ROTATE_Q_NORM)
        q = word(a + ROTATE_Q) + t * word(a + ROTATE_Q_STRIDE)
        pinned = word(a + ROTATE_PINNED_Q) + t * word(a + ROTATE_Q_STRIDE)
        offset = 8 * n_pairs * t
        for _ in range(n_heads):
            if norm != 0:
                normalise(q, norm, load_f32(a + ROTATE_EPS), k_dim, q)
            if slid:
                rotate(q, pinned, word(a + ROTATE_PINNED_ANGLES) + offset, n_pairs)
                copy(q + 8 * n_pairs, pinned + 8 * n_pairs, k_dim - 2 * n_pairs)
            rotate(q, q, word(a + ROTATE_ANGLES) + offset, n_pairs)
            q += 4 * k_dim
            pinned += 4 * k_dim

    @jit
    def keys_and_values(a, chunk, page, place):
        k_dim, v_dim, s = word(a + ROTATE_K_DIM), word(a + ROTATE_V_DIM), scratch()
        n_pairs, norm = word(a + ROTATE_N_PAIRS), word(a + ROTATE_K_NORM)
        angles = word(a + ROTATE_ANGLES) + 8 * n_pairs * chunk
        k = word(a + ROTATE_K) + chunk * word(a + ROTATE_K_STRIDE)
        v = word(a + ROTATE_V) + chunk * word(a + ROTATE_V_STRIDE)
        k_page = word(a + ROTATE_K_BASE) + page * word(a + ROTATE_K_PAGE_BYTES)
        v_page = word(a + ROTATE_V_BASE) + page * word(a + ROTATE_V_PAGE_BYTES)
        for _ in range(word(a + ROTATE_N_KV_HEADS)):
            if norm != 0:
                normalise(k, norm, load_f32(a + ROTATE_EPS), k_dim, k)
            rotate(k, k, angles, n_pairs)
            store_k(k, k_page, place, k_dim, word(a + ROTATE_TRANSFORMS_K), s)
            store_v(v, v_page, place, v_dim, word(a + ROTATE_TRANSFORMS_V), s)
            k += 4 * k_dim
            v += 4 * v_dim
            k_page += word(a + ROTATE_K_HEAD_BYTES)
            v_page += word(a + ROTATE_V_HEAD_BYTES)

    def kernel(h, a, chunk, thread):
        pos, table = position(h, chunk), table_of(h, word(a + ROTATE_TABLES), chunk)
        queries(h, a, chunk, word(a + ROTATE_PINNED_Q) != 0 and n_gone(table, pos // PAGE) > 0)
        if word(a + ROTATE_N_KV_HEADS) > 0:
            keys_and_values(a, chunk, arena_page(table, pos // PAGE), pos % PAGE)

    return kernel
