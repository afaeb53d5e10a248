"""The pages of all sequences: whose they are, and what of those that have ended is kept.

Used by one thread; knows nothing of scheduling.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from edgeinfer.batch import StepLimits
from edgeinfer.engine.cache import CacheLayout, PagePool, SequenceCache
from edgeinfer.engine.sequence import Sequence


class CacheStore:
    """Opens the cache of a sequence, and keeps those of ended ones while nobody needs the room.

    What an error cuts short here is made good by `recover`: the sequences' page tables are the
    truth, and which pages are free follows from them.
    """

    def __init__(self, limits: StepLimits) -> None:
        self.pools = [PagePool(n_pages) for n_pages in limits.n_pages.values()]
        self.ended: list[Sequence] = []  # the latest last
        self._most_ended = limits.max_sequences

    @property
    def n_pages(self) -> list[int]:
        """All pages there are of each cache group."""
        return [pool.n_pages for pool in self.pools]

    def open(self, ids: SequenceOf[int], layout: CacheLayout) -> Sequence:
        """A sequence for a prompt, on the cache of an ended one where their tokens agree."""
        n_cached, best = 0, None
        for ended in self.ended:
            n = ended.common_prefix(ids, layout)
            if n > n_cached:
                n_cached, best = n, ended
        if best is None:
            return self.open_empty(ids, layout)
        self.ended.remove(best)
        best.cache.truncate(n_cached)
        return Sequence(list(ids), len(ids), best.cache, n_cached)

    def open_empty(self, ids: SequenceOf[int], layout: CacheLayout) -> Sequence:
        """A sequence that computes every one of its tokens."""
        return Sequence(list(ids), len(ids), SequenceCache(self.pools, layout))

    def hold(self, sequence: Sequence, n_rows: int) -> bool:
        """Hold the pages for the next rows of a sequence: False where that many are not left.

        Until there are, what has ended gives its pages, the oldest first.
        """
        missing = sequence.cache.missing(n_rows)
        n_new = [len(slots) for slots in missing]
        while not self._has(n_new):
            if not self.ended:
                return False
            self.ended.pop(0).cache.free()
        sequence.cache.grow(n_rows, missing)
        return True

    def _has(self, n_pages: SequenceOf[int]) -> bool:
        return all(n <= pool.n_free for n, pool in zip(n_pages, self.pools, strict=True))

    def keep(self, sequence: Sequence, *, is_whole: bool) -> None:
        """End a sequence, whose pages a later prompt may begin with.

        It is not whole where its last step may have been aborted.
        """
        cache = sequence.cache
        # An aborted step may have overwritten pages that a slid cache still needs.
        if not is_whole and cache.is_full:
            cache.free()
            return
        cache.truncate(cache.n_tokens)  # a page of failed drafts only
        self.ended.append(sequence)
        if len(self.ended) > self._most_ended:
            self.ended.pop(0).cache.free()

    def free(self, sequence: Sequence) -> None:
        """Give back what a sequence holds; it may go on, from its first token."""
        sequence.cache.free()

    def recover(self, used: Iterable[Sequence]) -> None:
        """Count anew who holds what, from the sequences in use and those that have ended."""
        caches = [sequence.cache for sequence in used]
        self.ended = [each for each in self.ended if each.cache not in caches]
        caches += [each.cache for each in self.ended]
        for i, pool in enumerate(self.pools):
            pool.reset(cache.tables[i].pages.tolist() for cache in caches)
