"""Draws Markdown as rows of calm text: nothing that a model writes is hidden.

Knows nothing of blocks or streaming. Imported late: the parser takes 30 ms.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from markdown_it.tree import SyntaxTreeNode
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from edgeinfer.tui.markup import parse
from edgeinfer.tui.rows import Margins, Row, Sheet, Span

_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_SAME_TWICE = re.compile(r"\[([^\]]+)\]\(<?(?:mailto:)?\1>?\)")  # shown once
_NARROWEST = 4  # cells of a table's column
_GAP = 3  # between columns
_INLINE = {
    "strong": "bold",
    "em": "italic",
    "s": "markdown.s",
    "link": "markdown.link",
    "image": "markdown.link",
    "code_inline": "markdown.code",
    "formula": "markdown.code",
    "address": "markdown.link",
}

DrawCode = Callable[[str, str, int], Sheet]


def draw(source: str, console: Console, width: int, code: DrawCode) -> Sheet:
    """Rows of at most `width` cells; `code` draws a fenced block's text, language and width."""
    page = _Page(console, width, code)
    page.blocks(parse(source).children, is_loose=True)
    seen = Counter(_letters("".join(s.text for row in page.sheet.rows for s in row.segments)))
    wanted = _BREAK.sub("", html.unescape(_SAME_TWICE.sub(r"\1", source)))
    if Counter(_letters(wanted)) - seen:
        # The parser has dropped something: too many cells in a row, nesting without end.
        page = _Page(console, width, code)
        for line in source.split("\n"):
            page.line(Text(line))
    return page.sheet


def _letters(text: str) -> Iterator[str]:
    return filter(str.isalnum, text)


@dataclass(slots=True)
class _Indent:
    """What stands before every line of a list item or a quote; the mark is for the first one."""

    mark: str
    rest: str
    style: str
    copied: str = ""
    is_item: bool = False
    is_used: bool = False


class _Page:
    """Walks the tree and writes on a sheet."""

    def __init__(self, console: Console, width: int, code: DrawCode) -> None:
        self.sheet = Sheet(console, width)
        self._console, self._code = console, code
        self._indents: list[_Indent] = []
        self._style = ""  # of all text, within a quote

    # -- blocks ----------------------------------------------------------------------------------

    def blocks(self, nodes: list[SyntaxTreeNode], *, is_loose: bool) -> None:
        for i, node in enumerate(nodes):
            if i and is_loose:
                self.line(Text())
            self._block(node)

    def line(self, text: Text) -> None:
        """A line of text with what stands before it."""
        text.expand_tabs(4)
        self.sheet.add(text, margins=self._margins(is_blank=not text.plain))

    def _add(self, sheet: Sheet, *, has_text: bool = True) -> None:
        """What was drawn on a sheet of its own."""
        if not sheet.rows:
            return
        margins = self._margins(is_blank=False)
        prefixes = [margins.first] + [margins.rest] * (len(sheet.rows) - 1)
        rows = [
            row.moved(self.sheet.segments(prefix))
            for row, prefix in zip(sheet.rows, prefixes, strict=True)
        ]
        self.sheet.add_rows(rows, sheet.text if has_text else None)

    def _margins(self, *, is_blank: bool) -> Margins:
        """What the next line begins with; a mark is used up, unless nothing follows it."""
        first, rest, copied = Text(), Text(), ""
        for each in self._indents:
            is_bare = each.is_used or (is_blank and each.is_item)
            first.append(each.rest if is_bare else each.mark, each.style)
            rest.append(each.rest, each.style)
            copied += (" " * len(each.mark) if is_bare else each.copied) if each.is_item else ""
            each.is_used = each.is_used or not is_blank
        return Margins(first, rest, "" if is_blank else copied)

    def _block(self, node: SyntaxTreeNode) -> None:
        kind = node.type
        if kind == "heading":
            self._lines(self._inline(node, f"markdown.{node.tag}"))
        elif kind in ("bullet_list", "ordered_list"):
            self._list(node)
        elif kind == "blockquote":
            bar = _Indent("▌ ", "▌ ", "markdown.block_quote")
            self._within(bar, node.children, is_loose=True)
        elif kind in ("fence", "code_block"):
            text = node.content.removesuffix("\n")
            self._add(self._code(text, node.info.strip(), self._width))
        elif kind == "hr":
            rule = Sheet(self._console, self._width)
            rule.add(Text("─" * self._width, "markdown.hr"))
            self._add(rule, has_text=False)
        elif kind == "table":
            self._table(node)
        elif kind == "formula_block":
            self._lines(Text(node.content, self._console.get_style("markdown.code")))
        else:
            self._lines(self._inline(node, self._style))

    def _within(self, indent: _Indent, nodes: list[SyntaxTreeNode], *, is_loose: bool) -> None:
        style = self._style
        if not indent.is_item:
            self._style = indent.style
        self._indents.append(indent)
        self.blocks(nodes, is_loose=is_loose)
        if indent.is_item and not indent.is_used:
            self._mark_alone()
        self._indents.pop()
        self._style = style

    def _mark_alone(self) -> None:
        """An item without text."""
        self.sheet.add(Text(), margins=self._margins(is_blank=False))

    def _list(self, node: SyntaxTreeNode) -> None:
        is_loose = any(
            child.type == "paragraph" and not child.hidden
            for item in node.children
            for child in item.children
        )
        for i, item in enumerate(node.children):
            if i and is_loose:
                self.line(Text())
            if node.type == "ordered_list":
                number = f"{item.info}{item.markup} "
                mark = _Indent(number, " " * len(number), "markdown.item.number", number, True)
            else:
                mark = _Indent("• ", "  ", "markdown.item.bullet", f"{item.markup} ", True)
            self._within(mark, item.children, is_loose=is_loose)

    @property
    def _width(self) -> int:
        return max(1, self.sheet.width - sum(cell_len(each.rest) for each in self._indents))

    def _lines(self, text: Text) -> None:
        for line in text.split("\n", allow_blank=True):
            self.line(line)

    # -- tables ----------------------------------------------------------------------------------

    def _table(self, node: SyntaxTreeNode) -> None:
        rows = [row.children for part in node.children for row in part.children]
        cells = [[self._cell(cell) for cell in row] for row in rows]
        widths = self._widths(cells)
        if not widths:
            for row in cells:
                self.line(Text("  ").join(Text(" ").join(lines) for lines in row))
            return
        aligned = ["right" in str(cell.attrs.get("style", "")) for cell in rows[0]]
        drawing = Sheet(self._console, self._width)
        for i, row in enumerate(cells):
            self._add_cells(drawing, row, widths, aligned)
            if not i:
                width = sum(widths) + _GAP * (len(widths) - 1)
                line = Text("─" * width, "markdown.table.border")
                drawing.add_rows([Row(drawing.segments(line))])
        self._add(drawing)

    def _cell(self, node: SyntaxTreeNode) -> list[Text]:
        style = "markdown.table.header" if node.type == "th" else self._style
        text = self._inline(node, style)
        for found in reversed(list(_BREAK.finditer(text.plain))):
            before, _, after = text.divide(found.span())
            before.rstrip()
            text = Text("\n").join([before, after[len(after) - len(after.plain.lstrip()) :]])
        return list(text.split("\n", allow_blank=True))

    def _widths(self, cells: list[list[list[Text]]]) -> list[int]:
        """Of the columns; none when so many do not fit."""
        room = self._width - _GAP * (len(cells[0]) - 1)
        widths = [
            max((line.cell_len for lines in column for line in lines), default=0)
            for column in zip(*cells, strict=True)
        ]
        if room < sum(min(_NARROWEST, width) for width in widths):
            return []
        widths = [min(room, width) for width in widths]
        while sum(widths) > room:
            widths[widths.index(max(widths))] -= 1
        return widths

    def _add_cells(
        self, drawing: Sheet, row: list[list[Text]], widths: list[int], aligned: list[bool]
    ) -> None:
        """One row of a table: cells beside each other, each wrapped in its column."""
        columns, texts, base = [], [], 0
        for lines, width in zip(row, widths, strict=True):
            cell = Sheet(self._console, width, base)
            for line in lines:
                cell.add(line)
            columns.append(cell.rows)
            texts.append(cell.text.replace("\n", " "))
            base += len(texts[-1]) + 1
        rows = []
        for i in range(max(map(len, columns), default=0)):
            parts = [column[i] if i < len(column) else Row([]) for column in columns]
            rows.append(_beside(parts, widths, aligned))
        drawing.add_rows(rows, "\t".join(texts))

    # -- text ------------------------------------------------------------------------------------

    def _inline(self, node: SyntaxTreeNode, style: str) -> Text:
        """The text in a block, with the styles of its parts."""
        text = Text(style=style)
        self._append(text, node, Style.null())
        return text

    def _append(self, text: Text, node: SyntaxTreeNode, style: Style) -> None:
        if node.type in ("softbreak", "hardbreak"):
            text.append("\n")
            return
        if node.type in _INLINE:
            style += self._console.get_style(_INLINE[node.type])
        start = len(text)
        for child in node.children:
            self._append(text, child, style)
        if not node.children:
            text.append(node.content, style)
        if node.type in ("link", "image"):
            address = str(node.attrs.get("href") or node.attrs.get("src") or "")
            title = f' "{node.attrs["title"]}"' if node.attrs.get("title") else ""
            label = text.plain[start:]
            if title or label not in (address, address.removeprefix("mailto:")):
                url_style = self._console.get_style("markdown.link_url")
                text.append(f" ({address}{title})" if label else address + title, url_style)


def _beside(parts: list[Row], widths: list[int], aligned: list[bool]) -> Row:
    """Cells in their columns; `aligned` ones stand at the right."""
    segments: list[Segment] = []
    spans: list[Span] = []
    at = 0
    for row, width, is_right in zip(parts, widths, aligned, strict=True):
        free = width - sum(segment.cell_length for segment in row.segments)
        moved = row.moved([Segment(" " * (free * is_right + (_GAP if at else 0)))])
        segments += [*moved.segments, Segment(" " * (0 if is_right else free))]
        spans += [Span(at + span.at, span.start, span.end) for span in moved.spans]
        at += width + (_GAP if at else 0)
    return Row(segments, tuple(spans))
