"""How well a model predicts a text, in chunks, so that a text of any length can be measured.

Knows nothing of files or of text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeinfer.engine.cache import Overflow
from edgeinfer.engine.engine import Engine
from edgeinfer.errors import EdgeInferError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-probability of `tokens` predicted tokens."""

    ppl: float
    tokens: int


def measure(
    engine: Engine,
    ids: Sequence[int],
    bos_id: int | None,
    progress: Callable[[int, int], None] | None = None,
    *,
    last: int | None = None,
    overflow: Overflow = "error",
) -> Perplexity:
    """The `last` tokens (all by default) given those before each in its window of the context.

    What overflows is read in windows that begin anew, of these tokens alone; what slides is one
    text, whose first token stays visible. With a `bos_id` every window begins with it; else its
    first token is not predicted.
    """
    body = list(ids[1:]) if bos_id is not None and ids[:1] == [bos_id] else list(ids)
    head = [] if bos_id is None else [bos_id]
    n_unscored = 0 if last is None else max(0, len(body) - last)
    width = max(1, len(body))
    if overflow == "error":
        if engine.n_ctx < 2:
            raise InvalidRequestError(
                "a context of 1 token has no room for what it predicts; give 2 or more",
                param="n_ctx",
            )
        body, n_unscored, width = body[n_unscored:], 0, engine.n_ctx - len(head)
    total, n_scored = 0.0, 0
    for start in range(0, len(body), width):
        window = head + body[start : start + width]
        first = max(1, len(head) + n_unscored)  # the first token that is scored
        if len(window) > first:
            score = _Score(window[first:])
            engine.each_logits(window[:-1], score.take, first - 1, overflow=overflow)
            total, n_scored = total + score.total, n_scored + len(window) - first
        if progress:
            progress(min(start + width, len(body)), len(body))
    if not n_scored:
        raise InvalidRequestError("the text has too few tokens to measure", param="file")
    return Perplexity(math.exp(min(total / n_scored, 700.0)), n_scored)


class _Score:
    """Adds up the negative log-probabilities of tokens as the logits before each come."""

    def __init__(self, tokens: list[int]) -> None:
        self._next = np.array(tokens, np.int64)
        self.total = 0.0

    def take(self, row: int, logits: NDArray[np.float32]) -> None:
        wanted = self._next[row : row + len(logits)]
        for one, token in zip(logits, wanted, strict=True):
            wide = one.astype(np.float64)
            peak = wide.max()
            if not math.isfinite(peak):
                raise EdgeInferError("the model yields no number to tell probabilities by")
            self.total += float(peak + np.log(np.exp(wide - peak).sum()) - wide[token])
