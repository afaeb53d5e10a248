"""Draws the pieces of a message as rows of styled text.

Knows nothing of scrolling or of conversations.
"""

from __future__ import annotations

from functools import cached_property
from io import StringIO
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from rich.theme import Theme

from edgeinfer.tui.palette import Palette
from edgeinfer.tui.rows import TAB, Row, Sheet

if TYPE_CHECKING:
    from rich.syntax import SyntaxTheme

_EDGE = 2  # cells of ground beside code and what the user wrote


class Look:
    """One palette's way to draw; every row has at most `width` cells."""

    def __init__(self, palette: Palette) -> None:
        self.palette = palette
        self._console = Console(
            file=StringIO(), force_terminal=True, color_system="truecolor", theme=_styles(palette),
            legacy_windows=False, _environ={},
        )  # fmt: skip

    def prose(self, text: str, width: int) -> Sheet:
        """Markdown; its `text` is what the model wrote, without markup."""
        from edgeinfer.tui.markdown import draw

        return draw(text, self._console, width, self._nested_code)

    def code(self, text: str, language: str, width: int, base: int = 0) -> list[Row]:
        """A block of code on a ground of its own, its language above it.

        `base` is where `text` begins in the block's text.
        """
        inner = max(1, width - 2 * _EDGE)
        name = language or "text"
        labels = [name.ljust(inner - len("copy")) + "copy"]
        if cell_len(labels[0]) > inner:
            labels = ["copy".rjust(inner), name]
        above = [Text(label, self.palette.muted) for label in labels]
        return self._on_ground(above, self._code_lines(text, language), width, base).rows

    def plain(self, text: str, width: int, style: str = "") -> list[Row]:
        """Text as it is, wrapped."""
        sheet = Sheet(self._console, width)
        for line in text.expandtabs(TAB).split("\n"):
            sheet.add(Text(line, style))
        return sheet.rows

    def bubble(self, text: str, notes: list[str], width: int) -> list[Row]:
        """What the user wrote, on a tinted ground; `notes` name what goes with it."""
        lines = text.expandtabs(TAB).split("\n") if text else []
        body = [Text(line, self.palette.text) for line in lines]
        below = [Text(note, self.palette.muted) for note in notes]
        return self._on_ground([], body, width, 0, below, self.palette.tint).rows

    def _nested_code(self, text: str, language: str, width: int) -> Sheet:
        """Code inside a list item or a quote."""
        label = [Text(language, self.palette.muted)] if language else []
        return self._on_ground(label, self._code_lines(text, language), width, 0)

    def _on_ground(
        self,
        above: list[Text],
        body: list[Text],
        width: int,
        base: int,
        below: list[Text] | None = None,
        color: str | None = None,
    ) -> Sheet:
        """Lines on a ground that reaches beyond them; `above` and `below` are no text."""
        color = self.palette.code if color is None else color
        ground = Style.parse(f"on {color}" if color else "none")
        sheet = Sheet(self._console, width, base)
        inner = max(1, width - 2 * _EDGE)
        for lines, has_text in ((above, False), (body, True), (below or [], False)):
            part = Sheet(self._console, inner)
            for line in lines:
                part.add(line)
            rows = [_grounded(row, inner, ground) for row in part.rows]
            if rows:
                sheet.add_rows(rows, part.text if has_text else None)
        return sheet

    def _code_lines(self, text: str, language: str) -> list[Text]:
        from edgeinfer.tui.highlight import highlighted

        name = language.split(" ")[0]
        code = highlighted(text.expandtabs(TAB), name, self._syntax_theme)
        return list(code.split("\n", allow_blank=True))

    @cached_property
    def _syntax_theme(self) -> SyntaxTheme:
        from edgeinfer.tui.highlight import CalmSyntax

        return CalmSyntax(self.palette)


def _grounded(row: Row, width: int, ground: Style) -> Row:
    """A row with the ground under it and beside it."""
    free = max(0, width - sum(segment.cell_length for segment in row.segments))
    segments = list(Segment.apply_style(row.segments, ground))
    edge = Segment(" " * _EDGE, ground)
    return Row(segments, row.spans).moved([edge], [Segment(" " * (free + _EDGE), ground)])


def _styles(palette: Palette) -> Theme:
    muted, accent = palette.muted, palette.accent
    return Theme(
        {
            "markdown.paragraph": "none",
            "markdown.h1": f"bold {accent}",
            "markdown.h2": f"bold {accent}",
            "markdown.h3": "bold",
            "markdown.h4": "bold",
            "markdown.h5": f"bold {muted}",
            "markdown.h6": f"bold {muted}",
            "markdown.code": f"{accent}",
            "markdown.item.bullet": f"{accent}",
            "markdown.item.number": f"{accent}",
            "markdown.block_quote": f"italic {muted}",
            "markdown.hr": palette.faint or "none",
            "markdown.link": f"underline {accent}",
            "markdown.link_url": f"underline {muted}",
            "markdown.table.border": palette.faint or "none",
            "markdown.table.header": "bold",
            "markdown.s": "strike",
        }
    )
