"""Past conversations: found by words, opened, exported, deleted.

Knows nothing of models.
"""

from __future__ import annotations

import time
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edgeinfer import EdgeInferError, one_line, printable
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.records import Summary
from edgeinfer.tui.store import Store

_HINT = "enter open   ctrl+d delete   esc back"


class HistoryScreen(ModalScreen[int | None]):
    """Ends with the id of the conversation to open, None for none."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back"),
        Binding("down", "move(1)", "Next", priority=True, show=False),
        Binding("up", "move(-1)", "Previous", priority=True, show=False),
        Binding("pagedown", "move(10)", "Further", priority=True, show=False),
        Binding("pageup", "move(-10)", "Back", priority=True, show=False),
        Binding("ctrl+d", "delete", "Delete", priority=True),
    ]

    AUTO_FOCUS = "Input"

    def __init__(self, store: Store, current: int | None) -> None:
        super().__init__()
        self._store, self._current = store, current
        self._found: list[Summary] = []
        self._doomed: int | None = None

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog tall"):
            yield Input(placeholder="Search all conversations", id="words", compact=True)
            yield OptionList(id="found", compact=True)
            yield Static(_HINT, classes="hint")

    def on_mount(self) -> None:
        self.query_one(".dialog").border_title = "History"
        self.query_one(OptionList).can_focus = False
        self._search("")

    @on(Input.Changed)
    def _type(self, event: Input.Changed) -> None:
        self._search(event.value)

    @on(Input.Submitted)
    def _open(self) -> None:
        at = self.query_one(OptionList).highlighted
        if at is not None and self._found:
            self.dismiss(self._found[at].id)

    @on(OptionList.OptionSelected)
    def _click(self, event: OptionList.OptionSelected) -> None:
        if self._found:
            self.dismiss(self._found[event.option_index].id)

    def action_move(self, step: int) -> None:
        shown = self.query_one(OptionList)
        if self._found and shown.highlighted is not None:
            shown.highlighted = max(0, min(len(self._found) - 1, shown.highlighted + step))

    def action_delete(self) -> None:
        """The first press asks, the second one deletes."""
        shown = self.query_one(OptionList)
        if shown.highlighted is None or not self._found:
            return
        summary = self._found[shown.highlighted]
        if summary.id == self._current:
            self._hint("the conversation that is open can't be deleted; /clear leaves it")
        elif self._doomed != summary.id:
            self._doomed = summary.id
            self._hint(f"ctrl+d again deletes “{one_line(summary.title)[:40]}” for good")
        else:
            try:
                self._store.delete_conversation(summary.id)
            except EdgeInferError as error:
                self._hint(printable(str(error)))
                return
            at = shown.highlighted
            self._search(self.query_one(Input).value)
            shown.highlighted = min(at, len(self._found) - 1) if self._found else None
            self._hint("deleted")

    def _hint(self, text: str) -> None:
        self.query_one(".hint", Static).update(Text(text))

    def _search(self, words: str) -> None:
        self._found = self._store.search(words)
        self._doomed = None
        self._hint(self._store.notice(None) or _HINT)
        shown = self.query_one(OptionList)
        shown.clear_options()
        palette = Palette.of(self.app.current_theme)
        if not self._found:
            empty = "nothing found" if words.strip() else "no conversations yet"
            shown.add_option(Option(Text(empty, palette.muted), disabled=True))
            return
        shown.add_options(Option(_row(each, palette)) for each in self._found)
        shown.highlighted = 0


def _row(summary: Summary, palette: Palette) -> Text:
    count = f"{summary.n_messages} message{'s' * (summary.n_messages != 1)}"
    model = f" · {one_line(summary.model)}" if summary.model else ""
    row = Text(one_line(summary.title), no_wrap=True, overflow="ellipsis")
    row.append(f"\n{_ago(summary.updated)} · {count}{model}", palette.muted)
    snippet = " ".join(printable(summary.snippet).split())
    if snippet:
        row.append(f" · {snippet}", palette.accent)
    return row


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for limit, unit, name in ((60, 1, ""), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit:.0f} {name} ago" if name else "just now"
    if seconds < 7 * 86400:
        return f"{seconds // 86400:.0f} d ago"
    return time.strftime("%Y-%m-%d", time.localtime(then))
