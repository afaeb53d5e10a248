"""Lines that a person types at a plain terminal, or that come through a pipe.

A pasted text stays together, what was typed can be had back, and a slip ends nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType, ModuleType

from edgeinfer import platform
from edgeinfer.cli.console import note, takes_escapes, tell
from edgeinfer.errors import reason_of
from edgeinfer.text.plain_text import lines

_PROMPT = "> "
_PASTE_SECONDS = 0.05  # between two lines of a paste; nobody types one in that time
_TWICE_SECONDS = 2.0  # in which a second Ctrl-C means the first
_MOST_BYTES = 1 << 20  # of a history before it is cut to its newest lines
_MOST_LINES = 1000


class LineInput:
    """What stdin says, message by message. `history` is where typed ones are kept, None: nowhere.

    Where readline can, it tells what was pasted. Elsewhere lines that come at once, after nothing
    had come, are a paste; what was typed ahead, during an answer, stays line by line.
    """

    def __init__(self, history: Path | None) -> None:
        self._is_terminal = sys.stdin.isatty()
        self._readline: ModuleType | None = None
        self._marks_pastes = False
        self._history: _History | None = None
        self._cleared = ""  # by a signal
        self._signal = 0  # which one that was
        self._interrupted_at = -_TWICE_SECONDS
        if not self._is_terminal:
            self._piped = lines(iter(sys.stdin.buffer.readline, b""))
            return
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # no byte ends a chat
        if sys.stdout.isatty():  # else `input` edits nothing
            self._readline = _find_readline()
        if self._readline is not None:
            self._marks_pastes = takes_escapes(os.environ) and "libedit" not in _about(
                self._readline
            )
            switch = "on" if self._marks_pastes else "off"
            self._readline.parse_and_bind(f"set enable-bracketed-paste {switch}")
            self._history = _History(history)
            for text in self._history.read():
                self._readline.add_history(text)

    def next(self) -> str | None:
        """The next message, None at the end; the second of two Ctrl-C is one."""
        if not self._is_terminal:
            return next(self._piped, None)
        while True:
            self._cleared = ""
            try:
                text = self._ask()
            except KeyboardInterrupt:
                now = time.monotonic()
                if now - self._interrupted_at < _TWICE_SECONDS and not self._cleared:
                    return None
                self._interrupted_at = now
                self._tell_interrupted()
                continue
            self._interrupted_at = -_TWICE_SECONDS
            if text and self._history is not None:
                self._history.add(text)
            return text

    def _tell_interrupted(self) -> None:
        if self._cleared and self._readline is not None:
            self._readline.add_history(self._cleared)
            note("\n(the Up key brings it back; Ctrl-D or /exit ends the chat)")
        else:
            note("\n(Ctrl-D or /exit ends the chat, Ctrl-C once more too)")

    def _ask(self) -> str | None:
        joins = not self._marks_pastes and not platform.input_waits(0)
        with platform.signals_handled([signal.SIGINT], self._leave):
            text = self._line(_PROMPT)
            while text is not None and joins and platform.input_waits(_PASTE_SECONDS):
                more = self._line("")
                if more is None:
                    break
                text += "\n" + more
        return text

    def _line(self, prompt: str) -> str | None:
        """A line; one in whose midst the shell had the terminal is drawn and written on anew."""
        while True:
            self._signal = 0
            try:
                with platform.signals_handled(_stops(), self._leave):
                    return _read_line(prompt)
            except (KeyboardInterrupt, SystemError):
                # NOTE: of two signals at once, Python makes SystemError.
                if not self._signal:
                    raise
                if self._signal == signal.SIGINT:
                    raise KeyboardInterrupt from None
            # Not after `bg`: touching the terminal would stop us once more.
            platform.stop_for_shell(0, lambda: False, now=self._signal == signal.SIGTSTP)
            tell("\r\x1b[K" if takes_escapes(os.environ) else "\n")
            self._write_on()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """Keeps what was typed, which readline forgets."""
        if self._signal:  # the one before is on its way
            return
        if number == getattr(signal, "SIGCONT", None):
            platform.stop_for_shell(0, lambda: False, now=False)
        self._signal = number
        if self._readline is not None:
            self._cleared = self._readline.get_line_buffer()
        raise KeyboardInterrupt

    def _write_on(self) -> None:
        """Have the next line begin with what was typed of this one."""
        text, self._cleared = self._cleared, ""
        if self._readline is not None:
            readline = self._readline

            def insert() -> None:
                readline.set_startup_hook(None)
                readline.insert_text(text)

            readline.set_startup_hook(insert)


def _stops() -> list[int]:
    """The signals by which a shell stops programs and lets them go on, where there is one."""
    numbers = [getattr(signal, name) for name in ("SIGTSTP", "SIGCONT") if hasattr(signal, name)]
    is_heard = all(signal.getsignal(number) is not signal.SIG_IGN for number in numbers)
    return numbers if is_heard else []


def _read_line(prompt: str) -> str | None:
    """A line as Python's readline or the terminal itself edits it, None at the end."""
    if sys.stdout.isatty():
        try:
            return input(prompt)
        except EOFError:
            note("")
            return None
    tell(prompt)
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _find_readline() -> ModuleType | None:
    """Importing it is what gives `input` its editing."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _about(readline: ModuleType) -> str:
    return f"{getattr(readline, 'backend', '')} {readline.__doc__}".replace("editline", "libedit")


class _History:
    """What was typed in earlier chats, one JSON string a line, for this user alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._last = ""

    def read(self) -> list[str]:
        """The newest ones, oldest first; where none can be kept, a line says why."""
        if self._path is None:
            return []
        try:
            data = platform.read_private(self._path)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._give_up(error)
            return []
        texts = [text for line in data.splitlines() if (text := _parsed(line))][-_MOST_LINES:]
        if len(data) > _MOST_BYTES:
            self._replace(texts)
        return texts

    def add(self, text: str) -> None:
        if self._path is None or text == self._last:
            return
        self._last = text
        try:
            platform.append_private(self._path, json.dumps(text).encode() + b"\n")
        except OSError as error:
            self._give_up(error)

    def _replace(self, texts: list[str]) -> None:
        assert self._path is not None
        try:
            platform.write_whole(
                self._path, b"".join(json.dumps(t).encode() + b"\n" for t in texts)
            )
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        note(f"typed lines are not kept in {self._path} ({reason_of(error)})")
        self._path = None


def _parsed(line: bytes) -> str:
    """The text of a line; nothing for one that is damaged."""
    try:
        text = json.loads(line)
    except ValueError:
        return ""
    return text if isinstance(text, str) and "\0" not in text else ""
