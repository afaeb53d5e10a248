"""The CUDA backend as a whole, on the shim: the reference's bits, whatever graph and step."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from edgeinfer.batch import Batch, PageTable, StepLimits, StepRequest
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import KVType, Route, Segment
from edgeinfer.kernels.cuda.backend import CudaBackend
from edgeinfer.kernels.cuda.program import CudaProgram
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model
from edgeinfer.sampling.params import SampleTable, SamplingParams
from edgeinfer.sampling.sampler import ReferenceSampler

from . import test_graphs
from .backends import IDS, LIMITS, batch_of
from .models_for_tests import tiny_model
from .random_graphs import MODELS, TYPED_MODELS, Drawn, RandomGraph, Recorder
from .shim import shim


@cache
def backend() -> CudaBackend:
    device = shim(runs_at_once=False)
    return CudaBackend(device, "shim:0", lambda n_vocab, n_threads: ReferenceSampler())


def cuda(segment: Segment, limits: StepLimits = LIMITS) -> CudaProgram:
    return backend().compile(segment, limits)


def check_drawn(drawn: Drawn) -> None:
    segment = Recorder(drawn).segment()
    n_groups, limits = len(segment.groups), test_graphs.limits(segment)
    with ReferenceBackend().compile(segment, limits, mode="quantised") as reference:
        expected = test_graphs.results(reference, drawn.n_prompt, n_groups)
    with cuda(segment, limits) as program:
        ours = test_graphs.results(program, drawn.n_prompt, n_groups)
    for rows, theirs in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(rows, theirs)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(MODELS)
def test_every_graph_has_the_references_bits(drawn: Drawn) -> None:
    check_drawn(drawn)


@settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(TYPED_MODELS)
def test_every_graph_has_them_over_caches_in_blocks(drawn: Drawn) -> None:
    check_drawn(drawn)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(MODELS | TYPED_MODELS)
def test_many_graphs_have_the_references_bits(drawn: Drawn) -> None:
    check_drawn(drawn)


@pytest.fixture
def segment(tmp_path: Path) -> Any:
    path = tiny_model(tmp_path, arch="qwen3", quant="Q4_0", qk_norm=True)
    with GGUFFile.open(path) as file:
        yield Model.load(file).graph.segment()


def test_steps_of_few_and_of_many_rows_have_the_same_bits(segment: Segment) -> None:
    """Attention is another kernel from 17 rows on, and in parts below."""
    limits = LIMITS._replace(max_rows=64, max_outputs=64)
    ids = (IDS * 4)[:40]
    with ReferenceBackend().compile(segment, limits, mode="quantised") as reference:
        expected = reference.submit(batch_of(ids)).wait().logits
    for chunk in (1, 7, 16, 17, 40):
        with cuda(segment, limits) as program:
            steps = [batch_of(ids[i : i + chunk], i) for i in range(0, len(ids), chunk)]
            rows = [program.submit(step).wait().logits.copy() for step in steps]
        np.testing.assert_array_equal(np.concatenate(rows), expected)


# Of a GPU its architecture, the most shared memory of a block, and an order of its threads.
GPUS = {"Pascal": (61, 48, 1), "Turing": (75, 64, 7), "Orin": (87, 163, 1)}


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_the_same_bits(segment: Segment, gpu: str) -> None:
    """Each takes other kernels, by how many rows there are."""
    arch, shared_kb, seed = GPUS[gpu]
    device = shim(arch=arch, shared_bytes=shared_kb << 10, seed=seed, runs_at_once=False)
    machine = CudaBackend(device, "shim:0", lambda n_vocab, n_threads: ReferenceSampler())
    limits = LIMITS._replace(max_rows=64, max_outputs=64)
    ids, at = (IDS * 7)[:71], 0
    with ReferenceBackend().compile(segment, limits, mode="quantised") as reference:
        first = reference.submit(batch_of(ids[:64])).wait().logits
        expected = np.concatenate([first, reference.submit(batch_of(ids[64:], 64)).wait().logits])
    with machine.compile(segment, limits) as program:
        for chunk in (1, 2, 3, 4, 5, 9, 16, 31):
            logits = program.submit(batch_of(ids[at : at + chunk], at)).wait().logits
            np.testing.assert_array_equal(logits, expected[at : at + chunk])
            at += chunk
        launches = program._lowered.launches
    tensor_cores = [
        n
        for n in (2, 3, 4, 5)
        if any(each.takes(n) and each.kernel.name == "matmul_mma" for each in launches)
    ]
    assert tensor_cores == {"Pascal": [], "Turing": [5], "Orin": [3, 4, 5]}[gpu]
    device.close()


def test_what_no_block_of_threads_has_room_for_is_refused() -> None:
    """A choice among more experts than fit into the shared memory of this GPU."""
    g = RandomGraph(1)
    x = g.embed()
    for blk in g.layers():
        h = g.rms_norm(x, f"{blk}.norm")
        scores = g.linear(h, f"{blk}.gate", 5000)
        route = g._record(
            Route, 4, x=scores, gating="softmax", n_used=2, bias=None, n_groups=1,
            n_groups_used=1, norm=False, scale=1.0,
        )  # fmt: skip
        x = g.layer_output(x + g.linear(route, f"{blk}.out", 32))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))
    request, make = StepRequest(64, 1, 1), lambda n_vocab, n_threads: ReferenceSampler()
    for shared_kb, fits in ((99, True), (48, False)):
        device = shim(shared_bytes=shared_kb << 10)
        machine = CudaBackend(device, "shim:0", make)
        if fits:
            assert machine.demand(g.segment(), request).memories
            continue
        with pytest.raises(UnsupportedModelError, match="kernel route.* 60004 bytes .* 49152; run"):
            machine.demand(g.segment(), request)


TYPES: list[tuple[KVType, KVType]] = [("q8_0", "q8_0"), ("q4_0", "q4_0")]


@pytest.mark.parametrize("types", TYPES)
def test_caches_in_blocks_have_the_references_bits(
    types: tuple[KVType, KVType], tmp_path: Path
) -> None:
    """Heads of 64, which are transformed; of a table that slides, in steps of few and many rows."""
    path = tiny_model(tmp_path, dim=128, n_heads=2, n_kv_heads=1, quant="Q4_0")
    limits, ids = LIMITS._replace(max_rows=64, max_outputs=64), [7 * i % 300 for i in range(170)]
    with GGUFFile.open(path) as file:
        segment, rows = Model.load(file).graph.segment(kv_types=types), []
        for machine in (backend(), ReferenceBackend()):
            mode = {} if isinstance(machine, CudaBackend) else {"mode": "quantised"}
            with machine.compile(segment, limits, **mode) as program:
                found, at = [], 0
                for chunk in (1, 7, 40, 64, 16, 1, 41):
                    step = batch_of(ids[at : at + chunk], at)
                    step.tables = [(PageTable(np.array([2, 5, 0, 7], np.int32), 1, 2),)]
                    found.append(program.submit(step).wait().logits.copy())
                    at += chunk
                rows.append(np.concatenate(found))
    np.testing.assert_array_equal(rows[0], rows[1])


def test_rows_of_sequences_side_by_side_are_those_of_each_alone(segment: Segment) -> None:
    alone, tables = [], []
    for i in range(3):
        with cuda(segment) as program:
            alone.append(program.submit(batch_of(IDS[i : i + 4])).wait().logits.copy())
        tables.append((PageTable(np.array([2 * i, 2 * i + 1], np.int32), 0, 2),))
    order = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    batch = Batch(
        ids=np.array([IDS[i + j] for i in range(3) for j in range(4)], np.int32),
        pos=np.array([0, 1, 2, 3] * 3, np.int64),
        seq=np.array(order, np.int32),
        tables=tables,
        wanted=np.arange(12, dtype=np.int32),
    )
    with cuda(segment) as program:
        np.testing.assert_array_equal(program.submit(batch).wait().logits, np.concatenate(alone))


def test_an_aborted_step_says_so_and_the_next_one_is_right(segment: Segment) -> None:
    with cuda(segment) as program:
        whole = program.submit(batch_of(IDS)).wait().logits.copy()
        ticket = program.submit(batch_of(IDS))
        ticket.abort()
        assert ticket.wait().aborted
        again = program.submit(batch_of(IDS)).wait()
        assert not again.aborted
        np.testing.assert_array_equal(again.logits, whole)


def test_a_plan_is_what_a_program_reserves(segment: Segment) -> None:
    before = backend().device.memory()[0]
    with cuda(segment) as program:
        assert before - backend().device.memory()[0] == sum(program.memory["shim:0"].values())
    assert backend().device.memory()[0] == before


def test_nothing_is_begun_ahead_where_rows_come_from_another_machine(segment: Segment) -> None:
    """The next rows are not known there, even where the next token is."""
    last = segment.graph.segment(1, segment.graph.hparams.n_layers)
    rng, params = np.random.default_rng(0), SamplingParams(temperature=0.0)
    hidden = rng.standard_normal((8, segment.graph.hparams.dim)).astype(np.float32)
    tokens = []
    reference = ReferenceBackend(ReferenceSampler()).compile(last, LIMITS, mode="quantised")
    for each in (cuda(last), reference):
        with each as program:
            picked, table = [], SampleTable(1)
            for pos in range(8):
                table.clear()
                table.set_row(0, params, 1, pos)
                batch = batch_of([7], pos, output="ids")
                batch.hidden, batch.samples = hidden[pos : pos + 1], table
                picked.append(int(program.submit(batch).wait().ids[0]))
                if isinstance(program, CudaProgram):
                    assert program._guess is None
            tokens.append(picked)
    assert tokens[0] == tokens[1]
