"""HTTP/1.1 requests whose replies are given on as they come, on kept connections.

Knows nothing of what is asked. What comes is passed on in the call that the system's data arrive
in: a task that wakes up for each part would cost ten times as much.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import h11

from edgeinfer import platform
from edgeinfer.load.framing import Body, MalformedBodyError, body_of
from edgeinfer.remote.address import Address

OnBody = Callable[[float, int, bytes], None]  # when it came, the reply's status, what came
_MOST_HEADER = 64 << 10  # bytes
_READ_BYTES = 64 << 10  # at a time
_REFUSED = errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)


class ConnectionLost(http.client.HTTPException):
    """A reply did not come to its end; `has_begun` where some of it came."""

    has_begun = False


class ConnectionClosed(ConnectionLost, ConnectionResetError):
    """The server has closed the connection, as the standard library's RemoteDisconnected says."""


class Reply(NamedTuple):
    """How a request was answered; header names are in lower case."""

    status: int
    headers: dict[str, str]
    keeps_connection: bool = False

    @classmethod
    def of(cls, head: h11.Response) -> Reply:
        headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        told = b",".join(value for name, value in head.headers if name == b"connection")
        is_last = b"close" in [each.strip() for each in told.lower().split(b",")]
        return cls(head.status_code, headers, head.http_version == b"1.1" and not is_last)


class Client:
    """Requests to one server, as many at a time as are asked for."""

    def __init__(self, address: Address) -> None:
        self.address, self._idle = address, list[_Link]()
        self._headers = [("host", address.place)]
        if address.key:
            self._headers.append(("authorization", f"Bearer {address.key}"))
        self._tls = platform.tls_context() if address.is_secure else None

    async def request(self, method: str, path: str, body: bytes, on_body: OnBody) -> Reply:
        """The reply, once it is whole; OSError or ConnectionLost where none comes to its end.

        `on_body` is given its parts; what that raises ends the request.
        """
        sent = [("content-length", str(len(body))), ("content-type", "application/json")]
        head = h11.Request(
            method=method, target=self.address.path(path), headers=[*self._headers, *sent]
        )
        while self._idle:
            link = self._idle.pop()
            if link.is_open:
                try:
                    return await self._on(link, head, body, on_body)
                except ConnectionLost:
                    if link.has_begun:
                        raise
                    # It was closed while it was idle: nobody has seen the request.
        return await self._on(await self._connect(), head, body, on_body)

    async def _connect(self) -> _Link:
        try:
            _, link = await asyncio.get_running_loop().create_connection(
                _Link, self.address.host, self.address.port, ssl=self._tls
            )
        except OSError as error:
            # asyncio has words of its own; of a host with several addresses it joins them all.
            if f"[Errno {errno.ECONNREFUSED}]" in str(error):
                raise ConnectionRefusedError(*_REFUSED) from None
            raise
        return link

    async def _on(self, link: _Link, head: h11.Request, body: bytes, on_body: OnBody) -> Reply:
        try:
            reply = await link.exchange(head, body, on_body)
        except BaseException:
            link.abort()
            raise
        if link.renew():
            self._idle.append(link)
        return reply

    def close(self) -> None:
        for link in self._idle:
            link.abort()
        self._idle.clear()


class _Link(asyncio.BufferedProtocol):
    """One connection, and the reply that it waits for."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._transport: asyncio.Transport | None = None
        self._head: h11.Connection | None = None  # until that of the reply has come
        self._done: asyncio.Future[Reply] | None = None
        self._reply: Reply | None = None
        self._body: Body | None = None
        self._on_body: OnBody = lambda at, status, data: None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def has_begun(self) -> bool:
        """Whether any of a reply has come."""
        return self._reply is not None

    async def exchange(self, head: h11.Request, body: bytes, on_body: OnBody) -> Reply:
        assert self._transport is not None
        self._reply, self._body, self._on_body = None, None, on_body
        self._head = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEADER)
        self._done = asyncio.get_running_loop().create_future()
        parts = (head, h11.Data(data=body), h11.EndOfMessage())
        self._transport.write(b"".join(self._head.send(part) or b"" for part in parts))
        return await self._done

    def renew(self) -> bool:
        """Whether it takes another request; it is closed where it does not."""
        body, reply = self._body, self._reply
        assert body is not None and reply is not None
        if self.is_open and reply.keeps_connection and not body.has_more:
            return True
        self.abort()
        return False

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- called by the event loop ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._done is None or self._done.done():
            self.abort()  # nobody waits: what comes now belongs to nothing
            return
        try:
            self._take(bytes(self._buffer[:nbytes]), time.perf_counter())
        except (h11.RemoteProtocolError, MalformedBodyError) as error:
            self._fail(ConnectionLost(f"the reply is no HTTP: {error}"))
        except Exception as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._body is not None and self._body.ends_with_connection:
            self._finish()
        self._fail(ConnectionClosed("the connection was closed"))

    def _take(self, data: bytes, at: float) -> None:
        if self._body is None:
            data = self._take_head(data)
        if self._body is None:
            return
        assert self._reply is not None
        for part in self._body.push(data):
            self._on_body(at, self._reply.status, part)
        if self._body.is_whole:
            self._finish()

    def _take_head(self, data: bytes) -> bytes:
        """What stands behind the head of the reply, once that is whole."""
        assert self._head is not None
        self._head.receive_data(data)
        while (event := self._head.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Response):
                self._reply, self._body = Reply.of(event), body_of(event)
                rest, _ = self._head.trailing_data
                self._head = None
                return rest
        return b""

    def _finish(self) -> None:
        assert self._reply is not None
        if self._done is not None and not self._done.done():
            self._done.set_result(self._reply)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, ConnectionLost):
            error.has_begun = self.has_begun
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
