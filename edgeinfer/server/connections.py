"""Connections that are ended where no request comes, or where nobody reads a reply."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from edgeinfer.server.wire import encode

HEADER_SECONDS = 20.0  # from the first byte of a header, or from the connection, to its last
STALLED_SECONDS = 120.0  # a reader that takes nothing for so long is gone
LINGER_SECONDS = 30.0  # at least, in which who is cut off may still read what was sent
LEAVE_SECONDS = 2.0  # in which a client may learn that it is refused, and stop sending
_MOST_EARLY = 64 << 10  # bytes of what a client sends before it has its reply
# Seconds between the questions whether who sends no more still reads. One that is gone refuses the
# first, which here comes back before the second, and from afar before one of those behind it.
_ASKED_AGAIN = (0.0, 0.05, 1.0)


class _Transport:
    """One whose `close` is another."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport, self.close = transport, close
        self.write = transport.write
        self.is_left = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.is_left or self._transport.is_closing()


class Connection(H11Protocol):
    """One client's connection; between requests uvicorn's own limit for idle ones holds.

    The application finds `write_now` in a request's state.
    """

    _alarm: asyncio.TimerHandle | None = None
    _linger: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _asking: asyncio.TimerHandle | None = None
    _leaving: asyncio.TimerHandle | None = None
    _sends_no_more = False
    _in_chunks: object = None  # the cycle whose reply is, if any is

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, {**app_state, "write_now": self.write_now}, _loop)

    def connection_made(  # type: ignore[override]  # as in the class above
        self, transport: asyncio.Transport
    ) -> None:
        self._open, self._way = transport, _Transport(transport, self._leave)
        super().connection_made(self._way)  # type: ignore[arg-type]  # it does what one does
        self._look_later()
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self._leaving is not None:
            return  # nobody reads it, but see there
        super().data_received(data)
        self._read_on()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with what is no request, which belongs to no API.

        Where a reply has begun, or was given, there can be no other.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for each in _refusal(sys.exc_info()[1]):
                self.transport.write(self.conn.send(each) or b"")
        if self._is_answering:  # whoever does so has nobody to tell any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        for alarm in (self._linger, self._stalled, self._asking, self._leaving):
            if alarm is not None:
                alarm.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]  # as asyncio has it
        """Whether the connection stays: who has sent all may still read, as HTTP allows.

        Of who has closed it for good nothing else comes: that is found out by writing.
        """
        is_reading = self._is_answering and not self.cycle.more_body
        if not is_reading or self.cycle.scope["http_version"] != "1.1":
            return False
        self._sends_no_more = True
        self._ask(_ASKED_AGAIN)
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._sends_no_more and not (self._is_answering and not self.cycle.more_body):
            self.transport.close()  # also of a request whose end will never come

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _ask(self, again: tuple[float, ...]) -> None:
        """Write what says nothing: a reply that is to come, or a zero before a chunk's length.

        One of a stated length has no room for it: what is left of that is being written.
        """
        if not self._is_answering or self.transport.is_closing():
            return
        begun = self.cycle.response_started
        if not (self.flow.write_paused or (begun and self._in_chunks is not self.cycle)):
            self.transport.write(b"0" if begun else b"HTTP/1.1 100 Continue\r\n\r\n")
        if again:
            self._asking = self.loop.call_later(again[0], self._ask, again[1:])

    def write_now(self, part: bytes) -> bool:
        """Write more, if there is any, of a reply of no known length that has begun.

        False where that must wait for its reader.
        """
        self._in_chunks = self.cycle
        if self.flow.write_paused:
            return False
        if part and not self.cycle.disconnected:
            # As h11 would, in a twentieth of its time.
            is_chunked = self.cycle.scope["http_version"] == "1.1"
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _leave(self) -> None:
        """Close, once a client that may be sending still has read why (RFC 9112, 9.6).

        What comes behind a socket that is closed resets it, and takes the reply from its reader.
        """
        sends_on = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or self.conn.trailing_data[0]
        if not sends_on or self.transport.is_closing():
            self._open.close()
            return
        self._way.is_left = True
        self._leaving = self.loop.call_later(LEAVE_SECONDS, self._open.close)
        self._open.write_eof()
        self._open.resume_reading()

    def _read_on(self) -> None:
        """Read what comes before a reply has ended, and with it that the client has gone."""
        if self._is_answering and not self.cycle.more_body:
            early, _ = self.conn.trailing_data
            if len(early) < _MOST_EARLY and not self.transport.is_closing():
                self.flow.resume_reading()

    def _look_later(self) -> None:
        self._linger = self.loop.call_later(LINGER_SECONDS, self._end_lingering)

    def _end_lingering(self) -> None:
        """A transport that is closed waits for its reader, who may never read on."""
        if self.transport.is_closing():
            self.transport.abort()
        else:
            self._look_later()

    def _watch(self) -> None:
        if self._is_answering or self.timeout_keep_alive_task is not None:
            self._forget()
        elif self._alarm is None:
            self._alarm = self.loop.call_later(HEADER_SECONDS, self._end)

    def _forget(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _end(self) -> None:
        self._alarm = None
        if not self.transport.is_closing():
            self.transport.close()


def _refusal(error: BaseException | None) -> list[h11.Event]:
    """A reply to what h11 has refused."""
    status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
    why = str(error).partition(": bytearray")[0]  # behind that comes what was sent
    told = {"message": f"this is no request that can be read: {why}", "param": None, "code": None}
    body = encode({"error": {**told, "type": "invalid_request_error"}})
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
    return [head, h11.Data(data=body), h11.EndOfMessage()]
