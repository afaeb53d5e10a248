"""Bookkeeping of KV pages and state slots: who holds which of the arena's, for how long.

Never touches their values, and knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from edgeinfer.batch import EVERY_PAGE, PAGE, PageTable, pages_for, ring_pages
from edgeinfer.errors import InvalidRequestError, Keyword

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NO_LIMIT = 1 << 30

Overflow: TypeAlias = Literal["error", "slide"]


class PagePool:
    """The pages of one arena, all there from the start; a page with several holders is shared.

    Slots of state are counted alike.
    """

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._n_holders = [0] * n_pages

    @property
    def n_free(self) -> int:
        return len(self._free)

    def n_holders(self, page: int) -> int:
        return self._n_holders[page]

    def take(self) -> int:
        """A page for the caller alone."""
        page = self._free.pop()
        self._n_holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page, of which nobody overwrites what the holder reads."""
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
    sees: int = 0  # positions that a query does, the same however long the context is; 0: all held


class CacheLayout(NamedTuple):
    """How the cache of a sequence is cut: what its logits depend on besides its tokens.

    A context has `n_slots` pages. `n_ctx` bounds the tokens of a sequence, None where it slides;
    what slides sees no more.
    """

    overflow: Overflow
    n_slots: int
    n_ctx: int | None
    rings: tuple[Ring, ...]  # by cache group
    has_state: bool = False

    def pages_needed(self, n_tokens: int) -> tuple[int, ...]:
        """Pages of each group that are held once `n_tokens` positions have been written.

        Where there is state the slots that a step takes come last.
        """
        pages = (min(pages_for(n_tokens), ring.n_slots) for ring in self.rings)
        return (*pages, *self._slots)

    @property
    def most_pages(self) -> tuple[int, ...]:
        """Pages of each group that are ever held, then slots."""
        return (*(ring.n_slots for ring in self.rings), *self._slots)

    @property
    def _slots(self) -> tuple[int, ...]:
        return (STEP_SLOTS,) if self.has_state else ()

    @property
    def n_alike(self) -> int:
        """Pages of a sequence that are what they would be in any layout: those see all before."""
        return _NO_LIMIT if self.overflow == "error" else self.n_slots - 1

    def seen_pages(self, group: int, n_tokens: int) -> list[int]:
        """Absolute pages of which a query behind `n_tokens` positions sees anything, ascending."""
        ring, end = self.rings[group], pages_for(n_tokens)
        first = max(ring.n_pinned, n_tokens // PAGE - ring.n_visible + 1)
        if ring.sees:
            first = max(first, (n_tokens - ring.sees + 1) // PAGE)
        return [*range(min(ring.n_pinned, end)), *range(first, end)]

    @classmethod
    def of(
        cls,
        overflow: Overflow,
        n_ctx: int,
        n_pinned_tokens: int = 0,
        windows: Iterable[int] = (0,),
        max_rows: int = 1,
        has_state: bool = False,
    ) -> CacheLayout:
        """For a context of `n_ctx` and groups by window, in steps of up to `max_rows` rows.

        `n_pinned_tokens` tokens stay for ever when it slides, `most_pinned` of them at most.
        """
        whole = _whole_ring(overflow, n_ctx, n_pinned_tokens)

        def ring(window: int) -> Ring:
            n_slots = ring_pages(window, max_rows) if window else whole.n_slots
            if n_slots < whole.n_slots:
                return Ring(n_slots, 0, EVERY_PAGE, window, window)
            return whole if whole.n_pinned else whole._replace(sees=window)

        bound = n_ctx if overflow == "error" else None
        return cls(overflow, whole.n_slots, bound, tuple(map(ring, windows)), has_state)


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
    n_pinned = min(pages_for(n_pinned_tokens), most_pinned(n_ctx) // PAGE)
    return Ring(n_slots, n_pinned, n_slots - n_pinned - 1)


def most_pinned(n_ctx: int) -> int:
    """Tokens that may stay when a context slides: a quarter slides, three pages at least."""
    n_slots = n_ctx // PAGE
    return max(0, n_slots - max(_MIN_SLIDING_PAGES - 1, n_slots // 4)) * PAGE


_MIN_SLIDING_PAGES = 4  # one pinned, two visible, one being written
STEP_SLOTS = 2  # of state: one that a step reads, one that it writes
LEAST_SLIDING = _MIN_SLIDING_PAGES * PAGE  # tokens of the shortest context that can slide


def _no_pages(n_slots: int) -> NDArray[np.int32]:
    pages = np.full(n_slots, -1, np.int32)
    pages.flags.writeable = False
    return pages


class SequenceCache:
    """The pages of one sequence: taken as it grows, recycled when rings turn.

    A full page may have other holders, which read it; it is replaced, not overwritten, where a ring
    turns. The state of recurrent layers lies in slots that steps write whole.
    """

    def __init__(
        self, pools: Sequence[PagePool], layout: CacheLayout, states: PagePool | None = None
    ) -> None:
        self._pools, self._states = pools, states
        self.layout = layout
        # Never written to: a step that has one reads it while the next one is made.
        self.tables = tuple(
            PageTable(_no_pages(ring.n_slots), ring.n_pinned, ring.n_visible)
            for ring in layout.rings
        )
        self.n_tokens = 0  # positions whose K and V are stored
        self.state = -1  # the slot that holds the state after them, -1 before the first
        self.kept: dict[int, int] = {}  # by number of tokens: the slots that its last step writes
        self.room = 0  # positions that it can write as it is; where there is state none is told
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

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing that others could have."""
        return self.state < 0 and not self.kept and not any(self.n_pages)

    @property
    def has_state(self) -> bool:
        return self._states is not None

    @property
    def slots(self) -> list[int]:
        """State slots held."""
        return [slot for slot in (self.state, *self.kept.values()) if slot >= 0]

    def step_limit(self) -> int:
        """Rows that the next step may add: none of them overwrites what another still sees."""
        left = self.layout.n_slots * PAGE - self.n_tokens
        if self.layout.overflow == "error":
            return left
        if not self._is_bounded:
            return _NO_LIMIT
        return left if left > 0 else PAGE - self.n_tokens % PAGE

    # -- a step ----------------------------------------------------------------------------------

    def missing(self, n_tokens: int) -> list[list[int]]:
        """Slots of each group that the next `n_tokens` positions need a page in."""
        first, last = self.n_tokens // PAGE, (self.n_tokens + n_tokens - 1) // PAGE
        n_begun = -(-self.n_tokens // PAGE)  # pages with tokens: what is held of them is its own
        missing = []
        for table, pool in zip(self.tables, self._pools, strict=True):
            slots = dict.fromkeys(
                slot
                for page in range(first, last + 1)
                if (held := table.pages[slot := table.slot(page)]) < 0
                or (page >= n_begun and pool.n_holders(int(held)) > 1)
            )
            missing.append(list(slots))
        return missing

    def grow(self, n_tokens: int, missing: list[list[int]] | None = None) -> None:
        """Hold the pages for `n_tokens` more positions; the pools must have them.

        `missing` is what `missing` has said of as many positions since it grew last.
        """
        self._n_written = max(self._n_written, self.n_tokens + n_tokens)
        self.room = 0
        missing = self.missing(n_tokens) if missing is None else missing
        for group, (pool, slots) in enumerate(zip(self._pools, missing, strict=True)):
            if slots:
                before = self.tables[group].pages[slots].tolist()
                self._set_pages(group, {slot: pool.take() for slot in slots})
                pool.release([page for page in before if page >= 0])
        self.room = 0 if self._states else pages_for(self.n_tokens + n_tokens) * PAGE

    def keep_states(self, counts: Iterable[int]) -> None:
        """Take the slots for the states that the next step leaves after `counts` tokens."""
        assert self._states is not None, "the model has no state"
        for n_tokens in counts:
            self.kept[n_tokens] = self._states.take()

    def drop_states(self) -> None:
        """Give back what the last step has kept, but for the state it left off in."""
        if self._states is not None and self.kept:
            dropped = list(self.kept.values())
            self.kept = {}
            self._states.release(dropped)

    def advance(self, n_tokens: int) -> None:
        """Count positions as stored that a step has computed."""
        self.n_tokens += n_tokens
        if self._states is not None:
            before, self.state = self.state, self.kept.pop(self.n_tokens)
            if before >= 0:
                self._states.release([before])

    # -- as a whole ------------------------------------------------------------------------------

    def page(self, group: int, page: int) -> int:
        """Where it holds an absolute page that it has written, -1 if it no longer does."""
        table, ring = self.tables[group], self.layout.rings[group]
        is_there = page < ring.n_pinned or page + len(table.pages) - ring.n_pinned >= self._top
        return int(table.pages[table.slot(page)]) if is_there else -1

    def replace(self, group: int, page: int, equal: int) -> None:
        """Hold another page in place of one with the same contents."""
        pool, table = self._pools[group], self.tables[group]
        slot = table.slot(page)
        own = int(table.pages[slot])
        pool.share(equal)
        self._set_pages(group, {slot: equal})
        pool.release([own])

    def begin_at(self, n_tokens: int, pages: Sequence[dict[int, int]], state: int = -1) -> None:
        """Hold what has been computed of `n_tokens` positions: pages by group and absolute page.

        Whoever calls has counted this as one more holder of each, and of the state.
        """
        self.free()
        for group, (table, held) in enumerate(zip(self.tables, pages, strict=True)):
            self._set_pages(group, {table.slot(page): number for page, number in held.items()})
        self.n_tokens = self._n_written = n_tokens
        self.state = state

    def free(self) -> None:
        """Give everything back."""
        self.room = 0
        for group, (table, pool) in enumerate(zip(self.tables, self._pools, strict=True)):
            held = table.pages[table.pages >= 0].tolist()
            self._set_pages(group, dict.fromkeys(range(len(table.pages)), -1))
            pool.release(held)
        self.drop_states()
        if self._states is not None and self.state >= 0:
            self._states.release([self.state])
        self.state = -1
        self.n_tokens = self._n_written = 0

    def _set_pages(self, group: int, pages: Mapping[int, int]) -> None:
        """Hold these by slot, in a table of its own."""
        table = self.tables[group]
        changed = table.pages.copy()
        changed[list(pages)] = list(pages.values())
        changed.flags.writeable = False
        tables = list(self.tables)
        tables[group] = table._replace(pages=changed)
        self.tables = tuple(tables)

    @property
    def _top(self) -> int:
        """The first page that no step has touched."""
        return pages_for(max(self.n_tokens, self._n_written))
