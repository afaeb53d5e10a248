"""Sorts int64 keys in memory, from the left and only as far as is asked for."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu import layout as at
from edgeinfer.kernels.cpu.native.inlining import not_inlined
from edgeinfer.kernels.cpu.native.words import set_word, word

jit = njit(error_model="numpy")

_INSERTION = 16  # keys or fewer are sorted by insertion


@jit
def _partition(keys, low, high, random):
    """Split [low, high) at the median of three random keys; returns where that one lies."""
    last = keys + 8 * (high - 1)
    n = high - low
    i = low + (((random >> 11) & 0xFFFFF) * n >> 20)
    j = low + (((random >> 31) & 0xFFFFF) * n >> 20)
    x, y, z = word(keys + 8 * i), word(keys + 8 * j), word(last)
    if (y < x) == (x < z):
        middle = i
    elif (x < y) == (y < z):
        middle = j
    else:
        middle = high - 1
    pivot = word(keys + 8 * middle)
    set_word(keys + 8 * middle, z)
    set_word(last, pivot)
    split = keys + 8 * low
    for p in range(keys + 8 * low, last, 8):
        x = word(p)
        set_word(p, word(split))
        set_word(split, x)
        split += 8 * (x < pivot)
    set_word(last, word(split))
    set_word(split, pivot)
    return (split - keys) >> 3


@jit
def _next_random(random):
    return random * 6364136223846793005 + 1442695040888963407


@jit
def _insertion(keys, low, high):
    for i in range(low + 1, high):
        x = word(keys + 8 * i)
        j = i - 1
        while j >= low and word(keys + 8 * j) > x:
            set_word(keys + 8 * (j + 1), word(keys + 8 * j))
            j -= 1
        set_word(keys + 8 * (j + 1), x)


@jit
def select(keys, n, k):
    """Move the k smallest keys to the front, the largest of them last."""
    low, high = 0, n
    random = n
    while high - low > _INSERTION:
        random = _next_random(random)
        split = _partition(keys, low, high, random)
        if split == k - 1:
            return
        if split > k - 1:
            high = split
        else:
            low = split + 1
    _insertion(keys, low, high)


@jit
def push_all(stack, n):
    """Before the first `sort_more` of n keys."""
    set_word(stack, 1)
    set_word(stack + 8, 0)
    set_word(stack + 16, n)


@jit
def sort_more(keys, n, stack, wanted):
    """Quicksort of n keys from the left until `wanted` are in place; returns how many are.

    The stack has its depth, then the ranges still to sort, leftmost on top. Where it is full, which
    random pivots all but exclude, insertion sorts the rest of a range.
    """
    not_inlined()
    depth, top = word(stack), stack + 16 * word(stack) - 8
    random, done = n, 0
    while depth > 0 and done < wanted:
        low, high = word(top), word(top + 8)
        while high - low > _INSERTION and depth < at.SAMPLE_STACK_RANGES:
            random = _next_random(random)
            split = _partition(keys, low, high, random)
            set_word(top, split + 1)
            set_word(top + 8, high)
            high = split
            top += 16
            depth += 1
        _insertion(keys, low, high)
        top -= 16
        depth -= 1
        done = word(top) if depth > 0 else n
    set_word(stack, depth)
    return done
