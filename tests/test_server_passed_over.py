"""Every field that the APIs document is obeyed, refused by its name, or changes no answer."""

from __future__ import annotations

from typing import Any

import anthropic.types
import ollama._types
import openai.types
import pytest

from edgeinfer.server import fields
from edgeinfer.server.chat_request import read_chat
from edgeinfer.server.fields import Fields
from edgeinfer.server.ollama import read_chat as read_ollama
from edgeinfer.server.requests import NOT_HERE
from edgeinfer.server.responses import read_request as read_responses

from .server_for_tests import N_CTX, Running
from .test_server_odd import told

HI: Any = [{"role": "user", "content": "hi"}]
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = "/v1/messages"
CACHE = {"prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h"}
# Who pays and who watches, what only makes an answer come sooner, and what other machines do.
PASSED_OVER: dict[str, dict[str, Any]] = {
    CHAT: {
        "audio": {"format": "wav", "voice": "ash"}, "metadata": {"a": "b"}, "store": True,
        "moderation": {"model": "m"}, "prediction": {"type": "content", "content": "hello"},
        "safety_identifier": "s", "service_tier": "flex", "user": "u", "verbosity": "low",
        "web_search_options": {"search_context_size": "low"}, **CACHE,
    },
    TEXT: {"user": "u"},
    RESPONSES: {
        "access_programs": {"cyber": "standard"}, "background_options": {"continuation_id": "c"},
        "context_management": [{"type": "compaction", "compact_threshold": 1000}],
        "image": {"context_compression": "auto"}, "max_tool_calls": 3, "store": True,
        "moderation": {"model": "m"}, "safety_identifier": "s", "service_tier": "flex",
        "stream_options": {"include_obfuscation": True}, "user": "u", **CACHE,
    },
    MESSAGES: {
        "cache_control": {"type": "ephemeral"}, "container": "c", "diagnostics": {},
        "inference_geo": "eu", "metadata": {"user_id": "u"}, "service_tier": "auto",
        "speed": "fast", "user_profile_id": "u", "workspace_id": "w",
    },
    "/api/chat": {},
    "/api/generate": {"width": 5, "height": 5, "steps": 5},
    "/v1/embeddings": {"user": "u"},
}  # fmt: skip
OF_OLLAMAS_MACHINE = {
    "numa": True, "num_ctx": 99, "num_batch": 8, "num_gpu": 1, "main_gpu": 0, "low_vram": True,
    "f16_kv": True, "logits_all": True, "vocab_only": False, "use_mmap": True, "use_mlock": True,
    "embedding_only": False, "num_thread": 3, "num_keep": 4, "tfs_z": 1.0, "penalize_newline": True,
}  # fmt: skip
# NOTE: other tests use the server, too, maybe a minute later: none has its model leave when idle.
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "functions": [{"name": "f"}]},
    TEXT: {"prompt": "hi"},
    RESPONSES: {"input": HI},
    MESSAGES: {"messages": HI, "max_tokens": 9},
    "/api/chat": {"messages": HI, "model": "tiny", "logprobs": True, "keep_alive": -1},
    "/api/generate": {"prompt": "hi", "model": "tiny", "logprobs": True, "keep_alive": -1},
    "/v1/embeddings": {"input": "hi"},
}
PARAMS: dict[str, list[Any]] = {
    CHAT: [openai.types.chat.completion_create_params.CompletionCreateParamsStreaming],
    TEXT: [openai.types.completion_create_params.CompletionCreateParamsStreaming],
    RESPONSES: [openai.types.responses.response_create_params.ResponseCreateParamsStreaming],
    MESSAGES: [
        anthropic.types.message_create_params.MessageCreateParamsStreaming,
        anthropic.types.message_count_tokens_params.MessageCountTokensParams,
    ],
    "/api/chat": [ollama._types.ChatRequest],
    "/api/generate": [ollama._types.GenerateRequest],
    "/v1/embeddings": [openai.types.embedding_create_params.EmbeddingCreateParams],
}


class Seen(dict[str, Any]):
    """A body that notes what was looked for in it."""

    names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def documented(params: Any) -> set[str]:
    """The names of a TypedDict's members, or of a model's."""
    if (found := getattr(params, "model_fields", None)) is not None:
        return set(found)
    bases = [documented(each) for each in getattr(params, "__orig_bases__", ()) if each is not dict]
    return {*getattr(params, "__annotations__", {})}.union(*bases)


@pytest.mark.parametrize("path", sorted(ASKED))
def test_a_documented_field_is_read_or_changes_nothing(
    server: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a new version of a client this tells what its API has got."""
    decode = fields.decode
    monkeypatch.setattr(fields, "decode", lambda body: Seen(decode(body)))
    monkeypatch.setattr(Seen, "names", set())
    body = {**ASKED[path], "stream": False}
    with server.replying("x") as prompts:
        plain = server.post(path, body)
        more = server.post(path, {**body, **PASSED_OVER[path]})
    if path != "/v1/embeddings":  # this model makes none
        assert plain.status_code == more.status_code == 200, more.text
        assert len(prompts) == 2 and prompts[0] == prompts[1]
    there = set[str]().union(*map(documented, PARAMS[path]))
    assert len(there) > 3 and there - Seen.names == set(PASSED_OVER[path]) - Seen.names
    assert set(PASSED_OVER[path]) <= there - Seen.names | {"metadata"}  # which is echoed


def test_each_of_ollamas_options_is_read_or_of_its_machine(server: Running) -> None:
    seen = Seen(seed=1)
    Seen.names = set()
    read_ollama(Fields({"messages": HI, "options": seen}))
    assert set(ollama._types.Options.model_fields) - Seen.names == set(OF_OLLAMAS_MACHINE)
    body = {**ASKED["/api/chat"], "stream": False}
    with server.replying("x") as prompts:
        for options in ({}, OF_OLLAMAS_MACHINE):
            assert server.post("/api/chat", {**body, "options": options}).status_code == 200
    assert prompts[0] == prompts[1]


# -- refused by name -------------------------------------------------------------------------------

NOTHING = (None, False, 0, "", [], {})


@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_what_would_change_an_answer_and_is_not_here_is_refused(server: Running, name: str) -> None:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    asked = [
        (CHAT, {"messages": HI, name: 5}, name), (TEXT, {"prompt": "hi", name: ["x"]}, name),
        (RESPONSES, {"input": "hi", name: "x"}, name),
        ("/api/chat", {"messages": HI, "options": {name: 5}}, f"options.{name}"),
        ("/v2/models/tiny/generate", {"text_input": "a", "parameters": {name: True}},
         f"parameters.{name}"),
        ("/v2/models/tiny/infer", {"inputs": [tensor], "parameters": {name: 2.5}}, name),
    ]  # fmt: skip
    for path, body, named in asked:
        reply = server.post(path, body)
        assert reply.status_code == 400 and f"{named} is not supported: " in reply.text
    for nothing in NOTHING:
        body = {"messages": HI, "max_tokens": 1, name: nothing}
        assert server.post(CHAT, body).status_code == 200


@pytest.mark.parametrize(
    ("path", "more", "named"),
    [
        (CHAT, {"best_of": 3}, "best_of is 3; it must be no more than n, 1"),
        (CHAT, {"n": 2, "best_of": 3}, "no more than n, 2"),
        (TEXT, {"best_of": 2}, "best_of is 2"), (TEXT, {"best_of": -1}, "best_of is -1"),
        (CHAT, {"chat_template": "x"}, "chat_template is not supported"),
        (CHAT, {"echo": True}, "echo is not supported"),
        (CHAT, {"skip_special_tokens": False}, "skip_special_tokens is False"),
        (CHAT, {"documents": [{"text": "x"}]}, "documents are given"),
        (CHAT, {"documents": "x"}, "documents is 'x'; it must be a list of objects"),
        (CHAT, {"thinking": "much"}, "thinking is 'much'"),
        (CHAT, {"thinking": {"budget_tokens": "x"}}, "thinking.budget_tokens is 'x'"),
        (CHAT, {"top_logprobs": "x"}, "top_logprobs is 'x'"),
        (RESPONSES, {"truncation": "middle"}, "truncation is 'middle'; it must be one of"),
        (RESPONSES, {"background": True}, "background is not supported"),
        ("/api/chat", {"truncate": 5}, "truncate is 5"),
        ("/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        *[(MESSAGES, {"tools": [{"type": kind, "name": "x"}]}, f"tools[0].type is '{kind}'")
          for kind in ("bash_20250124", "text_editor_20250728", "computer_20250124",
                       "memory_20250818")],
    ],
)  # fmt: skip
def test_what_is_asked_for_in_other_words_is_refused_by_its_name(
    server: Running, path: str, more: Any, named: str
) -> None:
    reply = server.post(path, {**ASKED[path], **more})
    assert reply.status_code == 400 and named in told(path, reply)


# -- obeyed ----------------------------------------------------------------------------------------


def test_an_answer_of_several_may_be_the_best_of_those(server: Running) -> None:
    for more in ({"best_of": 0}, {"best_of": 1}, {"n": 2, "best_of": 2}, {"n": 2, "best_of": 1}):
        body = {"prompt": "hi", "max_tokens": 1, **more}
        assert server.post(TEXT, body).status_code == 200


@pytest.mark.parametrize(
    ("more", "thinks", "budget"),
    [
        ({"thinking": {"type": "enabled"}}, True, None), ({"thinking": True}, True, None),
        ({"thinking": {"type": "disabled"}}, False, None), ({"thinking": False}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, True, 7),
        ({"thinking": {"type": "disabled"}, "enable_thinking": True}, True, None),
        ({"thinking": {}}, None, None),
    ],
)  # fmt: skip
def test_thinking_is_asked_for_in_the_words_of_all(
    server: Running, more: Any, thinks: bool | None, budget: int | None
) -> None:
    request = read_chat(Fields({"messages": HI, **more}))
    assert request.chat is not None
    assert request.chat.template_args.get("enable_thinking") is thinks
    assert request.sampling.get("reasoning_budget") == budget
    with server.replying("x") as prompts:
        assert server.post(CHAT, {"messages": HI, **more}).status_code == 200
    assert ("[think]" in prompts[0]) == bool(thinks)


def test_a_seed_by_mistrals_name() -> None:
    assert read_chat(Fields({"messages": HI, "random_seed": 5})).sampling["seed"] == 5


def test_logprobs_are_asked_for_by_how_many(server: Running) -> None:
    with server.replying("x"):
        found = server.post(CHAT, {"messages": HI, "top_logprobs": 1}).json()
        none = server.post(CHAT, {"messages": HI, "top_logprobs": 0}).json()
        response = server.post(RESPONSES, {"input": HI, "top_logprobs": 1}).json()
    assert len(found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1
    assert none["choices"][0]["logprobs"] is None
    (token,) = response["output"][-1]["content"][0]["logprobs"]
    assert len(token["top_logprobs"]) == response["top_logprobs"] == 1


LONG: Any = [
    {"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} " + "word " * 100}
    for i in range(N_CTX // 100)
] + [{"role": "user", "content": "the last one"}]


def test_turns_are_dropped_where_that_is_asked_for(server: Running) -> None:
    for path, body, limit in (
        (RESPONSES, {"input": LONG, "max_output_tokens": 1}, {"truncation": "auto"}),
        ("/api/chat", {"messages": LONG, "options": {"num_predict": 1}, "stream": False},
         {"truncate": True}),
    ):  # fmt: skip
        reply = server.post(path, body)
        assert reply.status_code == 400 and "prompt is too long" in reply.text
        reply = server.post(path, {**body, **limit})
        assert reply.status_code == 200, reply.text
        found = reply.json()
        assert path != RESPONSES or found["truncation"] == "auto"
    assert server.post(RESPONSES, {"input": "hi"}).json()["truncation"] == "disabled"
    assert "overflow" not in read_responses(Fields({"input": "hi"})).sampling


def test_a_chat_is_told_as_tokens(server: Running) -> None:
    """As vLLM has it: without this it was the tokens of no text."""
    found = server.post("/tokenize", {"messages": HI}).json()
    counted = server.post(f"{CHAT}/input_tokens", {"messages": HI}).json()["input_tokens"]
    assert found["count"] == len(found["tokens"]) == counted > 5
    pieces = server.post("/tokenize", {"messages": HI, "with_pieces": True}).json()["tokens"]
    assert [each["id"] for each in pieces] == found["tokens"]
    text = server.post("/tokenize", {"prompt": "hi", "add_special_tokens": True}).json()["tokens"]
    assert text == server.post("/tokenize", {"content": "hi", "add_special": True}).json()["tokens"]
    assert server.post("/tokenize", {"messages": [{}]}).status_code == 400


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_an_answer_that_goes_on_may_have_a_least_length(server: Running, path: str) -> None:
    """As `edgeinfer load` asks servers of any make."""
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    body = {**ASKED[path], "ignore_eos": True, "min_tokens": 5, limit: 5}
    usage = server.post(path, body).json()["usage"]
    assert usage.get("completion_tokens", usage.get("output_tokens")) == 5
