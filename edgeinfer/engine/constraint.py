"""Which tokens an answer may go on with, as the engine sees it: bits, and no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Matcher(Protocol):
    """How far one answer has come. One thread calls it; what it raises ends the answer."""

    @property
    def is_ended(self) -> bool:
        """Whether nothing but the end can follow."""
        ...

    def forced(self, n: int) -> list[int]:
        """Up to `n` tokens that must follow, as far as that is known."""
        ...

    def count_possible(self, tokens: Sequence[int]) -> int:
        """How many of these may follow one another at most."""
        ...

    def fill(self, masks: NDArray[np.uint32], drafts: Sequence[int]) -> None:
        """Row i of `masks` (n, `mask_words`): which tokens may follow the first i of the drafts.

        Nothing may follow a draft that may not be there itself.
        """
        ...

    def advance(self, token: int) -> None:
        """Go on behind a token that a mask has allowed."""
        ...


class Constraint(Protocol):
    """What answers must be; a value, for any number of them."""

    @property
    def text(self) -> str:
        """What it can be made of again."""
        ...

    def begin(self) -> Matcher:
        """For one more answer."""
        ...
