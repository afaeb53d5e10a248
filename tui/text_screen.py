"""A page to read: help, statistics.

Knows nothing of what is written on it.
"""

from __future__ import annotations

from typing import ClassVar

from rich.console import RenderableType
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static


class TextScreen(ModalScreen[None]):
    """Esc, Enter or q leave it; arrows scroll."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q,f1", "dismiss", "Back")]

    def __init__(self, title: str, content: RenderableType) -> None:
        super().__init__()
        self._title, self._content = title, content

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            with VerticalScroll(id="page"):
                yield Static(self._content)
            yield Static("esc back   ↑↓ scroll", classes="hint")

    def on_mount(self) -> None:
        self.query_one(".dialog").border_title = self._title
        self.query_one("#page").focus()
