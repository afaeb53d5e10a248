"""Bookkeeping of KV pages: who holds which page of the arena, for how long.

Never touches K or V values, and knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from edgeinfer.batch import PAGE, PageTable, pages_for
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


class CacheLayout(NamedTuple):
    """How the cache of a sequence is cut: what its logits depend on besides its tokens.

    `n_visible` is the number of unpinned pages that a query sees; a sliding ring has one page
    more, so that the page being written is never one that the step before still saw.
    `n_ctx` bounds the tokens of a sequence, None where it slides; what slides sees no more.
    """

    overflow: Overflow
    n_slots: int
    n_pinned: int
    n_visible: int
    n_ctx: int | None

    def pages_needed(self, n_tokens: int) -> int:
        """Pages held once `n_tokens` positions have been written."""
        return min(pages_for(n_tokens), self.n_slots)

    @classmethod
    def of(cls, overflow: Overflow, n_ctx: int, n_pinned_tokens: int = 0) -> CacheLayout:
        """For a context of `n_ctx`; `n_pinned_tokens` tokens stay for ever when it slides."""
        if overflow == "error":
            n_slots = pages_for(n_ctx)
            return cls(overflow, n_slots, 0, n_slots, n_ctx)
        n_slots = n_ctx // PAGE
        if n_slots < _MIN_SLIDING_PAGES:
            raise InvalidRequestError(
                f"a context of {n_ctx} tokens is too short to slide, it takes "
                f"{_MIN_SLIDING_PAGES * PAGE}",
                advice=("raise ", Keyword("n_ctx"), " or use ", Keyword("overflow", "error")),
                param="overflow",
            )
        n_pinned = min(pages_for(n_pinned_tokens), n_slots // 4)
        return cls(overflow, n_slots, n_pinned, n_slots - n_pinned - 1, None)


_MIN_SLIDING_PAGES = 4  # one pinned, two visible, one being written
LEAST_SLIDING = _MIN_SLIDING_PAGES * PAGE  # tokens of the shortest context that can slide


class SequenceCache:
    """The pages of one sequence: taken as it grows, recycled when it slides."""

    def __init__(self, pool: PagePool, layout: CacheLayout) -> None:
        self._pool = pool
        self.layout = layout
        pages = np.full(layout.n_slots, -1, np.int32)
        self.table = PageTable(pages, layout.n_pinned, layout.n_visible)
        self.n_tokens = 0  # positions whose K and V are stored

    @property
    def n_pages(self) -> int:
        """Pages held now."""
        return int(np.count_nonzero(self.table.pages >= 0))

    @property
    def has_slid(self) -> bool:
        """Whether positions were overwritten, so that the cache can't be cut back."""
        return pages_for(self.n_tokens) > self.layout.n_slots

    @property
    def is_full(self) -> bool:
        """Whether the next position would overwrite an old one, or there is no next one."""
        return self.n_tokens >= self.layout.n_slots * PAGE

    def step_limit(self) -> int:
        """Rows that the next step may add: none of them overwrites what another still sees."""
        left = self.layout.n_slots * PAGE - self.n_tokens
        if self.layout.overflow == "error" or left > 0:
            return left
        return PAGE - self.n_tokens % PAGE

    def grow(self, n_tokens: int) -> None:
        """Hold the pages for `n_tokens` more positions; the pool must have them."""
        for slot in self.missing(n_tokens):
            self.table.pages[slot] = self._pool.take()

    def missing(self, n_tokens: int) -> list[int]:
        """Slots that have no page yet, of those that the next `n_tokens` positions take."""
        pages, table = self.table.pages, self.table
        last = (self.n_tokens + n_tokens - 1) // PAGE
        slots = [table.slot(page) for page in range(self.n_tokens // PAGE, last + 1)]
        return [slot for slot in slots if pages[slot] < 0]

    def truncate(self, n_tokens: int) -> None:
        """Forget positions from `n_tokens` on; a cache that has slid can't."""
        assert n_tokens == self.n_tokens or not self.has_slid
        if not self.has_slid:
            self._drop(range(pages_for(n_tokens), self.layout.n_slots))
        self.n_tokens = n_tokens

    def free(self) -> None:
        """Give every page back."""
        self._drop(range(self.layout.n_slots))
        self.n_tokens = 0

    def _drop(self, slots: range) -> None:
        held = self.table.pages[slots.start : slots.stop]
        pages = [int(page) for page in held if page >= 0]
        held[:] = -1
        self._pool.release(pages)
