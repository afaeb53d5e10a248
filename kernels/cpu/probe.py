"""Compares schedules on the steps of generations themselves: what else a machine does changes.

What was found in a quiet minute is wrong in a busy one, and the other way round. Now and then a
step runs by another schedule than its neighbour before it; the results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_LEAST_WAIT, _MOST_WAIT = 4, 256  # steps from one comparison to the next
_PAIRS = 4
_GAIN, _LOSS = 0.97, 1.1  # of the time: by less it may be chance, by more it is none


class Probes(Generic[T]):
    """Which of some schedules the next step takes; `current` is the fastest so far.

    A schedule is compared in pairs of neighbouring steps of as many rows. Two pairs that are
    clearly lost end it; it takes the place of the current one by the median of several.
    """

    def __init__(self, known: Sequence[T], current: T) -> None:
        self.current = current
        self._known = list(known)
        self._rival = 0  # its place in `known`
        self._interval = self._wait = _LEAST_WAIT
        self._before: tuple[int, float] | None = None  # rows and seconds of the step before
        self._ratios: list[float] = []

    def next(self, n_rows: int) -> T:
        """The schedule of a step."""
        is_pair = self._before is not None and self._before[0] == n_rows
        return self._known[self._rival] if self._wait <= 0 and is_pair else self.current

    def took(self, schedule: T, n_rows: int, seconds: float) -> bool:
        """A step has run as `next` said. Whether `current` is another one now."""
        before, self._before = self._before, None
        if schedule == self.current:
            self._wait -= 1
            self._before = n_rows, seconds
            if self._known[self._rival] == self.current:
                self._take_next()
            return False
        if before is None or schedule != self._known[self._rival]:
            return False
        self._ratios.append(seconds / before[1])
        return self._judge()

    def _judge(self) -> bool:
        ratios = sorted(self._ratios)
        is_lost = sum(ratio > _LOSS for ratio in ratios) > 1
        if not is_lost and len(ratios) < _PAIRS:
            return False
        middle = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
        is_won = not is_lost and middle < _GAIN
        if is_won:
            self.current = self._known[self._rival]
            self._interval = _LEAST_WAIT
        self._ratios.clear()
        self._wait = self._interval
        self._take_next()
        return is_won

    def _take_next(self) -> None:
        """The next one to compare; after all of them the intervals grow."""
        self._rival += 1
        if self._rival == len(self._known):
            self._rival = 0
            self._interval = min(2 * self._interval, _MOST_WAIT)
