"""A store in which no sequence goes on from what another has computed: to measure reuse against."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from edgeinfer.engine.cache import CacheLayout
from edgeinfer.engine.cache_store import CacheStore
from edgeinfer.engine.sequence import Sequence


class UnsharedStore(CacheStore):
    """Every sequence computes each of its tokens, and leaves nothing behind."""

    def open(
        self,
        ids: SequenceOf[int],
        layout: CacheLayout,
        borders: Iterable[int] = (),
        n_stable: int = 0,
    ) -> Sequence:
        """A sequence for a prompt; where prompts part is of no use here."""
        sequence = self.open_empty(ids, layout)
        self._begun.append(sequence)
        return sequence

    def catch_up(self, sequence: Sequence) -> None:
        """It comes back with nothing after it gave way."""
        if sequence.is_behind:
            sequence.is_behind = False
            self._begun.append(sequence)

    def settle(self, sequence: Sequence) -> None:
        sequence.cache.drop_states()

    def park(self, sequence: Sequence) -> None:
        """Give back what it holds; if it returns it computes all of it again."""
        self.free(sequence)
        sequence.is_behind = True
