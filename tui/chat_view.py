"""What the chat shows: the branch, the answer that grows, the lines around them, hints.

Changes nothing of what it shows.
"""

from __future__ import annotations

import time
from typing import Literal

from rich.text import Text
from textual import events
from textual.driver import Driver
from textual.widgets import Static

from edgeinfer import one_line
from edgeinfer.tui.bars import StatusBar, TitleBar
from edgeinfer.tui.downloads import Downloads
from edgeinfer.tui.entries import RunningEntry, blocks_of
from edgeinfer.tui.keys import Keys
from edgeinfer.tui.notes import answer_note, dropped_block, hint, welcome
from edgeinfer.tui.records import Node
from edgeinfer.tui.session import News, Session
from edgeinfer.tui.settings import ChatSettings
from edgeinfer.tui.store import FILE_NAME, Store
from edgeinfer.tui.terminal_app import TerminalApp
from edgeinfer.tui.transcript import Transcript

_SHORT_SCREEN = 18


class ChatView(TerminalApp):
    """Draws the session, its downloads and its answer, as they are now."""

    keys: Keys  # which hints name

    def __init__(self, settings: ChatSettings, driver: type[Driver] | None) -> None:
        path = settings.data_folder / FILE_NAME if settings.keeps_history else None
        store = Store(path)
        super().__init__(settings, store, driver)
        self.session = Session(settings, store)
        self.downloads = Downloads(settings.fetch)
        self.editing: Node | None = None
        self._entry: RunningEntry | None = None
        self._lasting = ""

    @property
    def transcript(self) -> Transcript:
        return self.screen_stack[0].query_one(Transcript)

    @property
    def has_mark(self) -> bool:
        """Whether letters are commands: a message was marked by a key."""
        return self.transcript.has_focus and self.transcript.selected is not None

    def show_conversation(self) -> None:
        """Draw the branch on show from its start."""
        conversation = self.session.conversation
        blocks = []
        for node in conversation.branch():
            blocks += blocks_of(node, answer_note(node, conversation.place(node)))
        self.transcript.select(None)
        self.transcript.show(blocks)
        self._entry = None
        self.refresh_title()
        self.refresh_hint()
        self._draw_status()

    def refresh_title(self) -> None:
        session = self.session
        note = "not kept" if session.store.path is None or self._lasting else ""
        model = session.model.name if session.model is not None else session.conversation.model
        title = self.screen_stack[0].query_one(TitleBar)
        title.draw(model, session.conversation.title, note, self.palette)

    def refresh_hint(self) -> None:
        """The prompt's frame, and whether there is a conversation to show."""
        marked: Literal["keys", "mouse"] | None = None
        if self.transcript.selected is not None:
            marked = "keys" if self.has_mark else "mouse"
        is_editing = self.editing is not None
        title, text = hint(self.session, self.keys, is_editing=is_editing, marked=marked)
        self.composer.set_hint(title, text)
        empty = not self.transcript.blocks and self.session.running is None
        self.transcript.display = not empty
        note = self.screen_stack[0].query_one("#welcome", Static)
        note.display = empty
        if empty:
            last = self.session.store.recent(1)
            first = last[0] if last else None
            note.update(welcome(self.session, self.keys, first, self.palette))

    def _draw_status(self) -> None:
        session = self.session
        session.readings.sample_rate(time.perf_counter())
        status = self.screen_stack[0].query_one(StatusBar)
        memory, download = self.settings.memory_now(), self.downloads.current
        status.draw(session.readings, session.loader, download, memory, self.palette)

    def _draw_lasting(self) -> None:
        """What lasts: that, and why, the conversation is not kept."""
        text = self.session.notice
        if text == self._lasting:
            return
        self._lasting = text
        lasting = self.screen_stack[0].query_one("#lasting", Static)
        lasting.display = bool(text)
        lasting.update(Text(one_line(text, 500), self.palette.warn))
        self.refresh_title()

    def take_theme(self) -> None:
        self.transcript.set_palette(self.palette)
        self.refresh_title()
        self.refresh_hint()
        self._draw_status()

    def on_resize(self, event: events.Resize) -> None:
        screen, is_short = self.screen_stack[0], event.size.height < _SHORT_SCREEN
        screen.set_class(is_short, "short")
        # What is above the prompt gives way where there is no room for all of it: beside it are the
        # title, a row of the transcript and the status.
        bottom = screen.query_one("#bottom")
        bottom.styles.max_height = event.size.height - (3 if is_short else 5)
        bottom.anchor()

    # -- an answer -------------------------------------------------------------------------------

    def _begin_answer(self, node: Node) -> None:
        self._entry = RunningEntry(node.id)
        self.transcript.start(self._entry)
        self.refresh_hint()
        self._draw_status()

    def _take_news(self, news: News) -> None:
        """Draw what the model has said since the last look."""
        entry, seconds = self._entry, self.session.thinking_seconds()
        if entry is None:
            return
        first = len(entry.blocks)
        if news.n_dropped:
            entry.blocks.insert(0, dropped_block(news.n_dropped))
            first = 0
        if news.text or news.reasoning:
            first = min(first, entry.push(news.text, news.reasoning, seconds))
            if news.text:
                entry.end_thought(seconds)
        else:
            first = min(first, entry.tick(seconds))
        if news.is_over:
            first = min(first, self._finish_entry(entry))
        if first < len(entry.blocks):
            self.transcript.update_running(first)
        if news.is_over:
            self._end_answer()

    def _finish_entry(self, entry: RunningEntry) -> int:
        conversation = self.session.conversation
        node = conversation.node(entry.id)
        note = answer_note(node, conversation.place(node))
        error = str(node.details.get("error", ""))
        return entry.finish(note, error, float(node.details.get("thinking_s", 0.0)))

    def _end_answer(self) -> None:
        self.transcript.stop_running()
        self._entry = None
        self._draw_status()
        self.refresh_hint()
