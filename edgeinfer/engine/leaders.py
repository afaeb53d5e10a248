"""Who computes the beginning of a prompt for others: of two that run it is computed once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from edgeinfer.batch import PAGE
from edgeinfer.engine.sequence import Sequence

_STRIDE = 256  # tokens that are compared at a time


def leader_of(sequence: Sequence, others: Iterable[Sequence]) -> tuple[Sequence, int] | None:
    """Who of the others has most of the tokens that a sequence begins with, and how many."""
    found, most = None, 0
    layout, n_needed = sequence.cache.layout, len(sequence.ids) - 1
    for other in others:
        n_alike = n_needed
        if other.cache.layout != layout:
            n_alike = min(n_needed, PAGE * min(layout.n_alike, other.cache.layout.n_alike))
        if other is not sequence:
            n = _n_equal(other.ids, sequence.ids, n_alike)
            if n > most:
                found, most = (other, n), n
    return found


def waits(sequence: Sequence, read: SequenceOf[Sequence]) -> bool:
    """Whether one of those that read their prompts in this step computes what it needs next.

    Then it pays to wait. The few tokens in whose page two part are computed twice.
    """
    if sequence.leader is None:
        return False
    leader, n_equal = sequence.leader
    at, done = leader.cache.n_tokens, sequence.cache.n_tokens
    if not any(each is leader for each in read) or not done <= at < n_equal:
        return False
    if sequence.cache.has_state:
        return any(done < n <= n_equal for n, _ in leader.borders)
    return n_equal // PAGE > done // PAGE


def _n_equal(a: array[int], b: array[int], most: int) -> int:
    """How many tokens two lists begin with alike, at most `most`."""
    n, most = 0, min(len(a), len(b), most)
    while n < most and a[n : n + _STRIDE] == b[n : n + _STRIDE]:
        n += _STRIDE
    return next((i for i in range(n, most) if a[i] != b[i]), most)
