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
_PRIOR, _PRIOR_WEIGHT, _MEMORY = 0.6, 8.0, 0.95


@dataclass(slots=True, eq=False)
class Drafting:
    """What has been guessed for one sequence, and how that fares."""

    tokens: list[int] = field(default_factory=list)  # for the places from `at` on
    at: int = 0
    pending: NDArray[np.float32] | None = None  # the hidden row of a place that had no page yet
    is_off: bool = False  # it did not pay
    hits: list[float] = field(default_factory=lambda: [_PRIOR * _PRIOR_WEIGHT] * MOST)
    tries: list[float] = field(default_factory=lambda: [_PRIOR_WEIGHT] * MOST)

    def guess(self, at: int, n: int) -> tuple[list[int], list[float]]:
        """Up to n tokens from a place on, and the chance of each that it is reached and right."""
        tokens = self.tokens[: max(0, n)] if at == self.at else []
        return tokens, self.chances[: len(tokens)]

    @property
    def chances(self) -> list[float]:
        chances = [hit / n for hit, n in zip(self.hits, self.tries, strict=True)]
        return list(accumulate(chances, operator.mul))

    def learn(self, ids: SequenceOf[int]) -> None:
        """Count the guesses for places that have their tokens now, up to the first that failed."""
        for i, token in enumerate(self.tokens):
            if self.at + i >= len(ids):
                break
            is_hit = ids[self.at + i] == token
            self.hits[i] = self.hits[i] * _MEMORY + is_hit
            self.tries[i] = self.tries[i] * _MEMORY + 1
            if not is_hit:
                break
        self.tokens = []
