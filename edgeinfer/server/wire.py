"""Bodies in and replies out: JSON, server-sent events and lines of JSON.

Knows nothing of what they say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgeinfer.server.errors import ApiError, Json

T = TypeVar("T")
PING = b": ping\n\n"  # a comment, which keeps a connection and says nothing
DONE = b"data: [DONE]\n\n"
EVENTS, LINES = "text/event-stream", "application/x-ndjson"
_BODY_SECONDS = 60.0  # a body that takes longer is no client's
_MOST_AT_ONCE = 64 << 10  # bytes that are written at once
_STALLED_SECONDS = 120.0  # a reader that takes nothing for so long is gone

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
    if request.headers.get("content-encoding", "identity") != "identity":
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
    try:
        value = msgspec.json.decode(body) if body.strip() else {}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is no JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


class Source(Protocol):
    """What the parts of a reply are made of."""

    @property
    def has_ready(self) -> bool:
        """Whether another part comes without a wait."""
        ...

    async def close(self) -> None: ...


class Frames(Response):
    """A reply that comes in parts; those that are there at a time are written at once.

    Its source is closed as soon as the reader has gone.
    """

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str, source: Source) -> None:
        super().__init__(media_type=media_type)
        self._parts, self._source = parts, source
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        except ClientGone:
            pass
        finally:
            # NOTE: a generator that was never begun does not run its own end.
            await self._parts.aclose()
            await self._source.close()

    async def _write(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        found = b""
        with _ending_stalls() as watch:
            async for part in self._parts:
                found += part
                if self._source.has_ready and len(found) < _MOST_AT_ONCE:
                    continue
                watch.begin()
                await send({"type": "http.response.body", "body": found, "more_body": True})
                watch.end()
                found = b""
        await send({"type": "http.response.body", "body": found})


async def guarded(
    parts: AsyncGenerator[bytes, None], tell: Callable[[ApiError], bytes]
) -> AsyncGenerator[bytes, None]:
    """The parts; what fails between them is told in one more, as the API has it."""
    async with aclosing(parts):
        try:
            async for part in parts:
                yield part
        except Exception as error:
            yield tell(ApiError.of(error))


class ClientGone(ApiError):
    """Nobody waits for the reply any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client has closed the connection")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled, and ClientGone raised, once the client has gone."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    """The body has been read, so that nothing else comes."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def _ending_stalls() -> Iterator[_Watch]:
    """Cancels the task that is inside while one of its writes takes too long."""
    watch = _Watch()
    try:
        yield watch
    finally:
        watch.stop()


class _Watch:
    """Looks now and then how long a write has taken: a timer for each would cost more than it."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._loop = task, asyncio.get_running_loop()
        self._begun: float | None = None
        self._look()

    def begin(self) -> None:
        self._begun = self._loop.time()

    def end(self) -> None:
        self._begun = None

    def stop(self) -> None:
        self._alarm.cancel()

    def _look(self) -> None:
        if self._begun is not None and self._loop.time() - self._begun >= _STALLED_SECONDS:
            self._task.cancel()
        self._alarm = self._loop.call_later(_STALLED_SECONDS / 4, self._look)
