"""Pages: none lost, none shared by accident, none overwritten while a query sees it."""

from __future__ import annotations

import tracemalloc
from array import array

import pytest

from edgeinfer.batch import PAGE
from edgeinfer.engine.cache import (
    CacheLayout,
    PagePool,
    Ring,
    SequenceCache,
    most_pinned,
    pages_for,
)
from edgeinfer.engine.prefix_index import PrefixIndex
from edgeinfer.errors import InvalidRequestError


def test_pool_takes_every_page_once() -> None:
    pool = PagePool(5)
    pages = [pool.take() for _ in range(5)]
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert pool.n_free == 0
    pool.release(pages)
    assert pool.n_free == 5


def test_shared_page_is_free_after_its_last_holder() -> None:
    pool = PagePool(2)
    page = pool.take()
    pool.share(page)
    pool.release([page])
    assert pool.n_free == 1
    pool.release([page])
    assert pool.n_free == 2
    with pytest.raises(AssertionError):
        pool.release([page])


@pytest.mark.parametrize(("n_tokens", "n_pages"), [(0, 0), (1, 1), (32, 1), (33, 2), (64, 2)])
def test_pages_for(n_tokens: int, n_pages: int) -> None:
    assert pages_for(n_tokens) == n_pages


def test_error_layout_sees_everything() -> None:
    layout = CacheLayout.of("error", 100)
    assert layout.rings == (Ring(4, 0, 4),)


def test_a_sliding_layout_keeps_what_it_is_to_keep_and_a_quarter_to_slide_in() -> None:
    assert CacheLayout.of("slide", 512, 1).rings[0].n_pinned == 1
    assert CacheLayout.of("slide", 512, 40).rings[0].n_pinned == 2
    assert CacheLayout.of("slide", 512, 300).rings == (Ring(16, 10, 5),)
    assert CacheLayout.of("slide", 512, 500).rings == (Ring(16, 12, 3),)
    assert most_pinned(512) == 12 * PAGE
    for n_ctx in (128, 130, 200, 256, 300, 8192):
        assert most_pinned(n_ctx) <= n_ctx * 3 / 4
        (ring,) = CacheLayout.of("slide", n_ctx, n_ctx).rings
        assert ring.n_pinned * PAGE == most_pinned(n_ctx) and ring.n_visible >= 2


def test_too_short_a_context_cannot_slide() -> None:
    with pytest.raises(InvalidRequestError, match="too short to slide"):
        CacheLayout.of("slide", 96)


def test_growing_takes_pages_only_when_they_are_reached() -> None:
    pool = PagePool(4)
    cache = SequenceCache([pool], CacheLayout.of("error", 128))
    for n_tokens, n_pages in ((1, 1), (31, 1), (1, 2), (32, 3)):
        cache.grow(n_tokens)
        cache.n_tokens += n_tokens
        assert cache.n_pages == (n_pages,)
    assert cache.step_limit() == 128 - 65
    cache.free()
    assert pool.n_free == 4


@pytest.mark.parametrize("n_pinned", [40, 160])
def test_sliding_never_overwrites_what_a_row_of_the_step_sees(n_pinned: int) -> None:
    """Follow every physical page through 20 contexts: what a query sees is what was written."""
    n_ctx = 256
    pool = PagePool(pages_for(n_ctx))
    cache = SequenceCache([pool], CacheLayout.of("slide", n_ctx, n_pinned))
    holds: dict[int, int] = {}  # physical page: absolute page
    while cache.n_tokens < 20 * n_ctx:
        n = min(cache.step_limit(), 50)
        assert n > 0
        cache.grow(n)
        first, last = cache.n_tokens, cache.n_tokens + n - 1
        for page in range(first // PAGE, last // PAGE + 1):
            holds[int(cache.tables[0].pages[cache.tables[0].slot(page)])] = page
        for pos in (first, last):
            for page in cache.tables[0].visible(pos):
                assert holds[int(cache.tables[0].pages[cache.tables[0].slot(page)])] == page
        cache.n_tokens += n
        assert cache.n_pages[0] <= pages_for(n_ctx)
    assert pool.n_free == 0
    cache.free()
    assert pool.n_free == pages_for(n_ctx)


def test_what_is_known_of_an_endless_answer_is_small() -> None:
    """The tokens of pages that were overwritten stay, as a chain of nodes."""
    index, layout = PrefixIndex([PagePool(8)], False), CacheLayout.of("slide", 256)
    tracemalloc.start()
    node = index.root
    for page in range(1000):
        node = index.child(node, layout, page, array("i", range(page, page + PAGE)).tobytes())
    n_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.n_nodes == 1000 and n_bytes < 750 * 1000


def test_what_has_slid_is_never_taken_for_what_has_not() -> None:
    index, last = PrefixIndex([PagePool(8)], False), 20
    slides = [CacheLayout.of("slide", 256, n_pinned) for n_pinned in (1, 40)]
    layouts = [CacheLayout.of("error", 1024), *slides]
    for n in range(1, PAGE + 1):
        ids = array("i", [*range(n - 1), 0x2B]).tobytes()
        nodes = [index.child(index.root, layout, last, ids) for layout in layouts]
        assert len({id(node) for node in nodes}) == 3
    assert index.n_nodes == 3 * PAGE
    for slide in slides:  # before anything is overwritten it is what it would be in any layout
        assert index.child(index.root, slide, 0, ids) is index.child(index.root, layouts[0], 0, ids)
