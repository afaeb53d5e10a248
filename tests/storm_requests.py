"""Requests of every endpoint that can be asked twice, and what of their replies has to be equal.

Knows nothing of servers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

WORDS = ("one", "two", "three", "four", "five", "six", "é", "😀")
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["yes", "no"]}, "parts": {"type": "array", "maxItems": 2}},
    "required": ["kind"],
    "additionalProperties": False,
}


class Asked(NamedTuple):
    """A request and whether its reply can come in parts."""

    path: str
    body: dict[str, Any]
    can_stream: bool = True


def asked(i: int) -> Asked:
    """The request of a number: the API, the text and how it is sampled."""
    rng = random.Random(i)
    text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 30)))
    n, seed, heat = rng.randrange(1, 20), rng.randrange(100), rng.choice([0, 1.0])
    settings = {"seed": seed, "temperature": heat}
    spec = {"model": "tiny", **settings}
    chat = {**spec, "messages": [{"role": "user", "content": text}]}
    options = {"options": {"num_predict": n, **settings}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [text]}
    return (
        Asked("/v1/chat/completions", {**chat, "max_tokens": n}),
        Asked("/v1/chat/completions", {**chat, "max_tokens": 40, "response_format": schema}),
        Asked("/v1/messages", {**chat, "max_tokens": n}),
        Asked("/v1/responses", {**spec, "input": text, "max_output_tokens": n}),
        Asked("/v1/completions", {**spec, "prompt": text, "max_tokens": n}),
        Asked("/api/chat", {"model": "tiny", "messages": chat["messages"], **options}),
        Asked("/api/generate", {"model": "tiny", "prompt": text, **options}),
        Asked("/v1/embeddings", {"model": "tiny", "input": [text, "x"]}, False),
        Asked("/api/embed", {"model": "tiny", "input": text}, False),
        Asked("/v2/models/tiny/infer", {"inputs": [tensor], "parameters": settings}, False),
        Asked("/tokenize", {"content": text}, False),
    )[i % 11]


def content(path: str, reply: Any) -> Any:
    """What of a whole reply has to be equal, however often it is asked for."""
    if path == "/v1/messages":
        return "".join(part["text"] for part in reply["content"])
    if path == "/v1/responses":
        return "".join(p["text"] for item in reply["output"] for p in item["content"])
    if path == "/v1/chat/completions":
        return reply["choices"][0]["message"]["content"]
    if path == "/v1/completions":
        return reply["choices"][0]["text"]
    if path == "/api/chat":
        return reply["message"]["content"]
    for name in ("response", "data", "embeddings", "outputs", "tokens"):
        if name in reply:
            return reply[name]
    raise AssertionError(f"{path} says {reply}")


def streamed_content(path: str, data: bytes) -> str:
    """The text of a reply that came in parts."""
    return "".join(_piece(path, json.loads(line)) for line in _payloads(data))


def _payloads(data: bytes) -> Iterable[bytes]:
    for line in data.split(b"\n"):
        line = line.removeprefix(b"data: ").strip()
        if line.startswith(b"{"):
            yield line


def _piece(path: str, frame: Any) -> str:
    assert "error" not in frame or frame["error"] is None, frame
    if path == "/v1/messages":
        return str(frame.get("delta", {}).get("text", ""))
    if path == "/v1/responses":
        return str(frame["delta"]) if frame["type"].endswith("text.delta") else ""
    if path.startswith("/api/"):
        return str(frame["message"]["content"] if "message" in frame else frame["response"])
    if not frame["choices"]:
        return ""
    choice = frame["choices"][0]
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")
