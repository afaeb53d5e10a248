"""POST /api/pull: a model fetched from the hub, where the server may do that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edgeinfer.server.errors import ApiError
from edgeinfer.server.fields import read_fields
from edgeinfer.server.models import ServedModel
from edgeinfer.server.service import Service
from edgeinfer.server.wire import LINES, line, reply

_DONE = {"status": "success"}


def routes(service: Service) -> list[Route]:
    return [Route("/api/pull", OllamaPull(service).create, methods=["POST"])]


class OllamaPull:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        name = body.text("model") or body.text("name")
        if not name:
            raise body.wrong("model", "the name of a model")
        fetching = asyncio.ensure_future(self._service.models.fetch(name))
        await asyncio.wait({fetching}, timeout=0)  # what is refused at once has a status
        if fetching.done():
            fetching.result()
        # It goes on where nobody waits any more.
        waiting = asyncio.ensure_future(self._service.unless_stopped(asyncio.shield(fetching)))
        for each in (fetching, waiting):
            each.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is told
        if not body.flag("stream", True):
            await waiting
            return reply(_DONE)
        parts = _lines(waiting, self._service.limits.ping_seconds)
        return StreamingResponse(parts, media_type=LINES)


async def _lines(
    fetching: asyncio.Future[ServedModel], seconds: float
) -> AsyncGenerator[bytes, None]:
    """One now and then while it is fetched."""
    while not fetching.done():
        yield line({"status": "pulling manifest"})
        await asyncio.wait({fetching}, timeout=seconds)
    error = fetching.exception()
    yield line({"error": ApiError.of(error).message} if error else _DONE)
