"""The candidates of one row in descending order of logit, sorted only as far as is looked at.

They are a record at the start of a thread's scratch memory, passed on as its address `c`.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu import layout as at
from edgeinfer.kernels.cpu.native.inlining import not_inlined
from edgeinfer.kernels.cpu.native.sampling.numbers import INF, exp, log, token_of, value_of
from edgeinfer.kernels.cpu.native.sampling.sort import push_all, sort_more
from edgeinfer.kernels.cpu.native.sampling.vocabulary import gather, sum_exp, sum_products
from edgeinfer.kernels.cpu.native.words import set_word, word

jit = njit(error_model="numpy")

# Words of the record: where the first key lies, how many are in order, whether nothing was cut off
# yet, whether there are no more than those in order; then what sorting on needs.
_FIRST, _N, _IS_WHOLE, _IS_COMPLETE, _LOGITS, _N_VOCAB, _N_KEYS = (8 * i for i in range(7))
_LAZY = 256  # sorted at first where nothing is cut off


@jit
def open_first(c, logits, n_vocab, k, floor):
    """The first k with logits above `floor`, in order."""
    keys, stack = c + at.SAMPLE_KEYS, c + at.SAMPLE_STACK
    n = gather(logits, n_vocab, keys, k, floor)
    push_all(stack, n)
    sort_more(keys, n, stack, n)
    set_word(c + _FIRST, keys)
    set_word(c + _LOGITS, logits)
    set_word(c + _N_VOCAB, n_vocab)
    keep(c, n)


@jit
def open_all(c, logits, n_vocab):
    """The whole vocabulary; the first ones are in order."""
    k = min(_LAZY, n_vocab)
    open_first(c, logits, n_vocab, k, -INF)
    set_word(c + _IS_WHOLE, 1)
    set_word(c + _IS_COMPLETE, word(c + _N) < k or k == n_vocab)
    set_word(c + _N_KEYS, 0)


@jit
def sort_to(c, n):
    """Put the first n in order; returns how many are, fewer where there are no more."""
    not_inlined()
    if word(c + _N) < n and not word(c + _IS_COMPLETE):
        keys, stack, n_vocab = c + at.SAMPLE_KEYS, c + at.SAMPLE_STACK, word(c + _N_VOCAB)
        if word(c + _N_KEYS) == 0:
            set_word(c + _N_KEYS, gather(word(c + _LOGITS), n_vocab, keys, n_vocab, -INF))
            push_all(stack, word(c + _N_KEYS))
        set_word(c + _N, sort_more(keys, word(c + _N_KEYS), stack, n))
        set_word(c + _IS_COMPLETE, word(c + _N) == word(c + _N_KEYS))
    return min(n, word(c + _N))


@jit
def has(c, i):
    """Whether there is an i-th candidate, which is in order from now on."""
    return i < word(c + _N) or i < sort_to(c, i + 1)


@jit
def n_sorted(c):
    """How many are in order."""
    return word(c + _N)


@jit
def sort_all(c):
    """Put all in order; returns how many there are."""
    return sort_to(c, word(c + _N_VOCAB))


@jit
def keep(c, n):
    """Cut off all but the first n, which are in order."""
    set_word(c + _N, n)
    set_word(c + _IS_COMPLETE, 1)
    set_word(c + _IS_WHOLE, 0)


@jit
def drop(c, n):
    """Cut off the first n of candidates that are all in order."""
    set_word(c + _FIRST, word(c + _FIRST) + 8 * n)
    keep(c, word(c + _N) - n)


@jit
def keep_two(c, start1, end1, start2, end2):
    """Cut off all but two ranges, both in order."""
    keys = word(c + _FIRST)
    for i in range(end1 - start1):
        set_word(keys + 8 * i, word(keys + 8 * (start1 + i)))
    keys += 8 * (end1 - start1)
    for i in range(end2 - start2):
        set_word(keys + 8 * i, word(word(c + _FIRST) + 8 * (start2 + i)))
    keep(c, end1 - start1 + end2 - start2)


@jit
def token(c, i):
    return token_of(word(word(c + _FIRST) + 8 * i))


@jit
def logit(c, i):
    return value_of(word(word(c + _FIRST) + 8 * i))


@jit
def first_token(c):
    return token_of(word(word(c + _FIRST)))


@jit
def largest(c):
    return value_of(word(word(c + _FIRST)))


@jit
def scaled(c, i, inverse):
    """(logit - largest) / temperature."""
    return (logit(c, i) - largest(c)) * inverse


@jit
def total_weight(c, inverse):
    """Sum of the exp of `scaled`; over the vocabulary, in its order, while nothing was cut off."""
    not_inlined()
    if word(c + _IS_WHOLE):
        return sum_exp(word(c + _LOGITS), word(c + _N_VOCAB), c, largest(c), inverse)
    total = 0.0
    for i in range(word(c + _N)):
        total += exp(scaled(c, i, inverse))
    return total


@jit
def entropy(c):
    """The entropy of all, and their `total_weight`."""
    total, products = total_weight(c, 1.0), 0.0
    if word(c + _IS_WHOLE):
        products = sum_products(word(c + _LOGITS), word(c + _N_VOCAB), c, largest(c))
    else:
        for i in range(word(c + _N)):
            x = scaled(c, i, 1.0)
            products += exp(x) * x
    return log(total) - products / total, total


@jit
def draw(c, inverse, target):
    """The first whose running sum of weights exceeds `target`, else the last with any weight."""
    not_inlined()
    last, i, cum = 0, 0, 0.0
    while has(c, i):
        weight = exp(scaled(c, i, inverse))
        cum += weight
        if weight > 0.0:
            last = i
        if cum > target:
            break
        i += 1
    return last
