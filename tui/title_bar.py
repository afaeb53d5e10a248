"""The line at the top: the model and the conversation.

Knows nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.text import Text
from textual.widgets import Static

from edgeinfer import one_line
from edgeinfer.tui.palette import Palette


class TitleBar(Static):
    """One row; the title gives way first."""

    _draw_again: Callable[[], None] | None = None

    def on_resize(self) -> None:
        if self._draw_again is not None:
            self._draw_again()

    def draw(self, model: str, title: str, note: str, palette: Palette) -> None:
        """`note` is what is special about this chat, such as that nothing is kept."""
        self._draw_again = partial(self.draw, model, title, note, palette)
        width = max(10, self.size.width)
        left = Text.assemble((one_line(model) or "edgeinfer", f"bold {palette.accent}"))
        if note:
            left.append(f"   {note}", palette.warn)
        left.truncate(width, overflow="ellipsis")
        right = Text(one_line(title), palette.muted)
        right.truncate(max(0, width - left.cell_len - 3), overflow="ellipsis")
        gap = max(1, width - left.cell_len - right.cell_len)
        self.update(Text.assemble(left, " " * gap, right), layout=False)
