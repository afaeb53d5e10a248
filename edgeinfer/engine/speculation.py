"""Guesses the next tokens from what a sequence already holds, and when guessing pays.

Knows nothing of logits or caches. A guess is checked by the sampler itself, so it changes the
time a token takes and nothing else.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgeinfer.engine.step_costs import StepCosts

MAX_ROWS = 8  # of one sequence in a step: its next token and up to 7 guessed ones

_GRAM = 2  # tokens that must agree for a match; below it the last token alone may tell
_MAX_MATCH = 16  # longer matches count as this long
_MAX_CANDIDATES = 8  # earlier places that are compared, latest first
_BUCKETS = 1 << 14

_MAX_LEAD = 4


class Evidence:
    """What speaks for a guess, the worst first; a match of n tokens is PAIR + n - 2."""

    NONE = 0
    DISPUTED = 1  # the last token was followed by this and other tokens alike
    REPLACED = 2  # a match has just ended: as if one token of it were another now
    ONCE = 3  # the last token was followed by this, the one time that it was there
    OFTEN = 4  # ... by this more than by any other
    PAIR = 5  # the last two tokens were
    LONGEST = PAIR + _MAX_MATCH - _GRAM


class Lookup:
    """Where the latest tokens occurred before; a token takes constant time and 4 bytes.

    A chain links the places whose last two tokens fall into one bucket. Where no two tokens match,
    the guess is what followed the last one mostly, or the place at which a match just ended.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens  # the caller's, which grows
        self._heads = array("i", [-1]) * _BUCKETS
        self._previous = array("i")
        # By token: the latest place of what followed it mostly, and by how many times it leads.
        self._followers = array("i", [0]) * _BUCKETS
        self._leads = bytearray(_BUCKETS)
        self._follows, self._evidence = 0, Evidence.NONE
        for _ in range(len(tokens) - 1):
            self._link()
        self.push()

    def push(self) -> None:
        """Take in the next of the tokens that were appended."""
        end = len(self._previous)
        candidate = self._link()
        missed, was_match = self._follows, self._evidence >= Evidence.PAIR
        longest = 0
        for _ in range(_MAX_CANDIDATES):
            if candidate < 0:
                break
            n = self._agreement(candidate, end)
            if n >= _GRAM and n > longest:
                self._follows, longest = candidate + 1, n
            candidate = self._previous[candidate]
        if longest:
            self._evidence = Evidence.PAIR + longest - _GRAM
            return
        bucket = self._tokens[end] % _BUCKETS
        place = self._followers[bucket]
        if place and self._tokens[place - 1] == self._tokens[end]:
            self._follows, self._evidence = place, _LEADS[self._leads[bucket]]
        elif was_match and missed + 1 < end:
            self._follows, self._evidence = missed + 1, Evidence.REPLACED
        else:
            self._evidence = Evidence.NONE

    def find(self, n: int) -> tuple[int, list[int]]:
        """The evidence of the best guess, 0 for none, and its next `n` tokens."""
        if not self._evidence:
            return Evidence.NONE, []
        # A match that overlaps its own end repeats.
        period = len(self._previous) - self._follows
        return self._evidence, [self._tokens[self._follows + i % period] for i in range(n)]

    def _link(self) -> int:
        """Enter the next token; the latest place before it that may match, or -1."""
        end = len(self._previous)
        before = -1
        if end:
            before = self._tokens[end - 1]
            self._vote(before, end)
        bucket = (before * 0x9E3779B1 ^ self._tokens[end] * 0x85EBCA6B) >> 7 & _BUCKETS - 1
        place = self._heads[bucket]
        self._previous.append(place)
        self._heads[bucket] = end
        return place

    def _vote(self, token: int, place: int) -> None:
        """`token` is followed by what is at `place`: a lead grows, or shrinks until it is lost."""
        tokens, bucket = self._tokens, token % _BUCKETS
        leader, lead = self._followers[bucket], self._leads[bucket]
        if not leader or tokens[leader - 1] != token:
            lead = 1
        elif tokens[leader] == tokens[place]:
            lead = min(lead + 1, _MAX_LEAD)
        elif lead > 1:
            self._leads[bucket] = lead - 1
            return
        else:
            lead = 0
        self._followers[bucket], self._leads[bucket] = place, lead

    def _agreement(self, a: int, b: int) -> int:
        """How many tokens up to a and up to b agree."""
        tokens, n = self._tokens, 0
        while n < _MAX_MATCH and n <= a and tokens[a - n] == tokens[b - n]:
            n += 1
        return n


_LEADS = (Evidence.DISPUTED, Evidence.ONCE, *[Evidence.OFTEN] * (_MAX_LEAD - 1))  # evidence by lead

# Matches of similar length share an estimate; those of recorded answers to begin with.
_PRIOR = (0.0, 0.11, 0.2, 0.3, 0.52, 0.46, 0.6, 0.7, 0.78, 0.84, 0.88, 0.95)  # by level
_LEVELS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 9, 9, 10, 10, 10, 10, 10, 10, 11)  # by evidence
_PRIOR_WEIGHT = 8.0
_MEMORY = 0.97  # of a count, per later one: about the last 30 matter
_LONG_MEMORY = 0.99  # about 100: of all answers


@dataclass(slots=True)
class Acceptance:
    """How often the token after a guess's evidence was the sampled one.

    Every guessable token is counted, guessed in a step or not: so it costs nothing to see
    that guesses have begun, or stopped, to come true.
    """

    hits: list[float] = field(default_factory=lambda: [w * _PRIOR_WEIGHT for w in _PRIOR])
    tries: list[float] = field(default_factory=lambda: [_PRIOR_WEIGHT] * len(_PRIOR))
    memory: float = _MEMORY

    @classmethod
    def of_all(cls) -> Acceptance:
        """How the guesses of all answers fare."""
        return cls(memory=_LONG_MEMORY)

    def expected(self) -> Acceptance:
        """That of a new answer, whose guesses may fare as those before until they tell."""
        pairs = zip(self.hits, self.tries, strict=True)
        return Acceptance([hits / tries * _PRIOR_WEIGHT for hits, tries in pairs])

    def count(self, evidence: int, is_hit: bool) -> None:
        level = _LEVELS[evidence]
        self.hits[level] = self.hits[level] * self.memory + is_hit
        self.tries[level] = self.tries[level] * self.memory + 1

    def chances(self, evidence: int, n: int) -> list[float]:
        """For each of n guesses, that it and all before it come true."""
        chances, chance = [], 1.0
        for _ in range(n):
            level = _LEVELS[evidence]
            chance *= self.hits[level] / self.tries[level]
            chances.append(chance)
            # Once right, two tokens match, then three.
            evidence = min(max(evidence + 1, Evidence.PAIR), Evidence.LONGEST)
        return chances


class Speculator:
    """Guesses for one sequence, and how they fare; `of_all` counts those of all sequences."""

    def __init__(self, tokens: Sequence[int], of_all: Acceptance) -> None:
        self._tokens, self._lookup = tokens, Lookup(tokens)
        self._acceptance, self._of_all = of_all.expected(), of_all

    def guess(self, n: int) -> tuple[list[int], list[float]]:
        """Up to `n` tokens, and the chance of each that it is reached and right."""
        evidence, tokens = self._lookup.find(max(0, n))
        return tokens, self._acceptance.chances(evidence, len(tokens))

    def learn(self, n_new: int) -> None:
        """`n_new` tokens were appended."""
        for end in range(len(self._tokens) - n_new, len(self._tokens)):
            evidence, guessed = self._lookup.find(1)
            if guessed:
                is_hit = guessed[0] == self._tokens[end]
                self._acceptance.count(evidence, is_hit)
                self._of_all.count(evidence, is_hit)
            self._lookup.push()


def best_drafts(guesses: Sequence[Sequence[float]], costs: StepCosts, most: int) -> list[int]:
    """How many guesses of each sequence to check so that tokens per second are the most.

    `guesses` are their chances, falling within a sequence; `most` is the most rows in the step.
    """
    n = len(guesses)
    ranked = sorted(
        ((chance, i) for i, chances in enumerate(guesses) for chance in chances), reverse=True
    )[: max(0, most - n)]
    plain = n / costs.of(n)
    best, best_rate, expected = 0, plain * _LEAST_GAIN, float(n)
    for taken, (chance, _) in enumerate(ranked, 1):
        expected += chance
        rate = expected / costs.of(n + taken)
        if rate > best_rate:
            best, best_rate = taken, rate
    drafts = [0] * n
    for _, i in ranked[:best]:
        drafts[i] += 1
    return drafts


_LEAST_GAIN = 1.05  # what an estimate may be wrong by
