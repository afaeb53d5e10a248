"""The device's sampler on the shim: what the reference picks, bit for bit."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.batch import StepLimits
from edgeinfer.kernels.cuda import kernel as kernels
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.samples import SampleArrays
from edgeinfer.sampling.params import ROW, SampleRow, SamplingParams
from edgeinfer.sampling.sampler import sample_reference
from tests.cuda_shim import Floats, rows_in_memory, run, same_bits, step, stride_of
from tests.shim import SEEDS
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
        memory, rows_at, words_at = arrays.memory, arrays.rows_offset, arrays.words_offset
        run(
            Kernel("sample"), (1, n + 1), 512, seed=seed, step=step(n, n),
            logits=rows_in_memory(logits), logits_stride=stride_of(n_vocab), n_vocab=n_vocab,
            rows=memory[rows_at:words_at], words=memory[words_at:].view(np.int32),
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


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
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
