"""Picks the next token of one wanted row: `edgeinfer.sampling.sampler`, id for id and bit for bit.

What it is made of is in `sampling/`: the table's fields, passes over all logits, the candidates
that a lazy sort puts in order, changes of logits, the chain, mirostat.
"""

from __future__ import annotations

from numba import njit

from edgeinfer.kernels.cpu import layout as at
from edgeinfer.kernels.cpu.native.sampling.candidates import logit, n_sorted, open_first, token
from edgeinfer.kernels.cpu.native.sampling.chain import pick
from edgeinfer.kernels.cpu.native.sampling.changes import (
    change,
    logit_of,
    per_token_floats,
    restore,
)
from edgeinfer.kernels.cpu.native.sampling.mirostat import mirostat
from edgeinfer.kernels.cpu.native.sampling.numbers import INF, log, narrow
from edgeinfer.kernels.cpu.native.sampling.table import output, param
from edgeinfer.kernels.cpu.native.sampling.vocabulary import (
    copy_masked,
    first_at_least,
    largest_logit,
    sum_exp,
)
from edgeinfer.kernels.cpu.native.words import (
    load_f32,
    store_f32,
    store_f64,
    store_i32,
    word,
)
from edgeinfer.sampling.params import NO_CANDIDATE, OK

jit = njit(error_model="numpy")


@jit
def _sample(table, i, logits, n_vocab, scratch):
    row = output(table, "rows") + i * output(table, "row_bytes")
    n_top, largest, log_total = param(row, "n_logprobs"), -INF, 0.0
    if n_top >= 0:
        largest = largest_logit(logits, n_vocab, scratch)
        if largest > -INF:
            log_total = log(sum_exp(logits, n_vocab, scratch, largest, 1.0))
        offset = 4 * i * output(table, "max_logprobs")
        ids, values = output(table, "top_ids") + offset, output(table, "top_logprobs") + offset
        _list_top(logits, n_vocab, scratch, n_top, largest, log_total, ids, values)
    mask, changed = word(output(table, "masks") + 8 * i), logits
    if mask != 0:
        changed = per_token_floats(scratch, n_vocab)
        copy_masked(changed, logits, n_vocab, mask)
    change(row, changed, n_vocab, scratch)
    id, mu, status = _choose(row, changed, n_vocab, scratch)
    restore(row, changed, n_vocab, scratch)
    logprob = narrow(INF - INF)
    if n_top >= 0:
        logprob = narrow(-INF)
        if largest > -INF and load_f32(logits + 4 * id) > logprob:
            logprob = narrow(logit_of(logits, id) - largest - log_total)
    store_i32(output(table, "ids") + 4 * i, id)
    store_i32(output(table, "status") + 4 * i, status)
    store_f32(output(table, "logprobs") + 4 * i, logprob)
    store_f64(output(table, "mu") + 8 * i, mu)


@jit
def _list_top(logits, n_vocab, scratch, n_top, largest, log_total, ids, values):
    """The n_top likeliest tokens; writes (-1, -inf) where there are no more."""
    n = 0
    if n_top > 0 and largest > -INF:
        open_first(scratch, logits, n_vocab, min(n_top, n_vocab), -INF)
        n = n_sorted(scratch)
    for i in range(n_top):
        id, logprob = -1, -INF
        if i < n:
            id, logprob = token(scratch, i), logit(scratch, i) - largest - log_total
        store_i32(ids + 4 * i, id)
        store_f32(values + 4 * i, narrow(logprob))


@jit
def _choose(row, logits, n_vocab, scratch):
    """The token that follows changed logits, mirostat's next mu, and the status."""
    largest, mu = largest_logit(logits, n_vocab, scratch), param(row, "mu")
    if largest == -INF:
        return 0, mu, NO_CANDIDATE
    if param(row, "temperature") <= 0.0:
        return first_at_least(logits, n_vocab, narrow(largest)), mu, OK
    if param(row, "mirostat") != 0:
        id, mu = mirostat(scratch, row, logits, n_vocab)
        return id, mu, OK
    return pick(scratch, row, logits, n_vocab), mu, OK


def make(isa):
    def kernel(h, a, chunk, thread):
        table = word(h + at.H_SAMPLES)
        if table == 0:
            return
        scratch = word(a + at.SAMPLE_SCRATCH) + thread * word(a + at.SAMPLE_SCRATCH_BYTES)
        logits = word(a + at.SAMPLE_LOGITS) + chunk * word(a + at.SAMPLE_STRIDE)
        _sample(table, chunk, logits, word(a + at.SAMPLE_N_VOCAB), scratch)

    return kernel
