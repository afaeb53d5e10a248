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
from edgeinfer.remote.address import Address

OnBody = Callable[[float, int, bytes], None]  # when it came, the reply's status, what came
_MOST_HEADER = 64 << 10  # bytes
_REFUSED = errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)


class ConnectionLost(http.client.HTTPException):
    """A reply did not come to its end."""


class Reply(NamedTuple):
    """How a request was answered; header names are in lower case."""

    status: int
    headers: dict[str, str]


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


class _Link(asyncio.Protocol):
    """One connection, and the reply that it waits for."""

    def __init__(self) -> None:
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEADER)
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Reply] | None = None
        self._reply: Reply | None = None
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
        self._reply, self._on_body = None, on_body
        self._done = asyncio.get_running_loop().create_future()
        parts = (head, h11.Data(data=body), h11.EndOfMessage())
        self._transport.write(b"".join(self._parser.send(part) or b"" for part in parts))
        return await self._done

    def renew(self) -> bool:
        """Get ready for another request; False, and closed, where that can't be."""
        if self.is_open and self._parser.our_state is self._parser.their_state is h11.DONE:
            self._parser.start_next_cycle()
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

    def data_received(self, data: bytes) -> None:
        self._read(data, time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        self._read(b"", time.perf_counter())
        self._fail(ConnectionLost("the server has closed the connection"))

    def _read(self, data: bytes, at: float) -> None:
        if self._done is None or self._done.done():
            return  # nobody waits: what comes now belongs to nothing
        try:
            self._parser.receive_data(data)
            while not self._done.done():
                event = self._parser.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return
                self._take(event, at)
        except h11.RemoteProtocolError as error:
            self._fail(ConnectionLost(f"the reply is no HTTP: {error}"))
        except Exception as error:
            self._fail(error)

    def _take(self, event: object, at: float) -> None:
        if isinstance(event, h11.Data):
            assert self._reply is not None
            self._on_body(at, self._reply.status, bytes(event.data))
        elif isinstance(event, h11.Response):
            headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            self._reply = Reply(event.status_code, headers)
        elif isinstance(event, h11.EndOfMessage):
            assert self._done is not None and self._reply is not None
            self._done.set_result(self._reply)
        elif isinstance(event, h11.ConnectionClosed):
            self._fail(ConnectionLost("the server has closed the connection"))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
