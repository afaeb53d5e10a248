"""Behind which tokens the state of recurrent layers is kept for prompts to come.

Knows nothing of slots but how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from edgeinfer.batch import PAGE

EVERY = 16 * PAGE  # tokens, where nobody has asked for any and slots are free


def checkpoints(borders: Iterable[int], within: range, n_spare: int, n_free: int) -> list[int]:
    """Numbers of tokens, of those that a step ends a row behind.

    Borders, the most wanted first: one stands there once for each sequence that parts at it. They
    may take `n_spare` slots, those of older checkpoints among them, and all others `n_free`.
    """
    wanted = [n for n, _ in Counter(n for n in borders if n in within).most_common()]
    chosen = wanted[: max(0, n_spare)]
    n_left = n_free - len(chosen)
    if n_left <= 0:
        return chosen
    first = -(-within.start // EVERY) * EVERY
    return chosen + [n for n in range(first, within.stop, EVERY) if n not in chosen][-n_left:]
