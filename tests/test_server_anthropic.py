"""Anthropic's API through its own client; every event validated."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from .server_for_tests import N_CTX, Running

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {
        "name": "weather",
        "description": "Says what the weather is.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"type": "web_search_20250305", "name": "web_search"},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
NO_ARGUMENTS = '<tool_call>{"name": "weather"}</tool_call>'
THOUGHT = "<think>\nLet me see.\n</think>\n\n"
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def client(server: Running) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="x", max_retries=0)


def events(server: Running, body: Any) -> list[Any]:
    reply = server.post("/v1/messages?beta=true", {**body, "stream": True})
    found = []
    for frame in reply.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        each = json.loads(data.removeprefix("data: "))
        assert name == f"event: {each['type']}"
        found.append(each)
    return found


REPLIES = ["text", THOUGHT + "text", CALL, NO_ARGUMENTS, f"{THOUGHT}I look.\n{CALL}{CALL}", ""]


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_every_event_is_valid(server: Running, reply: str, reason: str) -> None:
    body = {"model": "x", "max_tokens": 100, "messages": HI, "tools": TOOLS}
    with server.replying(reply, reason=reason):
        whole = server.post("/v1/messages", body).json()
        found = [each for each in events(server, body) if each["type"] != "ping"]
    TypeAdapter(Message).validate_json(json.dumps(whole), strict=True)
    for each in found:
        EVENTS.validate_json(json.dumps(each), strict=True)
    kinds = [each["type"] for each in found]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    blocks: list[Any] = []
    for each in found[1:-2]:
        if each["type"] == "content_block_start":
            assert each["index"] == len(blocks)
            blocks.append({**each["content_block"], "joined": ""})
        elif each["type"] == "content_block_delta":
            delta = each["delta"]
            blocks[each["index"]]["joined"] += delta[
                {"text_delta": "text", "thinking_delta": "thinking"}.get(
                    delta["type"], "partial_json"
                )
            ]
    for block in blocks:
        joined = block.pop("joined")
        if block["type"] == "tool_use":
            block["input"] = json.loads(joined)
        else:
            block[block["type"]] = joined
    assert [_bare(block) for block in blocks] == [_bare(block) for block in whole["content"]]
    end = found[-2]
    assert end["delta"]["stop_reason"] == whole["stop_reason"]
    assert whole["stop_sequence"] is None
    assert whole["usage"]["output_tokens"] == end["usage"]["output_tokens"]
    usual = "tool_use" if "tool_call" in reply else "end_turn"
    assert whole["stop_reason"] == ("max_tokens" if reason == "length" else usual)


def _bare(block: Any) -> Any:
    return {key: value for key, value in block.items() if key != "id"}


def test_a_call_that_was_cut_off_is_still_an_object(server: Running) -> None:
    cut = CALL[: CALL.index("ln")]
    body = {"model": "x", "max_tokens": 100, "messages": HI, "tools": TOOLS}
    with server.replying(cut, reason="length"):
        whole = server.post("/v1/messages", body).json()
    assert whole["content"][0]["input"] == {"city": "Kö"} and whole["stop_reason"] == "max_tokens"


def test_the_client_streams_what_it_gets_whole(server: Running, client: Anthropic) -> None:
    asked: Any = {"model": "x", "max_tokens": 10, "messages": HI, "extra_body": {"seed": 4}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text" and text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 10)
    assert final.usage.cache_read_input_tokens is not None
    n_prompt = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert client.messages.count_tokens(model="x", messages=HI).input_tokens == n_prompt


def test_a_conversation_with_tools(server: Running, client: Anthropic) -> None:
    messages: Any = [
        *HI,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_123456789", "name": "weather",
             "input": {"city": "K"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_123456789", "content": [
                {"type": "text", "text": "sunny"}]},
            {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}},
        ]},
        {"role": "system", "content": "be brief"},
    ]  # fmt: skip
    system: Any = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc;"},
        {"type": "text", "text": "rules", "cache_control": {"type": "ephemeral"}},
    ]
    with server.replying("done") as prompts:
        reply = client.messages.create(
            model="claude-x", max_tokens=50, system=system, messages=messages,
            thinking={"type": "enabled", "budget_tokens": 1024}, stop_sequences=[],
        )  # fmt: skip
    assert reply.content[0].type == "text" and reply.content[0].text == "done"
    told = '[user]hi[assistant](hm)I look.weather{"city": "K"}123456789[tool]sunny[user]and?'
    reminder = "[user]<system-reminder>\nbe brief\n</system-reminder>[assistant]"
    assert prompts == [f"<|bos|>[think][system]rules{told}{reminder}"]


def test_a_stop_sequence_is_named(server: Running, client: Anthropic) -> None:
    with server.replying("one END two"):
        reply = client.messages.create(
            model="x", max_tokens=50, messages=HI, stop_sequences=["END"]
        )
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "END")
    assert reply.content[0].type == "text" and reply.content[0].text == "one "


def test_models(client: Anthropic) -> None:
    (model,) = client.models.list(limit=1000)
    assert (model.id, model.type) == ("tiny", "model")
    assert client.models.retrieve("tiny").display_name


def test_errors_are_what_the_client_knows(server: Running, client: Anthropic) -> None:
    long: Any = [{"role": "user", "content": "x" * (N_CTX + 1)}]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: .* tokens > 4096"):
        client.messages.create(model="x", max_tokens=1, messages=long)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        with client.messages.stream(model="x", max_tokens=1, messages=long) as stream:
            stream.get_final_message()
    with pytest.raises(anthropic.NotFoundError):
        client.post("/v1/messages/nothing", cast_to=object)
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(model="x", max_tokens=1, messages=image)
    reply = server.http.post("/v1/messages", content=b"{")
    assert reply.status_code == 400 and reply.json()["type"] == "error"
    with server.replying("abc", error=RuntimeError("it broke")):
        with pytest.raises(anthropic.APIStatusError):
            with client.messages.stream(model="x", max_tokens=9, messages=HI) as stream:
                stream.get_final_message()
