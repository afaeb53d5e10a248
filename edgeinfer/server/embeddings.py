"""POST /v1/embeddings: vectors of texts."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer.parameters import shown
from edgeinfer.server.errors import ApiError
from edgeinfer.server.fields import read_fields
from edgeinfer.server.service import Service
from edgeinfer.server.wire import floats, reply

_MOST_DIMENSIONS = 1 << 20
_FORMATS = ("float", "base64")
_NOT_HERE = {"truncate_prompt_tokens": "truncate leaves out what the context does not hold"}


def routes(service: Service) -> list[Route]:
    return [Route("/embeddings", Embeddings(service).create, methods=["POST"])]


class Embeddings:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        body.refuse(_NOT_HERE)
        texts, kind = _inputs(body.get("input")), body.text("encoding_format", "float")
        if kind not in _FORMATS:
            raise body.wrong("encoding_format", f"one of {', '.join(map(repr, _FORMATS))}")
        options: dict[str, Any] = {"truncate": body.flag("truncate")}
        if "dimensions" in body:
            options["dimensions"] = body.integer("dimensions", 0, 1, _MOST_DIMENSIONS)
        name = body.text("model")
        vectors, n_tokens = await self._service.embed(name, texts, **options)
        data = [
            {"object": "embedding", "index": i, "embedding": _shown(vector, kind)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        model = self._service.models.find(name).name
        return reply({"object": "list", "data": data, "model": model, "usage": usage})


def _inputs(given: Any) -> list[str | list[int]]:
    """A text, a list of token ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(isinstance(each, str) or _is_ids(each) for each in given):
            return given
    if _is_ids(given):
        return [given]
    raise ApiError(
        400,
        f"input is {shown(given)}; it must be text, token ids, or a list of them",
        param="input",
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(each) is int for each in value)


def _shown(vector: NDArray[np.float32], kind: str) -> Any:
    if kind == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return floats(vector)
