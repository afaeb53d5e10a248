"""Makes text that others wrote safe to show: on a terminal, in a log, in an error.

Knows nothing of where the text comes from.
"""

from __future__ import annotations

import re

# Control sequences (CSI), strings (OSC, DCS, ...) up to BEL or ST, and two-character escapes.
_SEQUENCE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c]{0,256}(?:\x07|\x1b\\\\|\x9c)"
    "|\x1b[ -/]+[0-~]|\x1b[0-Z`-~]"
)
# A sequence that the end of the text cuts off.
_UNFINISHED = re.compile(
    "(?:(?:\x1b\\[|\x9b)[0-?]{0,64}[ -/]{0,8}"
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c]{0,256}\x1b?"
    "|\x1b[ -/]{0,8})$"
)
_LONE = re.compile("[\ud800-\udfff]")  # as names of files have them that are not UTF-8
# Tab and newline stay; bidirectional overrides go, they hide what is written.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without escape sequences and control characters, tab and newline excepted.

    A lone surrogate, which no terminal can be sent, becomes U+FFFD.
    """
    return _LONE.sub("\ufffd", _CONTROL.sub("", _SEQUENCE.sub("", text)))


def one_line(text: str, limit: int = 200) -> str:
    """`text` as a part of one line: no escape sequence, control or invisible character.

    What ends a line becomes a space, a lone surrogate U+FFFD. Of a longer text than `limit` the
    middle is left out, but for its length.
    """
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]}… [{len(text)} characters] …{text[-limit // 4 :]}"
    if text.isprintable():
        return text
    from unicodedata import category  # a library that few texts need

    text = _SEQUENCE.sub("", text).translate(_LINE_ENDS)
    return "".join(_UNSEEN.get(category(c), c) for c in text)


_LINE_ENDS = dict.fromkeys(map(ord, "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"), " ")
# Controls, zero-width characters and those that turn the direction, lone surrogates.
_UNSEEN = {"Cc": "", "Cf": "", "Cs": "\ufffd"}


class StreamFilter:
    """The same for text that comes in parts: a sequence cut in two is still removed."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """What can be shown now."""
        text = self._held + text
        cut = _UNFINISHED.search(text)
        end = cut.start() if cut else len(text)
        self._held = text[end:]
        return printable(text[:end])

    def flush(self) -> str:
        """What is left once no more can come."""
        text, self._held = self._held, ""
        return printable(text)
