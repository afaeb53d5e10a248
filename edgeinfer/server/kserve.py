"""KServe's protocol, version 2, and Triton's extensions of it: binary tensors, and generate.

A model has the input `text_input` and continues it as it is; with pooling its `embedding` is an
output, too.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer import __version__
from edgeinfer.llm import LLM
from edgeinfer.results import Delta, Event
from edgeinfer.server.answers import Answer
from edgeinfer.server.errors import RETRY_SECONDS, ApiError, Json
from edgeinfer.server.fields import Fields, read_fields
from edgeinfer.server.frames import Frames
from edgeinfer.server.models import ServedModel
from edgeinfer.server.requests import NOT_HERE, SAMPLING, Request
from edgeinfer.server.service import Service
from edgeinfer.server.tensors import LENGTH_HEADER, Output, read_body, read_texts, write
from edgeinfer.server.wire import EVENTS, PING, event, reply
from edgeinfer.server.wire import read_body as read_bytes

_Handler: TypeAlias = "Callable[[HttpRequest], Coroutine[Any, Any, Response]]"
_INPUT, _TEXT, _EMBEDDING = "text_input", "text_output", "embedding"
_VERSION = "1"  # of every model
_USUAL_TOKENS = 16
_FIELDS = {**SAMPLING, "stop": "stop", "stop_words": "stop", "max_tokens": "max_tokens"}
_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32"}


def routes(service: Service) -> list[Route]:
    api = KServe(service)
    posted = {"infer": api.infer, "generate": api.generate, "generate_stream": api.stream}
    asked = {"ready": api.model_ready, "config": api.config}
    found = [
        Route("/v2", api.server, methods=["GET"]),
        Route("/v2/health/live", api.live, methods=["GET"]),
        Route("/v2/health/ready", api.ready, methods=["GET"]),
    ]
    for base in ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}"):
        found += [Route(f"{base}/{end}", do, methods=["POST"]) for end, do in posted.items()]
        found += [Route(f"{base}/{end}", _only_get, methods=["GET"]) for end in posted]
        found += [Route(f"{base}/{end}", do, methods=["GET"]) for end, do in asked.items()]
        found.append(Route(base, api.metadata, methods=["GET"]))
    return found


def envelope(error: ApiError) -> Json:
    return {"error": error.message}


async def _only_get(http: HttpRequest) -> Response:
    """Names may have any number of parts: without this one the path would be a model's."""
    raise HTTPException(405, headers={"allow": "POST"})


class KServe:
    def __init__(self, service: Service) -> None:
        self._service = service

    # -- what there is ---------------------------------------------------------------------------

    async def server(self, http: HttpRequest) -> Response:
        extensions = ["binary_tensor_data", "generate", "model_configuration", "parameters"]
        return reply({"name": "edgeinfer", "version": __version__, "extensions": extensions})

    async def live(self, http: HttpRequest) -> Response:
        return reply({"live": True})

    async def ready(self, http: HttpRequest) -> Response:
        is_ready = self._service.models.is_ready and not self._service.is_stopping
        return _ready({"ready": is_ready}, is_ready)

    async def model_ready(self, http: HttpRequest) -> Response:
        """A model that is not loaded is when it is asked for."""
        name, is_ready = self._model(http).name, self._service.models.is_ready
        return _ready({"name": name, "ready": is_ready}, is_ready)

    async def metadata(self, http: HttpRequest) -> Response:
        model = self._model(http)
        return reply(
            {
                "name": model.name,
                "versions": [_VERSION],
                "platform": "edgeinfer",
                "inputs": [{"name": _INPUT, "datatype": "BYTES", "shape": [-1]}],
                "outputs": await self._outputs(model),
            }
        )

    async def config(self, http: HttpRequest) -> Response:
        model = self._model(http)
        outputs = [
            {"name": each["name"], "data_type": _TYPES[each["datatype"]], "dims": each["shape"]}
            for each in await self._outputs(model)
        ]
        return reply(
            {
                "name": model.name,
                "platform": "",
                "backend": "edgeinfer",
                "version_policy": {"latest": {"num_versions": 1}},
                "max_batch_size": 0,
                "input": [{"name": _INPUT, "data_type": "TYPE_STRING", "dims": [-1]}],
                "output": outputs,
                "model_transaction_policy": {"decoupled": False},
            }
        )

    def _model(self, http: HttpRequest) -> ServedModel:
        """The one that a path names; ApiError for a version that it has not."""
        model = self._service.models.find(http.path_params["name"])
        version = http.path_params.get("version", _VERSION)
        if version != _VERSION:
            raise ApiError(404, f"model {model.name!r} has no version {version[:80]!r}; {_VERSION}")
        return model

    async def _outputs(self, model: ServedModel) -> list[Json]:
        return await self._service.with_model(model.name, _outputs)

    # -- tensors ---------------------------------------------------------------------------------

    async def infer(self, http: HttpRequest) -> Response:
        model, most = self._model(http), self._service.limits.most_body
        length = http.headers.get(LENGTH_HEADER)
        body, behind = read_body(await read_bytes(http, most), length)
        texts, head = read_texts(body.objects("inputs"), behind, _INPUT), _head(model, body)
        parameters = body.object("parameters")
        is_binary = parameters.flag("binary_data_output")
        there = [each["name"] for each in await self._outputs(model)]
        wanted = _wanted(body.objects("outputs"), there, is_binary)
        request = Request(model=model.name, prompts=texts, sampling=_sampling(parameters))
        outputs = await self._infer(request, texts, wanted)
        return write(head, outputs)

    async def _infer(
        self, request: Request, texts: list[str], wanted: dict[str, bool]
    ) -> list[Output]:
        found = []
        for name, is_binary in wanted.items():
            if name == _TEXT:
                answers = await (await self._service.answer(request)).collect() if texts else []
                found.append(Output(name, [answer.text for answer in answers], is_binary))
            else:
                vectors, _ = await self._service.embed(request.model, texts)
                found.append(Output(name, vectors, is_binary))
        return found

    # -- text ------------------------------------------------------------------------------------

    async def generate(self, http: HttpRequest) -> Response:
        head, answer = await self._begin(http)
        (found,) = await answer.collect()
        return reply({**head, _TEXT: found.text})

    async def stream(self, http: HttpRequest) -> Response:
        head, answer = await self._begin(http)
        return Frames(_Shape(head), EVENTS, answer)

    async def _begin(self, http: HttpRequest) -> tuple[Json, Answer]:
        model = self._model(http)
        body = await read_fields(http, self._service.limits.most_body)
        text = body.get(_INPUT)
        if isinstance(text, list) and len(text) == 1:  # a tensor of one element
            (text,) = text
        if not isinstance(text, str):
            raise body.wrong(_INPUT, "a text")
        sampling = _sampling(body, body.object("parameters"))
        request = Request(model=model.name, prompts=[text], sampling=sampling)
        head = _head(model, body)  # of what can't be used no answer is begun
        return head, await self._service.answer(request)


def _ready(told: Json, is_ready: bool) -> Response:
    if is_ready:
        return reply(told)
    return reply(told, 503, {"retry-after": str(RETRY_SECONDS)})


def _outputs(llm: LLM) -> list[Json]:
    found: list[Json] = [{"name": _TEXT, "datatype": "BYTES", "shape": [-1]}]
    if llm.runtime.pooling:
        n_dims = llm.runtime.segment.hidden.dim
        found.append({"name": _EMBEDDING, "datatype": "FP32", "shape": [-1, n_dims]})
    return found


def _wanted(asked: list[Fields], there: list[str], is_binary: bool) -> dict[str, bool]:
    """Which outputs are asked for, and whether as bytes; all where none is named."""
    found: dict[str, bool] = {}
    for each in asked:
        name, parameters = each.text("name"), each.object("parameters")
        if name not in there or name in found:
            raise each.wrong("name", f"one of {', '.join(map(repr, there))}, and each once")
        if parameters.get("classification"):
            raise parameters.wrong("classification", "left out: there are no classes")
        found[name] = parameters.flag("binary_data", is_binary)
    return found or dict.fromkeys(there, is_binary)


def _sampling(*given: Fields) -> Json:
    """Sampling keywords; what is given last counts."""
    found: Json = {"max_tokens": _USUAL_TOKENS}
    for each in given:
        each.refuse(NOT_HERE)
        found |= each.sampling(_FIELDS)
    return found


def _head(model: ServedModel, body: Fields) -> Json:
    head = {"model_name": model.name, "model_version": _VERSION}
    return {**head, "id": body.text("id")} if "id" in body else head


class _Shape:
    """Text as it comes; an answer without any is one frame."""

    ping = PING

    def __init__(self, head: Json) -> None:
        self._head, self._is_empty = head, True

    def begin(self) -> bytes:
        return b""

    def part(self, i: int, found: Event) -> bytes:
        return self._frame(found.text) if isinstance(found, Delta) and found.text else b""

    def end(self) -> bytes:
        return self._frame("") if self._is_empty else b""

    def failed(self, error: ApiError) -> bytes:
        return event(envelope(error))

    def _frame(self, text: str) -> bytes:
        self._is_empty = False
        return event({**self._head, _TEXT: text})
