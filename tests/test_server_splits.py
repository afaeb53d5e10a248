"""Any reply is the same message in all APIs, streamed and whole, however its bytes arrive."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from .server_for_tests import Running

TOOLS = ("weather", "read_file", "naïve-tool", "a.b", "x1")
SCHEMA = {"type": "object", "properties": {}}
HI = [{"role": "user", "content": "hi"}]


class Said(NamedTuple):
    """A message, as every API can tell it."""

    thought: str
    text: str
    calls: list[tuple[str, Any]]
    end: str


ENDS = {
    "stop": "stop", "tool_calls": "stop", "completed": "stop", "end_turn": "stop",
    "tool_use": "stop", "length": "length", "max_output_tokens": "length", "max_tokens": "length",
}  # fmt: skip


def data_of(reply: str) -> list[Any]:
    lines = [line[6:] for line in reply.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def offered(shape: Callable[[str], Any]) -> list[Any]:
    return [shape(name) for name in TOOLS]


def nested_tool(name: str) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}


# -- each API, whole and streamed ------------------------------------------------------------------


def chat(server: Running, *, is_streamed: bool) -> Said:
    body = {"messages": HI, "tools": offered(nested_tool), "stream": is_streamed}
    reply = server.post("/v1/chat/completions", body)
    if not is_streamed:
        (choice,) = reply.json()["choices"]
        message = choice["message"]
        calls = [each["function"] for each in message.get("tool_calls") or []]
        told = message.get("reasoning") or "", message["content"] or ""
        return said(*told, [(c["name"], c["arguments"]) for c in calls], choice["finish_reason"])
    thought = text = end = ""
    parts: dict[int, list[str]] = {}
    for chunk in data_of(reply.text):
        (choice,) = chunk["choices"]
        delta, end = choice["delta"], choice["finish_reason"] or end
        thought += delta.get("reasoning_content") or ""
        text += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            so_far = parts.setdefault(call["index"], ["", ""])
            so_far[0] += call["function"].get("name") or ""
            so_far[1] += call["function"]["arguments"]
    assert list(parts) == list(range(len(parts)))
    return said(thought, text, [(name, given) for name, given in parts.values()], end)


def responses(server: Running, *, is_streamed: bool) -> Said:
    tools = offered(lambda name: {"type": "function", "name": name, "parameters": SCHEMA})
    body = {"input": "hi", "tools": tools, "stream": is_streamed}
    reply = server.post("/v1/responses", body)
    if not is_streamed:
        return of_response(reply.json())
    events = data_of(reply.text)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    grown: dict[int, str] = {}
    for each in events:
        if each["type"].endswith(".delta"):
            grown[each["output_index"]] = grown.get(each["output_index"], "") + each["delta"]
    whole = events[-1]["response"]
    for i, item in enumerate(whole["output"]):
        parts = item.get("content") or [{"text": item.get("arguments", "")}]
        assert grown.get(i, "") == "".join(part["text"] for part in parts)
    return of_response(whole)


def of_response(found: Any) -> Said:
    thought = text = ""
    calls = []
    for item in found["output"]:
        told = "".join(part["text"] for part in item.get("content") or [])
        if item["type"] == "reasoning":
            thought += told
        elif item["type"] == "message":
            text += told
        else:
            calls.append((item["name"], item["arguments"]))
    cut = found["incomplete_details"] or {}
    return said(thought, text, calls, cut.get("reason", found["status"]))


def messages(server: Running, *, is_streamed: bool) -> Said:
    tools = offered(lambda name: {"name": name, "input_schema": SCHEMA})
    body = {"model": "x", "max_tokens": 9999, "messages": HI, "tools": tools}
    reply = server.post("/v1/messages", {**body, "stream": is_streamed})
    if not is_streamed:
        found = reply.json()
        return of_blocks(found["content"], found["stop_reason"])
    blocks: list[Any] = []
    end = ""
    for each in data_of(reply.text):
        if each["type"] == "content_block_start":
            assert each["index"] == len(blocks)
            blocks.append({**each["content_block"], "json": ""})
        elif each["type"] == "content_block_delta":
            assert each["index"] == len(blocks) - 1
            delta, block = dict(each["delta"]), blocks[-1]
            del delta["type"]
            ((name, more),) = delta.items()
            name = "json" if name == "partial_json" else name
            block[name] += more
        elif each["type"] == "message_delta":
            end = each["delta"]["stop_reason"]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = whole_json(block["json"] or "{}")
    return of_blocks(blocks, end)


def of_blocks(blocks: list[Any], end: str) -> Said:
    thought = "".join(each.get("thinking", "") for each in blocks)
    text = "".join(each["text"] for each in blocks if each["type"] == "text")
    calls = [(each["name"], each["input"]) for each in blocks if each["type"] == "tool_use"]
    return Said(thought, text, calls, ENDS[end])


def ollama(server: Running, *, is_streamed: bool) -> Said:
    body = {"model": "tiny", "messages": HI, "tools": offered(nested_tool), "think": True}
    reply = server.post("/api/chat", {**body, "stream": is_streamed})
    lines = [json.loads(line) for line in reply.text.split("\n") if line]
    assert len(lines) == 1 or is_streamed
    thought = "".join(each["message"].get("thinking") or "" for each in lines)
    text = "".join(each["message"].get("content") or "" for each in lines)
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for each in lines
        for call in each["message"].get("tool_calls") or []
    ]
    return Said(thought, text, calls, ENDS[lines[-1]["done_reason"]])


def said(thought: str, text: str, calls: list[tuple[str, str]], end: str) -> Said:
    return Said(thought, text, [(name, whole_json(args)) for name, args in calls], ENDS[end])


def whole_json(text: str) -> Any:
    """None for one that was cut off."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def without_cut(found: Said) -> Said:
    """APIs differ in what is left of the arguments of a call that the end cut off."""
    return found._replace(calls=[*found.calls[:-1], (found.calls[-1][0], None)])


# -- the property ----------------------------------------------------------------------------------

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\r")
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=30),
    st.sampled_from(["<", "<tool", "</think>", "<tool_call>", "```json\n{}", "{", "é€😀"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.text(CHARACTERS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(CHARACTERS), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.builds(
    lambda name, arguments, indent: (
        "<tool_call>\n"
        + json.dumps(
            {"name": name, "arguments": arguments}, indent=indent, ensure_ascii=indent is None
        )
        + "\n</tool_call>"
    ),
    st.sampled_from([*TOOLS, "unknown"]),
    st.dictionaries(st.text(CHARACTERS, max_size=6), VALUES, max_size=3),
    st.sampled_from([None, 1]),
)
REPLIES = st.builds(
    lambda thought, parts, cut: (thought + "".join(parts))[:cut],
    st.one_of(st.just(""), st.builds(lambda text: f"<think>\n{text}\n</think>\n\n", TEXTS)),
    st.lists(st.one_of(TEXTS, CALLS), max_size=4),
    st.one_of(st.none(), st.integers(0, 200)),
)
APIS = (chat, responses, messages, ollama)


@pytest.mark.parametrize("reason", ["stop", "length"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@example(reply='<tool_call>\n{"name": "weather", "arguments": {"a": "<tool_call>')
@example(reply='<tool_call>\n{"name": "weather", "arguments": {"a": "\\ud83d')
@example(reply="<think>\n\n</think>\n\n")
@given(reply=REPLIES)
def test_a_reply_is_one_message_everywhere(server: Running, reply: str, reason: str) -> None:
    with server.replying(reply, reason=reason):
        found = {
            (api.__name__, is_streamed): api(server, is_streamed=is_streamed)
            for api in APIS
            for is_streamed in (False, True)
        }
    expected = found["chat", False]
    if reason == "length" and expected.calls and expected.calls[-1][1] is None:
        found = {by: without_cut(each) for by, each in found.items()}
    assert all(arguments is not None for _, arguments in expected.calls) or reason == "length"
    assert found == dict.fromkeys(found, expected)
    assert expected.end == reason
