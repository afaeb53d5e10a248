"""Guesses tokens with the block that a model brings for that (MTP), after each of its steps.

A guess is checked by the sampler itself, so all that is here changes the time a token takes and
nothing else: what the block's cache lacks or has wrong costs guesses, never an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeinfer.backend import Drafts, GuessesOn, Program
from edgeinfer.batch import PAGE, Batch, Outputs, StepLimits
from edgeinfer.draft import rows_layer
from edgeinfer.engine.drafting import MOST, Drafting, Record
from edgeinfer.engine.generation import Generation
from edgeinfer.engine.sequence import Rows, Sequence
from edgeinfer.engine.step_costs import StepCosts
from edgeinfer.segment import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAST_GAIN = 1.02  # what an estimate may be wrong by
_RATE = 0.1  # at which measured seconds are followed
_RETRY = 16  # of so many answers one is guessed for as if nothing were known


class _Follower(NamedTuple):
    """A sequence, and the rows that the block computes of it next."""

    work: Generation
    first: int  # place of the first row
    hidden: list[NDArray[np.float32]]  # of the places before
    is_next: bool  # whether the last row tells what follows the sequence


class Drafter:
    """Runs the block of a program, in the engine's thread between its steps."""

    def __init__(
        self,
        program: Program,
        layer: int,
        group: int,
        limits: StepLimits,
        costs: StepCosts,
        share: float,
    ) -> None:
        """The block reads a `share` of the weights that the model reads."""
        self._program, self._layer, self._group = program, layer, group
        self._limits, self._costs = limits, costs
        self._share, self.has_failed = share, False
        self._seconds = 0.0  # of a step that guesses, once measured
        self._record, self._n_answers = Record(), 0  # of all answers; what a new one starts from
        self._starts: list[int] = []  # the places of the first rows of a step's parts

    @classmethod
    def of(
        cls, program: Program, segment: Segment | None, limits: StepLimits, costs: StepCosts
    ) -> Drafter | None:
        """For a program that has a block beside it."""
        block = program.draft if isinstance(program, Drafts) else None
        if block is None or segment is None or segment.draft is None:
            return None
        (window,) = segment.draft.groups
        share = block.step_weight_bytes / program.step_weight_bytes
        group = list(segment.groups).index(window)
        return cls(block, rows_layer(segment), group, limits, costs, share)

    def ask(self, batch: Batch, parts: SequenceOf[Rows]) -> None:
        """Have a step of the model yield what the block starts from."""
        self._starts = [part.sequence.cache.n_tokens for part in parts]
        if not self.has_failed and any([_follows(part) for part in parts]):
            batch.residuals = (*batch.residuals, self._layer)

    def follow(self, parts: SequenceOf[Rows], outputs: Outputs) -> None:
        """Fill the block's cache for what a step has computed, and guess what comes next.

        A fault ends its guesses and nothing else.
        """
        if self._layer not in outputs.residuals or self.has_failed:
            return
        try:
            self._follow(parts, outputs)
        except BaseException:
            self.has_failed = True

    def _follow(self, parts: SequenceOf[Rows], outputs: Outputs) -> None:
        rows, first, n_left = outputs.residuals[self._layer], 0, self._limits.max_rows
        followers = list[_Follower]()
        for part, start in zip(parts, self._starts, strict=True):
            if _follows(part):
                self._learn(part)
                found = _follower(part, start, rows[first : first + part.n], self._group)
                if found is not None and len(found.hidden) <= n_left:
                    followers.append(found)
                    n_left -= len(found.hidden)
            first += part.n
        if followers:
            self._guess(followers)

    def _learn(self, part: Rows) -> None:
        """Count how the last guesses have fared; of a new answer's the others' are expected."""
        assert isinstance(part.work, Generation)
        state = part.work.drafting
        if state.is_new:
            state.is_new = False
            self._n_answers += 1
            if self._n_answers % _RETRY:
                state.record = Record(self._record.chances)
        state.learn(part.sequence.ids, self._record)
        state.at = len(part.sequence.ids)

    def _guess(self, followers: list[_Follower]) -> None:
        decoding = [each for each in followers if each.is_next]
        n_guesses = self._n_guesses([each.work.drafting for each in decoding])
        if decoding and not n_guesses:
            for each in decoding:
                each.work.drafting.is_off = True
        wanted = decoding[: self._limits.max_sequences] if n_guesses else []
        while True:
            n = self._n_at_once(wanted, n_guesses)
            begun = time.perf_counter()
            tokens, hidden = self._run(followers, wanted, n, goes_on=n < n_guesses)
            if n > 1 or followers is wanted:  # else it fills the cache, mostly
                self._measure((time.perf_counter() - begun) / n)
            for each, *its in zip(wanted, *tokens, strict=True):
                each.work.drafting.tokens += its
            n_guesses -= n
            kept = [i for i, each in enumerate(wanted) if _has_page(each, self._group, n - 1)]
            if not kept or n_guesses < 1:
                return
            followers = wanted = [
                wanted[i]._replace(first=_end(wanted[i]) + n - 1, hidden=[hidden[i]]) for i in kept
            ]

    def _n_at_once(self, wanted: list[_Follower], most: int) -> int:
        """How many guesses of each the block makes before any of them is looked at."""
        if not isinstance(self._program, GuessesOn):
            return 1
        n = 1
        while n < most and all([_has_page(each, self._group, n - 1) for each in wanted]):
            n += 1
        return n

    def _n_guesses(self, states: list[Drafting]) -> int:
        """How many guesses of each make most tokens a second: each costs a step of the block."""
        n = len(states)
        if not n:
            return 0
        seconds = self._seconds or self._costs.of(1) * self._share
        best, best_rate, expected = 0, n / self._costs.of(n) * _LEAST_GAIN, float(n)
        for k in range(1, MOST + 1):
            expected += sum(state.chances[k - 1] for state in states)
            rate = expected / (self._costs.of(n * (k + 1)) + k * seconds)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def _measure(self, seconds: float) -> None:
        before = self._seconds or seconds
        self._seconds = before + _RATE * (min(seconds, 4 * before) - before)

    def _run(
        self, followers: list[_Follower], wanted: list[_Follower], n: int, *, goes_on: bool
    ) -> tuple[list[list[int]], NDArray[np.float32]]:
        """Fill the cache for followers; n guesses of each that is wanted, one list for each of n.

        And the hidden rows from which a step more `goes_on`.
        """
        counts = [len(each.hidden) for each in followers]
        ends = np.cumsum(counts)
        ids, pos = list[int](), list[int]()
        for each in followers:
            known = [*_sequence(each).ids, *each.work.drafting.tokens]
            places = range(each.first, _end(each))
            ids += [known[place] for place in places]
            pos += places
        batch = Batch(
            ids=np.array(ids, np.int32),
            pos=np.array(pos, np.int64),
            seq=np.repeat(np.arange(len(followers), dtype=np.int32), counts),
            tables=[(_sequence(each).cache.tables[self._group],) for each in followers],
            wanted=np.array(
                [end - 1 for each, end in zip(followers, ends, strict=True) if each in wanted],
                np.int32,
            ),
            hidden=np.stack([row for each in followers for row in each.hidden]),
            with_hidden=goes_on,
        )
        if isinstance(self._program, GuessesOn):
            guesses, rows = self._program.guess(batch, n)
            return guesses.tolist(), rows
        outputs = self._program.submit(batch).wait()
        return [outputs.logits.argmax(axis=1).tolist()], outputs.hidden.copy()


def _follows(part: Rows) -> bool:
    work = part.work
    if not isinstance(work, Generation) or work.sequence is None:
        return False
    return work.can_guess and not work.drafting.is_off


def _follower(part: Rows, start: int, rows: NDArray[np.float32], group: int) -> _Follower | None:
    """The rows of the block behind those of a step: each has the token after its model's row."""
    work, sequence = part.work, part.sequence
    assert isinstance(work, Generation)
    state = work.drafting
    n = sequence.cache.n_tokens - start
    hidden = [row.copy() for row in rows[:n]] if n == 1 else list(rows[:n])
    first = start + 1
    if state.pending is not None and start:
        hidden, first, state.pending = [state.pending, *hidden], start, None
    end = min(first + len(hidden), len(sequence.ids))
    table = sequence.cache.tables[group]
    while end > first and table.pages[table.slot((end - 1) // PAGE)] < 0:
        end -= 1
    if end == first + len(hidden) - 1:
        state.pending = hidden[-1].copy()
    if end <= first:
        return None
    is_next = end == len(sequence.ids) and sequence.n_waiting == 1
    return _Follower(work, first, hidden[: end - first], is_next)


def _sequence(each: _Follower) -> Sequence:
    sequence = each.work.sequence
    assert sequence is not None
    return sequence


def _end(each: _Follower) -> int:
    return each.first + len(each.hidden)


def _has_page(each: _Follower, group: int, n_further: int) -> bool:
    """Whether there is one for the place behind its rows, or for one further on."""
    table = _sequence(each).cache.tables[group]
    return bool(table.pages[table.slot((_end(each) + n_further) // PAGE)] >= 0)
