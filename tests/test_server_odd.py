"""What clients send that is odd but meant: taken as it is meant, or refused by its name."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import click
import pytest

from edgeinfer.cli import serve
from edgeinfer.server import native, service, token_ids
from edgeinfer.server.completions import read_request
from edgeinfer.server.errors import ApiError
from edgeinfer.server.fields import Fields
from edgeinfer.server.openai import tools_of
from edgeinfer.server.prefix_care import steady
from edgeinfer.server.requests import conversation
from edgeinfer.server.tensors import read_texts
from edgeinfer.server.wire import _MOST_VALUES
from edgeinfer.text.chat import ChatTemplate

from .server_for_tests import LOAD, Running, running, small_model

HI: Any = [{"role": "user", "content": "hi"}]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
ALL = "all of it, which is more than sixteen tokens of a small vocabulary"


def told(path: str, reply: Any) -> str:
    error = reply.json()["error"]
    return str(error if path.startswith(("/api/", "/v2/")) else error["message"])


# -- limits that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -1, -2, -1.0])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollama_means_no_limit_by_none(server: Running, n: float, path: str) -> None:
    options = {"num_predict": n, "num_ctx": 99}
    body = {"model": "tiny", "messages": HI, "prompt": "hi", "options": options, "stream": False}
    with server.replying(ALL):
        reply = server.post(path, body).json()
    assert (reply["message"]["content"] if "chat" in path else reply["response"]) == ALL


@pytest.mark.parametrize("name", ["max_tokens", "n_predict"])
def test_a_text_has_no_limit_where_it_is_told_so(server: Running, name: str) -> None:
    long = {"prompt": "hi", "logit_bias": {"257": -1000}, "temperature": 0}
    usual = server.post("/v1/completions", {**long, name: None}).json()
    assert usual["usage"]["completion_tokens"] == 16
    for none in (-1, -1.0, -2):
        assert "max_tokens" not in read_request(Fields({"prompt": "hi", name: none})).sampling


# -- contents --------------------------------------------------------------------------------------


def test_a_system_that_says_nothing_adds_nothing() -> None:
    for first, second in ((None, "a"), ("a", None), ("a", "")):
        said = [{"role": "system", "content": first}, {"role": "developer", "content": second}]
        assert conversation(said) == [{"role": "system", "content": "a"}]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": HI, "system": [{"type": "image", "source": {}}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "data": "x"}]}]}, "'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "container_upload"}]}]}, "'contain"),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 9999}]}]}, "..."),
        ({"messages": [*HI, {"role": "assistant", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}]}]},
         "'image'"),
        ({"messages": [{"role": "user", "content": [
            {"type": "document", "source": {"type": "url", "url": "x"}}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {
            "type": "content", "content": [{"type": "image"}]}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [
            {"type": "search_result", "content": [{"type": "image"}]}]}]}, "'image'"),
    ],
)  # fmt: skip
def test_anthropics_content_that_is_no_text_is_refused(
    server: Running, body: Any, named: str
) -> None:
    reply = server.post(MESSAGES, {"max_tokens": 1, **body})
    assert reply.status_code == 400 and named in told(MESSAGES, reply)
    assert len(reply.text) < 1000


def test_what_only_anthropic_can_read_says_nothing(server: Running) -> None:
    blocks: Any = [
        {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "I looked."},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "mcp_tool_use", "id": "m", "name": "x", "input": {}, "server_name": "y"},
        {"type": "mcp_tool_result", "tool_use_id": "m", "content": []},
    ]  # fmt: skip
    document = {"type": "document", "source": {"type": "text", "data": "a page"}, "title": "t"}
    parts = [{"type": "text", "text": "in parts"}]
    documents = [
        {"type": "document", "source": {"type": "content", "content": each}}
        for each in ("whole", parts)
    ]
    found = {"type": "search_result", "title": "of it", "source": "s", "content": [
        {"type": "text", "text": "words"}]}  # fmt: skip
    said = [*HI, {"role": "assistant", "content": blocks}]
    said.append({"role": "user", "content": [document, *documents, found]})
    with server.replying("x") as prompts:
        assert server.post(MESSAGES, {"messages": said, "max_tokens": 9}).status_code == 200
    assert prompts[0].endswith(
        "[assistant]I looked.[user]a page\nwhole\nin parts\nof it\nwords[assistant]"
    )


def nested(kind: str, name: str, n: int = 300) -> Any:
    found: Any = {"type": kind, name: []}
    for _ in range(n):
        found = {"type": kind, name: [found]}
    return found


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (5, "content 5"), ({"type": "text", "text": "x"}, "a list of parts"),
        ([{"type": "text"}], "no text in it"), ([{"type": "text", "text": 5}], "no text in it"),
        ([{"text": "x"}], "type None"), ([["x"]], "type 'list'"),
        ([{"type": "image_url", "image_url": {"url": "data:,"}}], "'image_url'; text is supp"),
    ],
)  # fmt: skip
def test_a_content_that_is_no_text_is_told(server: Running, content: Any, named: str) -> None:
    for path, role, place in ((CHAT, "user", "messages"), (RESPONSES, "user", "input")):
        reply = server.post(path, {place: [{"role": role, "content": content}]})
        assert reply.status_code == 400 and named in told(path, reply)


@pytest.mark.parametrize("key", ["1_0", " 5", "+5", "\u0663", "05", "5.0", "", "9" * 5000])
def test_keys_of_biases_are_ids_as_json_spells_them(server: Running, key: str) -> None:
    """`int` takes more for one, and then two keys may be of one token."""
    reply = server.post(CHAT, {"messages": HI, "max_tokens": 1, "logit_bias": {key: 1}})
    assert reply.status_code == 400 and "logit_bias" in told(CHAT, reply)


def test_namespaces_are_read_however_deep_they_are() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for _ in range(5000):
        tool = {"type": "namespace", "tools": [tool]}
    assert [each["function"]["name"] for each in tools_of([Fields(tool)])] == ["f"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (MESSAGES, {"messages": [{"role": "user", "content": [nested("search_result", "content")]}],
                    "max_tokens": 1}),
        (CHAT, {"messages": HI, "tools": [nested("namespace", "tools")], "max_tokens": 1}),
        (RESPONSES, {"input": "hi", "tools": [nested("namespace", "tools")],
                     "max_output_tokens": 1}),
        ("/api/generate", {"prompt": "hi", "template": "{{ .Prompt }}"}),
        ("/api/generate", {"prompt": "hi", "context": [1, 2]}),
        (RESPONSES, {"input": False}), (RESPONSES, {"input": 0}), (RESPONSES, {"input": {}}),
        (CHAT, {"messages": HI, "tool_choice": False}), (CHAT, {"messages": HI, "tool_choice": 0}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "x" * 9999}]}]}),
    ],
)  # fmt: skip
def test_what_is_odd_is_answered_or_refused(server: Running, path: str, body: Any) -> None:
    reply = server.post(path, body)
    named = [each for each in ("template", "context", "input", "tool_choice") if each in body]
    if named and not (path == RESPONSES and "tools" in body):
        assert reply.status_code == 400 and named[0] in told(path, reply)
    assert reply.status_code in (200, 400) and len(reply.text) < 9999


# -- calls that broke ------------------------------------------------------------------------------

GOES_THROUGH = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{% for key, value in call.function.arguments|items %}[{{ key }}={{ value }}]{% endfor %}"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city": "Kö', "f[city=Kö]"), ("{'a': True,}", "f[a=True]"), ("", "f"),
        ('{"a": 1}', "f[a=1]"), ("null", '"arguments": null'), ("[1]", '"arguments": [1]'),
        ("five", '"arguments": "five"'), ('{"a":' * 200, "f[a="), ("5", '"arguments": 5'),
    ],
)  # fmt: skip
def test_a_call_that_broke_does_not_break_what_follows(arguments: str, shown: str) -> None:
    """Some templates go through the arguments: what is no object is told as text."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    chat: Any = [
        *HI, {"role": "assistant", "content": "Well.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "no"},
    ]  # fmt: skip
    template = ChatTemplate(GOES_THROUGH)
    try:
        text = template.render(chat)
    finally:
        template.close()
    assert text.startswith("<user>hi<assistant>Well.") and text.endswith("<tool>no")
    assert shown in text and "f" in text


def test_calls_of_tools_that_take_a_text_are_told(server: Running) -> None:
    custom = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    said = [*HI, {"role": "assistant", "content": None, "tool_calls": [custom]}]
    said.append({"role": "tool", "tool_call_id": "c", "content": "Done"})
    with server.replying("x") as prompts:
        assert server.post(CHAT, {"messages": said}).status_code == 200
    assert 'patch{"input": "*** Begin"}' in prompts[0] and "[tool]Done" in prompts[0]
    items: Any = [
        {"type": "message", "role": "user", "content": "mend it"},
        {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "Done"},
    ]
    with server.replying("x") as prompts:
        assert server.post(RESPONSES, {"input": items}).status_code == 200
    assert 'patch{"input": "*** Begin"}' in prompts[0] and "[tool]Done" in prompts[0]


# -- logprobs of responses -------------------------------------------------------------------------


def test_responses_have_logprobs_where_they_are_asked_for(server: Running) -> None:
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    with server.replying("<think>\nhm\n</think>\n\nhé you"):
        whole = server.post(RESPONSES, body).json()
        frames = server.post(RESPONSES, {**body, "stream": True}).text.split("\n\n")[:-1]
        without = server.post(RESPONSES, {"input": "hi"}).json()
    events = [json.loads(each.split("data: ", 1)[1]) for each in frames]
    message = whole["output"][-1]["content"][0]
    assert b"".join(bytes(each["bytes"]) for each in message["logprobs"]) == "hé you".encode()
    assert all(len(each["top_logprobs"]) == 1 for each in message["logprobs"])
    deltas = [each for each in events if each["type"] == "response.output_text.delta"]
    assert [each for delta in deltas for each in delta["logprobs"]] == message["logprobs"]
    (done,) = (each for each in events if each["type"] == "response.output_text.done")
    assert done["logprobs"] == message["logprobs"]
    assert events[-1]["response"]["output"][-1]["content"][0]["logprobs"] == message["logprobs"]
    assert whole["top_logprobs"] == 1 and without["output"][-1]["content"][0]["logprobs"] == []


# -- bodies that take long -------------------------------------------------------------------------


@pytest.mark.parametrize("item", [b"[]", b"{}", b'{"role":"user"}', b"[[[]]]"])
def test_a_body_of_too_many_values_is_refused(server: Running, item: bytes) -> None:
    """Before any is made: each takes tens of bytes, and time of who else is served."""
    body = b'{"messages":[' + b",".join([item] * (_MOST_VALUES // 8 + 1)) + b"]}"
    reply = server.http.post(CHAT, content=body)
    assert reply.status_code == 413 and "values" in told(CHAT, reply)


@pytest.mark.parametrize(
    ("shape", "told"), [([1], "that of 2 or more elements"), ([64, 64], "at most 2048 elements")]
)
def test_no_more_texts_are_read_than_a_shape_tells(shape: list[int], told: str) -> None:
    """Each empty one takes four bytes here, and tens of them as a text."""
    behind = bytes(1 << 20)
    given = {"name": "text_input", "datatype": "BYTES", "shape": shape,
             "parameters": {"binary_data_size": len(behind)}}  # fmt: skip
    with pytest.raises(ApiError, match=told):
        read_texts([Fields(given)], behind, "text_input")


def test_what_stands_in_a_text_is_no_value(server: Running) -> None:
    text = '[{,"\\' * (_MOST_VALUES // 10)
    reply = server.post(CHAT, {"messages": [{"role": "user", "content": text}]})
    assert reply.status_code == 400 and "prompt is too long" in told(CHAT, reply)


def test_no_more_tokens_are_made_than_anybody_counts(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of 32 MiB take a minute, which nobody ends; what fits no context needs none."""
    for module in (native, service, token_ids):
        monkeypatch.setattr(module, "MOST_MADE", 1000)
    said = [{"role": "user", "content": "word " * 1000}]
    bodies = {
        "/tokenize": {"content": "word " * 1000}, f"{MESSAGES}/count_tokens": {"messages": said},
        f"{CHAT}/input_tokens": {"messages": said}, f"{RESPONSES}/input_tokens": {"input": said},
    }  # fmt: skip
    for path, body in bodies.items():
        reply = server.post(path, body)
        assert reply.status_code == 413
        assert "more than 1,000 tokens; send it in parts" in told(path, reply)


def test_lines_of_a_system_message_take_no_time() -> None:
    said: Any = [{"role": "system", "content": "a time\n" * 3_000_000}, *HI]
    begun = time.thread_time()
    assert steady(said) == said
    assert time.thread_time() - begun < 1


# -- models ----------------------------------------------------------------------------------------


def test_a_model_whose_file_is_gone(tmp_path: Path) -> None:
    """Whoever asks is not told where it was."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = small_model(tmp_path / "a"), small_model(tmp_path / "b", seed=1)
    load: Any = dict(LOAD, n_ctx=512)
    asked: Any = {"messages": HI, "max_tokens": 1}
    with running([("one", one), ("two", two)], load=load) as found:
        whole = two.read_bytes()
        for data, status in ((None, 404), (b"GGUF" + bytes(60), 500), (whole[:5000], 500)):
            two.unlink(missing_ok=True)
            if data is not None:
                two.write_bytes(data)
            reply = found.post(CHAT, {**asked, "model": "two"})
            assert reply.status_code == status and "'two' can't be loaded" in told(CHAT, reply)
            assert str(tmp_path) not in reply.text
            assert found.post(CHAT, {**asked, "model": "one"}).status_code == 200
            assert len(found.http.get("/v1/models").json()["data"]) == 2
        two.write_bytes(whole)
        assert found.post(CHAT, {**asked, "model": "two"}).status_code == 200


# -- who may ask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Box.LAN", "box.lan.", "box.lan:8080"])
def test_names_and_origins_are_read_as_browsers_spell_them(tmp_path: Path, name: str) -> None:
    limits: Any = {"hosts": (name,), "origins": ("https://OK.org/",)}
    with running([("tiny", small_model(tmp_path))], **limits) as found:
        for host, status in (("box.lan", 200), ("BOX.lan:1", 200), ("other.lan", 403)):
            assert found.http.get("/health", headers={"host": host}).status_code == status
        for origin, status in (("https://ok.org", 200), ("https://ok.org:444", 403)):
            assert found.http.get("/health", headers={"origin": origin}).status_code == status


def test_an_empty_key_lets_nobody_in(tmp_path: Path) -> None:
    with running([("tiny", small_model(tmp_path))], api_keys=("",)) as found:
        for headers in ({}, {"x-api-key": ""}, {"authorization": "Bearer"}, {"api-key": ""}):
            assert found.http.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("key", ["", " ", "a\nb", "\udcff", "a\x00"])
def test_keys_that_can_not_be_sent_are_refused(key: str) -> None:
    with pytest.raises(click.UsageError, match="API key"):
        serve._checked_keys(("good", key), None)


def test_keys_are_taken_without_the_space_around_them(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("two\n")
    assert serve._checked_keys((" one ",), str(tmp_path / "keys")) == ("one", "two")


def served(*arguments: str | Path) -> None:
    """The command with these, where it would not get to serve."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        serve.command.main([*map(str, arguments), "--port", port], standalone_mode=False)


@pytest.mark.parametrize("host", ["", " "])
def test_an_address_that_is_empty_is_not_every_address(tmp_path: Path, host: str) -> None:
    with pytest.raises(click.UsageError, match="--host is empty"):
        served(small_model(tmp_path), "--host", host)


@pytest.mark.parametrize("flags", [("--api-key", ""), ("--api-key", "a\nb")])
def test_the_command_refuses_such_keys(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError, match="API key"):
        served(small_model(tmp_path), *flags)


def test_the_command_refuses_two_models_of_one_name(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(small_model(tmp_path / folder))
    with pytest.raises(click.UsageError, match="both called 'tiny'"):
        served(*paths)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    served = [("Tiny", tmp_path / "a"), ("other", tmp_path / "b"), ("tiny", tmp_path / "c")]
    serve._check_names(served[:2])
    with pytest.raises(click.UsageError, match="both called 'tiny'"):
        serve._check_names(served)


# -- what a reply repeats --------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [102, 500, 900, 940])
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", ["metadata", "text", "tool_choice"])
def test_what_is_repeated_can_be_written(
    server: Running, name: str, is_streamed: bool, depth: int
) -> None:
    """Where more was read than could be written, the connection broke off in the reply."""
    inner = '{"a":' * depth + "1" + "}" * depth
    odd = {
        "metadata": inner,
        "text": f'{{"format":{{"type":"text","x":{inner}}}}}',
        "tool_choice": f'{{"type":"function","name":"f","x":{inner}}}',
    }
    rest = '"input":"hi","max_output_tokens":1,"tools":[{"type":"function","name":"f"}]'
    stream = "true" if is_streamed else "false"
    body = f'{{{rest},"stream":{stream},"{name}":{odd[name]}}}'
    reply = server.http.post(RESPONSES, content=body)
    assert reply.status_code == 400 and f"{name} are nested over 100" in told(RESPONSES, reply)
