"""Bookkeeping of KV pages: who holds which page of the arena, for how long.

Never touches K or V values, and knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from edgeinfer.batch import EVERY_PAGE, PAGE, PageTable, pages_for, ring_pages
from edgeinfer.errors import InvalidRequestError, Keyword

Overflow: TypeAlias = Literal["error", "slide"]


class PagePool:
    """The pages of one arena, all there from the start; a page with several holders is shared."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._n_holders = [0] * n_pages

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A page for the caller alone."""
        page = self._free.pop()
        self._n_holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a full page, which nobody writes any more."""
        assert self._n_holders[page] > 0, "a free page can't be shared"
        self._n_holders[page] += 1

    def reset(self, held: Iterable[Iterable[int]]) -> None:
        """Count anew who holds which page, from every page table; -1 is none."""
        n_holders = [0] * self.n_pages
        for pages in held:
            for page in pages:
                if page >= 0:
                    n_holders[page] += 1
        self._n_holders = n_holders
        self._free = [page for page in range(self.n_pages - 1, -1, -1) if not n_holders[page]]

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._n_holders[page] > 0, "a page was released twice"
            self._n_holders[page] -= 1
            if not self._n_holders[page]:
                self._free.append(page)


class Ring(NamedTuple):
    """How the cache of a sequence is cut in one cache group.

    `n_visible` is the number of unpinned pages that a query sees; a sliding ring has one page
    more, so that the page being written is never one that the step before still saw. A ring of
    its own for a window sees what the window leaves, and holds that of a largest step: what a step
    writes, guesses that fail among it, is never what the first of its rows still sees.
    """

    n_slots: int
    n_pinned: int
    n_visible: int
    window: int = 0  # 0: it holds whatever fits in the context


class CacheLayout(NamedTuple):
    """How the cache of a sequence is cut: what its logits depend on besides its tokens.

    A context has `n_slots` pages. `n_ctx` bounds the tokens of a sequence, None where it slides;
    what slides sees no more.
    """

    overflow: Overflow
    n_slots: int
    n_ctx: int | None
    rings: tuple[Ring, ...]  # by cache group

    def pages_needed(self, n_tokens: int) -> tuple[int, ...]:
        """Pages of each group that are held once `n_tokens` positions have been written."""
        return tuple(min(pages_for(n_tokens), ring.n_slots) for ring in self.rings)

    @property
    def most_pages(self) -> tuple[int, ...]:
        """Pages of each group that are ever held."""
        return tuple(ring.n_slots for ring in self.rings)

    @classmethod
    def of(
        cls,
        overflow: Overflow,
        n_ctx: int,
        n_pinned_tokens: int = 0,
        windows: Iterable[int] = (0,),
        max_rows: int = 1,
    ) -> CacheLayout:
        """For a context of `n_ctx` and groups by window, in steps of up to `max_rows` rows.

        `n_pinned_tokens` tokens stay for ever when it slides.
        """
        whole = _whole_ring(overflow, n_ctx, n_pinned_tokens)

        def ring(window: int) -> Ring:
            n_slots = ring_pages(window, max_rows) if window else whole.n_slots
            is_own = n_slots < whole.n_slots
            return Ring(n_slots, 0, EVERY_PAGE, window) if is_own else whole

        bound = n_ctx if overflow == "error" else None
        return cls(overflow, whole.n_slots, bound, tuple(map(ring, windows)))


def _whole_ring(overflow: Overflow, n_ctx: int, n_pinned_tokens: int) -> Ring:
    if overflow == "error":
        n_slots = pages_for(n_ctx)
        return Ring(n_slots, 0, n_slots)
    n_slots = n_ctx // PAGE
    if n_slots < _MIN_SLIDING_PAGES:
        raise InvalidRequestError(
            f"a context of {n_ctx} tokens is too short to slide, it takes "
            f"{_MIN_SLIDING_PAGES * PAGE}",
            advice=("raise ", Keyword("n_ctx"), " or use ", Keyword("overflow", "error")),
            param="overflow",
        )
    n_pinned = min(pages_for(n_pinned_tokens), n_slots // 4)
    return Ring(n_slots, n_pinned, n_slots - n_pinned - 1)


_MIN_SLIDING_PAGES = 4  # one pinned, two visible, one being written
LEAST_SLIDING = _MIN_SLIDING_PAGES * PAGE  # tokens of the shortest context that can slide


class SequenceCache:
    """The pages of one sequence: taken as it grows, recycled when rings turn."""

    def __init__(self, pools: Sequence[PagePool], layout: CacheLayout) -> None:
        self._pools = pools
        self.layout = layout
        self.tables = tuple(
            PageTable(np.full(ring.n_slots, -1, np.int32), ring.n_pinned, ring.n_visible)
            for ring in layout.rings
        )
        self.n_tokens = 0  # positions whose K and V are stored
        self.room = 0  # positions up to which it has grown: pages are held for them
        self._n_written = 0  # positions that steps may have touched, also those that failed
        self._is_bounded = any(not ring.window for ring in layout.rings)  # by a context

    @property
    def n_pages(self) -> tuple[int, ...]:
        """Pages held of each group."""
        return tuple(int((table.pages >= 0).sum()) for table in self.tables)

    @property
    def is_full(self) -> bool:
        """Whether the next position would overwrite an old one, or there is no next one."""
        return self._is_bounded and self.n_tokens >= self.layout.n_slots * PAGE

    def step_limit(self) -> int:
        """Rows that the next step may add: none of them overwrites what another still sees."""
        left = self.layout.n_slots * PAGE - self.n_tokens
        if self.layout.overflow == "error":
            return left
        if not self._is_bounded:
            return _NO_LIMIT
        return left if left > 0 else PAGE - self.n_tokens % PAGE

    def grow(self, n_tokens: int, missing: list[list[int]] | None = None) -> None:
        """Hold the pages for `n_tokens` more positions; the pools must have them.

        `missing` is what `missing` has said of as many positions since it grew last.
        """
        self._n_written = max(self._n_written, self.n_tokens + n_tokens)
        self.room = 0
        missing = self.missing(n_tokens) if missing is None else missing
        for table, pool, slots in zip(self.tables, self._pools, missing, strict=True):
            for slot in slots:
                table.pages[slot] = pool.take()
        self.room = pages_for(self.n_tokens + n_tokens) * PAGE

    def advance(self, n_tokens: int) -> None:
        """Count positions as stored that a step has computed."""
        self.n_tokens += n_tokens

    def missing(self, n_tokens: int) -> list[list[int]]:
        """Slots of each group without a page, of those that the next `n_tokens` positions take."""
        pages = range(self.n_tokens // PAGE, (self.n_tokens + n_tokens - 1) // PAGE + 1)
        taken = (dict.fromkeys(map(table.slot, pages)) for table in self.tables)
        return [
            [slot for slot in slots if table.pages[slot] < 0]
            for table, slots in zip(self.tables, taken, strict=True)
        ]

    def can_cut(self, n_tokens: int) -> bool:
        """Whether it holds all that a query behind its first `n_tokens` positions sees."""
        if n_tokens == self.n_tokens:
            return True
        for ring in self.layout.rings:
            first = max(0, n_tokens - ring.window + 1) // PAGE if ring.window else 0
            if first + ring.n_slots < self._top:
                return False
        return True

    def truncate(self, n_tokens: int) -> None:
        """Forget positions from `n_tokens` on, if it `can_cut` there."""
        assert self.can_cut(n_tokens), "what is left sees positions that are gone"
        self.room = 0
        gone = range(pages_for(n_tokens), self._top)
        for i, (ring, table) in enumerate(zip(self.layout.rings, self.tables, strict=True)):
            # In a ring that has turned their slots hold nothing else that anyone sees.
            if ring.window or self._top <= ring.n_slots:
                self._drop(i, dict.fromkeys(map(table.slot, gone)))
        self.n_tokens = n_tokens

    def free(self) -> None:
        """Give every page back."""
        self.room = 0
        for i, ring in enumerate(self.layout.rings):
            self._drop(i, range(ring.n_slots))
        self.n_tokens = self._n_written = 0

    @property
    def _top(self) -> int:
        """The first page that no step has touched."""
        return pages_for(max(self.n_tokens, self._n_written))

    def _drop(self, group: int, slots: Iterable[int]) -> None:
        pages = self.tables[group].pages
        held = [slot for slot in slots if pages[slot] >= 0]
        dropped = pages[held].tolist()
        pages[held] = -1
        self._pools[group].release(dropped)


_NO_LIMIT = 1 << 30
