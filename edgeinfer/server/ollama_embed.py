"""Vectors of texts in Ollama's API: of several, and, as it was before, of one."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer.server.durations import keep_alive
from edgeinfer.server.fields import Fields, read_fields
from edgeinfer.server.service import Service
from edgeinfer.server.wire import floats, reply

_MOST_DIMENSIONS = 1 << 20


def routes(service: Service) -> list[Route]:
    api = OllamaEmbed(service)
    return [
        Route("/api/embed", api.embed, methods=["POST"]),
        Route("/api/embeddings", api.embeddings, methods=["POST"]),
    ]


class OllamaEmbed:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def embed(self, http: HttpRequest) -> Response:
        start = time.perf_counter_ns()
        body = await read_fields(http, self._service.limits.most_body)
        vectors, n_tokens = await self._vectors(body, _inputs(body))
        told = {"model": body.text("model"), "embeddings": vectors, "load_duration": 0}
        return reply(
            told | {"total_duration": time.perf_counter_ns() - start, "prompt_eval_count": n_tokens}
        )

    async def embeddings(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        prompt = body.text("prompt")
        vectors, _ = await self._vectors(body, [prompt] if prompt else [])
        return reply({"embedding": vectors[0] if vectors else []})

    async def _vectors(
        self, body: Fields, texts: list[str | list[int]]
    ) -> tuple[list[msgspec.Raw], int]:
        """Of no text, nothing but the model, loaded."""
        name = body.text("model")
        options: dict[str, Any] = {"truncate": body.flag("truncate", True)}
        if "dimensions" in body:
            options["dimensions"] = body.integer("dimensions", 0, 1, _MOST_DIMENSIONS)
        is_kept = "keep_alive" in body
        seconds = keep_alive(body) if is_kept else None
        found, n_tokens = list[msgspec.Raw](), 0
        if texts:
            vectors, n_tokens = await self._service.embed(name, texts, **options)
            found = [floats(vector) for vector in vectors]
        else:
            async with self._service.model(name):
                pass
        if is_kept:
            models = self._service.models
            models.keep(models.find(name), seconds)
        return found, n_tokens


def _inputs(body: Fields) -> list[str | list[int]]:
    given = body.get("input")
    if given is None or isinstance(given, str):
        return [given] if given else []
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise body.wrong("input", "a text or a list of texts")
    return given
