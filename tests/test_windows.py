"""Layers with windows keep rings: the bits of whole caches, in memory that doesn't grow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, Batch, PageTable, StepLimits, StepRequest, pages_for, ring_pages
from edgeinfer.engine.cache import CacheLayout, Overflow, PagePool, SequenceCache
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.generation import MOST_UNREAD, Generation
from edgeinfer.engine.sequence import Prefilled, Request, Token
from edgeinfer.graph import KV, Segment
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.sampling.params import SamplingParams

from .random_graphs import ROPES, RandomGraph
from .test_graphs import backend

MAX_ROWS, VOCAB = 16, 40
IDS = np.random.default_rng(5).integers(0, VOCAB, 700).tolist()


@cache
def segment(*windows: int, shared: bool = False) -> Segment:
    """A layer for each window; with `shared` one more, which reads the first one's cache."""
    g = RandomGraph(len(windows) + shared)
    x = g.embed()
    for i, blk in enumerate(g.layers()):
        is_reader = i == len(windows)
        kv = KV(1, 8, 8, windows[0 if is_reader else i])
        h = g.rms_norm(x, f"{blk}.attn_norm")
        q = g.rotate(g.linear(h, f"{blk}.attn_q", 16), 2, ROPES[1])
        k, v = (g.linear(h, f"{blk}.attn_{name}", 8) for name in "kv")
        own = () if is_reader else (g.rotate(k, 1, ROPES[1]), v)
        a = g.attention(q, *own, cache=kv, source=0 if is_reader else None)
        x = g.layer_output(x + g.linear(a, f"{blk}.attn_output", g.dim))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))
    return g.segment()


def limits_of(segment: Segment, n_ctx: int, slots: int = 2) -> StepLimits:
    limits = StepLimits.of(StepRequest(n_ctx, slots, 2), VOCAB, segment.groups, MAX_ROWS)
    return limits._replace(max_outputs=MAX_ROWS, max_sequences=4)


@contextmanager
def engine(segment: Segment, n_ctx: int = 768, slots: int = 2) -> Iterator[Engine]:
    limits = limits_of(segment, n_ctx, slots)
    opened = Engine(backend().compile(segment, limits), limits, n_ctx, VOCAB)
    try:
        yield opened
    finally:
        opened.close()


def whole_logits(segment: Segment, ids: list[int]) -> NDArray[np.float32]:
    """Of one pass over caches of every position."""
    n, groups = len(ids), segment.groups
    n_pages = pages_for(n)
    limits = StepLimits({w: n_pages for w in groups}, n, n, 1, 1)
    table = PageTable(np.arange(n_pages, dtype=np.int32), 0, n_pages)
    rows = np.arange(n)
    batch = Batch(
        np.array(ids, np.int32), rows, np.zeros(n, np.int32), [(table,) * len(groups)],
        rows.astype(np.int32),
    )  # fmt: skip
    with backend().compile(segment, limits) as program:
        return program.submit(batch).wait().logits.copy()


def request(ids: list[int], n: int = 60, **fields: Any) -> Request:
    params = SamplingParams(temperature=0.0, seed=1)
    return Request(**{"ids": tuple(ids), "params": params, "max_tokens": n, **fields})


def tokens(generation: Generation) -> tuple[list[int], int]:
    """What was generated, and how much of the prompt was cached."""
    events = list(generation)
    cached = [event.cached for event in events if isinstance(event, Prefilled)]
    return [event.id for event in events if isinstance(event, Token)], cached[-1]


def all_is_given_back(engine: Engine) -> bool:
    index = engine._store.index
    return all(pool.n_free + index.n_idle(i) == pool.n_pages for i, pool in enumerate(engine.pools))


@pytest.mark.parametrize(
    "windows", [(0, 1), (0, 31, 31), (40,), (0, 32, 70), (33, 0, 33), (0, 500), (0, 9000)]
)
def test_rings_have_the_bits_of_whole_caches(windows: tuple[int, ...]) -> None:
    """In any chunks, beside others, and further than the rings reach."""
    model = segment(*windows, shared=len(windows) == 3)
    expected = whole_logits(model, IDS)
    with engine(model) as opened:
        for chunk, others in ((MAX_ROWS, None), (13, [IDS[:40], IDS[5:90]]), (1, [IDS[9:80]])):
            got = opened.logits(IDS, prefill_chunk=chunk, batch_with=others)
            np.testing.assert_array_equal(got, expected)
        assert all_is_given_back(opened)


def test_the_reference_keeps_the_same_rings() -> None:
    model, ids = segment(0, 33), IDS[:150]
    limits = limits_of(model, 768)
    with ReferenceBackend().compile(model, limits, mode="quantised") as program:
        opened = Engine(program, limits, 768, VOCAB)
        got = opened.logits(ids, prefill_chunk=11)
        opened.close()
    np.testing.assert_array_equal(got, whole_logits(model, ids))


def test_guesses_that_fail_overwrite_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rings turn, too: with and without guesses the answer is that of whole caches."""
    model, n = segment(0, 33, 40), 120
    monkeypatch.setattr(Generation, "guess", lambda self: ([*IDS[:7]], [0.99] * 7))
    with engine(model) as opened:
        generation = opened.submit(request(IDS[:90], n, speculation=True))
        answer, _ = tokens(generation)
    expected = whole_logits(model, IDS[:90] + answer)[89:-1].argmax(axis=1)
    np.testing.assert_array_equal(answer, expected)
    assert generation.n_proposed > 2 * n > generation.n_accepted


def test_a_prompt_goes_on_where_a_ring_still_reaches() -> None:
    model = segment(0, 40)
    with engine(model) as opened:
        first, _ = tokens(opened.submit(request(IDS[:400], 20)))
        longer = IDS[:400] + first[:-1] + IDS[500:510]
        gone_on, n_cached = tokens(opened.submit(request(longer, 20)))
        assert n_cached == 419
        back, n_cached = tokens(opened.submit(request(IDS[:395] + IDS[3:5], 20)))
        assert n_cached == 395
        far, n_cached = tokens(opened.submit(request(IDS[:300] + IDS[3:5], 20)))
        assert n_cached == 0
        early, n_cached = tokens(opened.submit(request(IDS[:200], 20)))
    with engine(model) as fresh:
        for ids, got in (
            (longer, gone_on), (IDS[:395] + IDS[3:5], back), (IDS[:300] + IDS[3:5], far),
            (IDS[:200], early),
        ):  # fmt: skip
            fresh._store.index.clear()
            assert tokens(fresh.submit(request(ids, 20))) == (got, 0)


def test_one_that_waits_for_its_reader_gives_its_rings_to_others() -> None:
    with engine(segment(0, 40), slots=1) as opened:
        alone, _ = tokens(opened.submit(request(IDS[:30], MOST_UNREAD + 100)))
        slow = opened.submit(request(IDS[:30], MOST_UNREAD + 100))
        other, _ = tokens(opened.submit(request(IDS[:700], 60)))
        assert len(other) == 60
        assert tokens(slow)[0] == alone
        cancelled = opened.submit(request(IDS[:200], 300))
        next(cancelled)
        cancelled.cancel()
        list(cancelled)
        assert all_is_given_back(opened)


@pytest.mark.parametrize("windows", [(0, 40), (40,), (0, 300)])
def test_what_slides_has_the_same_bits_beside_others(windows: tuple[int, ...]) -> None:
    """Layers without a window slide; rings turn; a window longer than the context slides, too."""
    model = segment(*windows)
    with engine(model, n_ctx=160, slots=4) as opened:
        requests = [
            request(IDS[at : at + 50], 400, overflow="slide", n_pinned=33) for at in (0, 100)
        ]
        alone = [tokens(opened.submit(each))[0] for each in requests]
        together = [opened.submit(each) for each in requests]
        assert [tokens(each)[0] for each in together] == alone
    if windows == (40,):  # whoever sees a window only forgets nothing
        np.testing.assert_array_equal(
            whole_logits(model, IDS[:50] + alone[0])[49:-1].argmax(axis=1), alone[0]
        )


def test_memory_of_a_window_does_not_grow_with_the_context() -> None:
    model = segment(0, 512)
    pages = [limits_of(model, n_ctx, slots=3).n_pages for n_ctx in (256, 8192, 131072)]
    assert [each[0] for each in pages] == [3 * 8, 3 * 256, 3 * 4096]
    assert [each[512] for each in pages] == [3 * 8, 4 * 18, 4 * 18]


def test_a_plan_has_a_row_for_each_group() -> None:
    model = segment(0, 40, 40)
    request = StepRequest(8192, 2, 2)
    limits, memories, *_ = backend().demand(model, request)
    rows = memories["host"]
    position = 2 * 8 * 2  # of a layer: K and V of one head in halves
    assert rows["KV cache"] == 2 * 8192 * position
    assert rows["KV cache, window 40"] == 3 * ring_pages(40, 256) * PAGE * 2 * position
    with backend().compile(model, limits) as program:
        assert program._kv.n_bytes == sum(
            n_bytes for row, n_bytes in rows.items() if row.startswith("KV cache")
        )
    exact = ReferenceBackend().demand(model, request).memories["host"]
    assert [exact[name] for name in ("KV cache", "KV cache, window 40")] == [
        2 * rows[name] for name in ("KV cache", "KV cache, window 40")
    ]


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("max_rows", [1, 2, 32, 50])
def test_a_ring_is_as_long_as_it_must_be(window: int, max_rows: int) -> None:
    spans = [
        (first + max_rows - 1) // PAGE - (first - window + 1) // PAGE + 1
        for first in range(4096, 4160)
    ]
    assert ring_pages(window, max_rows) == max(spans)


STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "guess", "fail"]), st.integers(1, 300)), max_size=40
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 90), st.integers(1, 40), STEPS, st.sampled_from(["error", "slide"]))
def test_what_a_query_sees_is_what_was_written(
    window: int, max_rows: int, steps: list[tuple[str, int]], overflow: Overflow
) -> None:
    """Steps that succeed, whose guesses fail, or that fail."""
    n_ctx = 512
    layout = CacheLayout.of(overflow, n_ctx, 40, (0, window), max_rows)
    pools = [PagePool(ring.n_slots) for ring in layout.rings]
    cache, holds = SequenceCache(pools, layout), [dict[int, int](), dict[int, int]()]
    for step, n in steps:
        if (n := min(n, max_rows, cache.step_limit())) > 0:
            cache.grow(n)
            for table, held in zip(cache.tables, holds, strict=True):
                for page in range(cache.n_tokens // PAGE, (cache.n_tokens + n - 1) // PAGE + 1):
                    held[int(table.pages[table.slot(page)])] = page
            for pos in (cache.n_tokens, cache.n_tokens + n - 1):
                check_visible(cache, holds, pos)
            cache.n_tokens += {"write": n, "guess": 1, "fail": 0}[step]
        if cache.n_tokens:
            check_visible(cache, holds, cache.n_tokens, pages_for(cache.n_tokens))
        if layout.n_ctx is not None:
            needed = layout.pages_needed(cache._n_written)
            assert all(n <= most for n, most in zip(cache.n_pages, needed, strict=True))
    cache.free()
    assert all(pool.n_free == pool.n_pages for pool in pools)


def check_visible(
    cache: SequenceCache, holds: list[dict[int, int]], pos: int, end: int = 1 << 30
) -> None:
    """Of the pages before `end`: the next row's own may not be written yet."""
    for ring, table, held in zip(cache.layout.rings, cache.tables, holds, strict=True):
        for page in (page for page in table.visible(pos, ring.window) if page < end):
            assert held[int(table.pages[table.slot(page)])] == page
