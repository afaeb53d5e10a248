"""Reads the terminal like Textual's own driver, but knows a lone Escape 20 ms after it was pressed.

Knows nothing of what keys do. Textual's driver finds out after 100 to 200 ms, and reads twice
after a SIGCONT that no SIGTSTP came before.
"""

from __future__ import annotations

import os
import selectors
from codecs import getincrementaldecoder
from collections.abc import Iterable

from textual import events
from textual._parser import ParseError
from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver

from edgeinfer.tui.terminal_colors import ASK, Answers, TerminalBackground

_ESCAPE = "\x1b"
_ESCAPE_SECONDS = 0.02  # what begins with Escape and comes later is typed by nobody
_WAIT_SECONDS = 0.1
_MOST_BYTES = 1 << 16


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

    def start_application_mode(self) -> None:
        super().start_application_mode()  # type: ignore[no-untyped-call]
        # Nobody waits for the answer: it comes with the keys, or never.
        self.write(ASK)
        self.flush()

    def _sigcont_application(self, *_: object) -> None:
        if self._auto_restart and not self._must_signal_resume:
            # It went on after a SIGSTOP, or was never stopped: a second thread that reads would
            # take half of the keys, and the shell may have changed the terminal's modes.
            self.suspend_application_mode()
        super()._sigcont_application()

    def run_input_thread(self) -> None:
        """Until the app ends: bytes to events."""
        parser = _Parser(self._debug)
        decode = getincrementaldecoder("utf-8")("replace").decode
        answers = Answers()
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                if selector.select(_WAIT_SECONDS):
                    text = decode(os.read(self.fileno, _MOST_BYTES))
                    if text == _ESCAPE and not selector.select(_ESCAPE_SECONDS):
                        self.process_message(events.Key("escape", _ESCAPE))
                        continue
                    text, is_light = answers.push(text)
                    if is_light is not None:
                        self.send_message(TerminalBackground(is_light))
                    if answers.is_unfinished and not selector.select(_ESCAPE_SECONDS):
                        text += answers.flush()
                    for event in parser.feed(text) if text else ():
                        self.process_message(event)
                for event in parser.tick():
                    self.process_message(event)
        try:
            for _ in parser.feed(""):
                pass
        except (EOFError, ParseError):
            pass
