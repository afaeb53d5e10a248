"""Replies in parts: each is written in the very call that brings the events it tells of.

Knows nothing of what the parts say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgeinfer.results import Event
from edgeinfer.server.answers import Answer, Listener
from edgeinfer.server.errors import ApiError

_MOST_AT_ONCE = 64 << 10  # bytes that are written at once


class Parts(Protocol):
    """An answer as an API spells it; any part may be empty."""

    ping: bytes  # keeps a connection and says nothing

    def begin(self) -> bytes: ...
    def part(self, i: int, found: Event) -> bytes: ...
    def end(self) -> bytes: ...
    def failed(self, error: ApiError) -> bytes:
        """The last part, where it does not come to its end."""
        ...


class Frames(Response, Listener):
    """A reply of parts; those that are there at a time are written at once.

    `write_now` of the connection takes no task's turn. Where a server has none, or the reader is
    behind, what comes next waits for a `send`. The answer is closed as soon as the reader has gone.
    """

    def __init__(self, parts: Parts, media_type: str, answer: Answer) -> None:
        super().__init__(media_type=media_type)
        self._parts, self._answer = parts, answer
        self._found = b""  # what has not been written
        self._write_now: Callable[[bytes], bool] = _not_now
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._write_now = scope.get("state", {}).get("write_now", _not_now)
        try:
            await self._write(send)
        finally:
            await self._answer.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._write_now(b"")  # tells that it is in chunks
        try:
            self._found += self._parts.begin()
            while await self._answer.listen(self):
                found, self._found = self._found, b""
                await send({"type": "http.response.body", "body": found, "more_body": True})
            self._found += self._parts.end()
        except Exception as error:
            self._found += self._parts.failed(ApiError.of(error))
        await send({"type": "http.response.body", "body": self._found})

    def hear(self, i: int, event: Event) -> bool:
        self._found += self._parts.part(i, event)
        return len(self._found) < _MOST_AT_ONCE or self.rest()

    def rest(self) -> bool:
        if self._found and self._write_now(self._found):
            self._found = b""
        return not self._found

    def idle(self) -> None:
        self._found += self._parts.ping


def _not_now(data: bytes) -> bool:
    return False
