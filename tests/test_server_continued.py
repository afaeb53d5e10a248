"""Answers that go on with the assistant's own words, and answers of no tokens, as each API asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM
from edgeinfer.errors import InvalidRequestError, TemplateError
from edgeinfer.remote.model import _as_sent
from edgeinfer.text.chat import ChatTemplate
from edgeinfer.text.chat_templates import BUILT_IN
from edgeinfer.text.messages import Conversation

from .server_for_tests import Running, small_model

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
BEGUN: Any = [USER, {"role": "assistant", "content": "Once \U0010ffff upon  "}]
CALLS = {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
VLLM = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": BEGUN, "max_tokens": 5}),
        ("/api/chat", {"messages": BEGUN, "model": "tiny", "stream": False}),
        (CHAT, {"messages": BEGUN, **VLLM}),
        (CHAT, {"messages": BEGUN, "continue_final_message": True}),
        (CHAT, {"messages": [USER, {**BEGUN[1], "prefix": True}]}),
    ],
)
def test_an_answer_goes_on(server: Running, path: str, body: Any) -> None:
    with server.replying(" a time") as prompts:
        reply = server.post(path, body)
    assert " a time" in reply.text and "Once" not in reply.text
    (prompt,) = prompts
    assert prompt.endswith("[assistant]Once \U0010ffff upon  ")


def test_what_is_counted_and_shown_is_what_is_read(server: Running) -> None:
    body = {"messages": BEGUN, **VLLM}
    shown = server.post("/apply-template", body).json()["prompt"]
    assert shown.endswith("[assistant]Once \U0010ffff upon  ")
    plain = server.post("/apply-template", {"messages": BEGUN}).json()["prompt"]
    assert plain == shown + "[assistant]"
    counted = server.post("/v1/messages/count_tokens", {"messages": BEGUN}).json()["input_tokens"]
    answer = server.post("/v1/messages", {"messages": BEGUN, "max_tokens": 1}).json()
    usage = answer["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, {"messages": [USER], "continue_final_message": True}, "last message"),
        (CHAT, {"messages": [USER, {**BEGUN[1], **CALLS}], **VLLM}, "last message"),
        (CHAT, {"messages": BEGUN, **VLLM, "add_generation_prompt": True}, "add_generation_prompt"),
        (CHAT, {"messages": BEGUN, "add_generation_prompt": False}, "add_generation_prompt"),
        (CHAT, {"messages": [{**BEGUN[1], "prefix": 1}]}, "messages[0].prefix"),
        (
            "/v1/messages",
            {"messages": BEGUN, "output_config": {"format": {"type": "json_schema", "schema": {}}}},
            "messages",
        ),
    ],
)
def test_what_can_not_go_on_is_refused(server: Running, path: str, body: Any, named: str) -> None:
    reply = server.post(path, body)
    assert reply.status_code == 400 and named in reply.json()["error"]["message"]


def test_a_turn_of_calls_is_whole(server: Running) -> None:
    block = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    turns = [USER, {"role": "assistant", "content": [block]}]
    with server.replying("x") as prompts:
        server.post("/v1/messages", {"messages": turns, "max_tokens": 5})
    assert prompts[0].endswith("[assistant]") and prompts[0].count("[assistant]") == 2


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_template_shows_where_it_goes_on(name: str) -> None:
    chat = Conversation.of(BEGUN, continues=True)
    shown = ChatTemplate(BUILT_IN[name], name=name).render_chat(chat)
    assert shown.endswith("Once \U0010ffff upon  ")


def test_a_template_that_drops_the_last_message_says_so() -> None:
    template = ChatTemplate("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}")
    with pytest.raises(TemplateError, match="can't be continued"):
        template.render_chat(Conversation.of(BEGUN, continues=True))


def test_from_python(tmp_path: Path) -> None:
    """A space at its start belongs to the answer, and the tokens are those after the text."""
    with LLM(small_model(tmp_path), n_ctx=256, device="reference") as llm:
        answer = llm.chat(BEGUN, continue_last=True, max_tokens=4, seed=1, temperature=0.0)
        prompt = llm.runtime.template.render_chat(Conversation.of(BEGUN, continues=True))
        ids = llm.tokenize(prompt, bos=True)
        assert llm.generate(ids, max_tokens=4, temperature=0.0).token_ids == answer.token_ids
        with pytest.raises(InvalidRequestError, match="last message"):
            llm.chat("hi", continue_last=True)
        nothing = llm.chat("hi", max_tokens=0)
        assert (nothing.text, nothing.token_ids, nothing.finish_reason) == ("", (), "length")
        assert llm.chat("hi", max_tokens=0).usage.cached_tokens > 0
    assert _as_sent({"continue_last": True}) == VLLM


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (CHAT, {"messages": [USER], "max_tokens": 0}, '"length"'),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0, "echo": True}, '"length"'),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, '"max_output_tokens"'),
        ("/v1/messages", {"messages": [USER], "max_tokens": 0}, '"max_tokens"'),
    ],
)
def test_no_tokens_are_none(
    server: Running, path: str, body: Any, reason: str, is_streamed: bool
) -> None:
    usage = {"stream_options": {"include_usage": True}} if is_streamed else {}
    reply = server.post(path, {**body, **usage, "stream": is_streamed})
    assert reply.status_code == 200 and reason in reply.text
    assert '"completion_tokens":0' in reply.text or '"output_tokens":0' in reply.text


def test_ollama_means_no_limit_by_none(server: Running) -> None:
    options = {"num_predict": 0, "num_ctx": 99}
    body = {"model": "tiny", "messages": [USER], "options": options, "stream": False}
    with server.replying("all of it"):
        assert server.post("/api/chat", body).json()["message"]["content"] == "all of it"
