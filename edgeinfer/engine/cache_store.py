"""The pages and state of all sequences: what they hold, share, and leave for those to come.

Used by one thread; knows nothing of scheduling.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import takewhile

from edgeinfer.backend import Program
from edgeinfer.batch import PAGE, StepLimits
from edgeinfer.engine.cache import CacheLayout, PagePool, SequenceCache
from edgeinfer.engine.checkpoints import BORDER, EVERY, PLAIN, STABLE, borders_of, checkpoints
from edgeinfer.engine.leaders import leader_of
from edgeinfer.engine.prefix_index import Match, Node, PrefixIndex
from edgeinfer.engine.sequence import Sequence
from edgeinfer.errors import BusyError

_NO_LIMIT = 1 << 30


class CacheStore:
    """Opens sequences on what others have computed of their beginnings.

    Full pages are shared by reference, of the page in which two sequences part a copy is made. Two
    that are read at a time share, too: see `leaders`. What an error cuts short here is made good by
    `recover`: the sequences' page tables and the nodes of the index are the truth, and which pages
    are free follows from them.
    """

    def __init__(self, limits: StepLimits, program: Program) -> None:
        self._program = program
        self.pools = [PagePool(n_pages) for n_pages in limits.n_pages.values()]
        self._states = PagePool(limits.n_states) if limits.n_states else None
        # Of every kind that an index holds: pages by group, then state slots.
        self._kinds = [*self.pools, *([self._states] if self._states else [])]
        self.index = PrefixIndex(self._kinds, self._states is not None)
        self._holdings = self.index.holdings
        self._begun: list[Sequence] = []  # that may be shared, in order of arrival
        self._guests: list[Sequence] = []  # that are written to files, or read from them

    @property
    def n_pages(self) -> list[int]:
        """All there is of each kind: pages by cache group, then state slots if there are any."""
        return [pool.n_pages for pool in self._kinds]

    @property
    def has_guests(self) -> bool:
        """Whether pages are held for files, which no request may have until these are done."""
        return bool(self._guests)

    # -- beginning -------------------------------------------------------------------------------

    def open(
        self,
        ids: SequenceOf[int],
        layout: CacheLayout,
        borders: Iterable[int] = (),
        n_stable: int = 0,
    ) -> Sequence:
        """A sequence for a prompt, on what has been computed of it.

        Prompts to come are likely to part from it at `borders`, numbers of tokens; what is kept of
        the first `n_stable` is the last to be given up.
        """
        sequence = self.open_empty(ids, layout)
        loses = self._states is not None or any(ring.window for ring in layout.rings)
        sequence.borders = borders_of(len(ids), borders if loses else None, n_stable)
        sequence.leader = leader_of(sequence, self._begun)
        self._extend(sequence)
        if sequence.leader is not None and self._states is not None:
            leader, n_equal = sequence.leader
            if n_equal > leader.cache.n_tokens:
                insort(leader.borders, (n_equal, BORDER))
        self._begun.append(sequence)
        return sequence

    def open_empty(self, ids: SequenceOf[int], layout: CacheLayout) -> Sequence:
        """A sequence that computes every one of its tokens, and shares none."""
        cache = SequenceCache(self.pools, layout, self._states)
        return Sequence(array("i", ids), len(ids), cache)

    def catch_up(self, sequence: Sequence) -> None:
        """Take over what others have computed meanwhile of the tokens it waits for."""
        if sequence.is_behind:
            sequence.is_behind = False
            sequence.leader = leader_of(sequence, self._begun)
            if all(each is not sequence for each in self._begun):
                self._begun.append(sequence)
        elif sequence.leader is None:
            return
        self._extend(sequence)

    def _extend(self, sequence: Sequence) -> None:
        """Go on with the longest beginning that the index knows, if it is longer than its own."""
        for each in self._begun:
            self._enter(each)
        if sequence.leader is not None and self._states is None:
            leader, n_equal = sequence.leader
            if leader.cache.n_tokens // PAGE == n_equal // PAGE:  # they part in its last page
                self._mark(leader, leader.cache.n_tokens, PLAIN)
        cache, most = sequence.cache, len(sequence.ids) - 1
        ids, before = array("i", sequence.ids), cache.n_tokens
        while most > before:
            match = self.index.find(cache.layout, ids, most, before)
            if not sequence.n_generated:
                sequence.miss = match.miss
            if match.n_tokens <= before:
                break
            if self._begin(sequence, match):
                if not sequence.n_generated:
                    sequence.n_cached += match.n_tokens - before
                break
            most = match.n_tokens - 1  # there is no page to copy its last one to
        if sequence.leader is not None and sequence.leader[1] <= cache.n_tokens:
            sequence.leader = None

    def _begin(self, sequence: Sequence, match: Match) -> bool:
        """Let a sequence go on behind a match; False where no page is left for a copy."""
        layout, n_full = sequence.cache.layout, len(match.path)
        pages: list[dict[int, int]] = []
        for group, pool in enumerate(self.pools):
            seen = layout.seen_pages(group, match.n_tokens)
            pages.append({i: match.path[i].held[group] for i in seen if i < n_full})
            for page in pages[-1].values():
                pool.share(page)
        state = -1
        if self._states is not None:
            state = (match.last or match.path[-1]).held[-1]
            self._states.share(state)
        if match.last is not None and not self._copy(match.last, n_full, pages):
            self._release(pages, state)
            return False
        sequence.cache.begin_at(match.n_tokens, pages, state)
        sequence.path = match.path
        self._touch(sequence, match)
        return True

    def _copy(self, node: Node, page: int, pages: list[dict[int, int]]) -> bool:
        """A copy of what is held of a node in each group, as an absolute page of `pages`."""
        for group, pool in enumerate(self.pools):
            source = node.held[group]
            pool.share(source)  # it must not be what is given up for its copy
            try:
                if not self._free(group, 1):
                    return False
                pages[group][page] = target = pool.take()
                self._program.copy_pages(group, [source], [target])
            finally:
                pool.release([source])
        return True

    def _release(self, pages: list[dict[int, int]], state: int) -> None:
        for pool, held in zip(self.pools, pages, strict=True):
            pool.release(held.values())
        if self._states is not None and state >= 0:
            self._states.release([state])

    def _touch(self, sequence: Sequence, match: Match) -> None:
        """Count what a sequence has begun with as used, the first of it last of all."""
        nodes = [*match.path, *([match.last] if match.last else [])]
        for group in range(len(self.pools)):
            for page in reversed(sequence.cache.layout.seen_pages(group, match.n_tokens)):
                if (held := nodes[page].held[group]) >= 0:
                    self._holdings[group].touch(held, PAGE)
        if self._states is not None:
            self._holdings[-1].touch(nodes[-1].held[-1], has_begun=True)
        sequence.n_marked = match.n_tokens

    # -- steps -----------------------------------------------------------------------------------

    def settle(self, sequence: Sequence) -> None:
        """Count what its last step has left; of all that run, before the next step holds any."""
        done = sequence.cache.n_tokens
        if self._states is not None or (sequence.borders and sequence.borders[0][0] <= done):
            self._pass_borders(sequence)
            sequence.cache.drop_states()

    def hold(self, sequence: Sequence, n_rows: int, n_drafts: int = 0) -> bool:
        """Hold what the next rows of a sequence are written to: False where that is not left.

        Until there is enough, what the index holds is given up. The last `n_drafts` rows may count
        as never computed.
        """
        cache = sequence.cache
        if cache.n_tokens + n_rows <= cache.room:
            return True
        cache.drop_states()
        missing = cache.missing(n_rows)
        while any(len(n) > pool.n_free for n, pool in zip(missing, self.pools, strict=True)):
            if not self._free_pages(cache, missing):
                return False
            missing = cache.missing(n_rows)
        if self._states is not None and not self._hold_states(sequence, n_rows, n_drafts):
            return False
        cache.grow(n_rows, missing)
        return True

    def _free(self, kind: int, n: int) -> bool:
        """Have n of a kind free, of what the index gives up; False where it holds too few."""
        while self._kinds[kind].n_free < n:
            if not self._holdings[kind].evict():
                return False
        return True

    def _free_pages(self, cache: SequenceCache, missing: list[list[int]]) -> bool:
        """Free a page of a group that lacks one, or make one that turns the cache's alone."""
        for group, (slots, pool) in enumerate(zip(missing, self.pools, strict=True)):
            if len(slots) > pool.n_free:
                turning = (int(cache.tables[group].pages[slot]) for slot in slots)
                held = self._holdings[group]
                return held.evict() or any(held.give_up(page) for page in turning)
        return True

    def _hold_states(self, sequence: Sequence, n_rows: int, n_drafts: int) -> bool:
        """Take slots for what may be gone on from, and for checkpoints while there are any."""
        assert self._states is not None
        kind, done = len(self.pools), sequence.cache.n_tokens
        end = done + n_rows
        needed = list(range(end - n_drafts, end + 1))
        if not self._free(kind, len(needed)):
            return False
        # All that have begun may need a slot in this step: what is kept beside must leave them.
        n_free = self._states.n_free - len(needed) - len(self._begun)
        n_spare = n_free + self.index.n_idle(kind) if sequence.borders else 0
        borders, within = (n for n, _ in sequence.borders), range(done + 1, end - n_drafts)
        beside = checkpoints(borders, within, n_spare, n_free)
        self._free(kind, len(needed) + len(beside))
        sequence.cache.keep_states([*needed, *beside])
        return True

    # -- what is left for others -----------------------------------------------------------------

    def _pass_borders(self, sequence: Sequence) -> None:
        """Enter what the last step has computed up to borders, and the states it has kept."""
        done = sequence.cache.n_tokens
        passed = list(takewhile(lambda border: border[0] <= done, sequence.borders))
        ends = {}
        if self._states is not None:
            counts = (*sequence.cache.kept, done)
            ends = {n: PLAIN for n in counts if 0 < n <= done and n % EVERY == 0}
        ends.update(passed)
        if not ends:
            return
        self._enter(sequence)
        for n_tokens, rank in sorted(ends.items()):
            self._mark(sequence, n_tokens, rank)
        del sequence.borders[: len(passed)]

    def _enter(self, sequence: Sequence) -> None:
        """Let the index hold the full pages of a sequence; of two equal ones one is kept."""
        cache, path = sequence.cache, sequence.path
        begin = len(path)
        for page in range(begin, cache.n_tokens // PAGE):
            above = path[-1] if path else self.index.root
            path.append(self.index.child(above, cache.layout, page, _page_ids(sequence, page)))
        for page in range(len(path) - 1, begin - 1, -1):
            self._enter_page(cache, path[page], page)
        if len(path) > begin:
            self._use(sequence, begin)

    def _enter_page(self, cache: SequenceCache, node: Node, page: int) -> None:
        for group in range(len(self.pools)):
            own, equal = cache.page(group, page), node.held[group]
            if own >= 0 and equal < 0:
                self._holdings[group].put(node, own, PAGE)
            elif own >= 0 and own != equal and node.is_full:  # else both may be written on
                cache.replace(group, page, equal)

    def _use(self, sequence: Sequence, n_pages: int) -> None:
        """Count the first pages of a path as used after those behind them: they go last."""
        for node in reversed(sequence.path[:n_pages]):
            for group, ring in enumerate(sequence.cache.layout.rings):
                if not ring.window and node.held[group] >= 0:
                    self._holdings[group].touch(node.held[group], PAGE)

    def _mark(self, sequence: Sequence, n_tokens: int, rank: int) -> None:
        """Hold what a prompt that goes on behind `n_tokens` needs, which have been entered."""
        cache, layout, n_full = sequence.cache, sequence.cache.layout, n_tokens // PAGE
        nodes = list(sequence.path[:n_full])
        if n_tokens % PAGE:
            above = nodes[-1] if nodes else self.index.root
            ids = _page_ids(sequence, n_full, n_tokens)
            nodes.append(self.index.child(above, layout, n_full, ids))
            self._enter_page(cache, nodes[-1], n_full)
        for group, ring in enumerate(layout.rings):
            is_dear = rank == STABLE or (ring.window and rank)  # all is lost without one of them
            saves = 4 * PAGE if is_dear else PAGE
            for page in reversed(layout.seen_pages(group, n_tokens)):
                if (held := nodes[page].held[group]) >= 0:
                    self._holdings[group].touch(held, saves, is_stable=rank == STABLE)
        slot = cache.state if n_tokens == cache.n_tokens else cache.kept.get(n_tokens, -1)
        if slot >= 0 and nodes[-1].held[-1] < 0:
            # It saves what was read since the last one at which prompts are likely to go on.
            saves = n_tokens - sequence.n_marked if rank else 0
            self.index.put_state(nodes, slot, saves, is_stable=rank == STABLE)
            sequence.n_marked = n_tokens if rank else sequence.n_marked

    # -- sessions --------------------------------------------------------------------------------

    def lend(self, ids: SequenceOf[int], layout: CacheLayout) -> Sequence:
        """A sequence that runs in no step, on what has been computed of all of `ids`."""
        guest = self.open_empty([*ids, 0], layout)  # of a last one nothing would be looked for
        self._extend(guest)
        self._guests.append(guest)  # last: of one that an error cuts short nobody is told
        return guest

    def receive(self, ids: SequenceOf[int], layout: CacheLayout) -> Sequence:
        """A sequence for what is about to be written; BusyError where pages are not left for it."""
        guest = self.open_empty(ids, layout)
        seen = [layout.seen_pages(group, len(ids)) for group in range(len(self.pools))]
        needed = [*map(len, seen), *([1] if self._states is not None else [])]
        if not all(self._free(kind, n) for kind, n in enumerate(needed)):
            raise BusyError(f"what runs leaves no room for a session of {len(ids)} tokens")
        pages = [
            {page: pool.take() for page in of_group}
            for pool, of_group in zip(self.pools, seen, strict=True)
        ]
        state = -1 if self._states is None else self._states.take()
        guest.cache.begin_at(len(ids), pages, state)
        self._guests.append(guest)
        return guest

    def dismiss(self, guest: Sequence, *, is_kept: bool) -> None:
        """End such a sequence, and have the index hold what it does."""
        self._guests = [each for each in self._guests if each is not guest]
        if is_kept:
            self.keep(guest)
        else:
            self.free(guest)

    # -- the end ---------------------------------------------------------------------------------

    def keep(self, sequence: Sequence) -> None:
        """End a sequence; what it has computed may serve later prompts while there is room."""
        self.park(sequence)

    def park(self, sequence: Sequence) -> None:
        """Give up what a sequence holds, but for others or its own return while there is room."""
        self._pass_borders(sequence)
        self._enter(sequence)
        if sequence.cache.n_tokens:
            self._mark(sequence, sequence.cache.n_tokens, BORDER)
        self.free(sequence)
        sequence.is_behind = True

    def free(self, sequence: Sequence) -> None:
        """Give back what a sequence holds, for nobody to go on with."""
        sequence.cache.free()
        sequence.path, sequence.n_marked = [], 0
        self.index.sweep(each.path[-1] for each in self._begun if each.path)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """It can't be shared any more; who follows it takes over what it has left."""
        self._begun = [each for each in self._begun if each is not sequence]
        self._leave_leaders()

    def _leave_leaders(self) -> None:
        """Nobody follows who is not shared any more: its pages may be others' by now."""
        for each in self._begun:
            if each.leader is not None and not any(each.leader[0] is one for one in self._begun):
                each.leader, each.is_behind = None, True

    def forget(self) -> bool:
        """Give up what the index holds; whether nobody holds anything then."""
        self.index.clear()
        return all(pool.n_free == pool.n_pages for pool in self._kinds)

    def most_rows(self) -> int:
        """Rows of a step, drafts among them, whose state there are slots for."""
        if self._states is None:
            return _NO_LIMIT
        return self._states.n_pages - sum(each.cache.state >= 0 for each in self._begun)

    def recover(self, used: Iterable[Sequence]) -> None:
        """Count anew who holds what, from the sequences in use and the index."""
        used = [*used, *self._guests]
        self._begun = [each for each in self._begun if any(each is one for one in used)]
        self._leave_leaders()
        held = self.index.recover()
        for group, pool in enumerate(self.pools):
            tables = (each.cache.tables[group].pages.tolist() for each in used)
            pool.reset([*tables, held[group]])
        if self._states is not None:
            self._states.reset([*(each.cache.slots for each in used), held[-1]])


def _page_ids(sequence: Sequence, page: int, end: int | None = None) -> bytes:
    """The key of an absolute page's tokens, of those before `end`."""
    stop = (page + 1) * PAGE
    return array("i", sequence.ids[page * PAGE : stop if end is None else min(end, stop)]).tobytes()
