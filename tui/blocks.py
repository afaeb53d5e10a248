"""The blocks of the transcript: what each holds, how it is drawn, and where each begins.

Knows nothing of widgets; heights of blocks that were not drawn yet are estimates.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rich.cells import cell_len
from rich.segment import Segment

from edgeinfer.tui.look import Look
from edgeinfer.tui.rows import TAB, Row, snapped, verbatim

Kind: TypeAlias = Literal["user", "text", "code", "thinking", "note", "notice", "failure"]

_INDENT = 2  # the grounds of code and of what the user wrote reach as far beyond the text
# Two clicks take addresses and paths whole, but not the mark that ends a sentence.
_WORD = re.compile(
    r"\w+://\S*[^\s.,;:!?)>'\"]|[\w@%&#=+~$/\\-](?:[\w@%&#=+~$/\\.:?!,;-]*[\w@%&#=+~$/\\-])?"
)
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
    rows: list[Row] | None = None
    shown: str = ""  # what the spans of the rows point into, once drawn
    height: int = 1
    _frozen: list[Row] = field(default_factory=list)
    _n_frozen: int = 0

    def draw(self, look: Look, width: int) -> list[Row]:
        """Its rows, drawn once until `forget`."""
        if self.rows is None:
            self.rows = [*self._drawn(look, width), *self._gap()]
            self.height = len(self.rows)
        return self.rows

    def place(self, row: int, cell: int) -> int:
        """Where in the text a cell of the drawn block is, as `Row.place` counts."""
        rows = self.rows or []
        found = rows[row].place(self.shown, cell) if row < len(rows) else None
        if found is not None:
            return found
        above = next((each for each in rows[row::-1] if each.spans), None)
        return 2 * above.spans[-1].end - 1 if above else -1

    def copied(self, start: int, end: int) -> str:
        """The text between two indexes of `shown`, as it was written."""
        start, end = snapped(self.shown, start, end)
        return self.shown[start:end] if self.kind == "text" else verbatim(self._source, start, end)

    def range_around(self, index: int, *, whole_line: bool) -> tuple[int, int]:
        """The bounds in `shown` of the word or line that holds a character."""
        line_start = self.shown.rfind("\n", 0, index) + 1
        line_end = self.shown.find("\n", index)
        line_end = len(self.shown) if line_end < 0 else line_end
        if whole_line:
            return line_start, line_end
        for found in _WORD.finditer(self.shown, line_start, line_end):
            if found.start() <= index < found.end():
                return found.span()
        return index, min(index + 1, line_end)

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
        self.rows = None
        if width_changed:
            self._frozen, self._n_frozen = [], 0

    def close(self) -> None:
        """It grows no more: what was drawn in parts is drawn as a whole."""
        self.is_open = False
        self.forget()

    def _gap(self) -> list[Row]:
        return [Row([]) for _ in range(2 if self.kind in ("note", "failure") else 1)]

    @property
    def _source(self) -> str:
        return self.text.strip() if self.kind == "thinking" else self.text

    def _drawn(self, look: Look, width: int) -> list[Row]:
        self.shown = self._source.expandtabs(TAB)
        if self.kind == "user":
            return look.bubble(self.text, self.notes, width)
        if self.kind == "code":
            return self._code_rows(look, width)
        indent = [Segment(" " * _INDENT)]
        return [row.moved(indent) for row in self._text_rows(look, max(1, width - 2 * _INDENT))]

    def _text_rows(self, look: Look, width: int) -> list[Row]:
        if self.kind == "text":
            sheet = look.prose(self.text, width)
            self.shown = sheet.text
            return sheet.rows
        if self.kind == "thinking":
            return self._thinking_rows(look, width)
        if self.kind == "failure":
            return look.plain(self.text, width, look.palette.bad)
        self.shown = ""  # notes are no part of what was said
        return [Row(row.segments) for row in look.plain(self.text, width, look.palette.muted)]

    def _code_rows(self, look: Look, width: int) -> list[Row]:
        lines = self.text.split("\n")
        if not self.is_open or len(lines) <= _OPEN_ROWS:
            return look.code(self.text, self.language, width)
        if len(lines) - self._n_frozen > _OPEN_ROWS:
            end = len(lines) - _OPEN_ROWS // 2
            self._frozen += self._code_part(look, width, lines, end)
            self._n_frozen = end
        return [*self._frozen, *self._code_part(look, width, lines, len(lines))]

    def _code_part(self, look: Look, width: int, lines: list[str], end: int) -> list[Row]:
        """The lines from the frozen ones to `end`, under the label if they are the first."""
        above = "".join(f"{line}\n" for line in lines[: self._n_frozen])
        part = "\n".join(lines[self._n_frozen : end])
        rows = look.code(part, self.language, width, len(above.expandtabs(TAB)))
        return [row for row in rows if row.spans] if self._n_frozen else rows

    def _thinking_rows(self, look: Look, width: int) -> list[Row]:
        """`notes` holds the heading; while it grows, the last words follow it."""
        mark = "▸" if self.is_folded else "▾"
        heading = f"{mark} {self.notes[0] if self.notes else 'Thinking'}"
        muted = look.palette.muted
        if not self.is_folded:
            body = look.plain(self._source, max(1, width - 2), f"italic {muted}")
            title = look.plain(heading, width, muted)
            rows = [row.moved([Segment("  ")]) for row in body]
            return [*(Row(row.segments) for row in title), *rows]
        if self.is_open:
            room = width - cell_len(heading) - 4
            last = self.text.strip().rsplit("\n", 1)[-1][-max(0, room) :] if room > 8 else ""
            heading = f"{heading}  {last}" if last else heading
        self.shown = ""
        return [Row(row.segments) for row in look.plain(heading[:width], width, muted)[:1]]


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
