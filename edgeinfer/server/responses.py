"""POST /v1/responses: what Codex and the newer clients of OpenAI's API speak. Nothing is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer.server.custom_tools import as_arguments
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import Fields, read_fields
from edgeinfer.server.frames import Frames
from edgeinfer.server.openai import (
    custom_tools,
    sampling_of,
    template_args,
    text_content,
    tools_of,
)
from edgeinfer.server.requests import Chat, Request, conversation, session_of
from edgeinfer.server.responses_shape import Shape
from edgeinfer.server.service import Service
from edgeinfer.server.structure import of_format
from edgeinfer.server.wire import EVENTS, reply
from edgeinfer.text.messages import plain

# Of functions, and of tools that take a text, which another model may have called before.
_CALLS = ("function_call", "custom_tool_call")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")
# What another's server did on its own, and tells of in the message that follows.
_HOSTED = (
    "web_search_call", "file_search_call", "image_generation_call", "code_interpreter_call",
    "mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response",
    "tool_search_call", "tool_search_output", "additional_tools", "compaction_trigger",
)  # fmt: skip
_LOGPROBS, _MOST_LOGPROBS = "message.output_text.logprobs", 128
_TRUNCATIONS = ("disabled", "auto")  # of what does not fit: none, or of the oldest turns
_KINDS = ("message", "reasoning", *_CALLS, *_OUTPUTS)
_NO_STORE = "nothing is stored here; send the whole input"
_NOT_HERE = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt"), _NO_STORE),
    "background": "wait for the answer, or read it as it comes",
}


def routes(service: Service) -> list[Route]:
    api = Responses(service)
    return [
        Route("/responses", api.create, methods=["POST"]),
        Route("/responses/input_tokens", api.count, methods=["POST"]),
        Route("/responses/{id}", api.stored, methods=["GET", "DELETE"]),
        Route("/responses/{id}/input_items", api.stored, methods=["GET"]),
        Route("/responses/{id}/cancel", api.stored, methods=["POST"]),
    ]


class Responses:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        request, is_streamed = read_request(body), body.flag("stream")
        custom = custom_tools(body.objects("tools"))
        echoed = _echo(body, request, custom)
        session = session_of(http.headers, body.get("prompt_cache_key"))
        request = replace(request, session=session)
        answer = await self._service.answer(request)
        shape = Shape(answer, echoed, custom)
        if is_streamed:
            return Frames(shape, EVENTS, answer)
        return reply(await shape.whole())

    async def count(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        n_tokens = await self._service.count_tokens(read_request(body))
        return reply({"object": "response.input_tokens", "input_tokens": n_tokens})

    async def stored(self, http: HttpRequest) -> Response:
        raise ApiError(404, "responses are not stored here", param="id")


def read_request(body: Fields) -> Request:
    body.refuse(_NOT_HERE)
    sampling = sampling_of(body, "max_output_tokens")
    if _truncation(body) == "auto":
        sampling["overflow"] = "drop-turns"
    included = body.get("include")
    is_included = isinstance(included, list) and _LOGPROBS in included
    if is_included or body.get("top_logprobs"):
        sampling["logprobs"] = body.integer("top_logprobs", 0, 0, _MOST_LOGPROBS)
    chat = Chat(
        messages=conversation(_messages(body)),
        tools=tools_of(body.objects("tools")),
        tool_choice=body.get("tool_choice"),
        parallel_tool_calls=body.flag("parallel_tool_calls", True),
        template_args=template_args(body),
    )
    structure = of_format(body.object("text").object("format"), "text.format")
    return Request(
        model=body.text("model"),
        chat=chat,
        sampling=sampling,
        structure=structure,
        ignores_eos=body.flag("ignore_eos"),
    )


def _truncation(body: Fields) -> str:
    found = body.text("truncation", _TRUNCATIONS[0])
    if found not in _TRUNCATIONS:
        raise body.wrong("truncation", f"one of {', '.join(map(repr, _TRUNCATIONS))}")
    return found


def _messages(body: Fields) -> list[Json]:
    found: list[Json] = []
    if body.text("instructions"):
        found.append({"role": "system", "content": body.text("instructions")})
    given = body.get("input")
    if given is None or given == [] or isinstance(given, str):  # nothing to say is a message, too
        return [*found, {"role": "user", "content": given or ""}]
    for item in body.objects("input"):
        kind = item.text("type", "message")
        if kind == "message":
            _add_message(found, item)
        elif kind == "reasoning":
            if thought := _thought(item):  # what only its maker can read says nothing here
                _assistant(found, reasoning_content=thought)
        elif kind in _CALLS:
            function = {"name": item.text("name"), "arguments": _arguments(item, kind)}
            call = {"id": item.text("call_id"), "type": "function", "function": function}
            _assistant(found, tool_calls=[call])
        elif kind in _OUTPUTS:
            output = text_content(item.get("output"), "input")
            found.append({"role": "tool", "tool_call_id": item.text("call_id"), "content": output})
        elif kind == "item_reference":
            raise ApiError(400, "item_reference is not supported: nothing is stored", param="input")
        elif kind not in _HOSTED:
            raise item.wrong("type", f"one of {', '.join(_KINDS)}")
    if not found:
        raise body.wrong("input", "a text, or items of which one is a message")
    return found


def _add_message(found: list[Json], item: Fields) -> None:
    role, content = item.text("role"), text_content(item.get("content"), "input")
    if not role:
        raise item.wrong("role", "who speaks, such as 'user'")
    last = found[-1] if found else {}
    if role == "assistant" and last.get("role") == role and not last["content"]:
        last["content"] = content  # its reasoning came before
    else:
        found.append({"role": role, "content": content})


def _arguments(item: Fields, kind: str) -> str | Json:
    return as_arguments(item.text("input")) if kind == _CALLS[1] else item.text("arguments", "{}")


def _thought(item: Fields) -> str:
    parts = [*item.objects("content"), *item.objects("summary")]
    return "\n".join(part.text("text") for part in parts)


def _assistant(found: list[Json], **more: Any) -> None:
    """Items that are one turn of the model: reasoning, then text, then calls."""
    last = found[-1] if found else {}
    if last.get("role") != "assistant" or "reasoning_content" in more:
        last = {"role": "assistant", "content": ""}
        found.append(last)
    if more.get("reasoning_content"):
        last["reasoning_content"] = more["reasoning_content"]
    if calls := more.get("tool_calls"):
        last.setdefault("tool_calls", []).extend(calls)


def _echo(body: Fields, request: Request, custom: Mapping[str, Json]) -> Json:
    """What a response repeats of its request."""
    tools = request.chat.tools if request.chat is not None else []
    reasoning = body.object("reasoning")
    choice = body.get("tool_choice")
    told: Json = {
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.object("metadata").values,
        "parallel_tool_calls": body.flag("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "store": False,
        "temperature": body.get("temperature"),
        "text": {"format": body.object("text").get("format") or {"type": "text"}},
        "tool_choice": choice if choice is not None else "auto",
        "tools": [_echo_of_tool(tool["function"], custom) for tool in tools],
        "top_logprobs": request.sampling.get("logprobs", 0),
        "top_p": body.get("top_p"),
        "truncation": _truncation(body),
        "background": False,
    }
    return {name: plain(value, name) for name, value in told.items()}  # so that all can be written


def _echo_of_tool(function: Json, custom: Mapping[str, Json]) -> Json:
    given = custom.get(function["name"])
    if given is None:
        return {"type": "function", "strict": False, **function}
    return {"type": "custom", **given}
