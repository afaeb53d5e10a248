"""Highlights code in few colours.

Imported late: Pygments takes 40 ms.
"""

from __future__ import annotations

from typing import Any

from pygments.token import (  # type: ignore[import-untyped]
    Comment,
    Keyword,
    Name,
    Number,
    Operator,
    String,
    Token,
)
from rich.style import Style
from rich.syntax import Syntax, SyntaxTheme
from rich.text import Text

from edgeinfer.tui.palette import Palette


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


def highlighted(code: str, language: str, theme: SyntaxTheme) -> Text:
    """The code as it is, styled; unknown languages stay plain."""
    ground = theme.get_background_style()
    text = Syntax(code, language or "text", theme=theme).highlight(code)
    if text.plain == code:
        return text
    # Lexers drop or add line ends: what is shown is what was written.
    body = code.rstrip("\n")
    if text.plain.rstrip("\n") != body:
        return Text(code, ground)
    text = text[: len(body)]
    return text.append(code[len(body) :])
