"""POST /v1/completions: texts to continue, as they are."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeinfer.parameters import shown
from edgeinfer.results import Completion, Delta, Done, Event, TokenLogprob
from edgeinfer.server.answers import Answer
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import Fields, read_fields
from edgeinfer.server.frames import Frames
from edgeinfer.server.openai import FINGERPRINT, count_of, envelope, sampling_of, timings_json
from edgeinfer.server.requests import Request, new_id
from edgeinfer.server.service import Service
from edgeinfer.server.structure import of_chat
from edgeinfer.server.wire import DONE, EVENTS, PING, event, reply

_USUAL_TOKENS = 16  # of this API, where nobody says otherwise


def routes(service: Service) -> list[Route]:
    return [Route("/completions", Completions(service).create, methods=["POST"])]


class Completions:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        request = read_request(body)
        is_streamed, has_echo = body.flag("stream"), body.flag("echo")
        if has_echo and "logprobs" in body:
            raise ApiError(
                400,
                "echo with logprobs is not supported: those of a prompt's tokens are not told; "
                "leave out one of the two",
                param="echo",
                code="unsupported",
            )
        has_usage = body.object("stream_options").flag("include_usage")
        answer = await self._service.answer(request)
        shape = _Shape(answer, request, has_echo, "logprobs" in body, has_usage)
        if is_streamed:
            return Frames(shape, EVENTS, answer)
        return reply(shape.whole(await answer.collect()))


def read_request(body: Fields) -> Request:
    limits = ("max_tokens", "n_predict")
    sampling = sampling_of(body, *limits)
    if not any(name in body for name in limits):
        sampling["max_tokens"] = _USUAL_TOKENS
    if "logprobs" in body:
        sampling["logprobs"] = body.integer("logprobs", 0, 0, 128)
    return Request(
        model=body.text("model"),
        prompts=_prompts(body.get("prompt")),
        sampling=sampling,
        structure=of_chat(body),
        n=count_of(body),
        suffix=body.text("suffix"),
        ignores_eos=body.flag("ignore_eos"),
    )


def _prompts(given: Any) -> list[str | list[int]]:
    """A text, a list of token ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(type(each) is int for each in given):
            return [given]
        if all(isinstance(each, str) or _is_ids(each) for each in given):
            return given
    raise ApiError(
        400,
        f"prompt is {shown(given)}; it must be text, token ids or a list of them",
        param="prompt",
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


class _Shape:
    """Answers as this API has them."""

    ping = PING

    def __init__(
        self,
        answer: Answer,
        request: Request,
        has_echo: bool,
        has_logprobs: bool,
        has_usage: bool,  # in a stream
    ) -> None:
        self._answer, self._has_logprobs, self._has_usage = answer, has_logprobs, has_usage
        self._n, self._n_each = len(answer.streams), request.n
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": answer.model.name,
            "system_fingerprint": FINGERPRINT,
        }
        detokenize = answer.model.opened.detokenize
        self._before = [
            (each if isinstance(each, str) else detokenize(each)) if has_echo else ""
            for each in request.prompts
            for _ in range(request.n)
        ]
        self._at = [len(text) for text in self._before]  # where the next token's text begins

    def whole(self, answers: list[Completion]) -> Json:
        choices = [
            self._choice(i, self._before[i] + each.text, each.logprobs, _finish_reason(each))
            for i, each in enumerate(answers)
        ]
        usage, timings = self._usage(), timings_json(answers[0])
        return {**self._head, "choices": choices, "usage": usage, "timings": timings}

    def begin(self) -> bytes:
        texts = enumerate(self._before)
        return b"".join(self._frame([self._choice(i, text)]) for i, text in texts if text)

    def part(self, i: int, found: Event) -> bytes:
        if isinstance(found, Delta) and (found.text or found.logprobs):
            return self._frame([self._choice(i, found.text, found.logprobs)])
        if isinstance(found, Done):
            return self._frame([self._choice(i, "", None, _finish_reason(found.completion))])
        return b""

    def end(self) -> bytes:
        if not self._has_usage:
            return DONE
        return event({**self._head, "choices": [], "usage": self._usage()}) + DONE

    def failed(self, error: ApiError) -> bytes:
        return event(envelope(error))

    def _usage(self) -> Json:
        """Each prompt is counted once, however many answers it has."""
        answers = [self._answer.completions[i].usage for i in range(self._n)]
        firsts = answers[:: self._n_each]
        n_prompt = sum(usage.prompt_tokens for usage in firsts)
        n_new = sum(usage.completion_tokens for usage in answers)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in firsts)},
        }

    def _frame(self, choices: list[Json]) -> bytes:
        return event({**self._head, "choices": choices})

    def _choice(
        self,
        i: int,
        text: str,
        logprobs: tuple[TokenLogprob, ...] | None = None,
        finish_reason: str | None = None,
    ) -> Json:
        shown = self._logprobs(i, logprobs) if self._has_logprobs and logprobs else None
        return {"index": i, "text": text, "logprobs": shown, "finish_reason": finish_reason}

    def _logprobs(self, i: int, found: tuple[TokenLogprob, ...]) -> Json:
        piece = self._answer.model.opened.runtime.tokenizer.piece
        offsets = []
        for each in found:
            offsets.append(self._at[i])
            self._at[i] += len(each.text)
        return {
            "tokens": [each.text for each in found],
            "token_logprobs": [each.logprob for each in found],
            "text_offset": offsets,
            "top_logprobs": [
                {piece(id).decode(errors="replace"): logprob for id, logprob in each.top}
                for each in found
            ],
        }


def _finish_reason(answer: Completion) -> str:
    return "length" if answer.finish_reason == "length" else "stop"
