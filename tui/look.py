"""Renders the pieces of a message as lines of styled text.

Knows nothing of scrolling or of conversations.
"""

from __future__ import annotations

from functools import cached_property
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from rich.theme import Theme

from edgeinfer.tui.palette import Palette

if TYPE_CHECKING:
    from rich.markdown import Markdown
    from rich.syntax import SyntaxTheme

Lines = list[list[Segment]]


class Look:
    """One palette's way to draw; every method returns lines of at most `width` cells."""

    def __init__(self, palette: Palette) -> None:
        self.palette = palette
        self._console = Console(
            file=StringIO(), force_terminal=True, color_system="truecolor", theme=_styles(palette),
            legacy_windows=False, _environ={},
        )  # fmt: skip

    def prose(self, text: str, width: int) -> Lines:
        """Markdown without fenced code."""
        lines = self._lines(self._markdown(text), width)
        while lines and not _is_visible(lines[0]):
            del lines[0]
        while lines and not _is_visible(lines[-1]):
            del lines[-1]
        return lines

    def code(self, text: str, language: str, width: int) -> Lines:
        """A block of code on a ground of its own, its language above it."""
        room = max(0, width - 4 - len("copy"))
        label = Text((language or "text")[:room].ljust(room) + "copy", self.palette.muted)
        body = self._highlighted(text, language)
        ground = Style.parse(f"on {self.palette.code}" if self.palette.code else "none")
        rows = self._lines(body, max(1, width - 4), ground)
        head = self._lines(label, max(1, width - 4), ground)
        edge = Segment("  ", ground)
        return [[edge, *line, edge] for line in [*head, *rows]]

    def plain(self, text: str, width: int, style: str = "") -> Lines:
        """Text as it is, wrapped."""
        return self._lines(Text(text, style), width)

    def bubble(self, text: str, notes: list[str], width: int) -> Lines:
        """What the user wrote, on a tinted ground; `notes` name what goes with it."""
        content = Text(text, self.palette.text)
        for note in notes:
            content.append(f"{chr(10) if content else ''}{note}", self.palette.muted)
        ground = Style.parse(f"on {self.palette.tint}" if self.palette.tint else "none")
        return self._lines(Padding(content, (0, 2)), width, ground)

    def _lines(self, content: RenderableType, width: int, style: Style | None = None) -> Lines:
        options = self._console.options.update(width=width, height=None, highlight=False)
        return self._console.render_lines(content, options, style=style, pad=style is not None)

    def _markdown(self, text: str) -> Markdown:
        from edgeinfer.tui.markdown import CalmMarkdown

        return CalmMarkdown(text, code_theme=self._syntax_theme)

    def _highlighted(self, text: str, language: str) -> RenderableType:
        from rich.syntax import Syntax

        return Syntax(
            text.expandtabs(4) or " ", language or "text", theme=self._syntax_theme,
            word_wrap=True, background_color=self.palette.code or "default",
        )  # fmt: skip

    @cached_property
    def _syntax_theme(self) -> SyntaxTheme:
        from edgeinfer.tui.markdown import CalmSyntax

        return CalmSyntax(self.palette)


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


def _is_visible(line: list[Segment]) -> bool:
    return any(segment.text.strip() for segment in line)
