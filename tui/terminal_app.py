"""What an app needs of a terminal: keys in order, a theme that fits, notices, the clipboard."""

from __future__ import annotations

import asyncio
from collections import deque

from textual import events
from textual.app import App
from textual.content import Content
from textual.driver import Driver
from textual.notifications import SeverityLevel

from edgeinfer import printable
from edgeinfer.tui.composer import Composer
from edgeinfer.tui.copying import Copies
from edgeinfer.tui.palette import DARK, LIGHT, OURS, Palette, row_colors
from edgeinfer.tui.settings import ChatSettings
from edgeinfer.tui.store import Store
from edgeinfer.tui.terminal_colors import TerminalBackground, is_light_by

_MOST_LOOKS = 500  # a millisecond apart, at what a key set off; then the next is taken anyway


class TerminalApp(App[None], inherit_bindings=False):
    """Keys that come faster than they are taken mean what they would mean typed slowly."""

    def __init__(self, settings: ChatSettings, store: Store, driver: type[Driver] | None) -> None:
        super().__init__(driver_class=driver)
        self.settings = settings
        self.copies = Copies(settings.environment, settings.run_tool, self._write)
        self._preferences = store
        self._typed: deque[events.Key | events.Paste] = deque()
        self._taking: asyncio.Task[None] | None = None
        self._automatic = OURS[0].name  # the theme that fits the terminal
        for theme in OURS:
            self.register_theme(theme)

    @property
    def composer(self) -> Composer:
        return self.screen_stack[0].query_one(Composer)

    # -- keys ------------------------------------------------------------------------------------

    async def on_event(self, event: events.Event) -> None:
        if not isinstance(event, (events.Key, events.Paste)) or event.is_forwarded:
            await super().on_event(event)
        elif not self._typed and self._is_settled():
            await self._take(event)
        else:
            self._typed.append(event)
            if self._taking is None or self._taking.done():
                self._taking = asyncio.create_task(self._take_typed())

    async def _take_typed(self) -> None:
        try:
            while self._typed and not self._exit:
                for _ in range(_MOST_LOOKS):
                    if self._is_settled():
                        break
                    await asyncio.sleep(0.001)
                await self._take(self._typed[0])
                self._typed.popleft()
        except Exception as error:
            self._handle_exception(error)

    def _is_settled(self) -> bool:
        """Whether everything that the keys before have set off is done."""
        if not self.screen.is_running or (len(self.screen_stack) > 1 and self.focused is None):
            return False
        chain = self.focused.ancestors_with_self if self.focused else [self.screen, self]
        return not any(node.message_queue_size for node in chain)

    async def _take(self, event: events.Key | events.Paste) -> None:
        if not self.obey(event):
            await super().on_event(event)

    def obey(self, event: events.Key | events.Paste) -> bool:
        """Do what a key is a command for; False for what is for the widget that has the focus."""
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
