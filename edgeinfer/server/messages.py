"""POST /v1/messages: Anthropic's API, as Claude Code and its SDKs speak it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer.results import Completion, Delta, Event
from edgeinfer.server.answers import Answer
from edgeinfer.server.blocks import Block, Blocks, Change, arguments_object
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import Fields, read_fields
from edgeinfer.server.frames import Frames
from edgeinfer.server.requests import (
    MOST_BUDGET,
    Chat,
    Request,
    conversation,
    function_tool,
    new_call_id,
    new_id,
    session_of,
)
from edgeinfer.server.service import Service
from edgeinfer.server.structure import Structure, of_format
from edgeinfer.server.wire import EVENTS, event, reply
from edgeinfer.text.messages import can_go_on, reminder_of

_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed",
             "stop_sequences": "stop", "max_tokens": "max_tokens"}  # fmt: skip
# Blocks that go back as they came, and say nothing to a model: what Anthropic alone can read, and
# what its own tools have done.
_UNTOLD = ("thinking", "redacted_thinking", "tool_reference")
_OF_SERVERS = ("_tool_use", "_tool_result")
# Tools that a client runs, which Anthropic's models know without being told of.
_KNOWN_THERE = ("bash_", "computer_", "memory_", "text_editor_")
_SUPPORTED = "'text', which is all that a model is told"
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def routes(service: Service) -> list[Route]:
    api = Messages(service)
    return [
        Route("/messages", api.create, methods=["POST"]),
        Route("/messages/count_tokens", api.count, methods=["POST"]),
    ]


def envelope(error: ApiError) -> Json:
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ERROR_TYPES.get(error.status, usual)
    told = {"type": kind, "message": error.message, **error.facts}
    return {"type": "error", "error": told, "request_id": new_id("req_")}


class Messages:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        request, is_streamed = read_request(body), body.flag("stream")
        request = replace(request, session=session_of(http.headers, None))
        answer = await self._service.answer(request)
        shape = _Shape(answer)
        if is_streamed:
            return Frames(shape, EVENTS, answer)
        return reply(await shape.whole())

    async def count(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        return reply({"input_tokens": await self._service.count_tokens(read_request(body))})


# -- requests -------------------------------------------------------------------------------------


def read_request(body: Fields) -> Request:
    sampling = body.sampling(_SAMPLING)
    messages: list[Json] = []
    if system := _system(body):
        messages.append({"role": "system", "content": system})
    for given in body.objects("messages"):
        messages += _turn(given, is_first=not messages)
    thinking = body.object("thinking")
    if thinking.text("type") == "enabled" and "budget_tokens" in thinking:
        sampling["reasoning_budget"] = thinking.integer("budget_tokens", 0, 0, MOST_BUDGET)
    choice = body.object("tool_choice")
    told = conversation(messages)
    structure, continues = _structure(body), can_go_on(told)
    if structure.keyword and continues:
        raise ApiError(
            400,
            "messages ends with the assistant's, which an answer in a form can't go on with",
            param="messages",
        )
    chat = Chat(
        messages=told,
        tools=_tools(body),
        tool_choice=_choice(choice),
        parallel_tool_calls=not choice.flag("disable_parallel_tool_use"),
        template_args=_template_args(body),
        continues=continues,
    )
    return Request(model=body.text("model"), chat=chat, sampling=sampling, structure=structure)


def _choice(choice: Fields) -> str | Json | None:
    kind = choice.text("type")
    return {"name": choice.text("name")} if kind == "tool" else kind or None


def _structure(body: Fields) -> Structure:
    """It was a field of its own before it became one of `output_config`."""
    if "output_format" in body:
        return of_format(body.object("output_format"), "output_format")
    return of_format(body.object("output_config").object("format"), "output_config.format")


def _template_args(body: Fields) -> dict[str, Any]:
    """How much to think, in the words that templates know."""
    found: dict[str, Any] = {}
    kind = body.object("thinking").text("type")
    if kind:
        found["enable_thinking"] = kind != "disabled"
    if effort := body.object("output_config").text("effort"):
        found["reasoning_effort"] = effort
    return found


def _system(body: Fields) -> str:
    given = body.get("system")
    texts = [given] if isinstance(given, str) else _texts(body.objects("system"))
    return "\n\n".join(filter(None, texts))


def _tools(body: Fields) -> list[Json]:
    """Those of the client; tools that Anthropic's servers run are no concern of a model's here."""
    found = []
    for tool in body.objects("tools"):
        kind = tool.text("type", "custom")
        if kind.startswith(_KNOWN_THERE):
            raise tool.wrong("type", "'custom', with the input_schema that the tool has")
        if kind == "custom":
            found.append(function_tool(tool, "input_schema"))
    return found


def _turn(given: Fields, is_first: bool) -> list[Json]:
    """A message as messages: results of tools are turns of their own."""
    role, content = given.text("role"), given.get("content")
    if role == "system" and not is_first:  # templates have it at the front alone
        text = content if isinstance(content, str) else _joined(given.objects("content"))
        return [{"role": "user", "content": reminder_of(text)}]
    if not role:
        raise given.wrong("role", "who speaks, such as 'user'")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = given.objects("content")
    if role == "assistant":
        return [_assistant(blocks)]
    results = [each for each in blocks if each.text("type") == "tool_result"]
    rest = [each for each in blocks if each.text("type") != "tool_result"]
    turns = [_result(each) for each in results]
    return turns + ([{"role": role, "content": _joined(rest)}] if rest or not results else [])


def _assistant(blocks: list[Fields]) -> Json:
    told = [each for each in blocks if each.text("type") != "tool_use"]
    message: Json = {"role": "assistant", "content": _joined(told)}
    thoughts = [each.text("thinking") for each in blocks if each.text("type") == "thinking"]
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    calls = [_call(each) for each in blocks if each.text("type") == "tool_use"]
    return {**message, "tool_calls": calls} if calls else message


def _call(block: Fields) -> Json:
    function = {"name": block.text("name"), "arguments": block.object("input").values}
    return {"id": block.text("id"), "type": "function", "function": function}


def _result(block: Fields) -> Json:
    content = block.get("content")
    text = content if isinstance(content, str) else _joined(block.objects("content"))
    if block.flag("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": text}


def _joined(blocks: Iterable[Fields]) -> str:
    return "\n".join(_texts(blocks))


def _texts(blocks: Iterable[Fields]) -> Iterator[str]:
    """Those of blocks; what a model can't be told is refused, unless it is of no use to one."""
    for block in blocks:
        kind = block.text("type", "text")
        source = block.object("source") if kind == "document" else Fields({})
        if kind == "text":
            yield block.text("text")
        elif source.text("type") == "text":
            yield source.text("data")
        elif source.text("type") == "content":
            parts = source.get("content")
            yield parts if isinstance(parts, str) else _of_parts(source.objects("content"))
        elif kind == "search_result":
            yield f"{block.text('title')}\n{_of_parts(block.objects('content'))}"
        elif kind not in _UNTOLD and not kind.endswith(_OF_SERVERS):
            raise block.wrong("type", _SUPPORTED)


def _of_parts(parts: Iterable[Fields]) -> str:
    """Of what stands inside of a block, where text alone may."""
    texts = []
    for part in parts:
        if part.text("type", "text") != "text":
            raise part.wrong("type", _SUPPORTED)
        texts.append(part.text("text"))
    return "\n".join(texts)


# -- replies --------------------------------------------------------------------------------------


class _Shape:
    """An answer as a message."""

    ping = event({"type": "ping"}, "ping")

    def __init__(self, answer: Answer) -> None:
        self._answer, self._blocks = answer, Blocks()
        self._id = new_id("msg_")
        self._call_ids: dict[int, str] = {}

    async def whole(self) -> Json:
        (answer,) = await self._answer.collect(self._blocks.add)
        content = [self._block(block) for block in self._blocks.all]
        return {**self._message(), "content": content, **_end(answer), "usage": _usage(answer)}

    def begin(self) -> bytes:
        n_prompt = len(self._answer.prompt_ids(0))
        usage = {"input_tokens": n_prompt, "output_tokens": 0, **_NO_CACHE}
        return _event("message_start", message={**self._message(), "usage": usage})

    def part(self, i: int, found: Event) -> bytes:
        if not isinstance(found, Delta):
            return b""
        return b"".join(map(self._told, self._blocks.add(found)))

    def end(self) -> bytes:
        answer = self._answer.completions[0]
        rest = map(self._told, self._blocks.finish())
        delta = _event("message_delta", delta=_end(answer), usage=_usage(answer))
        return b"".join([*rest, delta, _event("message_stop")])

    def failed(self, error: ApiError) -> bytes:
        return event(envelope(error), "error")

    def _message(self) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._answer.model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _block(self, block: Block, is_empty: bool = False) -> Json:
        text = "" if is_empty else block.text
        if block.kind == "reasoning":
            return {"type": "thinking", "thinking": text, "signature": ""}
        if block.kind == "text":
            return {"type": "text", "text": text}
        id = self._call_ids.setdefault(block.index, new_call_id("toolu_"))
        value = {} if is_empty else arguments_object(text)
        return {"type": "tool_use", "id": id, "name": block.name, "input": value}

    def _told(self, change: Change) -> bytes:
        index = change.block.index
        if change.kind == "begin":
            block = self._block(change.block, is_empty=True)
            return _event("content_block_start", index=index, content_block=block)
        if change.kind == "end":
            return _event("content_block_stop", index=index)
        kind, field = _DELTAS[change.block.kind]
        return _event("content_block_delta", index=index, delta={"type": kind, field: change.text})


_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
_NO_CACHE = {"cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _usage(answer: Completion) -> Json:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _end(answer: Completion) -> Json:
    """Why it ended, and the stop sequence if one did it."""
    if answer.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(answer.stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop}
    return {"stop_reason": "tool_use" if answer.tool_calls else "end_turn", "stop_sequence": None}
