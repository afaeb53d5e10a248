"""Cuts Markdown, as it streams in, into blocks that can each be rendered once.

Knows nothing of how they look.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,})[ \t]*([^`\n]*)$")
_INDENTED_FENCE = re.compile(r"^\s+(`{3,}|~{3,})")
_ITEM = re.compile(r"^(?:([-*+])|\d{1,9}([.)]))\s")


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of Markdown, or the inside of a fenced code block.

    `language` is all that the fence says; its first word is the language's name.
    """

    kind: Literal["text", "code"]
    text: str
    language: str = ""


class Splitter:
    """Push text, get closed pieces; `tail` is what may still grow."""

    def __init__(self) -> None:
        self._lines: list[str] = []  # of the open piece
        self._partial = ""  # the line that is being written
        self._fence = ""  # what closes the open code block
        self._language = ""
        self._nested_fence = ""  # a code block inside a list item
        self._after_blank = False

    def push(self, text: str) -> list[Piece]:
        """Pieces that the text closes."""
        *lines, self._partial = (self._partial + text).split("\n")
        closed = [piece for line in lines for piece in self._line(line)]
        return closed

    def tail(self) -> Piece | None:
        """The open piece as it is now."""
        lines = [*self._lines, self._partial] if self._partial else self._lines
        if self._fence:
            # A closing fence that is being written is no code.
            if self._partial and self._fence.startswith(self._partial.strip()):
                lines = self._lines
            return Piece("code", "\n".join(lines), self._language)
        text = "\n".join(lines)
        return Piece("text", text) if text.strip() else None

    def flush(self) -> list[Piece]:
        """What is left at the end, which closes it."""
        closed = self._line(self._partial) if self._partial else []
        self._partial = ""
        tail = self.tail()
        self._lines, self._fence = [], ""
        return [*closed, tail] if tail is not None else closed

    def _line(self, line: str) -> list[Piece]:
        if self._fence:
            return self._code_line(line)
        opening = None if self._nested_fence else _FENCE.match(line)
        if opening and not (opening[1] and self._is_list):
            closed = self._close()
            self._fence = opening[2]
            self._language = opening[3].strip()
            return closed
        self._track_nested(line)
        closed = []
        if self._after_blank and line.strip() and not self._continues(line):
            closed = self._close()
        if line.strip():
            self._after_blank = False
        elif not self._nested_fence:
            self._after_blank = bool(self._lines)
        if line.strip() or self._lines:
            self._lines.append(line)
        return closed

    def _code_line(self, line: str) -> list[Piece]:
        stripped = line.strip()
        if stripped.startswith(self._fence) and not stripped.strip(self._fence[0]):
            piece = Piece("code", "\n".join(self._lines), self._language)
            self._lines, self._fence = [], ""
            return [piece]
        self._lines.append(line)
        return []

    def _continues(self, line: str) -> bool:
        """Whether a line after a blank one still belongs to the open list."""
        if line[:1] in " \t":
            return True
        kind = _item_kind(line)
        return bool(kind and self._lines and kind == _item_kind(self._lines[0]))

    def _track_nested(self, line: str) -> None:
        if self._nested_fence:
            if line.strip() == self._nested_fence:
                self._nested_fence = ""
        elif found := _INDENTED_FENCE.match(line):
            self._nested_fence = found[1]

    @property
    def _is_list(self) -> bool:
        return bool(self._lines and _item_kind(self._lines[0]))

    def _close(self) -> list[Piece]:
        text = "\n".join(self._lines).rstrip()
        self._lines, self._after_blank, self._nested_fence = [], False, ""
        return [Piece("text", text)] if text.strip() else []


def _item_kind(line: str) -> str:
    """The mark of a list item, without its number; "" for any other line."""
    found = _ITEM.match(line)
    return (found[1] or found[2]) if found else ""


def split(text: str) -> list[Piece]:
    """All pieces of a finished text."""
    splitter = Splitter()
    return [*splitter.push(text), *splitter.flush()]
