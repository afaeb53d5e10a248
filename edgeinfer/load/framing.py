"""Where the body of a reply ends: in chunks, by a length, or with the connection.

h11 takes four times as long for a chunk, which a load would take from a server beside it.
"""

from __future__ import annotations

import re
from typing import Protocol

import h11

# What ends the chunk before, and the size of one. The first has none before it.
_HEAD = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_TRAILERS = re.compile(rb"(?:[^\r\n]+\r\n)*\r\n")
_MOST_HEAD = 4 << 10  # bytes of a chunk's head, or of the trailers
_EMPTY = (204, 304)  # statuses of replies without a body


class MalformedBodyError(Exception):
    """What came is no body."""


class Body(Protocol):
    """Takes the bytes behind a reply's head."""

    is_whole: bool
    ends_with_connection: bool
    has_more: bool  # whether something came behind its end

    def push(self, data: bytes) -> list[bytes]:
        """The parts of the body that these bytes are; MalformedBodyError where they are none."""
        ...


def body_of(reply: h11.Response) -> Body:
    """That of a reply to anything but HEAD, by its head, which h11 has checked."""
    headers = dict(reply.headers)
    if reply.status_code in _EMPTY:
        return _Sized(0)
    if b"transfer-encoding" in headers:  # h11 takes "chunked" alone
        return _Chunked()
    if b"content-length" in headers:
        return _Sized(int(headers[b"content-length"]))
    return _Endless()


class _Chunked:
    is_whole = has_more = ends_with_connection = False

    def __init__(self) -> None:
        self._held = b"\r\n"  # what is not yet the whole head of a chunk
        self._n_left = 0  # bytes of a chunk
        self._is_last = False

    def push(self, data: bytes) -> list[bytes]:
        parts: list[bytes] = []
        if self._held:
            data, self._held = self._held + data, b""
        at = 0
        while at < len(data):
            if self._n_left:
                part = data[at : at + self._n_left]
                parts.append(part)
                self._n_left -= len(part)
                at += len(part)
                continue
            match = (_TRAILERS if self._is_last else _HEAD).match(data, at)
            if match is None:
                self._hold(data[at:])
                break
            at = match.end()
            if self._is_last:
                self.is_whole, self.has_more = True, at < len(data)
                break
            self._n_left = int(match[1], 16)
            self._is_last = not self._n_left
        return parts

    def _hold(self, head: bytes) -> None:
        is_line = head[:2] != b"\r\n"[: len(head)] or b"\n" in head[2:]
        if len(head) > _MOST_HEAD or (is_line and not self._is_last):
            raise MalformedBodyError("a chunk has no size")
        self._held = head


class _Sized:
    has_more = ends_with_connection = False

    def __init__(self, n_bytes: int) -> None:
        self._n_left = n_bytes
        self.is_whole = not n_bytes

    def push(self, data: bytes) -> list[bytes]:
        part = data[: self._n_left]
        self._n_left -= len(part)
        self.is_whole, self.has_more = not self._n_left, len(part) < len(data)
        return [part] if part else []


class _Endless:
    is_whole = has_more = False
    ends_with_connection = True

    def push(self, data: bytes) -> list[bytes]:
        return [data] if data else []
