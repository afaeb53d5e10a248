"""Ollama's API through its own client."""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest

from .server_for_tests import N_CTX, Running

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
THOUGHT = "<think>\nLet me see.\n</think>\n\n"


@pytest.fixture(scope="module")
def client(server: Running) -> ollama.Client:
    return ollama.Client(host=server.url)


def test_a_chat_streamed_and_whole_is_the_same(client: ollama.Client) -> None:
    asked: Any = {"model": "tiny", "messages": HI, "options": {"num_predict": 6, "seed": 1}}
    whole = client.chat(**asked)
    parts = list(client.chat(**asked, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert parts[-1].done and parts[-1].done_reason == whole.done_reason == "length"
    assert whole.eval_count == parts[-1].eval_count == 6 and (whole.total_duration or 0) > 0


def test_no_character_ends_a_line(server: Running, client: ollama.Client) -> None:
    """The client reads lines as Python splits them."""
    text = "a\x85b\u2028c\u2029d\x1ce\x0bf\r\ng"
    with server.replying(text):
        parts = list(client.chat(model="tiny", messages=HI, stream=True))
    assert "".join(part.message.content or "" for part in parts) == text


@pytest.mark.parametrize("reply", ["text", THOUGHT + "text", CALL, f"{THOUGHT}Look.\n{CALL}{CALL}"])
def test_thoughts_and_calls(server: Running, client: ollama.Client, reply: str) -> None:
    asked: Any = {"model": "tiny", "messages": HI, "tools": TOOLS, "think": True}
    with server.replying(reply):
        whole = client.chat(**asked).message
        parts = [part.message for part in client.chat(**asked, stream=True)]
    assert "".join(part.content or "" for part in parts) == (whole.content or "")
    assert "".join(part.thinking or "" for part in parts) == (whole.thinking or "")
    calls = [call for part in parts for call in part.tool_calls or []]
    assert calls == list(whole.tool_calls or [])
    assert all(call.function.arguments == {"city": "Köln"} for call in calls)
    assert len(calls) == reply.count("<tool_call>")


@pytest.mark.parametrize("reply", ["text", THOUGHT + "text", f"{THOUGHT}Look.\n{CALL}{CALL}"])
def test_logprobs_streamed_and_whole_are_the_same(server: Running, reply: str) -> None:
    """Also those of tokens that have no text."""
    asked: Any = {"model": "tiny", "messages": HI, "tools": TOOLS, "logprobs": True}
    with server.replying(reply):
        whole = server.post("/api/chat", {**asked, "stream": False}).json()["logprobs"]
        lines = server.post("/api/chat", asked).text.splitlines()
    streamed = [each for line in lines for each in json.loads(line).get("logprobs", [])]
    assert streamed == whole and len(whole) > 3


def test_calls_go_back_into_the_prompt(server: Running, client: ollama.Client) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "K"}}}
    messages: Any = [
        *HI,
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_name": "weather"},
    ]
    with server.replying("x") as prompts:
        client.chat(model="tiny", messages=messages, think=False)
    assert '[assistant](hm)weather{"city": "K"}' in prompts[0]
    assert prompts[0].endswith("[tool]sunny[assistant]")


def test_texts(server: Running, client: ollama.Client) -> None:
    asked: Any = {"model": "tiny", "prompt": "hi", "options": {"num_predict": 4, "seed": 1}}
    whole = client.generate(**asked)
    parts = list(client.generate(**asked, stream=True))
    assert "".join(part.response for part in parts) == whole.response and parts[-1].done
    with server.replying("x") as prompts:
        client.generate(model="tiny", prompt="raw", raw=True)
        client.generate(model="tiny", prompt="hi", system="rules", logprobs=True, top_logprobs=1)
    assert prompts == ["<|bos|>raw", "<|bos|>[system]rules[user]hi[assistant]"]


def test_models(client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == "tiny:latest" and model.details is not None
    assert model.details.format == "gguf" and (model.size or 0) > 1000
    shown = client.show("tiny")
    assert "tools" in (shown.capabilities or [])
    assert shown.modelinfo is not None and shown.modelinfo["llama.context_length"] == N_CTX
    (running,) = client.ps().models
    assert running.model == "tiny:latest" and running.context_length == N_CTX


def test_loading_and_unloading(server: Running, client: ollama.Client) -> None:
    assert client.generate(model="tiny", prompt="").done_reason == "load"
    server.wait_until_idle()  # what uses it yet would keep it
    assert client.generate(model="tiny", prompt="", keep_alive=0).done_reason == "unload"
    assert list(client.ps().models) == []
    assert client.chat(model="tiny", messages=HI, options={"num_predict": 1}).done
    assert len(client.ps().models) == 1


def test_errors_are_what_the_client_knows(server: Running, client: ollama.Client) -> None:
    long: Any = [{"role": "user", "content": "x" * N_CTX}]
    for is_streamed in (False, True):
        with pytest.raises(ollama.ResponseError, match="prompt is too long"):
            list(client.chat(model="tiny", messages=long, stream=is_streamed))
    with pytest.raises(ollama.ResponseError, match="images"):
        client.generate(model="tiny", prompt="x", images=[b"x"])
    with server.replying("abc", error=RuntimeError("it broke")):
        with pytest.raises(ollama.ResponseError, match="RuntimeError"):
            list(client.chat(model="tiny", messages=HI, stream=True))
    for path, status in (("/api/nothing", 404), ("/api/chat", 405)):
        reply = server.http.get(path)
        assert reply.status_code == status and list(reply.json()) == ["error"]
    assert server.http.get("/").text == "Ollama is running"
    assert server.http.head("/").status_code == 200
    assert json.loads(server.http.get("/api/version").text)["version"]
