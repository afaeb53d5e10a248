"""Runs the application until it is told to stop: listening, loading, and an end in good order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from edgeinfer.server.app import make_app
from edgeinfer.server.service import Service

_KEEP_ALIVE_SECONDS = 75
_MOST_HEADER = 64 << 10  # bytes
_END_SECONDS = 5.0  # for replies that were told to end


def serve(service: Service, listener: socket.socket, tell: Callable[[], None]) -> None:
    """Serve in this thread until a signal; `tell` is called once the first model is loaded."""
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        log_level="error",
        access_log=False,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=_MOST_HEADER,
    )
    server = _Server(config, service, tell)
    asyncio.run(server.serve(sockets=[listener]))
    if server.error is not None:
        raise server.error


class _Server(uvicorn.Server):
    """Loads the first model beside listening, and ends answers before connections."""

    def __init__(self, config: uvicorn.Config, service: Service, tell: Callable[[], None]) -> None:
        super().__init__(config)
        self.error: Exception | None = None
        self._service, self._tell = service, tell
        self._loading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await self._service.models.start()
        except Exception as error:
            self.error, self.should_exit = error, True
        else:
            self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers may end by themselves for a while; the others end with an error that says so."""
        service = self._service
        service.is_stopping = True
        for listening in self.servers:
            listening.close()
        end = asyncio.get_running_loop().time() + service.limits.grace_seconds
        while service.answers and not self.force_exit and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        service.end_answers()
        self.config.timeout_graceful_shutdown = int(_END_SECONDS)
        await super().shutdown(sockets)
        if self._loading is not None:
            self._loading.cancel()
        await service.models.close()
