"""Requests with a field that is something else: an answer, or a refusal that names the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.server.responses import _HOSTED

from .server_for_tests import Running

HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": False}
SAMPLING: Any = {
    "temperature": 0.5, "top_k": 4, "top_p": 0.9, "seed": 1, "stop": ["x"], "stop_token_ids": [3],
    "dry_sequence_breakers": ["\n"], "dry_multiplier": 0.5, "repetition_penalty": 1.1,
}  # fmt: skip
CALLED: Any = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
BLOCKS: Any = [
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "t", "signature": ""},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]},
]
ITEMS: Any = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "x"},
]
TENSOR: Any = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}
REQUESTS: list[tuple[str, Any]] = [
    (
        "/v1/chat/completions",
        {
            "messages": [*HI, CALLED, {"role": "tool", "tool_call_id": "1", "content": "x"}],
            "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto", "n": 1,
            "logprobs": True, "top_logprobs": 2, "max_tokens": 2, "logit_bias": {"5": 1},
            "stream_options": {"include_usage": True}, "reasoning": {"effort": "low"},
            "chat_template_kwargs": {"a": 1}, "metadata": {"a": "b"}, **SAMPLING,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": HI, "functions": [FUNCTION], "max_completion_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        },
    ),
    ("/v1/completions", {"prompt": ["hi", [5]], "echo": True, "max_tokens": 2, **SAMPLING}),
    (
        "/v1/responses",
        {
            "input": ITEMS, "instructions": "i", "tools": [{"type": "function", **FUNCTION}],
            "max_output_tokens": 2, "text": {"format": {"type": "text"}}, "metadata": {"a": "b"},
            "reasoning": {"effort": "low"}, "temperature": 0.5,
        },
    ),
    (
        "/v1/messages",
        {
            "messages": BLOCKS, "system": [{"type": "text", "text": "s"}], "max_tokens": 2,
            "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
            "thinking": {"type": "enabled", "budget_tokens": 1024}, "stop_sequences": ["x"],
            "tool_choice": {"type": "auto"}, "output_config": {"effort": "low"}, "top_k": 4,
        },
    ),
    (
        "/api/chat",
        {
            "model": "tiny", "messages": [*HI, {**CALLED, "content": "", "tool_calls": []}],
            "tools": [{"function": FUNCTION}], "format": SCHEMA,
            "think": "low", "options": {"num_predict": 2, **SAMPLING}, "stream": False,
        },
    ),
    ("/api/generate", {"model": "tiny", "prompt": "a", "system": "s", "options": {"top_k": 1}}),
    ("/tokenize", {"content": "a", "add_special": True, "with_pieces": True}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/v1/embeddings", {"input": ["a", [5]], "dimensions": 4, "encoding_format": "float"}),
    ("/v2/models/tiny/infer", {"inputs": [TENSOR], "parameters": {"max_tokens": 2, "top_k": 1}}),
    ("/v2/models/tiny/generate", {"text_input": "a", "parameters": {"stop_words": ["x"]}}),
    ("/v2/models/tiny/generate_stream", {"text_input": "a", "id": "1", "max_tokens": 2}),
]  # fmt: skip
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
DEEP: Any = []
for _ in range(70):
    DEEP = [DEEP]
MISSING = object()
ODD: list[Any] = [
    None, True, False, 0, -1, 1, -0.0, 1.0, 2.5, 1e308, 10**30, -(10**30), 2**63, "", "x", "1",
    "é\x00\u2028\U0010ffff", "x" * 3000, [], {}, [[]], [None], [1], [1.5], ["x"], [True], {"a": 1},
    {"": None}, {"type": 5}, {"role": "user"}, DEEP, [{}], [10**30], MISSING,
    " ", {" ": 1},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    items = enumerate(value) if isinstance(value, list) else ()
    for key, each in value.items() if isinstance(value, dict) else items:
        yield from places(each, (*at, key))


def changed(body: Any, at: tuple[Any, ...], odd: Any) -> Any:
    found = inner = json.loads(json.dumps(body))  # what it has twice is changed once
    for key in at[:-1]:
        inner = inner[key]
    if odd is MISSING:
        del inner[at[-1]]
    else:
        inner[at[-1]] = odd
    return found


def told(path: str, reply: Any) -> str:
    """What a refusal says, in the envelope of its API."""
    found = reply.json()
    if path.startswith(("/api/", "/v2/")):
        return str(found["error"])
    assert path != "/v1/messages" or found["type"] == "error"
    return str(found["error"]["message"])


ALL = [(path, body, at) for path, body in REQUESTS for at in places(body)]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(ALL), st.sampled_from(ODD), st.sampled_from([None, True]))
def test_a_field_that_is_something_else(
    server: Running, case: tuple[str, Any, tuple[Any, ...]], odd: Any, streams: bool | None
) -> None:
    path, body, at = case
    changed_body = changed(body, at, odd)
    if streams and path.startswith("/v1/") and at != ("stream",):
        changed_body["stream"] = True
    with server.replying("<think>a</think>hi"):
        reply = server.http.post(path, content=json.dumps(changed_body))
    if reply.status_code == 200:
        assert '"error":{' not in reply.text
        return
    assert reply.status_code in (400, 404), reply.text
    assert not server.service.answers  # of what is refused none has begun, or goes on
    said = told(path, reply)
    is_about_all = any(words in said for words in ("context_length", "--pooling", "one of them"))
    names = [each for each in at if isinstance(each, str)]
    assert is_about_all or any(name in said for name in names), said


def test_what_another_server_did_is_passed_over(server: Running) -> None:
    """The message behind it tells of it."""
    items = [{"type": kind, "id": "x", "status": "completed"} for kind in _HOSTED]
    said = [*HI, *items, {"role": "assistant", "content": "so"}, {"role": "user", "content": "?"}]
    with server.replying("x") as prompts:
        assert server.post("/v1/responses", {"input": said}).status_code == 200
    assert prompts[0].endswith("[user]hi[assistant]so[user]?[assistant]")


@pytest.mark.parametrize("text", ['{"n": NaN}', '{"n": 1e999}', "[" * 5000, '{"n": 1', "\xff", "5"])
def test_what_is_no_object_is_refused(server: Running, text: str) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat", "/v2/models/tiny/infer"):
        reply = server.http.post(path, content=text.encode("latin-1"))
        assert reply.status_code == 400 and "body" in told(path, reply)


def test_the_last_of_equal_names_counts(server: Running) -> None:
    text = '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": "x", "max_tokens": 1.0}'
    reply = server.http.post("/v1/chat/completions", content=text)
    assert reply.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/chat/completions", {"messages": HI, "max_completion_tokens": "x"},
         "max_completion_tokens is 'x'"),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": False}, "max_tokens is False"),
        ("/v1/chat/completions", {"messages": HI, "repetition_penalty": 0}, "repetition_penalty"),
        ("/v1/chat/completions", {"messages": HI, "functions": [{}]}, "functions[0].name is None"),
        ("/v1/chat/completions", {"messages": [{}]}, "messages[0].role is None"),
        ("/v1/messages", {"messages": HI, "stop_sequences": [None]}, "stop_sequences is [None]"),
        ("/v1/messages", {"messages": [{**BLOCKS[1], "role": "x"}]},
         "messages[0].content[1].type is 'tool_use'; it must be 'text'"),
        ("/v1/messages", {"messages": HI, "tools": [{"name": "f", "input_schema": 5}]},
         "tools[0].input_schema is 5"),
        ("/api/chat", {"messages": HI, "options": {"num_predict": "x"}}, "options.num_predict"),
        ("/v1/chat/completions", {"messages": HI, "dry_sequence_breakers": ["x" * 5000]},
         "dry_sequence_breakers"),
        ("/v1/chat/completions", {"messages": HI, "modalities": ["text", "audio"]},
         "modalities is ['text', 'audio']; it must be ['text']"),
        ("/v1/chat/completions", {"messages": HI, "response_format": {"type": "json_schema"}},
         "response_format.json_schema.schema is missing"),
        ("/v1/chat/completions", {"messages": HI, "structured_outputs": {"structural_tag": "{}"}},
         "structured_outputs.structural_tag is '{}'; it must be left out"),
        ("/api/embed", {"model": "tiny", "input": "x", "keep_alive": "soon"}, "keep_alive is"),
        ("/v1/responses", {"input": "hi", "text": {"format": {"type": "json_schema"}}},
         "text.format.schema is missing"),
        ("/v1/responses", {"input": [*HI, {"type": "local_shell_call_output", "output": "x"}]},
         "input[1].type is 'local_shell_call_output'; it must be one of message,"),
        ("/v1/responses", {"input": [{"type": "compaction", "encrypted_content": "x"}, *HI]},
         "input[0].type is 'compaction'"),
        ("/v1/responses", {"input": [*HI, {"type": "mesage", "role": "user", "content": "x"}]},
         "input[1].type is 'mesage'"),
        *[("/v1/chat/completions", {"messages": HI, "tools": TOOLS, "tool_choice": {
            "type": "allowed_tools", **choice}}, named)
          for choice, named in (
              ({"mode": "auto"}, "tool_choice.tools is None"),
              ({"allowed_tools": {"mode": "required"}}, "tool_choice.tools is None"),
              ({"mode": "auto", "tools": []}, "tool_choice.tools is []"),
              ({"mode": "auto", "tools": ["f"]}, "tool_choice.tools is ['f']"),
              ({"tools": TOOLS}, "tool_choice.mode is None; it must be 'auto' or 'required'"),
              ({"mode": "any", "tools": TOOLS}, "tool_choice.mode is 'any'"))],
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_that_came(
    server: Running, path: str, body: Any, named: str
) -> None:
    reply = server.post(path, body)
    assert reply.status_code == 400 and named in told(path, reply)
