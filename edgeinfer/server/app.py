"""The application: the routes of all APIs behind one gate, each error in its API's envelope."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from edgeinfer.server import (
    chat_completions,
    completions,
    embeddings,
    kserve,
    lm_studio,
    messages,
    model_list,
    native,
    ollama,
    ollama_embed,
    ollama_pull,
    openai,
    responses,
)
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.gate import Gate
from edgeinfer.server.service import Service
from edgeinfer.server.wire import unless_gone

_APIS = (
    native, chat_completions, completions, responses, embeddings, model_list, messages, ollama,
    ollama_embed, ollama_pull, kserve, lm_studio,
)  # fmt: skip


def make_app(service: Service) -> ASGIApp:
    routes = [route for api in _APIS for route in api.routes(service)]
    router = Router(routes, redirect_slashes=False)

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        async with service.request():
            await unless_gone(receive, lambda take: router(scope, take, send))

    return Gate(answered, service.limits, find_envelope)


def find_envelope(path: str, headers: Mapping[str, str]) -> Callable[[ApiError], Json]:
    """That of the API which a path, or a header, belongs to."""
    if path.startswith("/api/"):
        return ollama.envelope
    if path == "/v2" or path.startswith("/v2/"):
        return kserve.envelope
    if path.startswith("/messages") or "anthropic-version" in headers:
        return messages.envelope
    return openai.envelope
