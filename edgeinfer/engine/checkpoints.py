"""Behind which tokens what rings and recurrent layers lose is kept for prompts to come.

Knows nothing of slots but how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from edgeinfer.batch import PAGE

EVERY = 16 * PAGE  # tokens, where nobody has asked for any and slots are free
# Whom something is held for: nobody that is known, prompts that are likely to part there, those
# that were said to go on there.
PLAIN, BORDER, STABLE = range(3)


def borders_of(
    n_prompt: int, borders: Iterable[int] | None, n_stable: int
) -> list[tuple[int, int]]:
    """Numbers of a prompt's tokens behind which something is held, and how dear that is.

    `borders` are where later prompts may part from it, None where nothing is lost behind them; what
    is kept of the first `n_stable` tokens is the last to be given up.
    """
    ends = {}
    if borders is not None:
        # The same prompt once more needs its last token's logits.
        ends = {n: BORDER for n in (*borders, n_prompt - 1) if 0 < n < n_prompt}
    if 0 < n_stable <= n_prompt:
        ends[n_stable] = STABLE
    return sorted(ends.items())


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
