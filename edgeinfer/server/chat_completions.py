"""POST /v1/chat/completions: chats as most clients ask for them."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer.results import (
    CallDelta,
    Completion,
    Delta,
    Done,
    Event,
    PromptProgress,
    TokenLogprob,
)
from edgeinfer.server.answers import Answer
from edgeinfer.server.chat_request import is_of_functions, read_chat
from edgeinfer.server.custom_tools import input_of
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import read_fields
from edgeinfer.server.frames import Frames
from edgeinfer.server.openai import (
    FINGERPRINT,
    custom_tools,
    envelope,
    timings_json,
    usage_json,
)
from edgeinfer.server.requests import new_call_id, new_id, session_of
from edgeinfer.server.service import Service
from edgeinfer.server.wire import DONE, EVENTS, PING, TextFrame, event, reply


def routes(service: Service) -> list[Route]:
    api = ChatCompletions(service)
    return [
        Route("/chat/completions", api.create, methods=["POST"]),
        Route("/chat/completions/input_tokens", api.count, methods=["POST"]),
    ]


class ChatCompletions:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        request = read_chat(body)
        is_streamed, has_progress = body.flag("stream"), body.flag("return_progress")
        has_usage = body.object("stream_options").flag("include_usage")
        session = session_of(http.headers, body.get("prompt_cache_key"))
        request = replace(request, session=session)
        answer = await self._service.answer(request)
        shape = _Shape(
            answer,
            has_logprobs="logprobs" in request.sampling,
            has_usage=has_usage,
            has_progress=has_progress,
            is_of_functions=is_of_functions(body),
            custom=frozenset(custom_tools(body.objects("tools"))),
        )
        if is_streamed:
            return Frames(shape, EVENTS, answer)
        return reply(shape.whole(await shape.collect()))

    async def count(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        n_tokens = await self._service.count_tokens(read_chat(body))
        return reply({"object": "response.input_tokens", "input_tokens": n_tokens})


class _Shape:
    """An answer as this API has it."""

    ping = PING

    def __init__(
        self,
        answer: Answer,
        *,
        has_logprobs: bool,
        has_usage: bool,
        has_progress: bool,
        is_of_functions: bool,
        custom: frozenset[str],  # tools that take a text
    ) -> None:
        self._answer, self._has_logprobs = answer, has_logprobs
        self._is_of_functions, self._custom = is_of_functions, custom
        self._late: set[tuple[int, int]] = set()  # calls of these in a stream
        self._has_usage, self._has_progress = has_usage, has_progress  # in a stream
        self._n = len(answer.streams)
        self._head = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": answer.model.name,
            "system_fingerprint": FINGERPRINT,
        }
        self._call_ids: dict[tuple[int, int], str] = {}
        self._n_reasoning = 0
        self._texts = [TextFrame(partial(self._text, i)) for i in range(self._n)]

    # -- whole -----------------------------------------------------------------------------------

    async def collect(self) -> list[Completion]:
        return await self._answer.collect(self._count)

    def whole(self, answers: list[Completion]) -> Json:
        return {
            "object": "chat.completion",
            **self._head,
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": usage_json((answer.usage for answer in answers), self._n_reasoning),
            "timings": timings_json(answers[0]),
        }

    def _choice(self, i: int, answer: Completion) -> Json:
        calls = answer.tool_calls
        message: Json = {
            "role": "assistant",
            "content": answer.text if answer.text or not calls else None,
            "refusal": None,
            **_reasoning(answer.reasoning),
        }
        if calls:
            told = [
                {"id": self._call_id(i, n), **self._call(call.name, call.arguments)}
                for n, call in enumerate(calls)
            ]
            message |= self._calls(told)
        return {
            "index": i,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": self._finish_reason(answer),
        }

    def _call(self, name: str, arguments: str) -> Json:
        if name in self._custom:
            return {"type": "custom", "custom": {"name": name, "input": input_of(arguments)}}
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    # -- in parts --------------------------------------------------------------------------------

    def begin(self) -> bytes:
        start = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(i, start) for i in range(self._n))

    def part(self, i: int, found: Event) -> bytes:
        if isinstance(found, Delta):
            self._count(found)
            return self._delta(i, found)
        if isinstance(found, Done):
            answer = found.completion
            return self._inputs(i, answer) + self._chunk(
                i, {}, self._finish_reason(answer), more={"timings": timings_json(answer)}
            )
        return self._progress(found) if self._has_progress else b""

    def end(self) -> bytes:
        if not self._has_usage:
            return DONE
        usages = [self._answer.completions[i].usage for i in range(self._n)]
        return self._frame([], {"usage": usage_json(usages, self._n_reasoning)}) + DONE

    def failed(self, error: ApiError) -> bytes:
        return event(envelope(error))

    def _delta(self, i: int, delta: Delta) -> bytes:
        if delta.text and not (delta.reasoning or delta.call or self._has_logprobs):
            return self._texts[i].of(delta.text)  # as most are
        told: Json = _reasoning(delta.reasoning)
        if delta.text:
            told["content"] = delta.text
        if delta.call is not None and (call := self._call_delta(i, delta.call)):
            told |= self._calls([call])
        logprobs = self._logprobs(delta.logprobs)
        if not told and not (logprobs and logprobs["content"]):
            return b""
        return self._chunk(i, told, logprobs=logprobs)

    def _text(self, i: int, text: str) -> bytes:
        return self._chunk(i, {"content": text})

    def _call_delta(self, i: int, call: CallDelta) -> Json:
        """What names a call comes once: clients join what comes twice."""
        if not call.name:
            is_late = (i, call.index) in self._late
            more = {"index": call.index, "function": {"arguments": call.arguments}}
            return {} if is_late else more
        arguments = call.arguments
        if call.name in self._custom:
            self._late.add((i, call.index))
            arguments = ""  # of which the text is one that is whole
        id = self._call_id(i, call.index)
        return {"index": call.index, "id": id, **self._call(call.name, arguments)}

    def _inputs(self, i: int, answer: Completion) -> bytes:
        """The texts of calls of custom tools."""
        told = [
            {"index": n, "custom": {"input": input_of(call.arguments)}}
            for n, call in enumerate(answer.tool_calls)
            if (i, n) in self._late
        ]
        return self._chunk(i, self._calls(told)) if told else b""

    def _progress(self, found: PromptProgress) -> bytes:
        return self._frame([], {"prompt_progress": {"processed": found.done, "total": found.total}})

    def _chunk(
        self,
        i: int,
        delta: Json,
        finish_reason: str | None = None,
        *,
        logprobs: Json | None = None,
        more: Json | None = None,
    ) -> bytes:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._frame([choice], more or {})

    def _frame(self, choices: list[Json], more: Json) -> bytes:
        return event({"object": "chat.completion.chunk", **self._head, "choices": choices, **more})

    # -- both ------------------------------------------------------------------------------------

    def _calls(self, told: list[Json]) -> Json:
        """Those of tools; of functions there is one, which has no id."""
        if self._is_of_functions:
            return {"function_call": told[0]["function"]}
        return {"tool_calls": told}

    def _finish_reason(self, answer: Completion) -> str:
        if answer.finish_reason == "length":
            return "length"
        if not answer.tool_calls:
            return "stop"
        return "function_call" if self._is_of_functions else "tool_calls"

    def _call_id(self, i: int, n: int) -> str:
        return self._call_ids.setdefault((i, n), new_call_id("call_"))

    def _count(self, delta: Delta) -> None:
        self._n_reasoning += len(delta.token_ids) if delta.reasoning and not delta.text else 0

    def _logprobs(self, found: tuple[TokenLogprob, ...] | None) -> Json | None:
        if not self._has_logprobs or found is None:
            return None
        return {"content": self._answer.logprobs_json(found), "refusal": None}


def _reasoning(text: str) -> Json:
    """By both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text} if text else {}
