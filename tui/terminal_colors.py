"""Whether the terminal is light: by its own word, or by what the environment says.

Knows nothing of how it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from textual.message import Message

ASK = "\x1b]11;?\x1b\\"  # which colour is the background?
_ANSWER = re.compile(
    "\x1b\\]11;rgba?:([0-9a-f]{1,4})/([0-9a-f]{1,4})/([0-9a-f]{1,4})(?:/[0-9a-f]*)?"
    "(?:\x07|\x1b\\\\)",
    re.IGNORECASE,
)
# The beginning of an answer, at the end of what was read.
_UNFINISHED = re.compile("\x1b(?:\\](?:1|11|11;[rgba:/0-9a-fA-F]{0,40}\x1b?)?)?$")


class TerminalBackground(Message):
    """The terminal has said which colour it has."""

    def __init__(self, is_light: bool) -> None:
        super().__init__()
        self.is_light = is_light


class Answers:
    """Takes answers out of what is typed, also those that come in parts."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> tuple[str, bool | None]:
        """What else was typed, and whether the terminal is light if it has said so."""
        text = self._held + text
        is_light = None
        found = _ANSWER.search(text)
        if found is not None:
            is_light = _is_light(found.groups())
            text = text[: found.start()] + text[found.end() :]
        cut = _UNFINISHED.search(text)
        end = cut.start() if cut else len(text)
        self._held = text[end:]
        return text[:end], is_light

    @property
    def is_unfinished(self) -> bool:
        return bool(self._held)

    def flush(self) -> str:
        """What was held, if no more comes: it was typed."""
        text, self._held = self._held, ""
        return text


def _is_light(channels: tuple[str, ...]) -> bool:
    red, green, blue = (int(each, 16) / int("f" * len(each), 16) for each in channels)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.5


def is_light_by(environment: Mapping[str, str]) -> bool:
    """What COLORFGBG says; terminals that do not set it are dark more often."""
    number = environment.get("COLORFGBG", "").rpartition(";")[2]
    return number in ("7", "15")
