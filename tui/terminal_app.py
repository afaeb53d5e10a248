"""What an app needs of a terminal: keys in order, its end, a theme, notices, the clipboard."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from textual import events
from textual.actions import ActionParseResult
from textual.app import App
from textual.await_complete import AwaitComplete
from textual.content import Content
from textual.dom import DOMNode
from textual.driver import Driver
from textual.geometry import Size
from textual.notifications import SeverityLevel
from textual.screen import Screen

from edgeinfer import printable
from edgeinfer.tui.composer import Composer
from edgeinfer.tui.copying import Copies
from edgeinfer.tui.palette import DARK, LIGHT, OURS, Palette, row_colors
from edgeinfer.tui.prompt import Prompt
from edgeinfer.tui.records import Draft
from edgeinfer.tui.settings import ChatSettings
from edgeinfer.tui.store import Store
from edgeinfer.tui.terminal_colors import TerminalBackground, is_light_by

_HANG_UP = 1  # SIGHUP, where a system has it
_MOST_ROUNDS = 100  # of looks at what a key has set off; then the next one is taken all the same
_ROUND_SECONDS = 1.0
# A terminal that is smaller shows a part: what has borders and margins has no room then, and some
# widgets divide by it.
_LEAST_SIZE = Size(24, 6)


class TerminalApp(App[None], inherit_bindings=False):
    """Keys that come faster than they are taken mean what they would mean typed slowly."""

    def __init__(self, settings: ChatSettings, store: Store, driver: type[Driver] | None) -> None:
        super().__init__(driver_class=driver)
        self.settings = settings
        self.copies = Copies(settings.environment, settings.run_tool, self._write)
        self._preferences = store
        self._typed: deque[events.Key | events.Paste] = deque()
        self._is_settled = True  # all that the keys before have set off is done
        self._wrote = ""  # the last key, where it was for whoever has the focus
        self._taking: asyncio.Task[None] | None = None
        self._obeyed: Screen[Any] | None = None  # had a key before
        self._automatic = OURS[0].name  # the theme that fits the terminal
        self.failure: Exception | None = None
        self.ended_by: int | None = None  # a signal
        self.draft = Draft()  # what was being written at the end
        for theme in OURS:
            self.register_theme(theme)

    @property
    def composer(self) -> Composer:
        return self.screen_stack[0].query_one(Composer)

    # -- size ------------------------------------------------------------------------------------

    @property
    def size(self) -> Size:
        return _at_least(super().size)

    # -- keys ------------------------------------------------------------------------------------

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Resize):
            event = events.Resize(_at_least(event.size), _at_least(event.virtual_size))
        if not isinstance(event, (events.Key, events.Paste)) or event.is_forwarded:
            await super().on_event(event)
        elif self._is_over:
            return
        elif self._taking is None and (self._is_settled or self._writes_on(event)):
            await self._take(event)
        else:
            self._typed.append(event)
            self._taking = self._taking or asyncio.create_task(self._take_typed())

    def _writes_on(self, event: events.Key | events.Paste) -> bool:
        """Whether it is text after text, which takes no look at what else there is."""
        if not (self._wrote and isinstance(event, events.Key) and self._writes(event)):
            return False
        # In an empty prompt Backspace brings back what waits: letters are to come after that.
        return self._wrote != "backspace" or event.key == "backspace"

    def _writes(self, event: events.Key) -> bool:
        """Whether the widget takes it at once: most keys go up first to whoever has a use."""
        edits = Prompt.EDITS if isinstance(self.focused, Prompt) else ()
        return event.is_printable or event.key in edits

    async def _take_typed(self) -> None:
        try:
            while self._typed and not self._is_over:
                event = self._typed.popleft()
                if not self._writes_on(event):
                    await self._settle()
                if not self._is_over:
                    await self._take(event)
        except Exception as error:
            self._handle_exception(error)
        finally:
            self._taking = None

    async def _settle(self) -> None:
        """Wait until everything that the keys before have set off is done."""
        n_quiet = 0
        for _ in range(_MOST_ROUNDS):
            if n_quiet == 2:
                break
            chain = [*(self.focused.ancestors_with_self if self.focused else [self.screen, self])]
            for node in chain:
                done = asyncio.Event()
                if node.is_running and node.call_later(done.set):
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(done.wait(), _ROUND_SECONDS)
            if self._is_over:
                break
            is_known = len(self.screen_stack) == 1 or self.screen is self._obeyed
            has_focus = is_known or self.focused is not None
            is_quiet = has_focus and not any(node.message_queue_size for node in chain)
            n_quiet = n_quiet + 1 if is_quiet else 0
        self._is_settled = True

    @property
    def _is_over(self) -> bool:
        return self._exit or not self.screen_stack

    async def _take(self, event: events.Key | events.Paste) -> None:
        self._obeyed = self.screen  # where nothing has the focus, a click has taken it away
        self._wrote, self._is_settled = "", False
        if not (isinstance(event, events.Key) and event.key == "backspace"):
            self.composer.prompt.release()
        if not self.obey(event):
            if isinstance(event, events.Key) and self._writes(event):
                self._wrote = event.key
            await super().on_event(event)

    async def run_action(
        self,
        action: str | ActionParseResult,
        default_namespace: DOMNode | None = None,
        namespaces: Mapping[str, DOMNode] | None = None,
    ) -> bool:
        try:
            return await super().run_action(action, default_namespace, namespaces)
        except (KeyError, IndexError):
            if "page_" in str(action):  # of a list that is not laid out yet: it has no pages
                return True
            raise

    def obey(self, event: events.Key | events.Paste) -> bool:
        """Do what a key is a command for; False for what is for the widget that has the focus."""
        raise NotImplementedError

    # -- what ends it ----------------------------------------------------------------------------

    def end_by(self, number: int) -> None:
        """End, since a signal asks for that; called by any thread."""
        self.ended_by = self.ended_by or number
        self.call_soon(self.exit)

    def exit(self, *arguments: Any, **options: Any) -> None:
        with suppress(Exception):
            self.note_draft()
        super().exit(*arguments, **options)

    def fail(self, error: Exception) -> None:
        """End by an error of another thread's; called by any thread."""

        def fail() -> None:
            raise error

        self.call_soon(fail)

    def _handle_exception(self, error: Exception) -> None:
        # NOTE: Textual's name. It writes pages of local variables and forgets the error, which
        # whoever runs the chat tells in a line.
        self.failure = self.failure or error
        with suppress(Exception):
            self.note_draft()
        super()._handle_exception(error)
        self._exit_renderables.clear()

    def note_draft(self) -> None:
        """Take what is being written into `draft`."""
        raise NotImplementedError

    def give_up(self) -> None:
        """Restore the terminal from any thread, whatever the screen's waits for."""
        give_up = getattr(self._driver, "give_up", None)
        if give_up is not None:
            give_up()

    def pop_screen(self) -> AwaitComplete:
        """A dialog that is closed twice, by keys that came at once, takes nothing else away."""
        return super().pop_screen() if len(self.screen_stack) > 1 else AwaitComplete()

    # -- for the driver --------------------------------------------------------------------------

    def call_soon(self, call: Callable[[], object]) -> None:
        """From any thread, or a signal's handler, in the screen's; never once the app is over."""
        with suppress(RuntimeError, AttributeError):
            self._loop.call_soon_threadsafe(self.call_later, call)  # type: ignore[union-attr]

    def hang_up(self) -> None:
        """The terminal went away; called by any thread."""
        self.end_by(_HANG_UP)

    def stop_for_shell(self, terminal: int, *, now: bool, group: bool = False) -> bool:
        stop = self.settings.stop_for_shell
        return stop(terminal, lambda: self.ended_by is not None, now=now, group=group)

    def draw_again(self) -> None:
        """The terminal is another than before."""
        self.refresh(layout=True)

    def suspend_for_shell(self) -> None:
        """Ctrl-Z, where the terminal knows it."""
        pause = getattr(self._driver, "pause", None)
        if pause is not None:
            pause(group=True)

    # -- telling ---------------------------------------------------------------------------------

    def say(
        self,
        text: str,
        severity: SeverityLevel = "information",
        seconds: float | None = None,
    ) -> None:
        """A line that goes away by itself, where it covers nothing."""
        self.notify(printable(text), severity=severity, timeout=seconds, markup=False)

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

    def tell_copies(self) -> None:
        for text, is_bad in self.copies.take():
            self.say(text, "warning" if is_bad else "information")

    def _write(self, sequence: str) -> None:
        if self._driver is not None:
            self._driver.write(sequence)

    # -- the theme -------------------------------------------------------------------------------

    @property
    def palette(self) -> Palette:
        return Palette.of(self.current_theme)

    def theme_names(self) -> list[str]:
        return sorted(self.available_themes, key=lambda name: (not name.startswith("edge"), name))

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return row_colors(self.current_theme)

    def on_mount(self) -> None:
        self._fit_theme(is_light=is_light_by(self.settings.environment))
        self.theme_changed_signal.subscribe(self, lambda _: self._keep_theme())
        self._keep_theme()
        if self.ended_by is not None:  # before there was anything to end
            self.exit()

    def _fit_theme(self, *, is_light: bool) -> None:
        """The theme that was chosen, or else the one that fits the terminal."""
        if self.console.color_system == "standard" and not self.is_headless:
            # Sixteen colours: ours would become one, the terminal's own are told apart.
            self._automatic = "ansi-light" if is_light else "ansi-dark"
        else:
            self._automatic = (LIGHT if is_light else DARK).name
        chosen = self._preferences.preference("theme")
        self.theme = chosen if chosen in self.available_themes else self._automatic

    def _keep_theme(self) -> None:
        self.take_theme()
        if self.theme != (self._preferences.preference("theme") or self._automatic):
            self._preferences.set_preference("theme", self.theme)

    def take_theme(self) -> None:
        """Draw what the theme's colours are not taken from by themselves."""
        raise NotImplementedError

    def on_terminal_background(self, message: TerminalBackground) -> None:
        self._fit_theme(is_light=message.is_light)


def _at_least(size: Size) -> Size:
    return Size(max(size.width, _LEAST_SIZE.width), max(size.height, _LEAST_SIZE.height))
