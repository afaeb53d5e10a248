"""Takes what is pasted out of what is typed.

Textual's parser reads keys out of escape sequences inside a paste: text with colours in it, or a
page that means harm, could stop an answer, open an editor or quit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from edgeinfer import printable

_START, _END = "\x1b[200~", "\x1b[201~"
_BEGUN = re.compile("\x1b(?:\\[(?:2(?:0(?:0)?)?)?)?$")  # a part of the start, at the end of a read


class Pastes:
    """Of one terminal, whose text comes in parts of any length."""

    def __init__(self) -> None:
        self._held = ""  # may go on as a marker
        self._parts: list[str] | None = None  # of the paste that has not ended

    @property
    def is_open(self) -> bool:
        """Whether what comes next is pasted."""
        return self._parts is not None

    @property
    def is_unfinished(self) -> bool:
        """Whether typed text is held, which may be the start of a paste."""
        return bool(self._held) and self._parts is None

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """Texts in order, and whether each was pasted: whole then, clean, its lines ended by LF."""
        text, self._held = self._held + text, ""
        while text:
            if self._parts is None:
                typed, start, text = text.partition(_START)
                if start:
                    self._parts = []
                elif begun := _BEGUN.search(typed):
                    typed, self._held = typed[: begun.start()], typed[begun.start() :]
                if typed:
                    yield typed, False
            else:
                pasted, end, rest = text.partition(_END)
                if not end:
                    cut = max(0, len(text) - len(_END) + 1)
                    self._parts.append(text[:cut])
                    self._held = text[cut:]
                    return
                whole = "".join([*self._parts, pasted])
                self._parts, text = None, rest
                yield _clean(whole), True

    def flush(self) -> str:
        """What was held, if no more comes: it was typed."""
        text, self._held = self._held, ""
        return text


def _clean(text: str) -> str:
    """Terminals send the Enter key for the end of a line."""
    return printable(text.replace("\r\n", "\n").replace("\r", "\n"))
