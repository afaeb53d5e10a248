"""Tools that take a text: told as functions, called as what they are."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import TypeAdapter

from edgeinfer.server.custom_tools import input_of

from .server_for_tests import Running
from .test_server_openai import EVENTS, FLAT_TOOLS, HI, TOOLS, frames

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
PATCH = '*** Begin "é"\n+x = {}\n'
FORM = {"syntax": "lark", "definition": 'start: "*** Begin" /.+/'}
CUSTOM = {"name": "patch", "description": "Mends a file.", "format": {"type": "text"}}
GRAMMAR = {"type": "grammar", "grammar": FORM}
CALL, ALSO = (
    f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
    for name, arguments in (("patch", {"input": PATCH}), ("weather", {"city": "Oslo"}))
)


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_chat_calls_it_with_a_text(server: Running, reason: str) -> None:
    tools = [*TOOLS, {"type": "custom", "custom": {**CUSTOM, "format": GRAMMAR}}]
    body = {"messages": HI, "tools": tools}
    with server.replying(f"I see.{CALL}{ALSO}{CALL}", reason=reason) as prompts:
        whole = server.post(CHAT, body).json()
        *chunks, done = frames(server, CHAT, body)
    TypeAdapter(ChatCompletion).validate_json(json.dumps(whole), strict=True)
    first, between, last = calls = whole["choices"][0]["message"]["tool_calls"]
    assert first["custom"] == last["custom"] == {"name": "patch", "input": PATCH}
    assert (first["type"], between["function"]["name"]) == ("custom", "weather")
    joined: list[dict[str, Any]] = []
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(joined)
                joined.append({"type": call["type"], call["type"]: {}})
            told = joined[call["index"]]
            inner = told[told["type"]]
            for name, text in call[told["type"]].items():
                inner[name] = inner.get(name, "") + text
    assert joined == [{k: v for k, v in call.items() if k != "id"} for call in calls]
    assert done == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"]
    assert "Mends a file." in prompts[0] and json.dumps(FORM["definition"])[1:-1] in prompts[0]


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_response_calls_it_with_a_text(server: Running, reason: str) -> None:
    form = {"type": "grammar", **FORM}
    tools = [{"type": "namespace", "name": "n", "tools": [{"type": "custom", **CUSTOM}]},
             *FLAT_TOOLS, {"type": "custom", "name": "other", "format": form}]  # fmt: skip
    body: Any = {"input": "hi", "tools": tools, "model": "x"}
    with server.replying(f"{CALL}{ALSO}{CALL}", reason=reason):
        whole = server.post(RESPONSES, body).json()
        found = frames(server, RESPONSES, body)
    TypeAdapter(Response).validate_json(json.dumps(whole), strict=True)
    for each in found:
        EVENTS.validate_json(json.dumps(each), strict=True)
    assert [tool["type"] for tool in whole["tools"]] == ["custom", "function", "custom"]
    assert whole["tools"][-1]["format"] == form
    items = found[-1]["response"]["output"]
    assert [item["type"] for item in items] == [
        "custom_tool_call", "function_call", "custom_tool_call",
    ]  # fmt: skip
    assert [item.get("input") for item in items] == [PATCH, None, PATCH]
    assert [item.get("input") for item in whole["output"]] == [PATCH, None, PATCH]
    for kind in ("delta", "input"):
        told = [
            each[kind] for each in found if f"custom_tool_call_input.{kind[:2]}" in each["type"]
        ]
        assert told == ([PATCH] * 2 if kind == "delta" else [])
    ends = [each for each in found if each["type"].endswith("custom_tool_call_input.done")]
    assert [each["input"] for each in ends] == [PATCH] * 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a\\nb"}', "a\nb"), ('{"input": "a', "a"), ('{"patch": "a"}', "a"),
        ('{"input": {"a": 1}}', '{"input": {"a": 1}}'), ('{"a": ""}', ""),
        ('{"input": "a", "why": "b"}', "a"), ("", ""), ("{}", "{}"),
    ],
)  # fmt: skip
def test_the_text_of_a_call(arguments: str, text: str) -> None:
    assert input_of(arguments) == text


def test_a_regex_is_kept_to_and_one_may_be_chosen(server: Running) -> None:
    pytest.importorskip("llguidance", reason="pip install 'edgeinfer[grammar]'")
    form = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-c]{2}|x"}}
    custom = {"type": "custom", "custom": {"name": "pick", "format": form}}
    named = {"type": "custom", "custom": {"name": "pick"}}
    allowed = {"mode": "required", "tools": [named]}
    with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        for choice in (named, {"type": "allowed_tools", "allowed_tools": allowed}):
            ask: Any = {"model": "x", "messages": HI, "tools": [*TOOLS, custom], "max_tokens": 200}
            chat = client.chat.completions.create(**ask, tool_choice=choice)
            (call,) = chat.choices[0].message.tool_calls or ()
            assert call.type == "custom" and call.custom.name == "pick"
            assert re.fullmatch("[a-c]{2}|x", call.custom.input)


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "custom"}, "tools[0].name"),
        ({"type": "custom", "custom": {}}, "tools[0].custom.name"),
        ({"type": "custom", "custom": 5}, "tools[0].custom"),
        ({"type": "custom", "custom": {"name": "a", "format": "x"}}, "tools[0].custom.format"),
    ],
)
def test_what_is_no_tool_is_named(server: Running, tool: Any, param: str) -> None:
    reply = server.post(CHAT, {"messages": HI, "tools": [tool]})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
