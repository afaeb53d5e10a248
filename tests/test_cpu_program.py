"""The CPU backend as a whole, against the reference: every type, every cut of the work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import Batch, PageTable, StepLimits
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.kernels.cpu.program import CpuBackend, CpuProgram
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model

from .models_for_tests import tiny_model
from .native import cache_root

IDS = [3, 141, 59, 26, 5, 35, 89, 79, 32, 38, 46]
LIMITS = StepLimits(n_pages={0: 8}, max_rows=16, max_outputs=16, max_sequences=4, n_threads=2)
TYPES = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "Q4_K_M", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip


def batch_of(
    ids: list[int],
    pos: int = 0,
    pages: tuple[int, ...] = (0, 1, 2, 3),
    output: str = "logits",
    n_groups: int = 1,
) -> Batch:
    """One sequence's rows at `pos`, every output wanted."""
    n = len(ids)
    return Batch(
        ids=np.array(ids, np.int32),
        pos=np.arange(pos, pos + n, dtype=np.int64),
        seq=np.zeros(n, np.int32),
        tables=[(PageTable(np.array(pages, np.int32), 0, len(pages)),) * n_groups],
        wanted=np.arange(n, dtype=np.int32),
        output=output,  # type: ignore[arg-type]
    )


def cpu(segment: Segment, n_threads: int = 2, isa: str | None = None) -> CpuProgram:
    limits = LIMITS._replace(n_threads=n_threads)
    return CpuBackend(cache_root(), isa=isa).compile(segment, limits)


def logits(segment: Segment, ids: list[int], **options: object) -> NDArray[np.float32]:
    with cpu(segment, **options) as program:  # type: ignore[arg-type]
        return program.submit(batch_of(ids)).wait().logits.copy()


@pytest.fixture(params=TYPES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Model]:
    """A random 4-layer model of width 512."""
    path = tiny_model(
        tmp_path, quant=request.param, n_layers=4, dim=512, n_heads=8, n_kv_heads=2, ffn_dim=1024
    )
    with GGUFFile.open(path) as file:
        yield Model.load(file)


def test_logits_are_the_references(model: Model) -> None:
    segment = model.graph.segment()
    ours = logits(segment, IDS)
    for mode, tolerance in (("quantised", 1e-5), ("exact", 0.02)):
        with ReferenceBackend().compile(segment, LIMITS, mode=mode) as program:
            theirs = program.submit(batch_of(IDS)).wait().logits
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= tolerance, f"{mode}: {error:.2e}"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Model]:
    path = tiny_model(tmp_path, arch="qwen3", quant="Q4_0", qk_norm=True)
    with GGUFFile.open(path) as file:
        yield Model.load(file)


@pytest.mark.parametrize(
    "options", [{"n_threads": 1}, {"n_threads": 3}, {"isa": "avx2"}, {"isa": "generic"}]
)
def test_bits_do_not_depend_on_threads_or_instruction_set(
    small: Model, options: dict[str, object]
) -> None:
    segment = small.graph.segment()
    assert np.array_equal(logits(segment, IDS), logits(segment, IDS, **options))


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_bits_do_not_depend_on_chunks(small: Model, chunk: int) -> None:
    segment = small.graph.segment()
    whole = logits(segment, IDS)
    with cpu(segment) as program:
        rows = [
            program.submit(batch_of(IDS[i : i + chunk], i)).wait().logits.copy()
            for i in range(0, len(IDS), chunk)
        ]
    assert np.array_equal(np.concatenate(rows), whole)


def test_segments_joined_by_hidden_rows_equal_the_whole(small: Model) -> None:
    whole = logits(small.graph.segment(), IDS)
    with cpu(small.graph.segment(0, 1)) as first, cpu(small.graph.segment(1, 2)) as second:
        batch = batch_of(IDS)
        batch.hidden = first.submit(batch_of(IDS, output="hidden")).wait().hidden
        assert np.array_equal(second.submit(batch).wait().logits, whole)


def test_hidden_rows_are_what_the_head_reads(small: Model) -> None:
    segment = small.graph.segment()
    with cpu(segment) as ours, ReferenceBackend().compile(segment, LIMITS, mode="quantised") as ref:
        batch = batch_of(IDS, output="hidden")
        batch.wanted = np.array([2, 9], np.int32)
        a, b = ours.submit(batch).wait().hidden, ref.submit(batch).wait().hidden
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_aborted_step_says_so_and_the_next_one_is_right(small: Model) -> None:
    segment = small.graph.segment()
    whole = logits(segment, IDS)
    with cpu(segment) as program:
        ticket = program.submit(batch_of(IDS))
        ticket.abort()
        assert ticket.wait().aborted
        again = program.submit(batch_of(IDS)).wait()
        assert not again.aborted
        assert np.array_equal(again.logits, whole)


def test_memory_is_what_was_promised(small: Model) -> None:
    with cpu(small.graph.segment()) as program:
        kv = 2 * 2 * sum(c.n_heads * c.k_dim for c in program.segment.caches.values())
        assert program.memory["KV cache"] == LIMITS.n_pages[0] * 32 * kv
        assert sum(program.memory.values()) < 4 << 20
