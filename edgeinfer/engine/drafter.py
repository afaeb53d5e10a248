"""Guesses tokens with the block that a model brings for that (MTP), after each of its steps.

A guess is checked by the sampler itself, so all that is here changes the time a token takes and
nothing else: what the block's cache lacks or has wrong costs guesses, never an answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeinfer.backend import Drafts, GuessesOn, Program
from edgeinfer.batch import PAGE, Batch, Outputs, StepLimits
from edgeinfer.draft import rows_layer
from edgeinfer.engine.drafting import MOST, SHORTLIST, Drafting, Record
from edgeinfer.engine.generation import Generation
from edgeinfer.engine.sequence import Rows, Sequence
from edgeinfer.engine.step_costs import StepCosts
from edgeinfer.ops import Linear
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
        shares: Mapping[bool, float],
    ) -> None:
        """The block reads a share of what the model reads, and less where it `is_short`, if known.

        Where it is, it makes no more logits than those of the shortlist.
        """
        self._program, self._layer, self._group = program, layer, group
        self._limits, self._costs = limits, costs
        self._shares, self.has_failed = shares, False
        self._seconds = dict.fromkeys(shares, 0.0)  # of a step that guesses, once measured
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
        shares = {False: block.step_weight_bytes / program.step_weight_bytes}
        if segment.draft.output.dim >= 2 * SHORTLIST:
            shares[True] = shares[False] * _short_share(segment.draft)
        group = list(segment.groups).index(window)
        return cls(block, rows_layer(segment), group, limits, costs, shares)

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
        n_guesses, is_short = self._choose([each.work.drafting for each in decoding])
        if decoding and not n_guesses:
            for each in decoding:
                each.work.drafting.is_off = True
        wanted = decoding[: self._limits.max_sequences] if n_guesses else []
        n_logits = SHORTLIST if is_short else 0
        while True:
            n = self._n_at_once(wanted, n_guesses)
            begun = time.perf_counter()
            tokens, hidden = self._run(followers, wanted, n, n_logits, goes_on=n < n_guesses)
            if n > 1 or followers is wanted:  # else it fills the cache, mostly
                self._measure(is_short, (time.perf_counter() - begun) / n)
            for each, *its in zip(wanted, *tokens, strict=True):
                each.work.drafting.tokens += its
                each.work.drafting.is_short = is_short
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

    def _choose(self, states: list[Drafting]) -> tuple[int, bool]:
        """How many guesses of each make most tokens a second, and whether from the shortlist.

        Each costs a step of the block.
        """
        n, best = len(states), (0, False)
        if not n:
            return best
        best_rate = n / self._costs.of(n) * _LEAST_GAIN
        steps = [self._costs.of(n * (k + 1)) for k in range(1, MOST + 1)]
        for is_short, share in self._shares.items():
            seconds = self._seconds[is_short] or self._costs.of(1) * share
            chances = [state.chances(is_short=is_short) for state in states]
            expected = float(n)
            for k in range(1, MOST + 1):
                expected += sum(each[k - 1] for each in chances)
                rate = expected / (steps[k - 1] + k * seconds)
                if rate > best_rate:
                    best, best_rate = (k, is_short), rate
        return best

    def _measure(self, is_short: bool, seconds: float) -> None:
        before = self._seconds[is_short] or seconds
        self._seconds[is_short] = before + _RATE * (min(seconds, 4 * before) - before)

    def _run(
        self,
        followers: list[_Follower],
        wanted: list[_Follower],
        n: int,
        n_logits: int,
        *,
        goes_on: bool,
    ) -> tuple[list[list[int]], NDArray[np.float32]]:
        """Fill the cache for followers; n guesses of each that is wanted, one list for each of n.

        They are among the first `n_logits` tokens, or 0: all. And the hidden rows from which a
        step more `goes_on`.
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
            n_logits=n_logits,
        )
        if isinstance(self._program, GuessesOn):
            guesses, rows = self._program.guess(batch, n)
            return guesses.tolist(), rows
        outputs = self._program.submit(batch).wait()
        return [outputs.logits.argmax(axis=1).tolist()], outputs.hidden.copy()


def _short_share(block: Segment) -> float:
    """Of the matrices that a block reads, about, where its head makes the shortlist's logits."""
    sizes = [op.weight.n_elements for op in block.ops if isinstance(op, Linear)]
    return 1 - sizes[-1] * (1 - SHORTLIST / block.output.dim) / sum(sizes)


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
