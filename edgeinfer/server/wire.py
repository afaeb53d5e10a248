"""Bodies in and replies out: JSON, server-sent events and lines of JSON.

Knows nothing of what they say.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive

from edgeinfer.server.errors import ApiError, Json

PING = b": ping\n\n"  # a comment, which keeps a connection and says nothing
DONE = b"data: [DONE]\n\n"
EVENTS, LINES = "text/event-stream", "application/x-ndjson"
_MOST_VALUES = 1 << 20  # of a body
_OF_A_LIST = 8  # values that take what a list or an object does
_BODY_SECONDS = 60.0  # a body that takes longer is no client's
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")  # of UTF-8 and UTF-16

_encode = msgspec.json.Encoder().encode
# JSON leaves them as they are; Python's `splitlines`, by which clients read, ends a line at them.
_LINE_ENDS = tuple((end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029")


def encode(value: Any) -> bytes:
    """JSON on one line, whatever a client takes for the end of one."""
    found = bytes(_encode(value))
    if not found.isascii():
        for end, escaped in _LINE_ENDS:
            found = found.replace(end, escaped)
    return found


def event(value: Any, name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encode(value) + b"\n\n"


_PLACE = secrets.token_hex(16)  # of a text; no other part of a frame has it


class TextFrame:
    """A frame of which only a text changes from time to time: all else is encoded once."""

    def __init__(self, frame: Callable[[str], bytes]) -> None:
        self._before, self._behind = frame(_PLACE).split(encode(_PLACE))

    def of(self, text: str) -> bytes:
        return self._before + encode(text) + self._behind


def line(value: Any) -> bytes:
    return encode(value) + b"\n"


def floats(values: NDArray[np.float32]) -> msgspec.Raw:
    """Numbers as JSON: a list of Python's, as many as vectors have, takes four times as much."""
    return msgspec.Raw(encode(values.tolist()))


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON reply."""
    return Response(encode(value), status, headers, "application/json")


async def read_body(request: Request, most: int) -> bytes:
    """The body; ApiError where it is longer than `most` bytes, or comes too slowly."""
    encodings = ",".join(request.headers.getlist("content-encoding")).lower()
    if encodings.strip(", \t") not in ("", "identity"):
        raise ApiError(415, "compressed bodies are not read; send it as it is")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise _too_large(most)
    try:
        return await asyncio.wait_for(_collect(request, most), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the connection ended inside the body") from None


async def _collect(request: Request, most: int) -> bytes:
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise _too_large(most)
    return bytes(found)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most:,} bytes; --max-body raises that")


def decode(body: bytes) -> Json:
    """The JSON object that a body is."""
    if body.startswith(_MARKS) or b"\0" in body[:4]:
        raise ApiError(
            400, "the body is not UTF-8, or has a byte order mark; send JSON in UTF-8 alone"
        )
    _check_size(body)
    try:
        value = msgspec.json.decode(body) if body.strip() else {}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is no JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _check_size(body: bytes) -> None:
    """ApiError for values so many that making them would hold up other requests, or fill memory."""
    n_most = body.count(b",") + _OF_A_LIST * (body.count(b"[") + body.count(b"{"))
    if n_most > _MOST_VALUES and _n_values(body) > _MOST_VALUES:
        raise ApiError(413, f"the body has more than {_MOST_VALUES:,} values")


def _n_values(body: bytes) -> int:
    """About how many there are: what stands in strings is none."""
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    found = np.frombuffer(bare, np.uint8)
    is_outside = ~np.logical_xor.accumulate(found == ord('"'))
    commas, lists, objects = (np.count_nonzero(is_outside & (found == ord(c))) for c in ",[{")
    return int(commas + _OF_A_LIST * (lists + objects))


class ClientGone(ApiError):
    """Nobody waits for the reply any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client has closed the connection")


async def unless_gone(receive: Receive, answer: Callable[[Receive], Awaitable[None]]) -> None:
    """Run `answer`; it is cancelled, and ClientGone raised, once the client has gone.

    It reads the body by what it is given: behind that nothing comes but the client's end.
    """
    task, watching = asyncio.current_task(), set[asyncio.Task[None]]()
    assert task is not None
    is_gone = False

    async def take() -> Message:
        message = await receive()
        if not (message.get("more_body") or watching):
            watching.add(asyncio.create_task(watch()))
        return message

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    try:
        # In this very task: one more turn of the loop is one in which the client may go.
        await answer(take)
    except asyncio.CancelledError:
        if not is_gone:
            raise
        if sys.version_info >= (3, 11):
            task.uncancel()
        raise ClientGone from None
    finally:
        for each in watching:
            each.cancel()
