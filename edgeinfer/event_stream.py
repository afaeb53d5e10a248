"""Server-sent events out of the bytes of a reply, however they are spelled, wherever they are cut.

Knows nothing of what events say.
"""

from __future__ import annotations

# What a stream of events begins with, behind what may stand in front: its fields, and comments.
BEGINNINGS, BLANK = b":deir", b" \t\r\n\xef\xbb\xbf"

_LINE_BYTES = 64  # that keeping a line takes beside it
_MARK = b"\xef\xbb\xbf"  # of UTF-8, with which some begin


class EventTooLargeError(Exception):
    """An event has more bytes than are kept of one."""


class EventReader:
    """Takes bytes as they come and gives the data of events, once the lines that end them have."""

    def __init__(self, most: int) -> None:
        """`most` is how many bytes one event may have."""
        self._most = most
        self._mark = _MARK  # what may still come of it
        self._was_cr = False
        self._line: list[bytes] = []  # parts of one that has not ended
        self._data: list[bytes] = []  # lines of an event that has not ended
        self._n_line = self._n_data = 0  # bytes of both

    def push(self, chunk: bytes) -> list[bytes]:
        """The data of the events that these bytes end; EventTooLargeError beyond `most`."""
        if self._mark:
            chunk = self._without_mark(chunk)
        if self._was_cr or b"\r" in chunk:
            chunk = self._with_one_end(chunk)
        if not chunk:
            return []
        first, *lines = chunk.split(b"\n")
        self._line.append(first)
        self._n_line += len(first)
        found: list[bytes] = []
        if lines:
            whole, rest = b"".join(self._line), lines.pop()
            self._line, self._n_line = [rest], len(rest)
            for line in (whole, *lines):
                if line.startswith(b"data:"):
                    self._add(line)
                elif not line and self._data:
                    found.append(b"\n".join(self._data))
                    self._data, self._n_data = [], 0
        if self._n_line + self._n_data > self._most:
            raise EventTooLargeError
        return found

    def end(self) -> bytes:
        """The data of an event that lacks the empty line which ends it; nothing comes any more."""
        last = b"".join(self._line)
        if last.startswith(b"data:"):
            self._add(last)
        return b"\n".join(self._data)

    def _add(self, line: bytes) -> None:
        self._data.append(line[5:].removeprefix(b" "))
        self._n_data += len(line) + _LINE_BYTES

    def _without_mark(self, chunk: bytes) -> bytes:
        while self._mark and chunk[:1] == self._mark[:1]:
            chunk, self._mark = chunk[1:], self._mark[1:]
        if chunk:
            self._mark = b""
        return chunk

    def _with_one_end(self, chunk: bytes) -> bytes:
        """Lines may end in CR, LF or both."""
        if not chunk:
            return chunk
        rest = chunk.removeprefix(b"\n") if self._was_cr else chunk
        self._was_cr = chunk.endswith(b"\r")
        return rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
