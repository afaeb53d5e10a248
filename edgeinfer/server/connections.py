"""Connections that are ended where no request comes: what holds them open must say something."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0  # from the first byte of a header, or from the connection, to its last
LINGER_SECONDS = 30.0  # at least, in which who is cut off may still read what was sent


class Connection(H11Protocol):
    """One client's connection; between requests uvicorn's own limit for idle ones holds."""

    _alarm: asyncio.TimerHandle | None = None
    _linger: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # as in the class above
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._look_later()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        if self._linger is not None:
            self._linger.cancel()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        self._linger = self.loop.call_later(LINGER_SECONDS, self._end_lingering)

    def _end_lingering(self) -> None:
        """A transport that is closed waits for its reader, who may never read on."""
        if self.transport.is_closing():
            self.transport.abort()
        else:
            self._look_later()

    def _watch(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.timeout_keep_alive_task is not None:
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
