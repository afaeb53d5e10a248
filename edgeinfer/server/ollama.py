"""The API of Ollama: chats, texts, and what it tells of models."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edgeinfer.results import Completion, Delta, Done, Event
from edgeinfer.server.answers import Answer
from edgeinfer.server.blocks import Blocks, arguments_object
from edgeinfer.server.durations import keep_alive
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import Fields, read_fields, whole
from edgeinfer.server.frames import Frames
from edgeinfer.server.ollama_models import listed, now, running, shown
from edgeinfer.server.requests import (
    NOT_HERE,
    SAMPLING,
    Chat,
    Request,
    conversation,
    function_tool,
    new_call_id,
)
from edgeinfer.server.service import Service
from edgeinfer.server.structure import of_ollama
from edgeinfer.server.wire import LINES, line, reply
from edgeinfer.text.messages import can_go_on

_VERSION = "0.12.0"  # of Ollama's API; clients ask whether it is new enough
_NS = 1_000_000_000
_MOST_LOGPROBS = 20
_NOT_HERE = {
    "template": "the model's own is used; raw: true sends a prompt as it is",
    "context": "send what was said before to api/chat",
}


def routes(service: Service) -> list[Route]:
    api = Ollama(service)
    return [
        Route("/", api.running, methods=["GET"]),
        Route("/api/version", api.version, methods=["GET"]),
        Route("/api/tags", api.tags, methods=["GET"]),
        Route("/api/ps", api.ps, methods=["GET"]),
        Route("/api/show", api.show, methods=["POST"]),
        Route("/api/chat", api.chat, methods=["POST"]),
        Route("/api/generate", api.generate, methods=["POST"]),
    ]


def envelope(error: ApiError) -> Json:
    return {"error": error.message}


class Ollama:
    def __init__(self, service: Service) -> None:
        self._service = service

    # -- models ----------------------------------------------------------------------------------

    async def running(self, http: HttpRequest) -> Response:
        return PlainTextResponse("Ollama is running")  # what clients look for

    async def version(self, http: HttpRequest) -> Response:
        return reply({"version": _VERSION})

    async def tags(self, http: HttpRequest) -> Response:
        return reply({"models": [listed(model) for model in self._service.models.served]})

    async def ps(self, http: HttpRequest) -> Response:
        loaded = [model for model in self._service.models.served if model.llm is not None]
        return reply({"models": [running(model) for model in loaded]})

    async def show(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        return reply(await self._service.models.looked_into(_name(body), shown))

    # -- answers ---------------------------------------------------------------------------------

    async def chat(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        if not body.objects("messages"):
            return await self._load_or_unload(
                body, {"message": {"role": "assistant", "content": ""}}
            )
        return await self._answer(body, read_chat(body), is_chat=True)

    async def generate(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        if not body.text("prompt") and not body.text("suffix"):
            return await self._load_or_unload(body, {"response": ""})
        return await self._answer(body, read_generate(body), is_chat=False)

    async def _load_or_unload(self, body: Fields, told: Json) -> Response:
        """What a request without a prompt is for."""
        is_unload = "keep_alive" in body and keep_alive(body) == 0
        if is_unload:
            models = self._service.models
            model = models.find(_name(body))
            if not await models.unload(model):
                models.keep(model, 0)  # once it has answered
        else:
            async with self._service.model(_name(body)) as model:
                if "keep_alive" in body:
                    self._service.models.keep(model, keep_alive(body))
        reason = "unload" if is_unload else "load"
        head = {"model": _name(body), "created_at": now(), "done": True, "done_reason": reason}
        return reply({**head, **told})

    async def _answer(self, body: Fields, request: Request, *, is_chat: bool) -> Response:
        is_streamed, is_kept = body.flag("stream", True), "keep_alive" in body
        seconds = keep_alive(body) if is_kept else None
        answer = await self._service.answer(request)
        if is_kept:
            self._service.models.keep(answer.model, seconds)
        shape = _Shape(answer, _name(body), is_chat)
        if is_streamed:
            return Frames(shape, LINES, answer)
        return reply(await shape.whole())


# -- requests -------------------------------------------------------------------------------------


def _name(body: Fields) -> str:
    return body.text("model") or body.text("name")


def read_chat(body: Fields) -> Request:
    tools = [function_tool(tool.object("function")) for tool in body.objects("tools")]
    messages = conversation([_message(each) for each in body.objects("messages")])
    chat = Chat(
        messages=messages,
        tools=tools,
        template_args=_thinking(body),
        continues=can_go_on(messages),  # as that program's own templates do
    )
    return Request(
        model=_name(body), chat=chat, sampling=_sampling(body), structure=of_ollama(body)
    )


def read_generate(body: Fields) -> Request:
    _refuse_images(body)
    body.refuse(_NOT_HERE)
    prompt, sampling, structure = body.text("prompt"), _sampling(body), of_ollama(body)
    if body.flag("raw") or body.text("suffix"):
        return Request(
            model=_name(body),
            prompts=[prompt],
            suffix=body.text("suffix"),
            sampling=sampling,
            structure=structure,
        )
    system = body.text("system")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    chat = Chat(messages=messages, template_args=_thinking(body))
    return Request(model=_name(body), chat=chat, sampling=sampling, structure=structure)


def _sampling(body: Fields) -> dict[str, Any]:
    options = body.object("options")
    names = {**SAMPLING, "stop": "stop", "num_predict": "max_tokens"}
    most = whole(options.get("num_predict"))
    if type(most) is int and most <= 0:  # of these none is a limit
        del names["num_predict"]
    options.refuse(NOT_HERE)
    found = options.sampling(names)
    if body.flag("truncate") or body.flag("shift"):  # that program does both unless it is told
        found["overflow"] = "drop-turns"
    if body.flag("logprobs"):
        found["logprobs"] = body.integer("top_logprobs", 0, 0, _MOST_LOGPROBS)
    return found


def _thinking(body: Fields) -> dict[str, Any]:
    """`think` is true, false, or how much."""
    think = body.get("think")
    if think is None:
        return {}
    if isinstance(think, str):
        return {"enable_thinking": True, "reasoning_effort": think}
    return {"enable_thinking": body.flag("think")}


def _message(given: Fields) -> Json:
    _refuse_images(given)
    message: Json = {"role": given.text("role"), "content": given.text("content")}
    if not message["role"]:
        raise given.wrong("role", "who speaks, such as 'user'")
    if given.text("thinking"):
        message["reasoning_content"] = given.text("thinking")
    if calls := given.objects("tool_calls"):
        functions = [call.object("function") for call in calls]
        message["tool_calls"] = [
            {
                "id": call.text("id"),
                "type": "function",
                "function": {
                    "name": function.text("name"),
                    "arguments": function.object("arguments").values,
                },
            }
            for call, function in zip(calls, functions, strict=True)
        ]
    if name := given.text("tool_name") or given.text("name"):
        message["name"] = name
    if message["role"] == "tool":
        message["tool_call_id"] = given.text("tool_call_id")
    return message


def _refuse_images(given: Fields) -> None:
    if given.get("images"):
        raise ApiError(400, "images are not supported; text is", param="images")


# -- replies --------------------------------------------------------------------------------------


class _Shape:
    """An answer as this API has it."""

    ping = b""  # lines have no comments: what keeps the connection is TCP

    def __init__(self, answer: Answer, name: str, is_chat: bool) -> None:
        self._answer, self._blocks = answer, Blocks()
        self._name, self._is_chat = name or answer.model.name, is_chat

    async def whole(self) -> Json:
        (answer,) = await self._answer.collect(self._blocks.add)
        calls = [self._call(block.name, block.text) for block in self._blocks.all if block.name]
        told = self._told(answer.text, answer.reasoning, calls)
        if answer.logprobs is not None:
            told["logprobs"] = self._answer.logprobs_json(answer.logprobs)
        return self._object(told | self._end(answer))

    def begin(self) -> bytes:
        return b""

    def part(self, i: int, found: Event) -> bytes:
        if isinstance(found, Delta):
            return self._lines(self._changes(found))
        if isinstance(found, Done):
            end = self._object(self._told("", "", []) | self._end(found.completion))
            return self._lines(self._calls_of(self._blocks.finish())) + line(end)
        return b""

    def end(self) -> bytes:
        return b""

    def failed(self, error: ApiError) -> bytes:
        return line(envelope(error))

    def _lines(self, told: list[Json]) -> bytes:
        return b"".join(line(self._object({**each, "done": False})) for each in told)

    def _changes(self, delta: Delta) -> list[Json]:
        """Text as it comes, and calls once they are whole."""
        found = self._calls_of(self._blocks.add(delta))
        if delta.text or delta.reasoning or (delta.logprobs and not found):
            found.append(self._told(delta.text, delta.reasoning, []))
        if delta.logprobs and found:
            found[-1]["logprobs"] = self._answer.logprobs_json(delta.logprobs)
        return found

    def _calls_of(self, changes: list[Any]) -> list[Json]:
        ended = [each.block for each in changes if each.kind == "end" and each.block.name]
        return [self._told("", "", [self._call(each.name, each.text)]) for each in ended]

    def _call(self, name: str, arguments: str) -> Json:
        function = {"name": name, "arguments": arguments_object(arguments)}
        return {"id": new_call_id("call_"), "function": function}

    def _told(self, text: str, reasoning: str, calls: list[Json]) -> Json:
        if not self._is_chat:
            return {"response": text, **({"thinking": reasoning} if reasoning else {})}
        message: Json = {"role": "assistant", "content": text}
        if reasoning:
            message["thinking"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _object(self, told: Json) -> Json:
        return {"model": self._name, "created_at": now(), **told}

    def _end(self, answer: Completion) -> Json:
        usage, timings = answer.usage, answer.timings
        n_read = usage.prompt_tokens - usage.cached_tokens
        return {
            "done": True,
            "done_reason": "length" if answer.finish_reason == "length" else "stop",
            "total_duration": int(timings.total_s * _NS),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _duration(n_read, timings.prefill_tok_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": _duration(usage.completion_tokens, timings.decode_tok_s),
        }


def _duration(n: int, per_second: float) -> int:
    return int(n / per_second * _NS) if per_second else 0
