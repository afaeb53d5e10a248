"""The device's sampler on the shim: what the reference picks, bit for bit."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.batch import StepLimits
from edgeinfer.kernels.cuda import kernel as kernels
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.samples import MOST_TYPICAL, MOST_WORDS, ROWS_OFFSET, SampleArrays
from edgeinfer.sampling.params import NO_CANDIDATE, ROW, SampleRow, SamplingParams
from edgeinfer.sampling.sampler import _Candidates, sample_reference
from tests.cuda_shim import Floats, rows_in_memory, run, same_bits, step, stride_of
from tests.shim import SEEDS, shim
from tests.test_cpu_sample import VALUES
from tests.test_host_sampler import table_of

NONE = np.zeros(0, np.int32)
# What the device leaves to the host is off.
DEVICE = VALUES | dict(
    dry_multiplier=st.just(0.0), logprobs=st.none(), dry_breaker_tokens=st.just(())
)
PARAMS = st.builds(SamplingParams, **DEVICE)


def arrays_of(rows: list[SampleRow], n_vocab: int) -> SampleArrays:
    n = len(rows)
    arrays = SampleArrays(StepLimits({}, n, n + 1, n, 1), n_vocab)
    table = table_of(rows)
    assert arrays.fits(table, n)
    arrays.fill(table, n)
    return arrays


class Picked:
    """What the device has picked for each row, and a row more that is none of the step's."""

    def __init__(self, logits: Floats, rows: list[SampleRow], seed: int = 0) -> None:
        n, n_vocab = logits.shape
        self.ids, self.status = np.full(n + 1, -1, np.int32), np.full(n + 1, -1, np.int32)
        self.mu = np.full(n + 1, -1.0)
        self.sample(logits, arrays_of(rows, n_vocab), seed)

    def sample(self, logits: Floats, arrays: SampleArrays, seed: int = 0) -> None:
        n, n_vocab = logits.shape
        memory = arrays.memory
        run(
            Kernel("sample"), (1, n + 1), 512, seed=seed, step=step(n, n),
            logits=rows_in_memory(logits), logits_stride=stride_of(n_vocab), n_vocab=n_vocab,
            rows=memory[ROWS_OFFSET:], words=memory[ROWS_OFFSET:].view(np.int32),
            goes_on=memory[:4].view(np.int32), order=np.zeros((n, n_vocab), np.int32),
            ids=self.ids, status=self.status, mu=self.mu,
        )  # fmt: skip
        assert self.ids[n] == self.status[n] == self.mu[n] == -1


def check(logits: Floats, rows: list[SampleRow], seed: int = 0) -> None:
    picked = Picked(logits, rows, seed)
    for i, row in enumerate(rows):
        want = sample_reference(logits[i], row)
        assert (picked.ids[i], picked.status[i]) == (want.id, want.status), row
        same_bits(picked.mu[i : i + 1], np.array([want.mu]))


def rows_of(params: SamplingParams, n: int, seed: int) -> list[SampleRow]:
    random = np.random.default_rng(seed)
    histories = [random.integers(-1, 9, random.integers(0, 90)).astype(np.int32) for _ in range(n)]
    return [
        SampleRow(params, seed, i, histories[i], float(random.uniform(1, 14))) for i in range(n)
    ]


def test_a_row_is_the_tables() -> None:
    text = (Path(kernels.__file__).parent / "sample_row.cuh").read_text("utf-8")
    kinds = {"double": "f8", "long long": "i8"}
    fields = re.findall(r"^    (double|long long) (\w+);", text, re.MULTILINE)
    assert np.dtype([(name, kinds[kind]) for kind, name in fields]) == ROW


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    params=PARAMS,
    n_vocab=st.sampled_from([1, 2, 7, 31, 320, 1000]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 3.0, 10.0, 1e30]),
    round_to=st.sampled_from([None, 0, 1]),
    holes=st.sampled_from([None, math.nan, -math.inf, math.inf]),
    index=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
    threads=st.sampled_from(SEEDS),
)
def test_whatever_is_asked_for_it_gives_the_references_token(
    params: SamplingParams,
    n_vocab: int,
    spread: float,
    round_to: int | None,
    holes: float | None,
    index: int,
    seed: int,
    threads: int,
) -> None:
    random = np.random.default_rng(index)
    logits = random.normal(0, spread, (3, n_vocab)).astype(np.float32)
    if round_to is not None:
        logits = np.round(logits, round_to)
    if holes is not None:
        logits[random.random(logits.shape) < 0.2] = holes
    rows = []
    for i in range(3):
        history = random.integers(-1, 8, random.integers(0, 200)).astype(np.int32)
        rows.append(SampleRow(params, seed, index + i, history, float(random.uniform(1, 14))))
    check(logits, rows, threads)


WHOLE = dict(top_k=0, top_p=1.0, min_p=0.0, temperature=0.9)  # nothing is cut off before
CHAINS: tuple[dict[str, Any], ...] = (
    {}, {"top_k": 40, "typical_p": 0.5}, {"top_k": 3000, "min_p": 1e-3}, {"dynatemp_range": 0.7},
    {"top_n_sigma": 1.0}, {"mirostat": 1}, {"mirostat": 2}, {"top_p": 0.9}, {"top_p": 0.9999},
    {"xtc_probability": 1.0, "xtc_threshold": 1e-4}, {"top_p": 0.95, "top_k": 40, "min_p": 0.05},
)  # fmt: skip


def logits_of(n_vocab: int) -> Floats:
    """Of which some are equal, some are no candidates, and in the last row all are equal."""
    random = np.random.default_rng(n_vocab)
    logits = random.normal(0, 2, (4, n_vocab)).astype(np.float32)
    logits[1, random.random(n_vocab) < 0.1] = -np.inf
    logits[2] = np.round(logits[2])
    logits[3] = -0.0
    return logits


@pytest.mark.parametrize("n_vocab", [4097, 8193])
@pytest.mark.parametrize("params", CHAINS, ids=str)
def test_more_than_is_sorted_or_added_up_at_a_time(params: dict[str, Any], n_vocab: int) -> None:
    check(logits_of(n_vocab), rows_of(SamplingParams(**WHOLE | params), 4, n_vocab))


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.5}, {"top_p": 0.0}, {"top_p": 0.0, "min_keep": 3},
        {"min_p": 1.0, "min_keep": 2}, {"xtc_probability": 0.5, "xtc_threshold": 0.1},
        {"xtc_probability": 1.0, "xtc_threshold": 0.1, "min_keep": 7}, {"dynatemp_range": 0.9},
        {"typical_p": 0.3}, {"typical_p": 0.3, "min_keep": 5}, {"temperature": 50.0},
    ],
    ids=str,
)  # fmt: skip
def test_where_a_chain_cuts(params: dict[str, Any]) -> None:
    """All tokens are as likely in half of the rows, so that a share may be met exactly."""
    logits = np.random.default_rng(2).normal(0, 1, (24, 8)).astype(np.float32)
    logits[:12] = 1.5
    check(logits, rows_of(SamplingParams(**WHOLE | {"seed": 1} | params), 24, 3))


SUMS = """#include "candidates.cuh"
EI_KERNEL(512, 1) sums(const Step* step, float* logits, int n_vocab, int* order, double* out) {
    EI_SHARED(SampleRoom, room, [1]);
    Candidates c = open_candidates(logits, n_vocab, order, room);
    for (int i = 0; i < 2; ++i) {
        const double sum = sum_candidates(c, [&](double x) {
            return exp_double((x - c.largest) * 0.7);
        });
        out[i] = sum;
        keep(c, c.n);
    }
}
"""


@pytest.mark.parametrize("n_vocab", [1, 7, 4097, 8193, 270_000])
def test_sums_have_the_bits_of_the_references(n_vocab: int, tmp_path: Path) -> None:
    """What is sampled rarely shows the last bits of a sum."""
    (tmp_path / "sums.cu").write_text(SUMS)
    random = np.random.default_rng(n_vocab)
    logits = random.normal(0, 3, n_vocab).astype(np.float32)
    logits[random.random(n_vocab) < 0.1] = -np.inf
    logits[0] = 15.0
    c, out = _Candidates(logits), np.zeros(2)
    run(
        Kernel("sums"), (1,), 512, device=shim(sources=[tmp_path]), step=step(1), logits=logits,
        n_vocab=n_vocab, order=np.zeros(n_vocab, np.int32), out=out,
    )  # fmt: skip
    expected = [c.total(0.7)]
    c.keep(c.ids)
    expected.append(c.total(0.7))
    assert out.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("params", CHAINS, ids=str)
def test_a_large_vocabulary(params: dict[str, Any]) -> None:
    check(logits_of(151_936), rows_of(SamplingParams(**WHOLE | params), 4, 3))


def test_without_candidates_there_is_no_token() -> None:
    logits = np.full((3, 40), -np.inf, np.float32)
    logits[1] = np.nan
    logits[2, 7] = 1.0
    bias = {7: -math.inf}
    for params in ({}, {"temperature": 0.0}, {"mirostat": 1}, {"mirostat": 2}):
        rows = rows_of(SamplingParams(**params, logit_bias=bias), 3, 1)
        assert Picked(logits, rows).status[:3].tolist() == [NO_CANDIDATE] * 3
        check(logits, rows)


@pytest.mark.parametrize(
    "params",
    [
        {"mirostat": 2},
        {"frequency_penalty": 0.9, "repeat_last_n": 4},
        {"presence_penalty": 2.0, "repeat_last_n": -1, "logit_bias": {3: 5.0}},
        {"temperature": 0.0, "repeat_penalty": 3.0},
    ],
    ids=str,
)
def test_a_step_goes_on_from_what_the_one_before_has_picked(params: dict[str, Any]) -> None:
    """Without anybody telling it the tokens; and what it says is what that step would say."""
    n, n_vocab = 40, 12
    logits = np.random.default_rng(1).normal(0, 1, (2, n, n_vocab)).astype(np.float32)
    rows = rows_of(SamplingParams(**params), n, 5)
    picked, arrays = Picked(logits[0], rows), arrays_of(rows, n_vocab)
    arrays.go_on(table_of(rows), n)
    before = picked.ids[:n].copy(), picked.mu[:n].copy()
    after = [
        SampleRow(row.params, row.seed, row.index + 1, history, mu)
        for row, token, mu in zip(rows, *(each.tolist() for each in before), strict=True)
        for history in [np.append(row.history, np.int32(token))]
    ]
    picked.sample(logits[1], arrays)
    for i, row in enumerate(after):
        want = sample_reference(logits[1, i], row)
        assert (picked.ids[i], picked.mu[i]) == (want.id, want.mu)
    assert not arrays.says_the_same(arrays_of(after, n_vocab))
    arrays.set_picked(*before)
    assert arrays.says_the_same(arrays_of(after, n_vocab))
    changes: list[dict[str, Any]] = [dict(index=9), dict(seed=9), dict(mu=9.5)]
    changes += [dict(history=after[1].history)] * (after[0].params.n_history != 0)
    for change in changes:
        other = [replace(after[0], **change), *after[1:]]
        assert not arrays.says_the_same(arrays_of(other, n_vocab)), change


# -- what is left to the host --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "n_history", "fits"),
    [
        ({}, 0, True),
        ({"dry_multiplier": 0.8}, 9, False),
        ({"logprobs": 0}, 0, False),
        ({"typical_p": 0.5, "top_k": MOST_TYPICAL}, 0, True),
        ({"typical_p": 0.5, "top_k": 0}, 0, False),
        ({"typical_p": 0.5, "top_k": 0, "mirostat": 2}, 0, True),
        ({"presence_penalty": 1.0, "repeat_last_n": -1}, MOST_WORDS - 1, True),
        ({"presence_penalty": 1.0, "repeat_last_n": -1}, MOST_WORDS, False),
        ({"logit_bias": {token: 1.0 for token in range(MOST_WORDS // 2)}}, 0, False),
    ],
    ids=range(9),
)
def test_a_row_is_the_devices_or_the_hosts(
    params: dict[str, Any], n_history: int, fits: bool
) -> None:
    plain = SampleRow(SamplingParams(temperature=0.0), 1, 2, NONE, 0.0)
    row = SampleRow(SamplingParams(**params), 1, 2, np.zeros(n_history, np.int32), 1.0)
    arrays = SampleArrays(StepLimits({}, 2, 2, 2, 1), 5000)
    assert arrays.fits(table_of([plain]), 1)
    assert arrays.fits(table_of([row]), 1) == fits
    if not fits:
        assert not arrays.fits(table_of([plain, row]), 2)
    elif n_history:
        arrays.go_on(table_of([row]), 1)
        assert len(arrays.memory) - arrays.n_bytes == ROW.itemsize  # a row more has room
