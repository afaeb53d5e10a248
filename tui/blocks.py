"""The blocks of the transcript: what each holds, how it is drawn, and where each begins.

Knows nothing of widgets; heights of blocks that were not drawn yet are estimates.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rich.cells import cell_len
from rich.segment import Segment

from edgeinfer.tui.look import Lines, Look

Kind: TypeAlias = Literal["user", "text", "code", "thinking", "note", "notice", "failure"]

_INDENT = 2  # the grounds of code and of what the user wrote reach as far beyond the text
_OPEN_ROWS = 80  # rows of code that are highlighted again while a block grows


@dataclass(slots=True, eq=False)
class Block:
    """A part of a message that is drawn as one. `entry` is the id of its message."""

    kind: Kind
    text: str
    entry: int
    language: str = ""
    notes: list[str] = field(default_factory=list)
    is_open: bool = False
    is_folded: bool = True
    lines: Lines | None = None
    height: int = 1
    _frozen: Lines = field(default_factory=list)
    _n_frozen: int = 0

    def draw(self, look: Look, width: int) -> Lines:
        """Its lines, drawn once until `forget`."""
        if self.lines is None:
            self.lines = [*self._rows(look, width), *self._gap()]
            self.height = len(self.lines)
        return self.lines

    def estimate(self, width: int) -> None:
        """Guess the height of a block that is not drawn."""
        if self.kind in ("note", "notice") or (self.kind == "thinking" and self.is_folded):
            rows = 1
        else:
            inner = max(1, width - 2 * _INDENT)
            rows = sum(max(1, -(-len(line) // inner)) for line in self.text.split("\n"))
            rows += len(self.notes) + (self.kind == "code")
        self.height = rows + len(self._gap())

    def forget(self, *, width_changed: bool = True) -> None:
        """Draw again when next seen."""
        self.lines = None
        if width_changed:
            self._frozen, self._n_frozen = [], 0

    def close(self) -> None:
        """It grows no more: what was drawn in parts is drawn as a whole."""
        self.is_open = False
        self.forget()

    def _gap(self) -> Lines:
        return [[] for _ in range(2 if self.kind in ("note", "failure") else 1)]

    def _rows(self, look: Look, width: int) -> Lines:
        if self.kind == "user":
            return look.bubble(self.text, self.notes, width)
        if self.kind == "code":
            return self._code_rows(look, width)
        rows = self._text_rows(look, max(1, width - 2 * _INDENT))
        return [[Segment(" " * _INDENT), *row] if row else row for row in rows]

    def _text_rows(self, look: Look, width: int) -> Lines:
        if self.kind == "text":
            return look.prose(self.text, width)
        if self.kind == "thinking":
            return self._thinking_rows(look, width)
        color = look.palette.bad if self.kind == "failure" else look.palette.muted
        return look.plain(self.text, width, color)

    def _code_rows(self, look: Look, width: int) -> Lines:
        rows = self.text.split("\n")
        if not self.is_open or len(rows) <= _OPEN_ROWS:
            return look.code(self.text, self.language, width)
        if len(rows) - self._n_frozen > _OPEN_ROWS:
            end = len(rows) - _OPEN_ROWS // 2
            part = look.code("\n".join(rows[self._n_frozen : end]), self.language, width)
            self._frozen += part[1:] if self._n_frozen else part
            self._n_frozen = end
        rest = look.code("\n".join(rows[self._n_frozen :]), self.language, width)
        return [*self._frozen, *rest[1:]]

    def _thinking_rows(self, look: Look, width: int) -> Lines:
        """`notes` holds the heading; while it grows, the last words follow it."""
        mark = "▸" if self.is_folded else "▾"
        heading = f"{mark} {self.notes[0] if self.notes else 'Thinking'}"
        muted = look.palette.muted
        if not self.is_folded:
            body = look.plain(self.text.strip(), max(1, width - 2), f"italic {muted}")
            rows = [[Segment("  "), *line] for line in body]
            return [*look.plain(heading, width, muted), *rows]
        if self.is_open:
            room = width - cell_len(heading) - 4
            last = self.text.strip().rsplit("\n", 1)[-1][-max(0, room) :] if room > 8 else ""
            heading = f"{heading}  {last}" if last else heading
        return look.plain(heading[:width], width, muted)[:1]


class BlockList:
    """Blocks in order, and the line on which each begins."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def n_lines(self) -> int:
        return self._ends[-1] if self._ends else 0

    def top(self, index: int) -> int:
        return self._ends[index - 1] if index else 0

    def find(self, line: int) -> int:
        """The index of the block that a line is in."""
        return min(bisect_right(self._ends, line), len(self.blocks) - 1)

    def entries(self) -> list[int]:
        """The messages, in order; notices belong to none."""
        return list(dict.fromkeys(block.entry for block in self.blocks if block.entry > 0))

    def span(self, entry: int) -> tuple[int, int] | None:
        """The first and last block of a message."""
        indexes = [i for i, block in enumerate(self.blocks) if block.entry == entry]
        return (indexes[0], indexes[-1]) if indexes else None

    def insert(self, index: int, blocks: Iterable[Block]) -> None:
        self.blocks[index:index] = blocks
        self.measure(index)

    def remove(self, start: int) -> None:
        """Drop the blocks from `start` on."""
        del self.blocks[start:]
        self.measure(start)

    def measure(self, start: int = 0) -> None:
        """Add up heights again, from the block that changed."""
        at = self.top(start)
        del self._ends[start:]
        for block in self.blocks[start:]:
            at += block.height
            self._ends.append(at)
