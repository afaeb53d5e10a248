"""The chat on a terminal: puts the widgets together and keeps them up to date.

Knows nothing of tokens or files; `Session` does what is asked here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.containers import Container
from textual.driver import Driver
from textual.timer import Timer
from textual.widgets import Static

from edgeinfer import one_line
from edgeinfer.tui import commands, controls
from edgeinfer.tui.catalog import find_models
from edgeinfer.tui.completions import Sources
from edgeinfer.tui.composer import Composer
from edgeinfer.tui.counts import TokenCounts
from edgeinfer.tui.downloads import Downloads
from edgeinfer.tui.entries import RunningEntry, blocks_of
from edgeinfer.tui.errors import in_chat
from edgeinfer.tui.files import FileSearch
from edgeinfer.tui.keys import Keys
from edgeinfer.tui.loader import Task
from edgeinfer.tui.notes import answer_note, dropped_block, hint, welcome
from edgeinfer.tui.palette import OURS, Palette
from edgeinfer.tui.records import Attachment, Draft, Node
from edgeinfer.tui.session import News, Session
from edgeinfer.tui.settings import ChatSettings, ModelChoice
from edgeinfer.tui.settings_file import FILE_NAME as SETTINGS
from edgeinfer.tui.settings_file import Entry, read_settings
from edgeinfer.tui.status_bar import StatusBar
from edgeinfer.tui.store import FILE_NAME, Store
from edgeinfer.tui.terminal_app import TerminalApp
from edgeinfer.tui.title_bar import TitleBar
from edgeinfer.tui.transcript import Transcript

if TYPE_CHECKING:
    from textual.command import Provider

    from edgeinfer.tui.commands import Place

_RATE = 8.0  # looks a second while something happens
_MOST_SHARE = 0.2  # of the time may go into drawing; a slow draw is followed by a pause
_SHORT_SCREEN = 18
_TWICE_SECONDS = 2.0
_LONG_SECONDS = 20.0  # of a line that nobody waits for


def _command_search() -> type[Provider]:
    """Imported when the palette is opened."""
    from edgeinfer.tui.command_search import CommandSearch

    return CommandSearch


class ChatApp(TerminalApp):
    """One conversation at a time, on one model."""

    ENABLE_COMMAND_PALETTE = False  # by a key of Textual's own
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {_command_search}

    CSS_PATH = "chat.tcss"
    AUTO_FOCUS = "#prompt"
    TITLE = "edgeinfer"
    NOTIFICATION_TIMEOUT = 4

    def __init__(self, settings: ChatSettings, driver: type[Driver] | None = None) -> None:
        path = settings.data_folder / FILE_NAME if settings.keeps_history else None
        store = Store(path)
        super().__init__(settings, store, driver)
        self.session = Session(settings, store)
        self.read_settings()
        self.editing: Node | None = None
        self._aside = Draft()  # what was being written before
        self._entry: RunningEntry | None = None
        self._timer: Timer | None = None
        self._rest_until = 0.0
        self._counts = TokenCounts()
        self._lasting = ""
        self.downloads = Downloads(settings.fetch)
        self.left_download = ""  # what was being fetched when the chat ended
        self.closing: Task[None] | None = None  # of the model, which may take seconds
        self.unsent = ""  # texts that are not in the history
        self._asked = "", 0.0
        self.refused = ""  # the last command that would have replaced a file

    def read_settings(self) -> None:
        """Take what the settings file gives; `complaints` says what is wrong with it."""
        written, complaints = read_settings(self.settings.data_folder / SETTINGS)
        self.keys = Keys(written.get("keys", {}))
        titles = written.get("chat", {}).get("titles", Entry("on", ""))
        if titles.value not in ("on", "off"):
            complaints.append(f"{titles.place}: titles is {titles.value[:20]}, not on or off")
        self._finds_titles = self.settings.finds_titles and titles.value != "off"
        self.complaints = [*complaints, *self.keys.complaints]

    def is_again(self, what: str) -> bool:
        """Whether the same was asked for a moment ago, as what can't be taken back must be."""
        (before, at), now = self._asked, time.monotonic()
        is_again = before == what and now - at < _TWICE_SECONDS
        self._asked = "" if is_again else what, now
        return is_again

    def compose(self) -> ComposeResult:
        files = FileSearch(self.settings.folder)
        known = tuple((each.name, each.help) for each in commands.TYPED.values())
        sources = Sources(
            known, self._argument_values, files.find, lambda: files.is_busy, files.file
        )
        yield TitleBar(id="title")
        yield Transcript(Palette.of(OURS[0]), id="transcript")
        yield Static(id="welcome")
        with Container(id="bottom"):
            yield Static(id="lasting")
            yield Composer(sources, self.settings.decode)
        yield StatusBar(id="status")

    def _argument_values(self, name: str) -> list[tuple[str, str]]:
        command = commands.typed(name)
        return command.values(self) if command else []

    def on_mount(self) -> None:
        self.screen_stack[0].query_one("#lasting").display = False
        self._timer = self.set_interval(1 / _RATE, self._tick)
        self.composer.prompt.set_history(self.session.store.prompts())
        self.composer.show(self.session.take_draft())
        self.show_conversation()
        if self.complaints:
            self.say("\n".join(self.complaints), "warning")
        # The first picture is out before loading takes the processor.
        self.call_after_refresh(self._begin)

    def on_unmount(self) -> None:
        session = self.session
        waiting = [draft.text for draft in session.queue]
        session.end(self.draft)
        self.left_download = self.downloads.close()
        if session.model is not None and self.ended_by is None:
            self.closing = Task(session.model.close)
        is_kept = session.store.path is not None and not session.notice
        left = [*([] if is_kept else waiting), self.draft.text]
        self.unsent = "\n".join(text for text in left if text).strip()

    def note_draft(self) -> None:
        self.draft = Draft.joined([self._aside, self.composer.draft])

    def _begin(self) -> None:
        path = self.settings.model or self.settings.last_model()
        if path is None:
            controls.choose_model(self)
        else:
            controls.load_model(self, path)

    @property
    def transcript(self) -> Transcript:
        return self.screen_stack[0].query_one(Transcript)

    def obey(self, event: events.Key | events.Paste) -> bool:
        """Keys of the conversation rest while a dialog is open; what is written is the prompt's."""
        is_main, keeps_mark = len(self.screen_stack) == 1, False
        if isinstance(event, events.Key):
            if is_main and self.composer.takes(event.key):
                return True
            here: Place = "message" if self.has_mark else "prompt"
            command = self.keys.find(event, [here, "main", "always"] if is_main else ["always"])
            if command is not None:
                command(self)
                return True
            keeps_mark = self.has_mark and not event.is_printable
        if is_main and not keeps_mark:
            self.set_focus(self.composer.prompt)
            self.refresh_hint()
        return False

    @property
    def has_mark(self) -> bool:
        """Whether letters are commands: a message was marked by a key."""
        return self.transcript.has_focus and self.transcript.selected is not None

    def model_choices(self) -> list[ModelChoice]:
        return find_models(self.settings, self.session.store)

    # -- drawing ---------------------------------------------------------------------------------

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
        self.screen_stack[0].set_class(event.size.height < _SHORT_SCREEN, "short")

    # -- while something happens -----------------------------------------------------------------

    def _tick(self) -> None:
        now = time.perf_counter()
        if now < self._rest_until or not self.is_running:
            return
        session = self.session
        session.store.tend()
        self._draw_lasting()
        is_busy = session.running is not None or session.loader is not None
        if session.loader is not None and session.loader.wants_old:
            self.stop()
            session.hand_over()
        if session.loader is not None and session.loader.task.is_over:
            self._finish_loading()
        if session.running is not None:
            self._take_news(session.drain())
            if session.running is None:
                self._send_next()
        self.composer.tend()
        self._take_download()
        if self._finds_titles and session.tend_title():
            self.refresh_title()
        self._take_counts()
        self.tell_copies()
        if is_busy or self.downloads.current is not None:
            self._draw_status()
        self._rest_until = now + (time.perf_counter() - now) / _MOST_SHARE

    def _finish_loading(self) -> None:
        session = self.session
        error = session.take_loaded()
        self.refresh_title()
        self.refresh_hint()
        if error is None:
            self._count_waiting()
        elif session.model is not None:
            self.recall()  # it was meant for another model
            self.say(f"{session.model.name} stays: {in_chat(error)}", "error")
        elif session.loader is None and self.composer.draft.is_empty:
            controls.choose_model(self, f"The model did not load: {in_chat(error)}")
        else:  # a dialog would take what is typed for a path
            self.say(f"The model did not load: {in_chat(error)}", "error")
        self._send_next()

    def _take_download(self) -> None:
        """One that nobody waits for: its model is opened where none is, else it is said."""
        over = self.downloads.take() if len(self.screen_stack) == 1 else None
        if over is None:
            return
        self._draw_status()
        error = over.task.error
        if error is not None:
            text = f"the download of {over.name} failed: {in_chat(error)}"
            self.say(text, "error", _LONG_SECONDS)
        elif self.session.model is None and self.session.loader is None:
            controls.load_model(self, over.task.result)
        else:
            text = f"{over.name} is here; /model switches to it"
            self.say(text, "information", _LONG_SECONDS)

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

    # -- sending ---------------------------------------------------------------------------------

    def submit(self, draft: Draft) -> None:
        """Send a message, now or when its turn comes; an edited one at once."""
        if self.editing is not None:
            self._ask_anew(self.editing, draft)
        elif self.session.is_ready:
            self._send(draft)
        else:
            self.session.queue.append(draft)
            self._draw_queue()
            if self.session.model is None and self.session.loader is None:
                controls.choose_model(self)

    def _send(self, draft: Draft) -> None:
        conversation = self.session.conversation
        node = self.session.ask(draft)
        self.transcript.select(None)
        self.transcript.follows = True
        self.transcript.add(blocks_of(node, answer_note(node, conversation.place(node))))
        self.refresh_title()
        self.start_answer()

    def _ask_anew(self, node: Node, draft: Draft) -> None:
        self.stop()
        self.end_edit()
        self.session.edit(node, draft)
        self.show_conversation()
        self.start_answer()

    def begin_edit(self, node: Node) -> None:
        """Write an earlier message anew; what was being written comes back afterwards."""
        self.end_edit()
        self._aside = self.composer.draft
        self.editing = node
        self.composer.show(Draft(node.content, node.attachments))
        self.composer.prompt.focus()
        self.refresh_hint()

    def end_edit(self) -> None:
        """Have what was being written back; what the edit was lies with the earlier prompts."""
        if self.editing is not None:
            if self.composer.prompt.text != self.editing.content:
                self.composer.prompt.remember(self.composer.prompt.text)
            self.editing = None
            self.composer.show(self._aside)
            self._aside = Draft()
            self.refresh_hint()

    def start_answer(self) -> None:
        """Let the model answer what is on show."""
        node = self.session.answer()
        self._entry = RunningEntry(node.id)
        self.transcript.start(self._entry)
        self.refresh_hint()
        self._draw_status()

    def _send_next(self) -> None:
        if self.session.queue and self.session.is_ready:
            draft = self.session.queue.pop(0)
            self._draw_queue()
            self._send(draft)

    def _draw_queue(self) -> None:
        names = [each.text or each.attachments[0].name for each in self.session.queue]
        self.composer.show_queue(names)

    @on(Composer.QueueRecalled)
    def _recall(self) -> None:
        self.recall(1)

    @on(Transcript.EntryClicked)
    def _mark_clicked(self, event: Transcript.EntryClicked) -> None:
        self.set_focus(self.composer.prompt)
        self.transcript.select(event.entry)
        self.refresh_hint()

    @on(Transcript.CopyRequested)
    def _copy_clicked(self, event: Transcript.CopyRequested) -> None:
        self.copy_to_clipboard(event.text)

    def stop(self) -> bool:
        """Stop the running answer and keep it; False if there is none."""
        news = self.session.stop()
        if news is None:
            return False
        self._take_news(news)
        return True

    def halt(self) -> None:
        """Stop what runs; what waits for its end is what one is writing again."""
        self.stop()
        self.recall()

    def recall(self, n: int | None = None) -> None:
        """Take the last `n` waiting messages back into the prompt, all by default."""
        queue = self.session.queue
        back = queue[-n:] if n else list(queue)
        del queue[len(queue) - len(back) :]
        self._draw_queue()
        if back:
            whole = Draft.joined([*back, self._aside if self.editing else self.composer.draft])
            if self.editing:
                self._aside = whole
            else:
                self.composer.show(whole)

    # -- attachments -----------------------------------------------------------------------------

    @on(Composer.Attached)
    def _count(self, event: Composer.Attached) -> None:
        self._counts.start(self.session.model, event.attachment)

    def _count_waiting(self) -> None:
        for attachment in self.composer.attachments:
            self._counts.start(self.session.model, attachment)

    def _take_counts(self) -> None:
        for attachment, n_tokens in self._counts.take():
            self.composer.set_count(attachment, n_tokens)
            self._warn_if_long(attachment, n_tokens)

    def _warn_if_long(self, attachment: Attachment, n_tokens: int) -> None:
        n_ctx = self.session.readings.n_ctx
        if n_ctx and n_tokens > n_ctx - min(512, n_ctx // 4):
            name = one_line(attachment.name)
            self.say(f"{name} is {n_tokens:,} tokens, the context holds {n_ctx:,}", "warning")
