"""Rows of styled cells that know which part of their block's text they show.

Knows nothing of Markdown or widgets. A block's text is what the mouse copies: whole lines, without
the breaks, indents and frames of the screen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

_JOINER = "\u200d"
_NEVER_FIRST = frozenset("，。、；：！？）】」』》〉”’…")  # no row begins with these
TAB = 4


class Span(NamedTuple):
    """The block's text from `start` to `end` stands from cell `at` on."""

    at: int
    start: int
    end: int


class Row(NamedTuple):
    """A line of the screen."""

    segments: list[Segment]
    spans: tuple[Span, ...] = ()

    def moved(self, prefix: list[Segment], suffix: Sequence[Segment] = ()) -> Row:
        """With something before and after it that is not text."""
        n = sum(segment.cell_length for segment in prefix)
        spans = tuple(Span(at + n, start, end) for at, start, end in self.spans)
        return Row([*prefix, *self.segments, *suffix], spans)

    def marked(self, text: str, start: int, end: int, style: Style) -> list[Segment]:
        """The segments with `style` over what they show of `text[start:end]`."""
        segments = self.segments
        for at, first, last in self.spans:
            left, right = max(start, first), min(end, last)
            if left < right:
                begin = at + cell_len(text[first:left])
                end_cell = begin + cell_len(text[left:right])
                segments = list(_styled(segments, begin, end_cell, style))
        return segments

    def place(self, text: str, cell: int) -> int | None:
        """Twice the index of the character at `cell`, one less for the gap before an index.

        None when the row shows no text. A gap is what is left of the text, and right of it.
        """
        if not self.spans:
            return None
        span = next((s for s in reversed(self.spans) if s.at <= cell), None)
        if span is None:
            return 2 * self.spans[0].start - 1
        at = span.at
        for start, end in clusters(text[span.start : span.end]):
            at += cell_len(text[span.start + start : span.start + end])
            if cell < at:
                return 2 * (span.start + start)
        return 2 * span.end - 1


def clusters(text: str) -> Iterator[tuple[int, int]]:
    """Bounds of what takes cells as one: a letter with its accents, emoji that are joined."""
    if text.isascii():
        yield from ((i, i + 1) for i in range(len(text)))
        return
    start = 0
    for i in range(1, len(text)):
        if text[i - 1] != _JOINER and cell_len(text[i]) and text[i] != _JOINER:
            yield start, i
            start = i
    if text:
        yield start, len(text)


def snapped(text: str, start: int, end: int) -> tuple[int, int]:
    """The range, with the clusters that it cuts."""
    while 0 < start < len(text) and _joins(text, start):
        start -= 1
    while 0 < end < len(text) and _joins(text, end):
        end += 1
    return start, end


def _joins(text: str, index: int) -> bool:
    """Whether the character at `index` belongs to the one before."""
    char = text[index]
    return char != "\n" and (text[index - 1] == _JOINER or not cell_len(char))


def wrapped(text: str, width: int) -> list[tuple[int, int]]:
    """Bounds of the rows that a line takes; the space at a break is in none."""
    if cell_len(text) <= width:
        return [(0, len(text))]
    rows, start = [], 0
    while start < len(text):
        end = _end_of_row(text, start, width)
        rows.append((start, start + len(text[start:end].rstrip())))
        start = end
        while start < len(text) and text[start].isspace():
            start += 1
    return rows


def _end_of_row(text: str, start: int, width: int) -> int:
    """Where the row that begins at `start` has to end."""
    # No cluster takes more characters than this; most take one cell each.
    part = text[start : start + 8 * width + 64]
    if part.isascii():
        space = part.rfind(" ", 0, width + 1)
        is_word = len(part) > width and bool(part[: max(0, space)].strip())
        return start + (space if is_word else min(width, len(part)))
    cells, last_break, is_indent = 0, 0, True
    for first, end in clusters(part):
        n = cell_len(part[first:end])
        is_space = part[first].isspace()
        if not is_indent and (n > 1 or is_space) and part[first] not in _NEVER_FIRST:
            last_break = first
        if cells + n > width:
            return start + (last_break or first or end)
        cells += n
        is_indent = is_indent and is_space
        if n > 1 and not is_space and part[end : end + 1] not in _NEVER_FIRST:
            last_break = end
    return start + len(part)


@dataclass(frozen=True, slots=True)
class Margins:
    """What stands before a line and before its further rows.

    `copied` is what a copy holds of the first; it takes as many cells as the end of `first`.
    """

    first: Text = field(default_factory=Text)
    rest: Text = field(default_factory=Text)
    copied: str = ""


class Sheet:
    """Takes lines of text one after another and wraps them into rows."""

    def __init__(self, console: Console, width: int, base: int = 0) -> None:
        """`base` is where the first line begins in the block's text."""
        self.width = max(1, width)
        self.rows: list[Row] = []
        self._console = console
        self._texts: list[str] = []
        self._n = base

    @property
    def text(self) -> str:
        return "\n".join(self._texts)

    def add(self, line: Text, copied: str | None = None, margins: Margins | None = None) -> None:
        """A line; `copied` is what a copy holds of it, character by character, if not its text."""
        margins = margins or Margins()
        text = line.plain if copied is None else copied
        base = self._next_line(margins.copied + text) + len(margins.copied)
        at = cell_len(margins.first.plain)
        bounds = wrapped(line.plain, max(1, self.width - at))
        for i, ((start, end), part) in enumerate(zip(bounds, self._cut(line, bounds), strict=True)):
            spans = [Span(at, base + start, base + end)]
            if not i and margins.copied:
                n = len(margins.copied)
                spans.insert(0, Span(at - n, base - n, base))
            prefix = self.segments(margins.rest if i else margins.first)
            self.rows.append(Row([*prefix, *part], tuple(spans)))

    def add_rows(self, rows: list[Row], text: str | None = None) -> None:
        """Rows as they are; their spans point into `text`, without which they show none."""
        base = self._next_line(text) if text is not None else 0
        for segments, spans in rows:
            shown = spans if text is not None else ()
            moved = tuple(Span(at, base + start, base + end) for at, start, end in shown)
            self.rows.append(Row(segments, moved))

    def segments(self, line: Text) -> list[Segment]:
        if not line.spans:  # rich would forget the style of the whole
            style = self._console.get_style(line.style)
            return [Segment(line.plain, style)] if line.plain else []
        return [each for each in line.render(self._console) if each.text]

    def _cut(self, line: Text, bounds: list[tuple[int, int]]) -> list[list[Segment]]:
        """The segments of each part of a line."""
        if len(bounds) == 1:
            return [self.segments(line)]
        edges = sorted({edge for pair in bounds for edge in pair} - {0, len(line)})
        starts = dict(zip([0, *edges], line.divide(edges), strict=True))
        return [self.segments(starts[start]) if end > start else [] for start, end in bounds]

    def _next_line(self, text: str) -> int:
        """Where it begins in the block's text."""
        self._n += bool(self._texts)
        self._texts.append(text)
        base, self._n = self._n, self._n + len(text)
        return base


def verbatim(source: str, start: int, end: int) -> str:
    """What `source.expandtabs(TAB)[start:end]` shows, with the tabs that it was written with."""
    if "\t" not in source:
        return source[start:end]
    shown = line_at = 0
    found = []
    for char in source:
        n = TAB - line_at % TAB if char == "\t" else 1
        if shown < end and shown + n > start:
            found.append(char)
        shown += n
        line_at = 0 if char == "\n" else line_at + n
    return "".join(found)


def _styled(segments: list[Segment], begin: int, end: int, style: Style) -> Iterator[Segment]:
    """Segments with another style over the cells from `begin` to `end`; no cluster is cut."""
    at = 0
    for text, old, _ in segments:
        cuts, cell = [0, 0], at
        for first, last in clusters(text):
            cuts = [
                last if cell < edge else cut for cut, edge in zip(cuts, (begin, end), strict=True)
            ]
            cell += cell_len(text[first:last])
        at = cell
        left, right = cuts
        new = (old or Style.null()) + style
        parts = (text[:left], old), (text[left:right], new), (text[right:], old)
        yield from (Segment(part, each) for part, each in parts if part)
