"""The text that is being written: grows with its lines, knows its history.

Knows nothing of what becomes of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.message import Message
from textual.widgets import TextArea

_MOST_ROWS = 10
_ROWS_AROUND = 4  # the title, the frame and the status
_REPEAT_SECONDS = 0.12  # at most, between two events of a key that is held
_LONG_PASTE = 4000  # characters; more becomes an attachment, an editor of a megabyte is slow


class Prompt(TextArea):
    """Up and Down leave it through history; the table of commands has the keys that do more."""

    # Done in the key's own event: bindings are looked for later, after the letters that follow.
    EDITS: ClassVar[dict[str, str]] = {
        "backspace": "delete_left", "delete": "delete_right", "left": "cursor_left",
        "right": "cursor_right", "home": "cursor_line_start", "end": "cursor_line_end",
    }  # fmt: skip

    @dataclass
    class LongPaste(Message):
        """More was pasted than belongs between the lines."""

        text: str

    class Left(Message):
        """Backspace, pressed in an empty prompt: the one before the text goes away."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(
            id=id, soft_wrap=True, compact=True, show_line_numbers=False,
            highlight_cursor_line=False, tab_behavior="focus", placeholder="Ask anything",
        )  # fmt: skip
        self._history: list[str] = []
        self._at: int | None = None
        self._written: dict[int, str] = {}  # by place in history
        self._deleted_at = 0.0

    def set_history(self, prompts: list[str]) -> None:
        self._history = list(prompts)
        self._at = None

    def remember(self, text: str) -> None:
        """Have it among the earlier prompts, after what was being written beside it."""
        self._leave_history()
        if text and (not self._history or self._history[-1] != text):
            self._history.append(text)

    def set_text(self, text: str) -> None:
        """Replace everything; the cursor goes to the end."""
        self._leave_history()
        self._show(text)

    def release(self) -> None:
        """Another key came: Backspace after it is pressed anew."""
        self._deleted_at = 0.0

    def _show(self, text: str) -> None:
        self.history.checkpoint()
        self.replace(text, (0, 0), self.document.end)
        self.move_cursor(self.document.end)
        self.fit()

    def begins_line(self) -> bool:
        """Whether a backslash before the cursor made Enter begin a line; two are a text's own."""
        before = self.line_to_cursor
        if (len(before) - len(before.rstrip("\\"))) % 2 == 0 or self.selected_text:
            return False
        row, column = self.cursor_location
        self.replace("\n", (row, column - 1), (row, column), maintain_selection_offset=False)
        return True

    @property
    def line_to_cursor(self) -> str:
        row, column = self.cursor_location
        return self.document.get_line(row)[:column]

    def fit(self) -> None:
        """As many rows as the text takes, within reason; half of a screen that is short."""
        most = min(_MOST_ROWS, (self.app.size.height - _ROWS_AROUND) // 2)
        rows = max(1, min(most, self.wrapped_document.height))
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
            # Held, it stops where the text does.
            if event.time - self._deleted_at > _REPEAT_SECONDS:
                self.post_message(self.Left())
        elif event.key in self.EDITS:
            getattr(self, f"action_{self.EDITS[event.key]}")()
        else:
            return
        if event.key == "backspace":
            self._deleted_at = event.time
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
        """Go through history; what was being written is the last entry, and changes stay."""
        if not self._history:
            return
        earlier = [*self._history, ""]
        end = len(self._history)
        before = end if self._at is None else self._at
        self._at = max(0, min(end, before + step))
        self._written[before] = self.text
        self._show(self._written.get(self._at) or earlier[self._at])
        if self._at == end:
            self._at = None

    def _leave_history(self) -> None:
        """Of what was written while going through history, only what is shown goes on."""
        known = dict(enumerate(self._history))
        shown = len(known) if self._at is None else self._at
        self._at = None
        for at, text in sorted(self._written.items()):
            if at != shown and text.strip() and text != known.get(at):
                self._history.append(text)
        self._written.clear()
