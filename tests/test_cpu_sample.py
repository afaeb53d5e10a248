"""The native sampler gives exactly what the NumPy one gives."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.kernels.cpu import layout
from edgeinfer.parameters import SAMPLING
from edgeinfer.sampling.exact_math import exp, sum_vocabulary
from edgeinfer.sampling.params import (
    Sampled,
    SampleRow,
    SampleTable,
    SamplingParams,
    mask_words,
)
from edgeinfer.sampling.sampler import _Candidates, sample_reference
from tests import native

from .test_sampling import VOCABULARIES

NONE = np.zeros(0, np.int32)


def run(logits: np.ndarray, rows: list[SampleRow], family: str | None = None) -> list[Sampled]:
    n_rows, n_vocab = logits.shape
    table = SampleTable(n_rows)
    for i, row in enumerate(rows):
        table.set_row(i, row.params, row.seed, row.index, row.history, row.mu)
        if row.mask is not None:
            table.masks(i, 1, n_vocab)[:] = row.mask
    n_bytes = layout.sample_scratch_bytes(n_vocab)
    scratch = native.huge(n_bytes)
    before = logits.copy()
    native.run(
        "sample",
        native.header(H_SAMPLES=table.address, H_WANTED_ROWS=n_rows),
        [logits.ctypes.data, 4 * n_vocab, n_vocab, scratch.ctypes.data, n_bytes],
        range(n_rows),
        family,
    )
    assert np.array_equal(before.view(np.int32), logits.view(np.int32)), "logits were changed"
    return [
        Sampled(
            int(table.ids[i]), float(table.logprobs[i]), table.top(i), float(table.mu[i]),
            int(table.status[i]),
        )
        for i in range(n_rows)
    ]  # fmt: skip


def check(logits: np.ndarray, rows: list[SampleRow], family: str | None = None) -> None:
    for got, row, line in zip(run(logits, rows, family), rows, logits, strict=True):
        want = sample_reference(line, row)
        assert (got.id, got.mu, got.status) == (want.id, want.mu, want.status), row
        np.testing.assert_array_equal(got.logprob, want.logprob, err_msg=str(row))
        np.testing.assert_array_equal(got.top[0], want.top[0])
        np.testing.assert_array_equal(got.top[1], want.top[1])


VALUES = dict(
    temperature=st.sampled_from([0.0, 0.1, 0.8, 2.0, 1e-40]),
    top_k=st.sampled_from([0, 1, 40, 300, 10**6]),
    top_p=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.9, 0.2]),
    top_n_sigma=st.sampled_from([-1.0, -1.0, 0.3, 2.0]),
    xtc_probability=st.sampled_from([0.0, 0.5, 1.0]),
    xtc_threshold=st.sampled_from([0.1, 0.01]),
    repeat_last_n=st.sampled_from([64, -1, 5]),
    repeat_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.2, 1e38]),
    dry_multiplier=st.sampled_from([0.0, 0.8]),
    dry_base=st.sampled_from([1.75, 1.0, 0.5]),
    dry_allowed_length=st.sampled_from([2, 0]),
    dry_penalty_last_n=st.sampled_from([64, -1]),
    dry_breaker_tokens=st.sampled_from([(), ((3,), (4, 5), (4, 5, 1), (10**6,))]),
    dynatemp_range=st.sampled_from([0.0, 0.0, 0.5, 5.0]),
    dynatemp_exponent=st.sampled_from([1.0, 0.0, 2.5]),
    mirostat=st.sampled_from([0, 0, 0, 1, 2]),
    mirostat_tau=st.sampled_from([5.0, 0.5]),
    mirostat_eta=st.sampled_from([0.1, 1.0]),
    min_keep=st.sampled_from([0, 0, 3, 1000]),
    logprobs=st.sampled_from([None, 0, 5, 128]),
    logit_bias=st.sampled_from([{}, {0: 2.0, 1: -math.inf, 5: math.inf, 10**6: 1.0}]),
)
PARAMS = st.builds(SamplingParams, **VALUES)


def test_no_parameter_is_left_out_here():
    assert set(SAMPLING) - {"seed", "dry_sequence_breakers"} < set(VALUES)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    params=PARAMS,
    n_vocab=st.sampled_from([1, 2, 7, 8, 9, 63, 64, 65, 130, 1000, 5003]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 3.0, 10.0, 1e30]),
    round_to=st.sampled_from([None, 0, 1]),
    holes=st.sampled_from([None, math.nan, -math.inf, math.inf]),
    index=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
    allowed=st.sampled_from([None, 0.0, 0.01, 0.5, 1.0]),
)
def test_any_parameters(params, n_vocab, spread, round_to, holes, index, seed, allowed):
    random = np.random.default_rng(index)
    logits = random.normal(0, spread, (3, n_vocab)).astype(np.float32)
    if round_to is not None:
        logits = np.round(logits, round_to)
    if holes is not None:
        logits[random.random(logits.shape) < 0.2] = holes
    rows = []
    for i in range(3):
        history = random.integers(-1, 8, random.integers(0, 200)).astype(np.int32)
        mu, mask = float(random.uniform(1, 14)), None
        if allowed is not None and i != 1:  # beside one without
            bits = random.random(32 * mask_words(n_vocab)) < allowed
            mask = np.packbits(bits, bitorder="little").view(np.uint32)
        rows.append(SampleRow(params, seed, index + i, history, mu, mask))
    check(logits, rows)


WHOLE = dict(top_k=0, top_p=1.0, min_p=0.0)  # nothing is cut off before


@pytest.mark.parametrize("n_vocab", VOCABULARIES[:-1])
def test_vocabularies_about_the_chunks_of_sums(n_vocab):
    random = np.random.default_rng(n_vocab)
    logits = random.normal(0, 2, (2, n_vocab)).astype(np.float32)
    logits[1, random.random(n_vocab) < 0.1] = -np.inf
    for params in (
        {}, {"typical_p": 0.5}, {"dynatemp_range": 0.7}, {"top_n_sigma": 1.0}, {"mirostat": 2},
        {"xtc_probability": 1.0, "xtc_threshold": 1e-4}, {"top_p": 0.9},
    ):  # fmt: skip
        given = SamplingParams(**WHOLE | {"logprobs": 3, "temperature": 0.9} | params)
        check(logits, [SampleRow(given, 5, i, NONE, 12.0) for i in range(2)])


@pytest.mark.parametrize("n_vocab", VOCABULARIES)
def test_sums_have_the_bits_of_the_references(n_vocab):
    """What is sampled rarely shows the last bits of a sum."""
    pytest.importorskip("numba", reason="needs Numba in this process")
    random = np.random.default_rng(n_vocab)
    logits = random.normal(0, 3, n_vocab).astype(np.float32)
    logits[random.random(n_vocab) < 0.1] = np.nan
    logits[0] = 15.0
    c = _Candidates(np.where(np.isnan(logits), -np.inf, logits).astype(np.float32))
    scaled = c.scaled()
    products = c.sum(exp(scaled) * scaled)
    n = np.count_nonzero(~np.isnan(logits))
    mean = sum_vocabulary(np.where(np.isnan(logits), 0.0, logits)) / n
    off = np.where(np.isnan(logits), mean, logits) - mean
    expected = [c.total(0.7), products, math.sqrt(sum_vocabulary(off * off) / n)]
    assert native_sums(logits) == expected


def native_sums(logits: np.ndarray) -> list[float]:
    """What the kernel adds up, compiled here."""
    sums = np.zeros(3)
    scratch = native.huge(layout.sample_scratch_bytes(len(logits)))
    _sums()(logits.ctypes.data, len(logits), scratch.ctypes.data, float(np.nanmax(logits)), sums)
    return sums.tolist()


@cache
def _sums() -> Callable[..., None]:
    from numba import njit

    from edgeinfer.kernels.cpu.native.sampling import vocabulary

    @njit(error_model="numpy")
    def sums(logits, n_vocab, scratch, largest, out):
        out[0] = vocabulary.sum_exp(logits, n_vocab, scratch, largest, 0.7)
        out[1] = vocabulary.sum_products(logits, n_vocab, scratch, largest)
        out[2] = vocabulary.deviation(logits, n_vocab, scratch)[1]

    return sums


@pytest.mark.parametrize("n_vocab", [49_152, 151_936])
@pytest.mark.parametrize(
    "params",
    [
        {}, {"temperature": 0}, {"top_k": 1000}, {"top_k": 60_000, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 0}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"top_k": 0, "typical_p": 0.5},
        {"top_k": 0, "min_p": 0.0, "top_p": 0.999}, {"top_k": 0, "top_n_sigma": 3.0},
        {"mirostat": 1}, {"mirostat": 2}, {"logprobs": 20}, {**WHOLE, "dynatemp_range": 0.5},
        {**WHOLE, "xtc_probability": 1.0},
        {"repeat_penalty": 1.2, "repeat_last_n": -1, "dry_multiplier": 1.0},
    ],
    ids=lambda p: ",".join(p) or "default",
)  # fmt: skip
def test_large_vocabularies(n_vocab, params):
    random = np.random.default_rng(n_vocab)
    logits = random.normal(0, 3, (3, n_vocab)).astype(np.float32)
    logits[1] *= 0.01  # flat: much of the vocabulary must be sorted
    logits[2] = np.sort(np.round(logits[2], 1))  # ascending and full of ties
    history = random.integers(0, n_vocab, 5000).astype(np.int32)
    rows = [SampleRow(SamplingParams(**params), 3, i, history, 12.0) for i in range(3)]
    check(logits, rows)


@pytest.mark.parametrize("family", ["generic", "avx2"])
def test_every_family_gives_the_same(family):
    if native.library().target.family == "generic" and family != "generic":
        pytest.skip(f"this machine has no {family}")
    logits = np.random.default_rng(1).normal(0, 3, (4, 3001)).astype(np.float32)
    for params in ({"logprobs": 5}, {"top_k": 0, "typical_p": 0.9}, {"mirostat": 1}):
        rows = [SampleRow(SamplingParams(**params), 5, i, NONE, 9.0) for i in range(4)]
        check(logits, rows, family)


def test_one_row_does_not_depend_on_the_others():
    random = np.random.default_rng(2)
    logits = random.normal(0, 3, (5, 999)).astype(np.float32)
    params = SamplingParams(repeat_penalty=1.1, logit_bias={3: 1.0})
    rows = [SampleRow(params, i, i, np.arange(i, dtype=np.int32), 1.0) for i in range(5)]
    together = run(logits, rows)
    alone = [run(logits[i : i + 1].copy(), rows[i : i + 1])[0] for i in range(5)]
    assert [s.id for s in together] == [s.id for s in alone]


def test_no_table_does_nothing():
    native.run("sample", native.header(), [0] * 5, range(2))


def test_threads_have_scratch_of_their_own():
    """Two threads at once; ctypes drops the GIL."""
    random = np.random.default_rng(3)
    logits = random.normal(0, 3, (64, 4999)).astype(np.float32)
    table = SampleTable(64)
    rows = [SampleRow(SamplingParams(top_k=0), 1, i, NONE, 1.0) for i in range(64)]
    for i, row in enumerate(rows):
        table.set_row(i, row.params, row.seed, row.index, row.history, row.mu)
    n_bytes = layout.sample_scratch_bytes(4999)
    scratch = native.huge(2 * n_bytes)
    header = native.header(H_SAMPLES=table.address)
    words = [logits.ctypes.data, 4 * 4999, 4999, scratch.ctypes.data, n_bytes]
    native.address("sample")
    threads = [
        threading.Thread(
            target=native.run, args=("sample", header, words, range(i, 64, 2), None, i)
        )
        for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = [sample_reference(line, row).id for line, row in zip(logits, rows, strict=True)]
    assert table.ids.tolist() == want
