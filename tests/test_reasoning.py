"""How much a model is to think: what reaches its template, and a budget that ends the thought."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, InvalidRequestError
from edgeinfer.reasoning_budget import ReasoningBudget
from edgeinfer.replay import Recording
from edgeinfer.text.reply import THINK

from .models_for_tests import tiny_model
from .server_for_tests import LOAD, Running, running

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
TEMPLATE = (
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{% if reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% endfor %}[assistant]{% if opens %}<think>\n{% endif %}"
)
NO_END: Any = {"logit_bias": {257: -1e9}, "max_tokens": 60, "seed": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("reasoning"), n_ctx=1024, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def thinking(path: Path) -> Iterator[Running]:
    with running([("tiny", path)], load=dict(LOAD, device="cpu", n_ctx=1024)) as found:
        yield found


ASKED: Any = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("door", "fields", "told"),
    [
        (CHAT, {"reasoning_effort": "high"}, "[True][high]"),
        (CHAT, {"reasoning_effort": "none"}, "[False][none]"),
        (CHAT, {"reasoning": {"effort": "low"}}, "[True][low]"),
        (CHAT, {"reasoning": {"enabled": False}}, "[False]"),
        (CHAT, {"enable_thinking": False}, "[False]"),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "x"}},
         "[True][x]"),
        (CHAT, {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
         "[False][high]"),
        (CHAT, {}, ""),
        (RESPONSES, {"reasoning": {"effort": "medium", "summary": "auto"}}, "[True][medium]"),
        (RESPONSES, {"reasoning": {"summary": "auto"}}, ""),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "[True]"),
        (MESSAGES, {"thinking": {"type": "adaptive"}}, "[True]"),
        (MESSAGES, {"thinking": {"type": "disabled"}}, "[False]"),
        (MESSAGES, {"output_config": {"effort": "max"}}, "[max]"),
        ("/api/chat", {"think": True}, "[True]"), ("/api/chat", {"think": False}, "[False]"),
        ("/api/chat", {"think": "low"}, "[True][low]"), ("/api/chat", {"think": None}, ""),
    ],
)  # fmt: skip
def test_what_reaches_the_template(thinking: Running, door: str, fields: Any, told: str) -> None:
    body = {**ASKED, **fields} | ({"input": "x"} if door == RESPONSES else {})
    with thinking.replying("y") as prompts:
        assert thinking.post(door, body).status_code == 200
    assert prompts == [f"<|bos|>{told}[user]x[assistant]"]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_come_back_by_both_names(thinking: Running, name: str) -> None:
    turns = [*ASKED["messages"], {"role": "assistant", "content": "y", name: "hm"}]
    body = {"messages": [*turns, {"role": "user", "content": "z"}]}
    with thinking.replying("w") as prompts:
        thinking.post(CHAT, body)
    assert prompts == ["<|bos|>[user]x[assistant]<think>hm</think>y[user]z[assistant]"]


# -- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, 7])
def test_thoughts_end_with_their_budget(path: Path, most: int) -> None:
    """The tag is made of several tokens here, and none of them is left to the model."""
    with LLM(path, n_ctx=512) as llm:
        close = llm.tokenize("</think>", special=True)
        assert len(close) > 1
        for more in ({}, {"speculation": False}, {"temperature": 0.0}):
            answer = llm.chat("x", template_args={"opens": True}, reasoning_budget=most,
                              **NO_END, **more)  # fmt: skip
            assert list(answer.token_ids[most : most + len(close)]) == close
            assert "</think>" not in answer.text and len(answer.token_ids) == 60
            free = llm.chat("x", template_args={"opens": True}, **NO_END, **more)
            assert answer.token_ids[:most] == free.token_ids[:most]  # what is thought is the same
            assert free.reasoning and not free.text


def test_a_budget_that_is_not_used_changes_nothing(path: Path) -> None:
    with LLM(path, n_ctx=512) as llm:
        for args in ({"opens": True}, {}):
            free = llm.chat("x", template_args=args, **NO_END)
            limited = llm.chat("x", template_args=args, reasoning_budget=1000, **NO_END)
            assert limited.token_ids == free.token_ids


def test_thoughts_that_an_answer_opens_itself(path: Path) -> None:
    with LLM(path, n_ctx=512) as llm:
        think = llm.tokenize("<think>", special=True)
        close = llm.tokenize("</think>", special=True)
        matcher = ReasoningBudget(3, llm.runtime.tokenizer, (THINK,), None, None).begin()
        for token in [*think, 70, 71, 72]:
            assert matcher.forced(8) == []
            matcher.advance(token)
        assert matcher.forced(8) == close
        for token in close:
            matcher.advance(token)
        assert matcher.forced(8) == [] and matcher.count_possible([70, 71]) == 2


def test_a_schema_begins_behind_a_budget(path: Path) -> None:
    with LLM(path, n_ctx=512) as llm:
        answer = llm.chat("x", template_args={"opens": True}, reasoning_budget=4,
                          regex="(yes|no)", **NO_END)  # fmt: skip
        assert answer.text.strip() in ("yes", "no") and len(answer.reasoning) > 0


def test_a_budget_is_refused_by_name(path: Path) -> None:
    with LLM(path, n_ctx=512) as llm:
        for wrong in (-1, 1.5, "x"):
            with pytest.raises(InvalidRequestError, match="reasoning_budget"):
                llm.chat("x", reasoning_budget=wrong)  # type: ignore[arg-type]
        with llm.stream_chat("x", reasoning_budget=3, max_tokens=2) as stream:
            stream.run()
            with pytest.raises(InvalidRequestError, match="recorded"):
                Recording.of(llm, stream)


@pytest.mark.parametrize(
    ("door", "fields"),
    [
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 5}}),
        (CHAT, {"reasoning_budget": 5}), (CHAT, {"thinking_budget": 5}),
        (CHAT, {"reasoning": {"max_tokens": 5}}), (RESPONSES, {"thinking_token_budget": 5}),
    ],
)  # fmt: skip
def test_budgets_of_every_api(
    thinking: Running, door: str, fields: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    engine = thinking.llm.runtime.engine
    made = engine.generation
    monkeypatch.setattr(engine, "generation", lambda asked: seen.append(asked) or made(asked))
    body = {**ASKED, **fields} | ({"input": "x"} if door == RESPONSES else {})
    assert thinking.post(door, body).status_code == 200
    assert seen[0].constraint.most == 5
    wrong = {key: {**value, "budget_tokens": -5, "max_tokens": -5} if isinstance(value, dict)
             else "x" for key, value in fields.items()}  # fmt: skip
    assert thinking.post(door, {**body, **wrong}).status_code == 400
