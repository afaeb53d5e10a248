"""Characters of a reply as they come, for parsers that are written as if all were there.

A parser is a generator: it yields where it needs more, and goes on once more was pushed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
Write: TypeAlias = Callable[[str], object]


class CutOff(Exception):
    """The reply was cut short here: what is open stays open."""


class Reader:
    """Text that grows at its end; `mark` and `reset` go back to where a parser began."""

    def __init__(self) -> None:
        self._text = ""
        self._at = self._marked = 0
        self._has_ended = self._was_cut = False

    def push(self, text: str) -> None:
        """More text. What is before the mark is forgotten."""
        self._text = self._text[self._marked :] + text
        self._at -= self._marked
        self._marked = 0

    def end(self, was_cut: bool) -> None:
        """Nothing more comes; `was_cut` says that the writer had not finished."""
        self._has_ended, self._was_cut = True, was_cut

    @property
    def rest(self) -> str:
        """What is here and was not taken yet."""
        return self._text[self._at :]

    @property
    def is_at_end(self) -> bool:
        return self._has_ended and self._at == len(self._text)

    @property
    def n_taken(self) -> int:
        """Characters that were taken since the mark."""
        return self._at - self._marked

    def mark(self) -> None:
        """Here `reset` comes back to."""
        self._marked = self._at

    def reset(self) -> None:
        self._at = self._marked

    def skip(self, n: int) -> None:
        """Take characters that are here."""
        self._at += n

    # -- for parsers -----------------------------------------------------------------------------

    def peek(self, n: int = 1) -> Steps[str]:
        """The next `n` characters without taking them, fewer at the end."""
        while len(self._text) - self._at < n and not self._has_ended:
            yield
        found = self._text[self._at : self._at + n]
        if self._was_cut and len(found) < n:
            raise CutOff
        return found

    def look(self, n: int = 1) -> Steps[str]:
        """`peek` that a cut does not end."""
        while len(self._text) - self._at < n and not self._has_ended:
            yield
        return self._text[self._at : self._at + n]

    def take(self, literal: str) -> Steps[bool]:
        """Whether that comes next; it is taken then. A difference is seen as soon as it comes."""
        for n in range(1, len(literal) + 1):
            if (yield from self.look(n)) != literal[:n]:
                return False
        self._at += len(literal)
        return True

    def take_any(self, *literals: str) -> Steps[str]:
        """The first of the literals that comes next, "" for none."""
        for literal in literals:
            if (yield from self.take(literal)):
                return literal
        return ""

    def space(self) -> Steps[str]:
        """Take white space."""
        found = ""
        while (character := (yield from self.look())).isspace():
            found += character
            self._at += 1
        return found

    def n_spaces(self) -> Steps[int]:
        """How much white space comes next; none is taken."""
        n = 0
        while True:
            while self._at + n < len(self._text):
                if not self._text[self._at + n].isspace():
                    return n
                n += 1
            if self._has_ended:
                return n
            yield

    def until(self, *ends: str, most: int | None = None) -> Steps[str]:
        """Take what comes before the first of some literals, or all; the literal stays."""
        found: list[str] = []
        yield from self.copy_until(ends, found.append, most)
        return "".join(found)

    def copy_until(self, ends: Sequence[str], write: Write, most: int | None = None) -> Steps[str]:
        """`until`, written as it comes; the literal that ended it, or "" at the end.

        Stops after `most` characters, too. A literal may hold another one at its own end alone.
        """
        n_written = 0
        while True:
            rest = self.rest
            places = [(at, end) for end in ends if (at := rest.find(end)) >= 0]
            at, end = min(places, default=(-1, ""))
            n = at if places else len(rest) - (0 if self._has_ended else _begun(rest, ends))
            if n:
                self._at += n
                n_written += n
                write(rest[:n])
            if places or self._has_ended or (most is not None and n_written > most):
                return end
            yield


def _begun(text: str, literals: Sequence[str]) -> int:
    """The length of the longest end of `text` that begins one of the literals."""
    longest = min(len(text), max(map(len, literals), default=1) - 1)
    return next(
        (n for n in range(longest, 0, -1) if any(each.startswith(text[-n:]) for each in literals)),
        0,
    )
