"""route.<gating>: which experts a row goes to, and with which weights. Knows no weights of theirs.

In scratch stand three arrays of a value for each expert: p, then the scores that they are chosen
by, then marks, 1 where an expert can't be chosen (any more).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from edgeinfer.kernels.cpu.layout import (
    H_ROWS,
    ROUTE_BIAS,
    ROUTE_N_EXPERTS,
    ROUTE_N_GROUPS,
    ROUTE_N_GROUPS_USED,
    ROUTE_N_USED,
    ROUTE_NORM,
    ROUTE_SCALE,
    ROUTE_SCRATCH,
    ROUTE_SINK,
    ROUTE_STRIDE,
    ROUTE_X,
    route_scratch_bytes,
)
from edgeinfer.kernels.cpu.native.activations import sigmoid, softplus
from edgeinfer.kernels.cpu.native.copy_rows import copy
from edgeinfer.kernels.cpu.native.math import exp
from edgeinfer.kernels.cpu.native.operations import (
    add_f,
    div_f,
    load_f32x8,
    load_rows_f32,
    max_f,
    max_lanes,
    row,
    splat_f32,
    store_f32x8,
    store_rows,
    sub_f,
    sum_lanes,
    zeros_f32,
)
from edgeinfer.kernels.cpu.native.sink import finish_row, row_at
from edgeinfer.kernels.cpu.native.words import (
    load_f32,
    load_i32,
    sqrt_f32,
    store_f32,
    store_i32,
    word,
)
from edgeinfer.ops import SMALLEST_SUM

jit = njit(error_model="numpy")
_scratch_bytes = jit(route_scratch_bytes)
_LOWEST = np.float32(-np.inf)
_SMALLEST = np.float32(SMALLEST_SUM)


@jit
def _softmax(x, n):
    """In place, of n values with room for whole blocks of 32."""
    end = 4 * ((n + 31) & -32)
    for i in range(4 * n, end, 4):
        store_f32(x + i, _LOWEST)
    top = load_f32x8(x)
    for i in range(32, end, 32):
        top = max_f(load_f32x8(x + i), top)
    m, acc = splat_f32(max_lanes(top)), zeros_f32(4)
    for i in range(0, end, 128):
        p = exp(sub_f(load_rows_f32(x + i, 32, 4), m))
        store_rows(x + i, 32, p)
        acc = add_f(acc, p)
    total = add_f(add_f(row(acc, 0), row(acc, 1)), add_f(row(acc, 2), row(acc, 3)))
    inverse = splat_f32(sum_lanes(total))
    for i in range(0, end, 32):
        store_f32x8(x + i, div_f(load_f32x8(x + i), inverse))


@jit
def _sigmoid(x, n):
    for i in range(0, 4 * n, 32):
        store_f32x8(x + i, sigmoid(load_f32x8(x + i)))


@jit
def _sqrt_softplus(x, n):
    for i in range(0, 4 * n, 32):
        store_f32x8(x + i, softplus(load_f32x8(x + i)))
    for i in range(0, 4 * n, 4):
        store_f32(x + i, sqrt_f32(load_f32(x + i)))


@jit
def _as_it_is(x, n):
    pass


_GATES = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sqrt_softplus": _sqrt_softplus,
    "raw": _as_it_is,
}


@jit
def _largest(scores, marks, n):
    """Place of the largest of n values without a mark, the first of equals."""
    best = -1
    for i in range(n):
        if load_i32(marks + 4 * i) == 0:
            if best < 0 or load_f32(scores + 4 * i) > load_f32(scores + 4 * best):
                best = i
    return best


@jit
def _number(score):
    """What is no number counts as the lowest."""
    return score if score == score else _LOWEST


@jit
def _two_largest(scores, n):
    """Their sum."""
    first, second = _LOWEST, _LOWEST
    for i in range(n):
        score = load_f32(scores + 4 * i)
        if score > first:
            first, second = score, first
        elif score > second:
            second = score
    return _number(first + second)


@jit
def _mark_groups(scores, marks, n, n_groups, n_used):
    """Mark every expert of the groups that are not used.

    Groups are marked first, where their experts will be: they have two or more each.
    """
    size, sums = n // n_groups, marks + 4 * n_groups
    for group in range(n_groups):
        store_f32(sums + 4 * group, _two_largest(scores + 4 * size * group, size))
        store_i32(marks + 4 * group, 0)
    for _ in range(n_used):
        store_i32(marks + 4 * _largest(sums, marks, n_groups), 1)
    for group in range(n_groups - 1, -1, -1):
        is_out = 1 - load_i32(marks + 4 * group)
        for i in range(size * group, size * (group + 1)):
            store_i32(marks + 4 * i, is_out)


@jit
def _weigh(weights, n, norm, scale):
    if norm != 0:
        total = load_f32(weights)
        for i in range(1, n):
            total += load_f32(weights + 4 * i)
        total = total if total > _SMALLEST else _SMALLEST
        for i in range(n):
            store_f32(weights + 4 * i, load_f32(weights + 4 * i) / total)
    if scale != np.float32(1):
        for i in range(n):
            store_f32(weights + 4 * i, load_f32(weights + 4 * i) * scale)


def make(isa, gating):
    gate, is_raw = _GATES[gating], gating == "raw"

    @jit
    def choose(a, p, scores, marks, out):
        """Leaves numbers and p of the chosen, in their order."""
        n, n_used, bias = word(a + ROUTE_N_EXPERTS), word(a + ROUTE_N_USED), word(a + ROUTE_BIAS)
        for i in range(0, 4 * n, 4):
            score = load_f32(p + i)
            if bias != 0:
                score += load_f32(bias + i)
            store_f32(scores + i, _number(score))
            store_i32(marks + i, 0)
        n_groups = word(a + ROUTE_N_GROUPS)
        if n_groups > 1:
            _mark_groups(scores, marks, n, n_groups, word(a + ROUTE_N_GROUPS_USED))
        for i in range(n_used):
            best = _largest(scores, marks, n)
            store_i32(marks + 4 * best, 1)
            store_f32(out + 4 * i, np.float32(best))
            store_f32(out + 4 * (n_used + i), load_f32(p + 4 * best))

    def kernel(h, a, chunk, thread):
        n, n_used, sink = word(a + ROUTE_N_EXPERTS), word(a + ROUTE_N_USED), a + ROUTE_SINK
        size = _scratch_bytes(n)
        p = word(a + ROUTE_SCRATCH) + thread * size
        scores, marks = p + size // 3, p + 2 * (size // 3)
        copy(word(a + ROUTE_X) + chunk * word(a + ROUTE_STRIDE), p, n)
        gate(p, n)
        out = row_at(sink, chunk, thread)
        choose(a, p, scores, marks, out)
        weights = out + 4 * n_used
        if is_raw:
            copy(weights, p, n_used)
            _softmax(p, n_used)
            copy(p, weights, n_used)
        _weigh(weights, n_used, word(a + ROUTE_NORM), load_f32(a + ROUTE_SCALE))
        finish_row(out, 2 * n_used, sink, chunk, word(h + H_ROWS))

    return kernel
