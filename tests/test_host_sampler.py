"""Sampling in host memory: with no program there, the ids of a CPU program and of the reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer import backend, platform
from edgeinfer.batch import Sampler
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cpu.host_sampler import HostSampler
from edgeinfer.kernels.cpu.program import CpuProgram
from edgeinfer.model import Model
from edgeinfer.sampling.params import SampleRow, SampleTable, SamplingParams
from edgeinfer.sampling.sampler import ReferenceSampler

from .models_for_tests import tiny_model
from .test_cpu_program import IDS, batch_of, cpu
from .test_cpu_sample import PARAMS

N_VOCAB = 300


def table_of(rows: list[SampleRow]) -> SampleTable:
    table = SampleTable(len(rows))
    for i, row in enumerate(rows):
        table.set_row(i, row.params, row.seed, row.index, row.history, row.mu)
    return table


def check_equal(ours: SampleTable, theirs: SampleTable) -> None:
    for name in ("ids", "status", "mu", "logprobs"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    for i in range(ours.n_rows):
        np.testing.assert_array_equal(ours.top(i), theirs.top(i))


def rows_of(params: list[SamplingParams], seed: int) -> list[SampleRow]:
    random = np.random.default_rng(seed)
    return [
        SampleRow(each, seed, i, random.integers(0, 9, 40).astype(np.int32), 8.0)
        for i, each in enumerate(params)
    ]


@pytest.fixture(scope="module")
def sampler() -> Iterator[Sampler]:
    opened = backend.host_sampler(N_VOCAB, 2)
    assert isinstance(opened, HostSampler)
    opened.open()
    yield opened
    opened.close()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(params=st.lists(PARAMS, min_size=1, max_size=5), seed=st.integers(0, 2**20))
def test_whatever_is_asked_for_it_gives_the_references_tokens(
    sampler: HostSampler, params: list[SamplingParams], seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (len(params), N_VOCAB)).astype(np.float32)
    before, rows = logits.copy(), rows_of(params, seed)
    ours, theirs = table_of(rows), table_of(rows)
    sampler.sample(logits, ours)
    ReferenceSampler().sample(before, theirs)
    check_equal(ours, theirs)
    np.testing.assert_array_equal(logits, before)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuProgram]:
    with GGUFFile.open(tiny_model(tmp_path_factory.mktemp("model"), quant="Q4_0")) as file:
        with cpu(Model.load(file).graph.segment()) as opened:
            yield opened


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(params=st.lists(PARAMS, min_size=5, max_size=5), seed=st.integers(0, 2**20))
def test_it_samples_as_a_program_does(
    program: CpuProgram, params: list[SamplingParams], seed: int
) -> None:
    rows = rows_of(params, seed)
    step = batch_of(IDS[:5], output="ids")
    step.samples = table_of(rows)
    ids = program.submit(step).wait().ids.copy()
    logits = program.submit(batch_of(IDS[:5])).wait().logits
    ours = HostSampler(program._backend.library, logits.shape[1], 1)
    ours.open()
    table = table_of(rows)
    ours.sample(logits, table)
    ours.close()
    check_equal(table, step.samples)
    assert table.ids.tolist() == ids.tolist()


def test_rows_may_lie_apart_and_elsewhere_each_time(sampler: HostSampler) -> None:
    wide = np.random.default_rng(2).normal(0, 3, (6, N_VOCAB + 20)).astype(np.float32)
    rows = rows_of([SamplingParams(top_k=0)] * 6, 3)
    expected = table_of(rows)
    ReferenceSampler().sample(wide[:, :N_VOCAB], expected)
    for logits in (wide[:, :N_VOCAB], wide[:, :N_VOCAB].copy(), wide[:, :N_VOCAB]):
        table = table_of(rows)
        sampler.sample(logits, table)
        assert table.ids.tolist() == expected.ids.tolist()
    first = table_of(rows)
    first.ids[:] = -1
    sampler.sample(wide[:2, :N_VOCAB], first)
    assert first.ids.tolist() == [*expected.ids[:2].tolist(), *[-1] * 4]


def test_it_takes_what_it_says_from_open_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[platform.Memory] = []

    class Counted(platform.Memory):
        def __init__(self, n_bytes: int) -> None:
            super().__init__(n_bytes)
            taken.append(self)

    sampler = backend.host_sampler(N_VOCAB, 3)
    wider = backend.host_sampler(N_VOCAB, 4)
    assert 0 < 4 * sampler.n_bytes == 3 * wider.n_bytes
    monkeypatch.setattr(platform, "Memory", Counted)
    sampler.open()
    scratch, tape = (memory.n_bytes for memory in taken)
    assert scratch == sampler.n_bytes and tape < 1024
    sampler.close()
    sampler.close()


def test_without_llvm_numpy_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    sampler = backend.host_sampler(N_VOCAB, 2)
    assert isinstance(sampler, ReferenceSampler) and sampler.n_bytes == 0
    sampler.open()
    table = table_of(rows_of([SamplingParams(temperature=0)], 1))
    sampler.sample(np.arange(N_VOCAB, dtype=np.float32)[None], table)
    sampler.close()
    assert table.ids.tolist() == [N_VOCAB - 1]


def test_it_needs_no_program() -> None:
    code = """
import sys
import numpy as np
from edgeinfer import backend
from edgeinfer.sampling.params import SampleTable, SamplingParams
table = SampleTable(1)
table.set_row(0, SamplingParams(temperature=0.0), 1, 0)
sampler = backend.host_sampler(300, 1)
sampler.open()
sampler.sample(np.arange(300, dtype=np.float32)[None], table)
print(table.ids[0], "edgeinfer.kernels.cpu.program" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["299", "False"]
