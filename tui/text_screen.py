"""A page to read: help, statistics.

Knows nothing of what is written on it.
"""

from __future__ import annotations

from typing import ClassVar

from rich.console import RenderableType
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Static

from edgeinfer.tui.dialog import Dialog

_HINT = "esc back   ↑↓ scroll"


class _Page(VerticalScroll):
    """Tells when what is below it changes."""

    class Moved(Message):
        """It was scrolled, or has another size."""

    def on_resize(self) -> None:
        self.post_message(self.Moved())

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self.post_message(self.Moved())


class TextScreen(Dialog[None]):
    """Esc, Enter or q leave it; arrows scroll."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q,f1", "dismiss", "Back")]

    GIVES_WAY = "#page"

    def __init__(self, title: str, content: RenderableType) -> None:
        super().__init__()
        self._title, self._content = title, content

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            with _Page(id="page"):
                yield Static(self._content)
            yield Static(_HINT, classes="hint")

    def on_mount(self) -> None:
        self.query_one(".dialog").border_title = self._title
        self.query_one(_Page).focus()

    @on(_Page.Moved)
    def _draw_hint(self) -> None:
        """Say how much there is below."""
        page = self.query_one(_Page)
        n = page.max_scroll_y - round(page.scroll_y)
        more = f"   ↓ {n} more line{'s' * (n != 1)}" if n > 0 else ""
        self.query_one(".hint", Static).update(Text(f"{_HINT}{more}"))
