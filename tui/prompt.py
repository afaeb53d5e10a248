"""The text that is being written: grows with its lines, knows its history.

Knows nothing of what becomes of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from textual import events
from textual.message import Message
from textual.widgets import TextArea

_MOST_ROWS = 10
_LONG_PASTE = 4000  # characters; more becomes an attachment, an editor of a megabyte is slow


class Prompt(TextArea):
    """Up and Down leave it through history; the table of commands has the keys that do more."""

    @dataclass
    class LongPaste(Message):
        """More was pasted than belongs between the lines."""

        text: str

    class Left(Message):
        """A key that means nothing in an empty prompt: the one before the text goes away."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(
            id=id, soft_wrap=True, compact=True, show_line_numbers=False,
            highlight_cursor_line=False, tab_behavior="focus", placeholder="Ask anything",
        )  # fmt: skip
        self._history: list[str] = []
        self._at: int | None = None
        self._draft = ""

    def set_history(self, prompts: list[str]) -> None:
        self._history = list(prompts)
        self._at = None

    def remember(self, text: str) -> None:
        if text and (not self._history or self._history[-1] != text):
            self._history.append(text)
        self._at = None

    def set_text(self, text: str) -> None:
        """Replace everything; the cursor goes to the end."""
        self.load_text(text)
        self.move_cursor(self.document.end)
        self.fit()

    @property
    def line_to_cursor(self) -> str:
        row, column = self.cursor_location
        return self.document.get_line(row)[:column]

    def fit(self) -> None:
        """As many rows as the text takes, within reason."""
        rows = max(1, min(_MOST_ROWS, self.wrapped_document.height))
        if self.styles.height is None or self.styles.height.value != rows:
            self.styles.height = rows

    def on_resize(self) -> None:
        self.call_after_refresh(self.fit)

    def on_text_area_changed(self) -> None:
        self.fit()

    def on_key(self, event: events.Key) -> None:
        """Keys that mean something else here than in an editor."""
        if event.key == "up" and self._at_edge(first=True):
            self._browse(-1)
        elif event.key == "down" and self._at_edge(first=False) and self._at is not None:
            self._browse(1)
        elif event.key == "backspace" and not self.text:
            self.post_message(self.Left())
        else:
            return
        event.prevent_default()
        event.stop()

    def on_paste(self, event: events.Paste) -> None:
        if len(event.text) > _LONG_PASTE:
            self.post_message(self.LongPaste(event.text))
            event.prevent_default()
            event.stop()

    def _at_edge(self, *, first: bool) -> bool:
        if self.selection.start != self.selection.end:
            return False
        offset = self.wrapped_document.location_to_offset(self.cursor_location)
        return offset.y == (0 if first else self.wrapped_document.height - 1)

    def _browse(self, step: int) -> None:
        """Go through history; what was being written is the last entry."""
        if not self._history:
            return
        if self._at is None:
            self._draft, self._at = self.text, len(self._history)
        self._at = max(0, min(len(self._history), self._at + step))
        is_draft = self._at == len(self._history)
        self.set_text(self._draft if is_draft else self._history[self._at])
        if is_draft:
            self._at = None
