"""Reads the terminal like Textual's own driver, but knows a lone Escape 20 ms after it was pressed.

It stops and goes on with the shell, and a terminal that goes away ends the chat. Textual's driver
knows an Escape after 100 to 200 ms.
"""

from __future__ import annotations

import os
import selectors
import signal
import termios
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import FileIO
from typing import IO, Any, Protocol, cast

from textual import events
from textual._parser import ParseError
from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver

from edgeinfer.tui.pastes import Pastes
from edgeinfer.tui.terminal_colors import ASK, Answers, TerminalBackground

_ESCAPE = "\x1b"
_ESCAPE_SECONDS = 0.02  # what begins with Escape and comes later is typed by nobody
_WAIT_SECONDS = 0.1
_MOST_BYTES = 1 << 16
_MOST_EMPTY_READS = 10
# What is left of a mode that is set, whatever was being written: Textual's own list, and mouse
# positions in pixels, which it forgets.
_RESET = (
    "\x18\x1b[?2026l\x1b[?2004l\x1b[?7h\x1b[?2048l\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l"
    "\x1b[?1016l\x1b[<u\x1b[?1049l\x1b[?25h\x1b[?1004l\x1b[0m"
)
_POP_KEYBOARD = "\x1b[<u"  # its protocol, which is pushed again


class Owner(Protocol):
    """The app, as far as its terminal needs it."""

    def stop_for_shell(self, terminal: int, *, now: bool, group: bool = False) -> bool: ...

    def call_soon(self, call: Callable[[], object]) -> None:
        """From any thread, or a signal's handler, in the screen's."""

    def hang_up(self) -> None:
        """The terminal went away; called by any thread."""

    def draw_again(self) -> None:
        """The terminal is another than before."""

    def fail(self, error: Exception) -> None:
        """End by an error of another thread's; called by any thread."""


# As terminals write it that have no protocol for keys, and as xterm and tmux may.
_ENTERS = {
    "\x1b\r": "alt+enter",
    "\x1b[27;2;13~": "shift+enter",
    "\x1b[27;3;13~": "alt+enter",
    "\x1b[27;5;13~": "ctrl+enter",
}


class _Parser(XTermParser):
    """Knows Enter with modifiers in every way that terminals write it."""

    def _sequence_to_key_events(self, sequence: str, alt: bool = False) -> Iterable[events.Key]:
        if sequence in _ENTERS:
            return [events.Key(_ENTERS[sequence], None)]
        return super()._sequence_to_key_events(sequence, alt)


class ChatDriver(LinuxDriver):
    """NOTE: the one place that relies on names Textual keeps to itself."""

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__(app, **options)
        self._owner = cast("Owner", app)
        self._is_on = False
        self._beginning: list[str] = []  # what sets the modes
        self._attributes: list[Any] = []
        self._file: Any = _Screen(self._file, self._owner.hang_up)

    def start_application_mode(self) -> None:
        for number in (self.fileno, self._file.fileno()):
            with suppress(OSError):
                # A program before us may have left it so; what is written would be lost.
                os.set_blocking(number, True)
        self._beginning.clear()
        super().start_application_mode()  # type: ignore[no-untyped-call]
        self._is_on = True
        with suppress(termios.error):
            self._attributes = termios.tcgetattr(self.fileno)
        # Nobody waits for the answer: it comes with the keys, or never.
        self.write(ASK)
        self.flush()

    def write(self, data: str) -> None:
        if not self._is_on:
            self._beginning.append(data)
        super().write(data)

    def stop_application_mode(self) -> None:
        if self._is_on:
            super().stop_application_mode()
        self._is_on = False

    def disable_input(self) -> None:
        if self._is_on:
            super().disable_input()

    def give_up(self) -> None:
        """Have the terminal as it was, at once; from any thread, whatever the others wait for."""
        if self._is_on:
            if self.attrs_before is not None:
                termios.tcsetattr(self.fileno, termios.TCSANOW, self.attrs_before)
            self._file.write_now(_RESET)

    # -- stopping with the shell -----------------------------------------------------------------

    def pause(self, *, group: bool = False) -> None:
        """Ctrl-Z: stop, all that was started together where it is a `group`, until `fg`."""
        self.suspend_application_mode()
        if self._owner.stop_for_shell(self.fileno, now=True, group=group):
            self.resume_application_mode()
            self._owner.draw_again()

    def _go_on(self) -> None:
        """After a SIGSTOP: have the modes that the shell may have changed; no key is lost."""
        # Not before the terminal is ours: after `bg` the shell draws there.
        if not self._owner.stop_for_shell(self.fileno, now=False):
            self.attrs_before = None  # those of the shell stay
        elif self._is_on:
            with suppress(termios.error):
                termios.tcsetattr(self.fileno, termios.TCSANOW, self._attributes)
            self.write("".join([_POP_KEYBOARD, *self._beginning]))
            self._owner.draw_again()

    def _sigtstp_application(self, *_: object) -> None:
        if self._auto_restart:
            # Not here: what is interrupted may hold a lock that writing needs.
            self._owner.call_soon(self.pause)
        else:  # another program has the terminal, which stops with us
            self._owner.stop_for_shell(self.fileno, now=True)

    def _sigcont_application(self, *_: object) -> None:
        if self._auto_restart:
            self._owner.call_soon(self._go_on)

    # -- reading ---------------------------------------------------------------------------------

    def _run_input_thread(self) -> None:
        try:
            self.run_input_thread()
        except Exception as error:
            self._owner.fail(error)

    def run_input_thread(self) -> None:
        """Until the app ends: bytes to events."""
        parser = _Parser(self._debug)
        decode = getincrementaldecoder("utf-8")("replace").decode
        answers, pastes = Answers(), Pastes()
        n_empty = 0
        # In the background a read fails then, and does not stop what `fg` has just let go on.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTIN])
        with self._open_terminal() as terminal, selectors.SelectSelector() as selector:
            selector.register(terminal, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                if selector.select(_WAIT_SECONDS):
                    data = _read(terminal)
                    n_empty = 0 if data or self._is_behind() else n_empty + 1
                    if n_empty > _MOST_EMPTY_READS:
                        self._owner.hang_up()
                        self.exit_event.wait()
                    text = decode(data)
                    is_alone = text == _ESCAPE and not pastes.is_open
                    if is_alone and not selector.select(_ESCAPE_SECONDS):
                        self.process_message(events.Key("escape", _ESCAPE))
                        continue
                    text, is_light = answers.push(text)
                    if is_light is not None:
                        self.send_message(TerminalBackground(is_light))
                    if answers.is_unfinished and not selector.select(_ESCAPE_SECONDS):
                        text += answers.flush()
                    for part, is_pasted in pastes.push(text):
                        for event in [events.Paste(part)] if is_pasted else parser.feed(part):
                            self.process_message(event)
                    if pastes.is_unfinished and not selector.select(_ESCAPE_SECONDS):
                        for event in parser.feed(pastes.flush()):
                            self.process_message(event)
                for event in parser.tick():
                    self.process_message(event)
        try:
            for _ in parser.feed(""):
                pass
        except (EOFError, ParseError):
            pass

    def _is_behind(self) -> bool:
        """Whether another program has the terminal; waits a moment then."""
        try:
            if os.tcgetpgrp(self.fileno) == os.getpgrp():
                return False
        except OSError:
            return False
        self.exit_event.wait(_WAIT_SECONDS)
        return True

    def _open_terminal(self) -> FileIO:
        """A way of its own to the terminal, on which no read waits.

        After a SIGSTOP the shell may take what was typed between our look and our read.
        """
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return FileIO(os.open(os.ttyname(self.fileno), flags))
        except OSError:  # one of another user's: shared with the shell, which wants it to wait
            return FileIO(self.fileno, closefd=False)


def _read(terminal: FileIO) -> bytes:
    """What was typed; nothing, again and again, from a terminal that is gone."""
    try:
        return terminal.read(_MOST_BYTES) or b""
    except OSError:
        return b""


class _Screen:
    """The terminal to write to; one that is gone takes what nobody will see."""

    def __init__(self, file: IO[str], hang_up: Callable[[], None]) -> None:
        self._file, self._hang_up = file, hang_up

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()

    def write(self, text: str) -> None:
        try:
            self._file.write(text)
        except (OSError, ValueError):
            self._hang_up()

    def flush(self) -> None:
        try:
            self._file.flush()
        except (OSError, ValueError):
            self._hang_up()

    def write_now(self, text: str) -> None:
        """Beside who may be writing, and only where nothing has to be waited for."""
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno(), selectors.EVENT_WRITE)
            if selector.select(_WAIT_SECONDS):
                os.write(self.fileno(), text.encode())
