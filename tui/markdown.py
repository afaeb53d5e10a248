"""Markdown and highlighted code in few colours, as rich renders them.

Knows nothing of blocks or streaming. Imported late: rich's Markdown and Pygments take 60 ms.
"""

from __future__ import annotations

from typing import Any, ClassVar

from markdown_it import MarkdownIt
from pygments.token import (  # type: ignore[import-untyped]
    Comment,
    Keyword,
    Name,
    Number,
    Operator,
    String,
    Token,
)
from rich import box
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.markdown import CodeBlock, Heading, HorizontalRule, Markdown, TableElement
from rich.rule import Rule
from rich.style import Style
from rich.syntax import Syntax, SyntaxTheme
from rich.table import Table

from edgeinfer.tui.palette import Palette


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = {}


class _Rule(HorizontalRule):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(style="markdown.hr", characters="─")


class _Code(CodeBlock):
    """Code inside a list item, or indented."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        theme: Any = self.theme
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=theme, word_wrap=True)


class _Table(TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, style="markdown.table.border"
        )
        if self.header is not None and self.header.row is not None:
            for cell in self.header.row.cells:
                heading = cell.content.copy()
                heading.stylize("markdown.table.header")
                table.add_column(heading, justify=cell.justify)
        if self.body is not None:
            for row in self.body.rows:
                table.add_row(*(cell.content for cell in row.cells))
        yield table


class CalmMarkdown(Markdown):
    """Headings on the left, thin rules, links spelled out: nothing a model writes is hidden."""

    elements = Markdown.elements | {
        "heading_open": _Heading,
        "hr": _Rule,
        "code_block": _Code,
        "fence": _Code,
        "table_open": _Table,
    }

    def __init__(self, markup: str, code_theme: Any) -> None:
        super().__init__("", code_theme=code_theme, hyperlinks=False)
        # Tags are shown as they are written: rich would leave them out.
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self.parsed = parser.parse(markup)


class CalmSyntax(SyntaxTheme):
    """Comments fade, names of things keep the text's colour, the rest has four colours."""

    def __init__(self, palette: Palette) -> None:
        self._ground = Style(bgcolor=palette.code or None)
        text = palette.text or "default"
        self._styles = {
            Token: Style.parse(text),
            Comment: Style.parse(f"italic {palette.muted}"),
            Keyword: Style.parse(palette.accent),
            Operator.Word: Style.parse(palette.accent),
            Name.Builtin: Style.parse(palette.accent),
            Name.Function: Style.parse(f"bold {text}"),
            Name.Class: Style.parse(f"bold {text}"),
            Name.Decorator: Style.parse(palette.warn),
            String: Style.parse(palette.good),
            Number: Style.parse(palette.warn),
        }

    def get_style_for_token(self, token_type: Any) -> Style:
        """The style of the nearest kind of token that has one."""
        at = token_type
        while at is not None and at not in self._styles:
            at = at.parent
        return self._ground + self._styles[Token if at is None else at]

    def get_background_style(self) -> Style:
        return self._ground
