"""Pages of a program's cache, copied and carried to another one: the bits stay what they were."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import PageTable, StepLimits
from edgeinfer.errors import ClosedError
from edgeinfer.graph import KV, KVType, Segment, Value
from edgeinfer.sampling.params import SampleTable, SamplingParams

from .backends import BACKENDS, LIMITS, WHOLE, backend, batch_of
from .random_graphs import HEADS, ROPES, RandomGraph

N_PAGES = {0: 8, 40: 7}
PROMPT = [7 * i % 40 for i in range(45)]  # a full page and a part of the next
NEXT = [3, 9, 27]
PAGES = ([2, 5, 0], [6, 1, 3])  # by group
COPIES = ([7, 3, 4], [0, 2, 5])


@pytest.fixture(scope="module")
def segment() -> Segment:
    return recorded("f16")


def recorded(kind: KVType) -> Segment:
    """Four layers whose caches differ in all that caches differ in; the last has another's."""
    g, (k_dim, v_dim) = RandomGraph(n_layers=4), HEADS[1]
    caches = [
        KV(2, k_dim, v_dim, window=40),
        KV(1, k_dim, v_dim),
        KV(1, 8, 8, k_is_v=True),
        KV(1, 8, 8, k_is_v=True),
    ]
    x = g.embed()
    for blk, cache in zip(g.layers(), caches, strict=True):
        x = g.layer_output(x + attention(g, x, blk, cache))
    g.head(g.select_rows(g.rms_norm(x, "output_norm")))
    return g.segment(kv_types=(kind, kind))


def attention(g: RandomGraph, x: Value, blk: str, cache: KV) -> Value:
    q = g.rotate(g.linear(x, f"{blk}.q", 2 * cache.k_dim), 2, ROPES[0])
    if blk == "blk.3":
        return g.linear(g.attention(q, cache=cache, source=2), f"{blk}.o", x.dim)
    n = cache.n_heads
    k = g.rotate(g.linear(x, f"{blk}.k", n * cache.k_dim), n, ROPES[0])
    v = None if cache.k_is_v else g.linear(x, f"{blk}.v", n * cache.v_dim)
    return g.linear(g.attention(q, k, v, cache=cache), f"{blk}.o", x.dim)


@pytest.fixture(scope="module")
def limits() -> StepLimits:
    return LIMITS._replace(n_pages=N_PAGES)


@pytest.fixture(scope="module")
def expected(segment: Segment, limits: StepLimits) -> NDArray[np.float32]:
    with backend("reference").compile(segment, limits) as law:
        read_prompt(law)
        return go_on(law, PAGES)


@pytest.fixture(params=BACKENDS)
def machine(request: pytest.FixtureRequest) -> Any:
    return backend(request.param)


@pytest.fixture
def program(machine: Any, segment: Segment, limits: StepLimits) -> Iterator[Any]:
    with machine.compile(segment, limits) as program:
        read_prompt(program)
        yield program


def step(ids: list[int], pos: int, pages: Any) -> Any:
    batch = batch_of(ids, pos)
    batch.tables = [
        tuple(PageTable(np.array(each, np.int32), 0, len(each)) for each in pages),
    ]
    return batch


def read_prompt(program: Any) -> None:
    for start in range(0, len(PROMPT), 15):
        program.submit(step(PROMPT[start : start + 15], start, PAGES)).wait()


def go_on(program: Any, pages: Any) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = program.submit(step(NEXT, len(PROMPT), pages)).wait().logits
    return logits.copy()


def test_pages_that_were_copied_are_read_as_the_others(
    program: Any, expected: NDArray[np.float32]
) -> None:
    for group in (0, 1):
        program.copy_pages(group, PAGES[group][:2], COPIES[group][:2])
    np.testing.assert_array_equal(go_on(program, COPIES), expected)
    np.testing.assert_array_equal(go_on(program, PAGES), expected)


def test_pages_of_one_group_alone_are_copied(program: Any, expected: NDArray[np.float32]) -> None:
    program.copy_pages(0, PAGES[0][:2], COPIES[0][:2])
    np.testing.assert_array_equal(go_on(program, (COPIES[0], PAGES[1])), expected)
    assert not np.array_equal(go_on(program, COPIES), expected)


def test_pages_go_on_in_another_program(
    program: Any, machine: Any, segment: Segment, limits: StepLimits, expected: NDArray[np.float32]
) -> None:
    """Also where they lie elsewhere, and whatever becomes of the first program."""
    saved = [program.read_pages(group, PAGES[group][:2]) for group in (0, 1)]
    layout = program.cache_layout
    for group in (0, 1):
        program.write_pages(group, PAGES[group][:2], np.zeros_like(saved[group]))
    assert not np.array_equal(go_on(program, PAGES), expected)
    with machine.compile(segment, limits) as other:
        assert other.cache_layout == layout
        for group in (0, 1):
            other.write_pages(group, COPIES[group][:2], saved[group])
            again = other.read_pages(group, COPIES[group][:2])
            np.testing.assert_array_equal(again, saved[group])
        np.testing.assert_array_equal(go_on(other, COPIES), expected)


def test_pages_in_blocks_go_on_elsewhere_and_nowhere_else(
    machine: Any, segment: Segment, limits: StepLimits
) -> None:
    blocks = recorded("q4_0")
    with backend("reference").compile(blocks, limits) as law:
        read_prompt(law)
        expected = go_on(law, PAGES)
    with machine.compile(blocks, limits) as program, machine.compile(segment, limits) as halves:
        read_prompt(program)
        for group in (0, 1):
            saved = program.read_pages(group, PAGES[group][:2])
            program.write_pages(group, COPIES[group][:2], saved)
            with pytest.raises(ValueError, match="must be"):
                halves.write_pages(group, COPIES[group][:2], saved)
        np.testing.assert_array_equal(go_on(program, COPIES), expected)
        assert program.cache_layout != halves.cache_layout


def test_a_wrong_number_of_bytes_is_an_error_and_nothing_is_written(program: Any) -> None:
    before = program.read_pages(0, [2, 5])
    wrong = before[:, :-1], before[:1], before.reshape(-1), before.astype(np.float32)
    for data in wrong:
        with pytest.raises(ValueError, match="must be"):
            program.write_pages(0, [2, 5], data)
    with pytest.raises(ValueError, match="must be"):
        program.write_states([], np.zeros((0, 1), np.uint8))
    np.testing.assert_array_equal(program.read_pages(0, [2, 5]), before)


def test_pages_that_are_not_there_are_an_error(program: Any) -> None:
    for numbers in ([8], [-1]):
        with pytest.raises(AssertionError):
            program.read_pages(0, numbers)
        with pytest.raises(AssertionError):
            program.copy_pages(0, [0], numbers)
    for sources, targets in (([0], [0]), ([0, 1], [2, 2]), ([0], [1, 2])):
        with pytest.raises(AssertionError):
            program.copy_pages(0, sources, targets)


def test_no_page_has_no_bytes_but_their_width(program: Any) -> None:
    for group in (0, 1):
        assert program.read_pages(group, []).shape == (0, program.read_pages(group, [1]).shape[1])
        program.write_pages(group, [], program.read_pages(group, []))
        program.copy_pages(group, [], [])
    assert program.read_states([]).shape == (0, 0), "this segment has no state"


def test_machines_say_whose_bytes_they_can_take(segment: Segment, limits: StepLimits) -> None:
    """A cut in other layers is another layout, and so is any cache that differs."""
    layouts = {}
    for name in BACKENDS:
        if isinstance(name, str):
            with backend(name).compile(segment, limits) as program:
                layouts[name] = program.cache_layout
    assert len(set(layouts.values())) == len(layouts)
    g = RandomGraph(n_layers=1)
    for blk in g.layers():
        x = g.layer_output(attention(g, g.embed(), blk, KV(1, *HEADS[1])))
    g.head(g.select_rows(x))
    with backend("cpu").compile(g.segment(), LIMITS) as program:
        assert program.cache_layout != layouts["cpu"]


@pytest.mark.parametrize("name", ["cpu", "reference", "cpu+reference"])
def test_a_closed_program_has_no_pages(segment: Segment, limits: StepLimits, name: str) -> None:
    program = backend(name).compile(segment, limits)
    program.close()
    for ask in (
        lambda: program.read_pages(0, [0]),
        lambda: program.copy_pages(0, [0], [1]),
        lambda: program.read_states([]),
        lambda: program.cache_layout,
    ):
        with pytest.raises(ClosedError):
            ask()


@pytest.mark.parametrize("name", ["cpu", "shim", "reference"])
def test_many_pages_go_quickly(segment: Segment, name: str) -> None:
    """Tens of MiB: a loop over values would take minutes."""
    n = 20000 if name == "cpu" else 8000
    many = LIMITS._replace(n_pages={0: n, 40: 8})
    with backend(name).compile(segment, many) as program:
        begun = time.thread_time()
        data = program.read_pages(0, range(n))
        program.write_pages(0, range(n), data)
        assert time.thread_time() - begun < 5


@pytest.mark.parametrize("verb", ["write", "copy"])
def test_a_step_that_runs_ahead_is_dropped_when_pages_change(
    segment: Segment, limits: StepLimits, verb: str
) -> None:
    """It has read what was there before; the next step is asked for in the very same words."""

    def tokens(name: str, change: bool = True) -> list[int]:
        picked, params = [3], SamplingParams(temperature=0.0)
        with backend(name).compile(segment, limits) as program:
            read_prompt(program)
            largest = (program.read_pages(0, PAGES[0][:1]).view(np.float16) * -20).view(np.uint8)
            program.write_pages(0, [4], largest)
            tables = step([0], 0, PAGES).tables
            for i in range(6):
                batch = step(picked[-1:], len(PROMPT) + i, PAGES)
                batch.tables, batch.output, batch.samples = tables, "ids", SampleTable(1)
                batch.samples.set_row(0, params, 1, i)
                picked.append(int(program.submit(batch).wait().ids[0]))
                if i == 3 and change:
                    assert name != "shim" or program._guess is not None
                    if verb == "write":
                        program.write_pages(0, PAGES[0][:1], largest)
                    else:
                        program.copy_pages(0, [4], PAGES[0][:1])
        return picked

    assert tokens("shim") == tokens("reference") != tokens("reference", change=False)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", [*WHOLE, "cpu+reference"])
def test_a_row_changes_the_bytes_of_its_position(
    name: str, kind: KVType, limits: StepLimits
) -> None:
    with backend(name).compile(recorded(kind), limits) as program:
        positions = [program.page_positions(group) for group in range(2)]
        for at in range(33):
            page, position = divmod(at, 32)
            before = [program.read_pages(group, [p[page]])[0] for group, p in enumerate(PAGES)]
            program.submit(step([3 + at], at, PAGES)).wait()
            for group, pages in enumerate(PAGES):
                changed = program.read_pages(group, [pages[page]])[0] != before[group]
                assert changed.any() and set(positions[group][changed]) == {position}
