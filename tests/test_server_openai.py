"""OpenAI's APIs through its own client: chats, texts, responses, models; every frame validated."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from .server_for_tests import N_CTX, Running

HI: Any = [{"role": "user", "content": "hi"}]
WEATHER = {
    "name": "weather",
    "description": "Says what the weather is.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS: Any = [{"type": "function", "function": WEATHER}]
FLAT_TOOLS: Any = [{"type": "function", **WEATHER}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln \\"x\\""}}\n</tool_call>'
THOUGHT = "<think>\nLet me see.\n</think>\n\n"
CITY = {"city": 'Köln "x"'}


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


def frames(server: Running, path: str, body: Any) -> list[Any]:
    """The objects of a stream, after its form was checked."""
    reply = server.post(path, {**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for frame in reply.text.removesuffix("\n\n").split("\n\n"):
        if frame == ": ping":
            continue
        *names, data = frame.split("\n")
        assert data.startswith("data: ") and len(names) <= 1
        found.append(data[6:])
        if names:
            assert names == [f"event: {json.loads(data[6:])['type']}"]
    return [json.loads(each) if each != "[DONE]" else each for each in found]


# -- chat completions -----------------------------------------------------------------------------


def test_a_chat_streamed_and_whole_is_the_same(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HI, "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert whole.usage.completion_tokens == 12


REPLIES = [
    "plain text",
    THOUGHT + "then text",
    CALL,
    f"{THOUGHT}I look.\n{CALL}\n{CALL}",
    "",
    "é€😀",
]


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_every_frame_of_a_chat_is_valid(server: Running, reply: str, reason: str) -> None:
    body = {"messages": HI, "tools": TOOLS, "logprobs": True, "top_logprobs": 1}
    with server.replying(reply, reason=reason):
        whole = server.post("/v1/chat/completions", body).json()
        chunks = frames(server, "/chat/completions", body)
    TypeAdapter(ChatCompletion).validate_json(json.dumps(whole), strict=True)
    assert chunks.pop() == "[DONE]"
    for chunk in chunks:
        TypeAdapter(ChatCompletionChunk).validate_json(json.dumps(chunk), strict=True)
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or ""
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for call in delta.get("tool_calls", []):
            known = message["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
            assert ("id" in call) == ("name" in call["function"]) == (known["name"] == "")
            known["name"] += call["function"].get("name", "")
            known["arguments"] += call["function"]["arguments"]
    (choice,) = whole["choices"]
    assert message["content"] == (choice["message"]["content"] or "")
    assert message["reasoning"] == choice["message"].get("reasoning", "")
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    assert list(message["calls"].values()) == calls
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    usual = "tool_calls" if calls else "stop"
    assert choice["finish_reason"] == ("length" if reason == "length" else usual)
    assert all(json.loads(call["arguments"]) == CITY for call in calls)


def test_the_streaming_helper_puts_calls_together(server: Running, client: OpenAI) -> None:
    with (
        server.replying(f"I look.\n{CALL}"),
        client.chat.completions.stream(model="x", messages=HI, tools=TOOLS) as stream,
    ):
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.content == "I look." and message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == CITY


def test_calls_and_reasoning_go_back_into_the_prompt(server: Running, client: OpenAI) -> None:
    call = {"id": "call_abcdefghi", "type": "function"}
    function = {"name": "weather", "arguments": json.dumps(CITY)}
    messages: Any = [
        {"role": "developer", "content": "one"},
        {"role": "system", "content": [{"type": "text", "text": "two"}]},
        *HI,
        {"role": "assistant", "content": None, "reasoning_content": "hm",
         "tool_calls": [{**call, "function": function}]},
        {"role": "tool", "tool_call_id": "call_abcdefghi", "content": "sunny"},
    ]  # fmt: skip
    with server.replying("x") as prompts:
        client.chat.completions.create(model="x", messages=messages)
    told = '[user]hi[assistant](hm)weather{"city": "Köln \\"x\\""}abcdefghi[tool]sunny'
    assert prompts == [f"<|bos|>[system]one\n\ntwo{told}[assistant]"]


def test_without_a_tool_choice_of_none_all_tools_are_told(server: Running) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    body = {"messages": HI, "tools": [*TOOLS, other]}
    named = {"type": "function", "function": {"name": "other"}}
    with server.replying(CALL) as prompts:
        none = server.post("/v1/chat/completions", {**body, "tool_choice": "none"}).json()
        server.post("/v1/chat/completions", {**body, "tool_choice": named})
        server.post("/v1/chat/completions", {**body, "tool_choice": "required"})
    assert none["choices"][0]["message"]["content"] == CALL
    assert [("weather" in p.split("[user]")[0], '"other"' in p) for p in prompts] == [
        (False, False), (True, True), (True, True),
    ]  # fmt: skip


def test_a_client_of_functions_is_told_of_one(server: Running, client: OpenAI) -> None:
    """As calls were before there were tools: one, without an id, and its result by its name."""
    asked: Any = {"model": "x", "messages": HI, "functions": [WEATHER]}
    with server.replying(CALL + CALL):
        (choice,) = client.chat.completions.create(**asked).choices
        chunks = list(client.chat.completions.create(**asked, stream=True))
    called = choice.message.function_call
    assert called is not None and json.loads(called.arguments) == CITY
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    deltas = [found for chunk in chunks if (found := chunk.choices[0].delta.function_call)]
    assert "".join(each.name or "" for each in deltas) == "weather"
    assert "".join(each.arguments or "" for each in deltas) == called.arguments
    assert chunks[-1].choices[0].finish_reason == "function_call"
    said: Any = [
        *HI, {"role": "assistant", "content": None, "function_call": called.model_dump()},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]  # fmt: skip
    with server.replying("x") as prompts:
        client.chat.completions.create(**{**asked, "messages": said})
    assert '[assistant]weather{"city"' in prompts[0] and "[tool]sunny" in prompts[0]


def test_several_answers(client: OpenAI) -> None:
    asked: Any = {"model": "x", "messages": HI, "n": 3, "max_tokens": 4, "seed": 1}
    whole = client.chat.completions.create(**asked)
    texts = [""] * 3
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert whole.usage is not None and whole.usage.completion_tokens == 12


def test_what_clients_send_that_means_nothing_here_is_ignored(server: Running) -> None:
    body = {
        "messages": HI, "max_completion_tokens": 2, "store": True, "metadata": {"a": "b"},
        "user": "u", "service_tier": "auto", "prediction": None, "prompt_cache_key": "k",
        "verbosity": "low", "web_search_options": {}, "modalities": ["text"], "stop": [""],
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "unknown": [1],
        "tools": [], "logit_bias": {"5": -100}, "top_k": 40.0, "frequency_penalty": 0,
        "chat_template_kwargs": {"x": 1}, "reasoning_effort": "low", "audio": None,
    }  # fmt: skip
    assert server.post("/v1/chat/completions", body).status_code == 200


# -- texts ----------------------------------------------------------------------------------------


def test_texts_streamed_and_whole(server: Running, client: OpenAI) -> None:
    asked: Any = {"model": "x", "prompt": ["a", "bc"], "max_tokens": 5, "seed": 1, "echo": True}
    whole = client.completions.create(**asked)
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0].startswith("a") and texts[1].startswith("bc")
    with pytest.raises(openai.BadRequestError, match="echo with logprobs"):
        client.completions.create(**asked, logprobs=2)
    logprobs = client.completions.create(**{**asked, "echo": False}, logprobs=2).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and len(logprobs.tokens) == 5
    for body in ({"prompt": [65, 66], "max_tokens": 1}, {"prompt": [[65], [66]], "max_tokens": 1}):
        reply = server.post("/v1/completions", body)
        TypeAdapter(Completion).validate_json(reply.content, strict=True)
    for frame in frames(server, "/completions", {"prompt": "x", "logprobs": 1})[:-1]:
        for choice in frame["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # the type knows no null
        TypeAdapter(Completion).validate_json(json.dumps(frame), strict=True)


def test_no_more_of_a_prompt_was_known_than_it_has(client: OpenAI) -> None:
    asked: Any = {
        "model": "x",
        "prompt": ["a word " * 30, "other " * 30],
        "n": 3,
        "max_tokens": 1,
        "seed": 1,
    }
    for _ in range(2):
        usage = client.completions.create(**asked).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.completion_tokens == 6
    assert 0 < (usage.prompt_tokens_details.cached_tokens or 0) <= usage.prompt_tokens


# -- responses ------------------------------------------------------------------------------------

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_every_event_of_a_response_is_valid(server: Running, reply: str, reason: str) -> None:
    body = {"input": "hi", "tools": FLAT_TOOLS, "model": "x"}
    with server.replying(reply, reason=reason):
        whole = server.post("/v1/responses", body).json()
        found = frames(server, "/v1/responses", body)
    TypeAdapter(Response).validate_json(json.dumps(whole), strict=True)
    for each in found:
        EVENTS.validate_json(json.dumps(each), strict=True)
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    assert [each["type"] for each in found[:2]] == ["response.created", "response.in_progress"]
    last = found[-1]["response"]
    assert found[-1]["type"] == f"response.{last['status']}"
    done = [each["item"] for each in found if each["type"] == "response.output_item.done"]
    assert done == last["output"]
    assert _bare(last["output"]) == _bare(whole["output"])
    deltas: dict[int, str] = {}
    for each in found:
        if each["type"].endswith(".delta"):
            at = each["output_index"]
            deltas[at] = deltas.get(at, "") + each["delta"]
    assert [deltas[i] for i in range(len(done))] == [_text(item) for item in done]


def _bare(items: list[Any]) -> list[Any]:
    """Without the names that each reply has its own of."""
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


def _text(item: Any) -> str:
    text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
    return str(text)


def test_a_response_through_the_client(server: Running, client: OpenAI) -> None:
    with (
        server.replying(f"{THOUGHT}I look.\n{CALL}"),
        client.responses.stream(model="x", input="hi", tools=FLAT_TOOLS) as stream,
    ):
        for _ in stream:
            pass
        response = stream.get_final_response()
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output_text == "I look." and response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 5


def test_what_agents_send(server: Running) -> None:
    """Two developer messages, kinds of tools that are none of ours, and items of earlier turns."""
    part = {"type": "input_text", "text": "rules"}
    body = {
        "model": "x",
        "input": [
            {"type": "message", "role": "developer", "content": [part]},
            {"type": "message", "role": "developer", "content": [{**part, "text": "more"}]},
            {"role": "user", "content": [{**part, "text": "hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": None,
             "encrypted_content": None},
            {"type": "reasoning", "summary": [],
             "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "ok", "annotations": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "call_123456789", "name": "weather",
             "arguments": "{}", "status": "completed"},
            {"type": "function_call_output", "call_id": "call_123456789",
             "output": [{**part, "text": "sunny"}]},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        ],
        "tools": [
            {"type": "namespace", "name": "n", "tools": FLAT_TOOLS}, {"type": "web_search"},
            {"type": "custom", "name": "apply_patch"},
        ],
        "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"summary": "auto"},
        "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k",
        "client_metadata": {"a": "b"},
    }  # fmt: skip
    with server.replying(CALL) as prompts:
        response = server.post("/v1/responses", body).json()
    assert response["output"][0]["name"] == "weather"
    assert prompts[0].startswith("<|bos|>[system]rules\n\nmore\n\nYou may call functions.")
    told = "[user]hi[assistant](hm)okweather{}123456789[tool]sunny[assistant]"
    assert prompts[0].endswith(told)


def test_what_needs_a_store_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.responses.create(model="x", input="a", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def test_tokens_are_counted(server: Running, client: OpenAI) -> None:
    count = client.responses.input_tokens.count(model="x", input="hi").input_tokens
    answer = client.chat.completions.create(model="x", messages=HI, max_tokens=1)
    assert answer.usage is not None and answer.usage.prompt_tokens == count
    chat = server.post("/v1/chat/completions/input_tokens", {"messages": HI}).json()
    assert chat["input_tokens"] == count


# -- models and errors ----------------------------------------------------------------------------


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("tiny", "edgeinfer")
    assert model.model_extra is not None and model.model_extra["context_length"] == N_CTX
    assert client.models.retrieve("tiny").id == "tiny"


LONG = "x" * (N_CTX + 10)


def test_errors_are_what_the_client_knows(server: Running, client: OpenAI) -> None:
    chat: Any = client.chat.completions.create
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(model="x", messages=[{"role": "user", "content": LONG}], stream=is_streamed)
        assert caught.value.code == "context_length_exceeded"
        for words in (
            "context_length_exceeded",
            "prompt is too long: ",
            "exceeds the context window",
        ):
            assert words in str(caught.value)
        with pytest.raises(openai.BadRequestError) as caught:
            chat(model="x", messages=HI, temperature="hot", stream=is_streamed)
        assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        chat(model="x", messages=HI, response_format={"type": "json_schema", "json_schema": {}})
    with pytest.raises(openai.BadRequestError, match="image_url"):
        chat(model="x", messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing", cast_to=object)
    with pytest.raises(openai.APIStatusError) as wrong:
        client.get("/chat/completions", cast_to=object)
    assert wrong.value.status_code == 405
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="x", input=LONG)


def test_a_fault_inside_a_stream_reaches_the_client(server: Running, client: OpenAI) -> None:
    with server.replying("abc", error=RuntimeError("it broke")):
        with pytest.raises(openai.APIError, match="RuntimeError"):
            list(client.chat.completions.create(model="x", messages=HI, stream=True))
        events = frames(server, "/v1/responses", {"input": "x"})
        assert server.post("/v1/chat/completions", {"messages": HI}).status_code == 500
    assert events[-1]["type"] == "response.failed"
    EVENTS.validate_json(json.dumps(events[-1]), strict=True)
