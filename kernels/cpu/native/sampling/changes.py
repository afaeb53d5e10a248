"""Logits that a request changes one by one, and puts back: bias, penalties, DRY."""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu import layout as at
from edgeinfer.kernels.cpu.native.sampling.numbers import INF, LARGEST, narrow, widen
from edgeinfer.kernels.cpu.native.sampling.table import param
from edgeinfer.kernels.cpu.native.simd import intp
from edgeinfer.kernels.cpu.native.words import (
    load_f32,
    load_i32,
    store_f32,
    store_i32,
)

jit = njit(error_model="numpy")

_DRY_LONGEST = 128  # tokens of a repeat that count


@jit
def logit_of(logits, token):
    """A logit that may be +inf or NaN, but is finite where it is a candidate's."""
    x = widen(load_f32(logits + 4 * token))
    return x if x < LARGEST else LARGEST


@jit
def _set_logit(logits, token, x):
    """Change a logit, unless it is NaN or -inf; a finite one stays finite."""
    p = logits + 4 * token
    if load_f32(p) > narrow(-INF):
        x = x if x < LARGEST else LARGEST
        x = x if x > -LARGEST else -LARGEST
        store_f32(p, narrow(x))


@jit
def _id(ids, i):
    return intp(load_i32(ids + 4 * i))


@jit
def _copy(to, logits, ids, n, n_vocab):
    """Copy the logits of these tokens."""
    for i in range(n):
        token = _id(ids, i)
        if 0 <= token < n_vocab:
            store_f32(to + 4 * token, load_f32(logits + 4 * token))


@jit
def change(row, logits, n_vocab, scratch):
    """Apply bias, penalties and DRY; `restore` undoes it from the same scratch."""
    saved, per_token = per_token_floats(scratch, n_vocab), scratch + at.SAMPLE_KEYS
    history, n_history = param(row, "history"), param(row, "n_history")
    _copy(saved, logits, param(row, "bias_ids"), param(row, "n_bias"), n_vocab)
    _copy(saved, logits, history, n_history, n_vocab)
    _bias(row, logits, n_vocab)
    n = _last(param(row, "repeat_last_n"), n_history)
    _penalise(row, logits, n_vocab, per_token, history + 4 * (n_history - n), n)
    n = _last(param(row, "dry_penalty_last_n"), n_history)
    _dry(row, logits, n_vocab, per_token, history + 4 * (n_history - n), n)


@jit
def restore(row, logits, n_vocab, scratch):
    saved = per_token_floats(scratch, n_vocab)
    _copy(logits, saved, param(row, "bias_ids"), param(row, "n_bias"), n_vocab)
    _copy(logits, saved, param(row, "history"), param(row, "n_history"), n_vocab)


@jit
def per_token_floats(scratch, n_vocab):
    """A float per token, behind all that sampling itself needs.

    `change` saves there what it changes, unless it changes the floats that lie there.
    """
    return scratch + at.SAMPLE_KEYS + 8 * (n_vocab + at.SAMPLE_SPARE_KEYS)


@jit
def _last(last_n, n_history):
    return n_history if last_n < 0 or last_n > n_history else last_n


@jit
def _bias(row, logits, n_vocab):
    ids, values = param(row, "bias_ids"), param(row, "bias_values")
    for i in range(param(row, "n_bias")):
        token, bias = _id(ids, i), widen(load_f32(values + 4 * i))
        if token < n_vocab:
            _set_logit(logits, token, logit_of(logits, token) + bias)
            if bias == -INF:
                store_f32(logits + 4 * token, narrow(-INF))


@jit
def _clear(per_token, history, n, n_vocab):
    for i in range(n):
        token = _id(history, i)
        if 0 <= token < n_vocab:
            store_i32(per_token + 4 * token, 0)


@jit
def _penalise(row, logits, n_vocab, counts, history, n):
    """`counts` is an int32 per token; only those of the history are ever touched."""
    repeat, presence = param(row, "repeat_penalty"), param(row, "presence_penalty")
    frequency = param(row, "frequency_penalty")
    _clear(counts, history, n, n_vocab)
    for i in range(n):
        token = _id(history, i)
        if 0 <= token < n_vocab:
            store_i32(counts + 4 * token, load_i32(counts + 4 * token) + 1)
    for i in range(n):
        token = _id(history, i)
        if 0 <= token < n_vocab and load_i32(counts + 4 * token) > 0:
            x = logit_of(logits, token)
            x = x * repeat if x <= 0.0 else x / repeat
            count = float(load_i32(counts + 4 * token))
            _set_logit(logits, token, x - (count * frequency + presence))
            store_i32(counts + 4 * token, 0)


# -- DRY -----------------------------------------------------------------------------------------


@jit
def _dry(row, logits, n_vocab, longest, history, n):
    """Penalise tokens that would continue a repeat of the latest tokens.

    `longest` is an int32 per token: 1 more than the length of such a repeat, 0 where there is none.
    """
    allowed = param(row, "dry_allowed_length")
    heads, n_breakers = param(row, "breakers"), param(row, "n_breakers")
    limit = _after_breaker(heads, n_breakers, history, n) if n > allowed else -1
    if limit < allowed:
        return
    limit = min(limit, allowed + _DRY_LONGEST)
    _clear(longest, history, n, n_vocab)
    for back in range(1, n):
        length = _repeat_length(history, n, back, limit)
        token = _id(history, n - back)
        if length >= allowed and 0 <= token < n_vocab:
            store_i32(longest + 4 * token, max(length + 1, load_i32(longest + 4 * token)))
    for i in range(n):
        token = _id(history, i)
        if 0 <= token < n_vocab and load_i32(longest + 4 * token) > 0:
            if not _is_breaker(heads, n_breakers, token):
                penalty = _dry_penalty(row, load_i32(longest + 4 * token) - 1 - allowed)
                _set_logit(logits, token, logit_of(logits, token) - penalty)
            store_i32(longest + 4 * token, 0)


@jit
def _repeat_length(history, n, back, limit):
    """How many of the latest tokens are equal to those `back` before them."""
    last, length = history + 4 * (n - 1), 0
    while (
        length < limit
        and length + back < n
        and load_i32(last - 4 * length) == load_i32(last - 4 * (length + back))
    ):
        length += 1
    return length


@jit
def _dry_penalty(row, n):
    """multiplier * base**n."""
    penalty, base = param(row, "dry_multiplier"), param(row, "dry_base")
    for _ in range(n):
        penalty = penalty * base
        penalty = penalty if penalty < LARGEST else LARGEST
    return penalty


@jit
def _first_head(heads, n, token):
    """Index of the first breaker whose head is `token` or more."""
    low, high = 0, n
    while low < high:
        middle = (low + high) >> 1
        if _id(heads, middle) < token:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _tail(heads, n, i):
    """Where breaker i's tail begins and ends, counted from the first tail."""
    return _id(heads, n + i - 1) if i > 0 else 0, _id(heads, n + i)


@jit
def _is_breaker(heads, n, token):
    """Whether the token by itself is one: the first of its head, which are in order."""
    i = _first_head(heads, n, token)
    if i == n or _id(heads, i) != token:
        return False
    start, end = _tail(heads, n, i)
    return start == end


@jit
def _after_breaker(heads, n, history, n_history):
    """How many of the latest tokens come after the last breaker."""
    tails = heads + 8 * n
    for back in range(n_history):
        p = history + 4 * (n_history - 1 - back)
        longest = -1
        i = _first_head(heads, n, intp(load_i32(p)))
        while i < n and load_i32(heads + 4 * i) == load_i32(p):
            start, end = _tail(heads, n, i)
            j = 0
            while start + j < end <= start + back and _id(tails, start + j) == _id(p, 1 + j):
                j += 1
            if start + j == end:
                longest = max(longest, j)
            i += 1
        if longest >= 0:
            return back - longest
    return n_history
