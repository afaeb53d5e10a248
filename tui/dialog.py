"""Screens over the conversation; of some one part gives way, so that the rest is always seen.

Knows nothing of what is asked.
"""

from __future__ import annotations

from typing import TypeVar

from textual import events
from textual.await_complete import AwaitComplete
from textual.containers import Vertical
from textual.screen import ModalScreen

T = TypeVar("T")

_SHORT_SCREEN = 18
_MOST_SHARE = 0.9  # of the screen's rows, as `.dialog` has it


class Modal(ModalScreen[T]):
    """A screen that is closed once: keys that come at once would close what is below it."""

    def dismiss(self, result: T | None = None) -> AwaitComplete:
        if self.app.screen is not self:
            return AwaitComplete()
        return super().dismiss(result)


class Dialog(Modal[T]):
    """`GIVES_WAY` selects the part that becomes as small as it must, and is scrolled."""

    GIVES_WAY = ""

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.height < _SHORT_SCREEN, "short")
        self.fit()

    def fit(self) -> None:
        """Once everything else has its size, the rest is for the part that gives way."""
        self.call_after_refresh(self._fit)

    def _fit(self) -> None:
        dialog = next(iter(self.query(".dialog").results(Vertical)), None)
        if dialog is None:  # it was closed before it was drawn
            return
        height = self.size.height
        room = height if self.has_class("short") else int(height * _MOST_SHARE)
        room -= dialog.gutter.height
        part = self.query_one(self.GIVES_WAY)
        for each in dialog.children:
            if each.display:
                room -= each.styles.margin.height
                room -= each.outer_size.height if each is not part else 0
        part.styles.max_height = max(1, room)
