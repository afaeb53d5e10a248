"""The app's actions: what keys, the command palette and slash commands have in common.

Knows nothing of drawing; `ChatApp` fills in what is left open here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import App
from textual.binding import BindingType
from textual.content import Content
from textual.notifications import SeverityLevel

from edgeinfer import printable
from edgeinfer.tui import actions, slash
from edgeinfer.tui.catalog import find_models
from edgeinfer.tui.composer import Composer
from edgeinfer.tui.copying import Copies
from edgeinfer.tui.history_screen import HistoryScreen
from edgeinfer.tui.keys import APP_KEYS, MAIN_ACTIONS
from edgeinfer.tui.model_screen import ModelScreen
from edgeinfer.tui.pages import help_page, stats_page
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.params_screen import ParamsScreen
from edgeinfer.tui.records import Node
from edgeinfer.tui.session import Session
from edgeinfer.tui.settings import ChatSettings, ModelChoice
from edgeinfer.tui.text_screen import TextScreen
from edgeinfer.tui.transcript import Transcript

if TYPE_CHECKING:
    from textual.command import Provider

_TWICE_SECONDS = 2.0
_FIRST_RUN = (
    "Welcome. edgeinfer runs language models on this machine.\n"
    "Choose one to begin with, or type the path of a .gguf file."
)


def _command_search() -> type[Provider]:
    """Imported when the palette is opened."""
    from edgeinfer.tui.command_search import CommandSearch

    return CommandSearch


class ChatCommands(App[None]):
    """Every `action_` is a key of `keys.py`."""

    BINDINGS: ClassVar[list[BindingType]] = [*APP_KEYS]
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {_command_search}

    settings: ChatSettings
    session: Session
    copies: Copies
    editing: Node | None
    _interrupted_at = -_TWICE_SECONDS

    # -- what the app itself does ----------------------------------------------------------------

    @property
    def transcript(self) -> Transcript:
        raise NotImplementedError

    @property
    def composer(self) -> Composer:
        raise NotImplementedError

    @property
    def palette(self) -> Palette:
        raise NotImplementedError

    def show_conversation(self) -> None:
        raise NotImplementedError

    def refresh_title(self) -> None:
        raise NotImplementedError

    def refresh_hint(self) -> None:
        raise NotImplementedError

    def start_answer(self) -> None:
        raise NotImplementedError

    def stop(self) -> bool:
        raise NotImplementedError

    def recall(self, n: int | None = None) -> None:
        raise NotImplementedError

    # -- telling ---------------------------------------------------------------------------------

    def say(self, text: str, severity: SeverityLevel = "information") -> None:
        """A line that goes away by itself, where it covers nothing."""
        self.notify(printable(text), severity=severity, markup=False)

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = True,
    ) -> None:
        """Above the prompt; over a dialog, which may hide the prompt, at the top."""
        if len(self.screen_stack) > 1:
            super().notify(message, title=title, severity=severity, timeout=timeout, markup=markup)
        else:
            text = Content.from_markup(message) if markup else Content(message)
            self.composer.tell(text, severity, timeout or self.NOTIFICATION_TIMEOUT)

    def copy_to_clipboard(self, text: str) -> None:
        """Through the terminal, and through tools of the system; what came of it is told later."""
        self._clipboard = text
        self.copies.start(text)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys of the conversation rest while a dialog is open."""
        is_main = action in MAIN_ACTIONS and action != "interrupt"
        return not (is_main and len(self.screen_stack) > 1)

    # -- models ----------------------------------------------------------------------------------

    def model_choices(self) -> list[ModelChoice]:
        return find_models(self.settings, self.session.store)

    def load_model(self, path: str) -> None:
        """Load it in the background; what runs is stopped and kept."""
        self.stop()
        self.session.load(path)
        self.refresh_title()
        self.refresh_hint()

    def choose_model(self, title: str) -> None:
        def take(path: str | None) -> None:
            if path is not None:
                self.load_model(path)

        current = self.session.store.preference("model")
        choices = self.model_choices()
        self.push_screen(ModelScreen(self.settings, choices, title, current), take)

    def action_models(self) -> None:
        is_first = self.session.model is None and self.session.loader is None
        self.choose_model(_FIRST_RUN if is_first else "")

    # -- screens ---------------------------------------------------------------------------------

    def action_history(self) -> None:
        def take(id: int | None) -> None:
            if id is not None:
                actions.open_conversation(self, id)

        self.push_screen(HistoryScreen(self.session.store, self.session.conversation.id), take)

    def action_params(self) -> None:
        def take(values: dict[str, Any] | None) -> None:
            if values is not None:
                self.session.sampling = values
                self.say("sampling changed, from the next answer on")

        self.push_screen(ParamsScreen(self.session.sampling), take)

    def action_help(self) -> None:
        rows = [(each.name, each.hint, each.help) for each in slash.COMMANDS]
        self.push_screen(TextScreen("Keys and commands", help_page(rows, self.palette)))

    def action_stats(self) -> None:
        page = stats_page(self.session, self.settings.memory_now(), self.palette)
        self.push_screen(TextScreen("Statistics", page))

    def action_probabilities(self) -> None:
        actions.show_probabilities(self)

    def theme_names(self) -> list[str]:
        return sorted(self.available_themes, key=lambda name: (not name.startswith("edge"), name))

    # -- control ---------------------------------------------------------------------------------

    def action_escape(self) -> None:
        """Stop the answer; else leave what is marked or edited."""
        if self.stop():
            self.recall()
        elif self.editing is not None:
            self.editing = None
            self.composer.prompt.set_text("")
        self.screen.clear_selection()
        self.transcript.select(None)
        self.composer.prompt.focus()
        self.refresh_hint()

    def action_interrupt(self) -> None:
        """Copy what is marked with the mouse; else stop the answer; twice in a row: leave."""
        text = self.screen.get_selected_text() or self.composer.prompt.selected_text
        if text:
            self.copy_to_clipboard(text)
            self.screen.clear_selection()
        elif self.stop():
            self.recall()
        elif time.monotonic() - self._interrupted_at < _TWICE_SECONDS:
            self.exit()
        else:
            self._interrupted_at = time.monotonic()
            self.say("ctrl+c again leaves")

    def action_new(self) -> None:
        actions.open_conversation(self, None)

    def action_retry(self) -> None:
        actions.retry(self, actions.selected_answer(self))

    def action_edit(self) -> None:
        actions.edit(self, actions.selected(self))

    def action_branch(self, step: int) -> None:
        actions.switch_branch(self, actions.selected(self), step)

    def action_copy_answer(self) -> None:
        last = self.session.conversation.last("assistant")
        actions.copy(self, actions.selected(self) or last)

    def action_copy_code(self) -> None:
        actions.copy_code(self, actions.selected_answer(self))

    def action_thinking(self) -> None:
        marked = actions.selected(self)
        last = self.session.conversation.last("assistant")
        running = self.session.running
        actions.toggle_thinking(self, marked or (None if running else last))

    # -- moving ----------------------------------------------------------------------------------

    def action_mark(self) -> None:
        """Mark the last message, or go to the one before."""
        self.transcript.focus()
        self.action_move_mark(-1)

    def action_move_mark(self, step: int) -> None:
        self.transcript.select_next(step)
        self.refresh_hint()

    def action_page(self, direction: int) -> None:
        transcript = self.transcript
        transcript.scroll_relative(y=direction * (transcript.size.height - 2), animate=False)

    def action_follow(self) -> None:
        self.transcript.follow()

    @on(Transcript.EntryClicked)
    def _mark_clicked(self, event: Transcript.EntryClicked) -> None:
        self.transcript.focus()
        self.transcript.select(event.entry)
        self.refresh_hint()

    @on(Transcript.CopyRequested)
    def _copy_clicked(self, event: Transcript.CopyRequested) -> None:
        self.copy_to_clipboard(event.text)
