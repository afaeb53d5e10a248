"""Runs the application until it is told to stop: listening, loading, and an end in good order."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from edgeinfer.server.app import make_app
from edgeinfer.server.connections import Connection
from edgeinfer.server.service import Service

_KEEP_ALIVE_SECONDS = 75
_MOST_HEADER = 64 << 10  # bytes
_END_SECONDS = 5  # for replies that were told to end
_LOOK_SECONDS = 0.05


class Server(uvicorn.Server):
    """Loads the first model beside listening, and ends answers before connections.

    `tell` is called once that model is loaded, `say` with what a person should know after that.
    """

    def __init__(
        self,
        service: Service,
        tell: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        config = uvicorn.Config(
            make_app(service),
            log_config=None,
            log_level="error",
            access_log=False,
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_END_SECONDS,
            h11_max_incomplete_event_size=_MOST_HEADER,
        )
        super().__init__(config)
        self._service, self._tell, self._say = service, tell, say
        self._error: Exception | None = None
        self._loading: asyncio.Task[None] | None = None

    def run_on(self, listener: socket.socket) -> None:
        """Serve in this thread until a signal or `stop`; raises why the model can't be loaded."""
        asyncio.run(self.serve(sockets=[listener]))
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Begin to end, from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal, whichever it is, ends at once what still runs."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await self._service.models.start()
        except Exception as error:
            self._error, self.should_exit = error, True
        else:
            self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers may end by themselves for a while; the others end with an error that says so."""
        service = self._service
        service.is_stopping = True
        for listening in self.servers:
            listening.close()
        seconds = service.limits.grace_seconds
        if service.answers:
            n = len(service.answers)
            self._say(
                f"{n} answer{'s' if n > 1 else ''} may end within {seconds:g} s; Ctrl-C again ends "
                "them now"
            )
        end = time.monotonic() + seconds
        while service.is_busy and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(_LOOK_SECONDS)
        service.end_answers()
        await super().shutdown(sockets)
        if self._loading is not None:
            self._loading.cancel()
        await service.models.close()
