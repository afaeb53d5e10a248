"""What a model's own block has guessed for one sequence, and how its guesses fare.

Knows nothing of models or steps.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST = 4  # guesses of a sequence for one step
# So many tokens of a large vocabulary make up most texts: byte pairs are numbered as they were
# merged, the commonest first. How much of this text they make up is counted.
SHORTLIST = 1 << 16
_PRIOR, _PRIOR_WEIGHT, _MEMORY = 0.6, 8.0, 0.95
_LATELY = 64  # tokens after which what came before them hardly counts


class Record:
    """How guesses have fared: of those at each place in a row of them, how many held."""

    def __init__(self, chances: SequenceOf[float] = (_PRIOR,) * MOST) -> None:
        """One that expects these, until guesses tell."""
        self._hits = [chance * _PRIOR_WEIGHT for chance in chances]
        self._tries = [_PRIOR_WEIGHT] * MOST

    def count(self, place: int, is_hit: bool) -> None:
        self._hits[place] = self._hits[place] * _MEMORY + is_hit
        self._tries[place] = self._tries[place] * _MEMORY + 1

    @property
    def chances(self) -> list[float]:
        """That a guess holds where all before it do."""
        return [hits / tries for hits, tries in zip(self._hits, self._tries, strict=True)]


@dataclass(slots=True, eq=False)
class Drafting:
    """What has been guessed for one sequence, and how that fares."""

    tokens: list[int] = field(default_factory=list)  # for the places from `at` on
    at: int = 0
    pending: NDArray[np.float32] | None = None  # the hidden row of a place that had no page yet
    is_off: bool = False  # it did not pay
    record: Record = field(default_factory=Record)
    is_new: bool = True  # nothing has been guessed for it
    is_short: bool = False  # the tokens were picked from the shortlist
    listed: float = 0.9  # of the tokens of late, how many that holds

    def guess(self, at: int, n: int) -> tuple[list[int], list[float]]:
        """Up to n tokens from a place on, and the chance of each that it is reached and right."""
        tokens = self.tokens[: max(0, n)] if at == self.at else []
        return tokens, self.chances(is_short=self.is_short)[: len(tokens)]

    def chances(self, *, is_short: bool) -> list[float]:
        """That each of a row of guesses is reached and right."""
        share = self.listed if is_short else 1.0
        return list(accumulate([share * each for each in self.record.chances], operator.mul))

    def learn(self, ids: SequenceOf[int], *records: Record) -> None:
        """Count the guesses for places that have their tokens now, up to the first that failed.

        A token that could not be guessed tells nothing about the block.
        """
        for token in ids[max(self.at, len(ids) - 4 * _LATELY) :]:
            self.listed += ((token < SHORTLIST) - self.listed) / _LATELY
        for i, token in enumerate(self.tokens):
            if self.at + i >= len(ids) or (self.is_short and ids[self.at + i] >= SHORTLIST):
                break
            is_hit = ids[self.at + i] == token
            for record in (self.record, *records):
                record.count(i, is_hit)
            if not is_hit:
                break
        self.tokens = []
