"""GET /v1/models, in the form of OpenAI's API or of Anthropic's; loading and unloading by name."""

from __future__ import annotations

from datetime import datetime, timezone

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import read_fields
from edgeinfer.server.models import ServedModel
from edgeinfer.server.service import Service
from edgeinfer.server.wire import reply


def routes(service: Service) -> list[Route]:
    api = ModelList(service)
    return [
        Route("/models", api.list, methods=["GET"]),
        Route("/models/load", api.load, methods=["POST"]),
        Route("/models/unload", api.unload, methods=["POST"]),
        Route("/models/{name:path}", api.one, methods=["GET"]),
    ]


class ModelList:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, http: HttpRequest) -> Response:
        served = self._service.models.served
        if _is_anthropic(http):
            return reply(
                {
                    "data": [_anthropic(model) for model in served],
                    "first_id": served[0].name,
                    "last_id": served[-1].name,
                    "has_more": False,
                }
            )
        return reply({"object": "list", "data": [_openai(model) for model in served]})

    async def one(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        model = self._service.models.find(name)
        return reply(_anthropic(model) if _is_anthropic(http) else _openai(model))

    async def load(self, http: HttpRequest) -> Response:
        """As llama-server has it; the reply comes once it is loaded."""
        body = await read_fields(http, self._service.limits.most_body)
        async with self._service.model(body.text("model")):
            return reply({"success": True})

    async def unload(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        models = self._service.models
        if not await models.unload(models.find(body.text("model"))):
            raise ApiError(409, "the model is answering; it can be unloaded once it is idle")
        return reply({"success": True})


def _is_anthropic(http: HttpRequest) -> bool:
    return "anthropic-version" in http.headers


def _anthropic(model: ServedModel) -> Json:
    created = datetime.fromtimestamp(model.created, timezone.utc)
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.llm.name if model.llm is not None else model.name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
    }


def _openai(model: ServedModel) -> Json:
    shown: Json = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "edgeinfer",
        "status": {"value": model.state},
    }
    llm = model.llm
    if llm is None:
        return shown
    return {
        **shown,
        "max_model_len": llm.n_ctx,
        "context_length": llm.n_ctx,
        "meta": {
            "n_ctx": llm.n_ctx,
            "n_ctx_train": llm.n_ctx_train,
            "n_params": llm.runtime.model.n_params,
            "n_vocab": llm.runtime.tokenizer.n_vocab,
            "size": model.n_bytes,
        },
    }
