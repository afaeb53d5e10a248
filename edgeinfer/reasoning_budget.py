"""Reasoning of at most so many tokens: after them the tag that closes it must follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from edgeinfer.engine.constraint import Constraint, Matcher
from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.reply import Tags
from edgeinfer.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ALL = np.uint32(0xFFFFFFFF)
_LONGEST_TAG = 64  # bytes of a tag, and of the space that may stand before it


class Place(NamedTuple):
    """How far an answer is: `n` tokens of its reasoning, or of the tag that closes it."""

    state: Literal["start", "inside", "closing", "after"]
    close: bytes = b""
    n: int = 0
    tail: bytes = b""  # its latest text, as much as a tag may begin in


class ReasoningBudget:
    """A constraint; what comes behind the reasoning follows `inner`, where there is one.

    `opened` are the tags inside which the prompt ends; else the answer may open any of `known`.
    """

    def __init__(
        self,
        most: int,
        tokenizer: Tokenizer,
        known: Sequence[Tags],
        opened: Tags | None,
        inner: Constraint | None,
    ) -> None:
        self.most, self._inner, self._piece = most, inner, tokenizer.piece
        self._closes = {tags.open.encode(): tags.close.encode() for tags in known}
        self._ids = {tags.close.encode(): _tag_ids(tags.close, tokenizer) for tags in known}
        self.first = Place("start")
        if opened is not None:
            self.first = self._inside(opened.close.encode(), 0)

    @property
    def text(self) -> str:
        raise InvalidRequestError(
            "an answer with a reasoning_budget can't be recorded; leave that out",
            param="reasoning_budget",
        )

    def begin(self) -> BudgetMatcher:
        """For one more answer."""
        return BudgetMatcher(self, self._inner.begin() if self._inner is not None else None)

    def forced(self, place: Place) -> list[int]:
        """The tokens that must follow; those of the tag that are still to come."""
        return self._ids[place.close][place.n :] if place.state == "closing" else []

    def after(self, place: Place, token: int) -> Place:
        """Where an answer is behind one more token."""
        if place.state == "after":
            return place
        if place.state == "closing":
            is_last = place.n + 1 == len(self._ids[place.close])
            return Place("after") if is_last else place._replace(n=place.n + 1)
        tail = place.tail + self._piece(token)
        if place.state == "inside":
            if place.close in tail:
                return Place("after")
            return self._inside(place.close, place.n + 1, tail[-len(place.close) :])
        begun = tail.lstrip()
        for opening, close in self._closes.items():
            if begun.startswith(opening):
                return self._inside(close, 0)
        may_open = any(opening.startswith(begun) for opening in self._closes)
        return Place("start", tail=tail[-_LONGEST_TAG:]) if may_open else Place("after")

    def _inside(self, close: bytes, n: int, tail: bytes = b"") -> Place:
        return Place(
            "inside" if n < self.most else "closing", close, n if n < self.most else 0, tail
        )


class BudgetMatcher:
    """How far one answer has come in its reasoning: an engine's `Matcher`."""

    def __init__(self, budget: ReasoningBudget, inner: Matcher | None) -> None:
        self._budget, self._inner, self._place = budget, inner, budget.first

    @property
    def is_ended(self) -> bool:
        return self._inner is not None and self._inner.is_ended

    def forced(self, n: int) -> list[int]:
        if found := self._budget.forced(self._place):
            return found[:n]
        return self._inner.forced(n) if self._inner is not None else []

    def count_possible(self, tokens: Sequence[int]) -> int:
        place, n = self._place, 0
        for token in tokens:
            if token != (self._budget.forced(place) or [token])[0]:
                break
            place, n = self._budget.after(place, token), n + 1
        return n if self._inner is None else min(n, self._inner.count_possible(tokens))

    def fill(self, masks: NDArray[np.uint32], drafts: Sequence[int]) -> None:
        if self._inner is not None:
            self._inner.fill(masks, drafts)
        else:
            masks[:] = _ALL
        place = self._place
        for i, mask in enumerate(masks):
            if found := self._budget.forced(place):
                mask[:] = 0
                mask[found[0] >> 5] = 1 << (found[0] & 31)
            if i < len(drafts):
                place = self._budget.after(place, drafts[i])

    def advance(self, token: int) -> None:
        self._place = self._budget.after(self._place, token)
        if self._inner is not None:
            self._inner.advance(token)


def _tag_ids(tag: str, tokenizer: Tokenizer) -> list[int]:
    id = tokenizer.special_id(tag)
    return [id] if id is not None else tokenizer.encode_middle(tag)
