"""The server's own endpoints, by the names that llama-server gave them: health, metrics, tokens."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edgeinfer import __version__
from edgeinfer.llm import LLM
from edgeinfer.server.chat_request import read_chat
from edgeinfer.server.errors import RETRY_SECONDS, Json
from edgeinfer.server.fields import read_fields
from edgeinfer.server.service import Service
from edgeinfer.server.token_ids import MOST_MADE, limited
from edgeinfer.server.wire import reply

_MOST_ID = 2**31
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def routes(service: Service) -> list[Route]:
    api = Native(service)
    return [
        Route("/health", api.health, methods=["GET"]),
        Route("/metrics", api.metrics, methods=["GET"]),
        Route("/props", api.props, methods=["GET"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/apply-template", api.apply_template, methods=["POST"]),
    ]


class Native:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, http: HttpRequest) -> Response:
        if self._service.is_stopping or not self._service.models.is_ready:
            status = "stopping" if self._service.is_stopping else "loading"
            return reply({"status": status}, 503, {"retry-after": str(RETRY_SECONDS)})
        return reply({"status": "ok"})

    async def metrics(self, http: HttpRequest) -> Response:
        return PlainTextResponse(self._service.metrics(), media_type=_METRICS_TYPE)

    async def props(self, http: HttpRequest) -> Response:
        name = http.query_params.get("model", "")
        return reply(await self._service.with_model(name, _props))

    async def tokenize(self, http: HttpRequest) -> Response:
        """A text, as llama-server or vLLM have it in a field, or a chat as vLLM has it."""
        body = await read_fields(http, self._service.limits.most_body)
        text = body.text("content") or body.text("text") or body.text("prompt")
        bos = body.flag("add_special", body.flag("add_special_tokens"))
        special, has_pieces = body.flag("parse_special", True), body.flag("with_pieces")
        chat = read_chat(body) if "messages" in body else None
        made = None if chat is None else await self._service.prompt_ids(chat)

        def work(llm: LLM) -> Json:
            with limited():
                ids = made or llm.runtime.tokenizer.encode(
                    text, bos=bos, parse_special=special, most=MOST_MADE
                )
            if not has_pieces:
                return {"tokens": ids, "count": len(ids), "max_model_len": llm.n_ctx}
            return {"tokens": [{"id": id, "piece": _piece(llm, id)} for id in ids]}

        return reply(await self._service.with_model(body.text("model"), work))

    async def detokenize(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        ids = body.get("tokens") or []
        if not isinstance(ids, list) or not all(map(_is_id, ids)):
            raise body.wrong("tokens", "a list of token ids")

        def work(llm: LLM) -> Json:
            text = llm.detokenize(ids, special=True)
            return {"content": text, "prompt": text}

        return reply(await self._service.with_model(body.text("model"), work))

    async def apply_template(self, http: HttpRequest) -> Response:
        body = await read_fields(http, self._service.limits.most_body)
        return reply({"prompt": await self._service.render(read_chat(body))})


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_ID


def _piece(llm: LLM, id: int) -> str | list[int]:
    """Text, or the bytes of what is no text by itself."""
    data = llm.runtime.tokenizer.piece(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _props(llm: LLM) -> Json:
    opened = llm.runtime
    template = opened.found_template
    return {
        "default_generation_settings": {"n_ctx": llm.n_ctx, "params": llm.recommended},
        "total_slots": llm.plan.slots,
        "model_alias": llm.name,
        "model_path": "",  # where files lie is nobody's concern
        "chat_template": "" if template is None else template.source,
        "chat_template_caps": {
            "supports_tools": template is not None and template.capabilities.tools,
            "supports_system_role": template is not None and template.capabilities.system_role,
        },
        "bos_token": opened.tokenizer.bos_text,
        "eos_token": opened.tokenizer.eos_text,
        "modalities": {"vision": False, "audio": False},
        "build_info": f"edgeinfer {__version__}",
        "is_sleeping": False,
    }
