"""Whatever graph is recorded: the CPU has the reference's bits, or an error names what it lacks."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

from edgeinfer import fused_ops, fusion
from edgeinfer.batch import Batch, OutputKind, PageTable, StepLimits
from edgeinfer.graph import Segment
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.reference import ReferenceBackend

from .native import cache_root
from .random_graphs import MODELS, ROPES, TYPED_MODELS, Drawn, RandomGraph, Recorder

# Page 0 stays and is read by a query that is rotated for it, once page 3 has come after it.
TABLES = [PageTable(np.array(pages, np.int32), 1, 1) for pages in ([2, 0], [0, 1], [1, 2])]


def limits(segment: Segment) -> StepLimits:
    n_pages = {window: 3 for window in segment.groups}
    return StepLimits(n_pages, max_rows=8, max_outputs=8, max_sequences=2, n_threads=2, n_states=4)


def batch(
    n: int,
    pos: int,
    wanted: list[int],
    n_groups: int,
    output: OutputKind = "logits",
    state: int = -1,
    kept: Sequence[int] = (),
) -> Batch:
    """Rows that start from a state; those behind the first rows are kept in slots."""
    return Batch(
        ids=(np.arange(n, dtype=np.int32) * 7 + pos) % 40,
        pos=np.arange(pos, pos + n, dtype=np.int64),
        seq=np.zeros(n, np.int32),
        tables=[tuple(TABLES[:n_groups])],
        wanted=np.array(wanted, np.int32),
        output=output,
        states=np.array([state], np.int32),
        kept=np.array([*kept[:n], *[-1] * (n - len(kept))], np.int32),
    )


def results(program: Any, n_prompt: int, n_groups: int) -> list[NDArray[np.float32]]:
    """Of a prompt, of rows behind a gap of two pages, and the hidden rows of a token more.

    States go on from the prompt's first row, or its second, and from the second of the three.
    """
    steps = [
        batch(n_prompt, 0, sorted({0, n_prompt - 1}), n_groups, kept=[0, 1]),
        batch(3, 96, [0, 2], n_groups, state=min(n_prompt - 1, 1), kept=[2, 3]),
        batch(1, 99, [0], n_groups, "hidden", 3),
    ]
    rows = [program.submit(step).wait().logits.copy() for step in steps[:2]]
    return [*rows, program.submit(steps[2]).wait().hidden.copy()]


@cache
def backend() -> CpuBackend:
    return CpuBackend(cache_root())


def check(segment: Segment, n_prompt: int = 5) -> None:
    n_groups = len(segment.groups)
    with ReferenceBackend().compile(segment, limits(segment), mode="quantised") as reference:
        expected = results(reference, n_prompt, n_groups)
    with backend().compile(segment, limits(segment)) as program:
        # Whoever reads what was never written gets NaN.
        ctypes.memset(program._scratch.address, 0xFF, program._scratch.n_bytes)
        for ours, theirs in zip(results(program, n_prompt, n_groups), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_rotation_needs_no_attention_beside_it() -> None:
    """A segment without attention has no page tables."""
    g = RandomGraph(2)
    x = g.embed()
    for _ in g.layers():
        x = g.layer_output(x + g.rotate(x, 2, ROPES[1]))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))
    assert not g.segment().groups
    check(g.segment())


SEEN: Counter[type] = Counter()


def check_drawn(drawn: Drawn) -> None:
    segment = Recorder(drawn).segment()
    SEEN.update(set(map(type, fusion.fuse(segment))))
    check(segment, drawn.n_prompt)


SETTINGS: dict[str, Any] = dict(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def test_any_graph_gives_the_references_bits() -> None:
    SEEN.clear()
    # These see all steps and kernels that 500 do.
    settings(max_examples=250, **SETTINGS)(given(MODELS)(check_drawn))()
    assert set(get_args(fused_ops.Step)) == set(SEEN)


@settings(max_examples=60, **SETTINGS)
@given(TYPED_MODELS)
def test_any_graph_of_caches_in_blocks_gives_the_references_bits(drawn: Drawn) -> None:
    check_drawn(drawn)


@pytest.mark.slow
@settings(max_examples=20_000, **{**SETTINGS, "derandomize": False})
@given(MODELS)
def test_thousands_of_graphs_give_the_references_bits(drawn: Drawn) -> None:
    check_drawn(drawn)
