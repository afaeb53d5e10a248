"""The chat on a terminal: puts the widgets together, takes keys, sends, looks at what has come.

Knows nothing of tokens or files; `Session` does what is asked here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.containers import Container
from textual.driver import Driver
from textual.timer import Timer
from textual.widgets import Static

from edgeinfer import one_line
from edgeinfer.tui import commands, controls
from edgeinfer.tui.bars import StatusBar, TitleBar
from edgeinfer.tui.chat_view import ChatView
from edgeinfer.tui.completions import Sources
from edgeinfer.tui.composer import Composer
from edgeinfer.tui.counts import TokenCounts
from edgeinfer.tui.entries import blocks_of
from edgeinfer.tui.errors import in_chat
from edgeinfer.tui.files import FileSearch
from edgeinfer.tui.keys import Keys
from edgeinfer.tui.loader import Task
from edgeinfer.tui.model_choices import find_models
from edgeinfer.tui.notes import answer_note
from edgeinfer.tui.palette import OURS, Palette
from edgeinfer.tui.records import Attachment, Draft, Node
from edgeinfer.tui.settings import ChatSettings, ModelChoice
from edgeinfer.tui.settings_file import FILE_NAME as SETTINGS
from edgeinfer.tui.settings_file import Entry, read_settings
from edgeinfer.tui.transcript import Transcript

if TYPE_CHECKING:
    from textual.command import Provider

    from edgeinfer.tui.commands import Place

_RATE = 8.0  # looks a second while something happens
_MOST_SHARE = 0.2  # of the time may go into drawing; a slow draw is followed by a pause
_TWICE_SECONDS = 2.0
_LONG_SECONDS = 20.0  # of a line that nobody waits for


def _command_search() -> type[Provider]:
    """Imported when the palette is opened."""
    from edgeinfer.tui.command_search import CommandSearch

    return CommandSearch


class ChatApp(ChatView):
    """One conversation at a time, on one model."""

    ENABLE_COMMAND_PALETTE = False  # by a key of Textual's own
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {_command_search}

    CSS_PATH = "chat.tcss"
    AUTO_FOCUS = "#prompt"
    TITLE = "edgeinfer"
    NOTIFICATION_TIMEOUT = 4

    def __init__(self, settings: ChatSettings, driver: type[Driver] | None = None) -> None:
        super().__init__(settings, driver)
        self.read_settings()
        self._aside = Draft()  # what was being written before
        self._timer: Timer | None = None
        self._rest_until = 0.0
        self._counts = TokenCounts()
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
        sources = Sources(known, self._argument_values, files.find, files.was_early, files.file)
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
        if path is None and self.settings.server is not None:
            path = ""  # the only one that it has
        if path is None:
            controls.choose_model(self)
        else:
            controls.load_model(self, path)

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

    def model_choices(self) -> list[ModelChoice]:
        return find_models(self.settings, self.session.store)

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
        self._begin_answer(self.session.answer())

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

    @on(Composer.Detached)
    def _tell_detached(self, event: Composer.Detached) -> None:
        key = self.keys.label("undo-writing", "prompt")
        self.say(f"{one_line(event.name)} is not sent; {key} brings it back")

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
