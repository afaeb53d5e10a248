"""The catalog of LM Studio: what front-ends that know it ask for models, and to load them."""

from __future__ import annotations

import time

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import Fields, read_fields
from edgeinfer.server.models import ServedModel
from edgeinfer.server.service import Service
from edgeinfer.server.wire import reply


def routes(service: Service) -> list[Route]:
    api = LMStudio(service)
    return [
        Route("/api/v1/models", api.list, methods=["GET"]),
        Route("/api/v1/models/load", api.load, methods=["POST"]),
        Route("/api/v1/models/unload", api.unload, methods=["POST"]),
        Route("/api/v0/models", api.older_list, methods=["GET"]),
    ]


class LMStudio:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, http: HttpRequest) -> Response:
        return reply({"models": [_shown(model) for model in self._service.models.served]})

    async def older_list(self, http: HttpRequest) -> Response:
        data = [_older(model) for model in self._service.models.served]
        return reply({"object": "list", "data": data})

    async def load(self, http: HttpRequest) -> Response:
        body, begun = await self._body(http), time.perf_counter()
        async with self._service.model(body.text("model")) as model:
            told = {"type": "llm", "instance_id": model.name, "status": "loaded"}
            return reply({**told, "load_time_seconds": time.perf_counter() - begun})

    async def unload(self, http: HttpRequest) -> Response:
        body, models = await self._body(http), self._service.models
        model = models.find(body.text("instance_id") or body.text("model"))
        if not await models.unload(model):
            raise ApiError(409, "the model is answering; it can be unloaded once it is idle")
        return reply({"instance_id": model.name})

    async def _body(self, http: HttpRequest) -> Fields:
        return await read_fields(http, self._service.limits.most_body)


def _shown(model: ServedModel) -> Json:
    shown: Json = {
        "type": "llm",
        "publisher": "",
        "key": model.name,
        "display_name": model.name,
        "size_bytes": model.n_bytes,
        "format": "gguf",
        "quantization": None,
        "params_string": None,
        "max_context_length": 0,
        "loaded_instances": [],
    }
    llm = model.llm
    if llm is None:
        return shown
    opened = llm.runtime.model
    return {
        **shown,
        "display_name": llm.name,
        "architecture": opened.hparams.architecture,
        "quantization": {"name": opened.quantisation, "bits_per_weight": None},
        "params_string": f"{opened.n_params / 1e9:.2f}B",
        "max_context_length": llm.n_ctx_train,
        "loaded_instances": [{"id": model.name, "config": {"context_length": llm.n_ctx}}],
        "capabilities": {"vision": False, "trained_for_tool_use": True},
    }


def _older(model: ServedModel) -> Json:
    shown = _shown(model)
    quantisation = shown["quantization"] or {}
    return {
        "id": model.name,
        "object": "model",
        "type": "llm",
        "publisher": "",
        "arch": shown.get("architecture", ""),
        "compatibility_type": "gguf",
        "quantization": quantisation.get("name", ""),
        "state": "loaded" if model.llm is not None else "not-loaded",
        "max_context_length": shown["max_context_length"],
    }
