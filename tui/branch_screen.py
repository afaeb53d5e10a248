"""The branches of a conversation, by how each ends.

Knows nothing of models.
"""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from edgeinfer import printable
from edgeinfer.tui.dialog import Modal
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.records import Node


class BranchScreen(Modal[int | None]):
    """Ends with the last message of the branch to show."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Back")]

    def __init__(self, leaves: list[Node], current: int | None) -> None:
        super().__init__()
        self._leaves, self._current = leaves, current

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield OptionList(id="branches", compact=True)
            yield Static("enter show   esc back", classes="hint")

    def on_mount(self) -> None:
        self.query_one(".dialog").border_title = "Branches"
        palette = Palette.of(self.app.current_theme)
        shown = self.query_one(OptionList)
        for node in self._leaves:
            mark = "● " if node.id == self._current else "  "
            text = " ".join(printable(node.content).split())[:200] or "(empty)"
            row = Text(mark, palette.accent, no_wrap=True, overflow="ellipsis")
            row.append(text, palette.text)
            shown.add_option(Option(row))
        ids = [node.id for node in self._leaves]
        shown.highlighted = ids.index(self._current) if self._current in ids else 0
        shown.focus()

    @on(OptionList.OptionSelected)
    def _select(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._leaves[event.option_index].id)
