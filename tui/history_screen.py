"""Past conversations: found by words, opened, named, tagged, exported, deleted.

Knows nothing of models.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edgeinfer import EdgeInferError, one_line, printable
from edgeinfer.tui.archive import export_history
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.dialog import Modal
from edgeinfer.tui.export import free_path
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.records import Summary, tags_of
from edgeinfer.tui.store import Store

_HINT = "enter open  ctrl+r rename  ctrl+t tags  ctrl+e export  ctrl+d delete  esc back"
_NAMING = {"title": "enter renames", "tags": "words; enter gives them as tags"}


class HistoryScreen(Modal[int | None]):
    """Ends with the id of the conversation to open, None for none."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back"),
        Binding("down", "move(1)", "Next", priority=True, show=False),
        Binding("up", "move(-1)", "Previous", priority=True, show=False),
        Binding("pagedown", "move(10)", "Further", priority=True, show=False),
        Binding("pageup", "move(-10)", "Back", priority=True, show=False),
        Binding("ctrl+r", "name('title')", "Rename", priority=True),
        Binding("ctrl+t", "name('tags')", "Tags", priority=True),
        Binding("ctrl+e", "export", "Export all", priority=True),
        Binding("ctrl+d", "delete", "Delete", priority=True),
    ]

    AUTO_FOCUS = "Input"

    def __init__(self, store: Store, current: Conversation, folder: Path) -> None:
        super().__init__()
        self._store, self._current, self._folder = store, current, folder
        self._found: list[Summary] = []
        self._doomed: int | None = None
        self._naming = ""  # what the marked conversation is given: a title, tags
        self._words = ""  # that were searched before

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
        if not self._naming:
            self._search(event.value)

    @on(Input.Submitted)
    def _open(self, event: Input.Submitted) -> None:
        marked = self._marked
        if self._naming and marked is not None:
            self._give(marked, event.value)
        elif marked is not None:
            self.dismiss(marked.id)

    @property
    def _marked(self) -> Summary | None:
        at = self.query_one(OptionList).highlighted
        return self._found[at] if at is not None and self._found else None

    @on(OptionList.OptionSelected)
    def _click(self, event: OptionList.OptionSelected) -> None:
        if self._found and not self._naming:
            self.dismiss(self._found[event.option_index].id)

    def action_back(self) -> None:
        self._end_naming() if self._naming else self.dismiss(None)

    def action_name(self, column: str) -> None:
        """Write the marked one's title or tags where the search is."""
        marked = self._marked
        if marked is not None and not self._naming:
            words = self.query_one(Input)
            self._naming, self._words = column, words.value
            with self.prevent(Input.Changed):
                words.value = marked.title if column == "title" else marked.tags
            words.action_end()
            self._hint(f"{_NAMING[column]}   esc back")

    def _give(self, summary: Summary, text: str) -> None:
        text = tags_of(text) if self._naming == "tags" else one_line(text).strip()
        if text or self._naming == "tags":
            if summary.id != self._current.id:
                self._store.update_conversation(summary.id, **{self._naming: text})
            elif self._naming == "tags":
                self._current.set_tags(text)
            else:
                self._current.rename(text)
        self._end_naming()

    def _end_naming(self) -> None:
        self._naming = ""
        with self.prevent(Input.Changed):
            self.query_one(Input).value = self._words
        self._search_again(self._words)

    def action_export(self) -> None:
        """All conversations, into a file of a new name."""
        path = free_path(self._folder, f"edgeinfer-{time.strftime('%Y-%m-%d')}", "json")
        try:
            n = export_history(self._store, path)
        except (EdgeInferError, FileExistsError) as error:
            self._hint(str(error))
        else:
            self._hint(f"{n} conversations written to {path}")

    def action_move(self, step: int) -> None:
        shown = self.query_one(OptionList)
        if self._found and not self._naming and shown.highlighted is not None:
            shown.highlighted = max(0, min(len(self._found) - 1, shown.highlighted + step))

    def action_delete(self) -> None:
        """The first press asks, the second one deletes."""
        summary = self._marked
        if summary is None or self._naming:
            return
        if summary.id == self._current.id:
            self._hint("the conversation that is open can't be deleted; /clear leaves it")
        elif self._doomed != summary.id:
            self._doomed = summary.id
            self._hint(f"ctrl+d again deletes “{one_line(summary.title)[:40]}” for good")
        else:
            try:
                self._store.delete_conversation(summary.id)
            except EdgeInferError as error:
                self._hint(str(error))
                return
            self._search_again(self.query_one(Input).value)
            self._hint("deleted")

    def _hint(self, text: str) -> None:
        self.query_one(".hint", Static).update(Text(printable(text)))

    def _search_again(self, words: str) -> None:
        """After a change: what is marked has the same place."""
        shown = self.query_one(OptionList)
        at = shown.highlighted
        self._search(words)
        if self._found and at is not None:
            shown.highlighted = min(at, len(self._found) - 1)

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
    for tag in summary.tags.split():
        row.append(f" #{one_line(tag)}", palette.accent)
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
