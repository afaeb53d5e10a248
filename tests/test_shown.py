"""What a template would leave out of what it is given: it is shown in another place, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.chat import ChatTemplate
from edgeinfer.text.chat_templates import BUILT_IN
from edgeinfer.text.messages import Conversation
from edgeinfer.text.template_engine import Budget, TemplateEngine

from .test_chat import TEMPLATES

ENGINE = TemplateEngine()
USER: Any = {"role": "user", "content": "ASKED"}
SYSTEM: Any = {"role": "system", "content": "RULES"}
LATER: Any = [{"role": "assistant", "content": "ANSWERED"}, {"role": "user", "content": "AGAIN"}]


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest, data_file: Callable[[str], Path]) -> ChatTemplate:
    source = data_file(f"templates/{request.param}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(
        source, bos_token="<s>", eos_token="</s>", name=request.param, engine=ENGINE
    )


def made(source: str, **more: Any) -> ChatTemplate:
    return ChatTemplate(source, engine=ENGINE, **more)


def turn(text: str, *words: str, **more: Any) -> Iterator[dict[str, Any]]:
    """An answer with a text and a call for each word, and the results."""
    calls = [
        {"id": f"call{i:05}", "type": "function",
         "function": {"name": "look", "arguments": json.dumps({"word": word})}}
        for i, word in enumerate(words)
    ]  # fmt: skip
    yield {"role": "assistant", "content": text, "tool_calls": calls, **more}
    for call, word in zip(calls, words, strict=True):
        yield {"role": "tool", "tool_call_id": call["id"], "name": "look", "content": f"{word}-OUT"}


def in_order(text: str, *parts: str) -> bool:
    places = [text.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


# -- text beside calls -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["ONE"], ["ONE", "TWO"]])
@pytest.mark.parametrize("later", [[], LATER, LATER[1:]], ids=["now", "answered", "interrupted"])
def test_the_text_beside_calls_is_there(template: ChatTemplate, words: Any, later: Any) -> None:
    """Some templates show it only until an answer follows, many never."""
    chat: Any = [SYSTEM, USER, *turn("BESIDE", *words), *later]
    text = template.render(chat)
    for each in ("RULES", "ASKED", "BESIDE", *words, *(f"{w}-OUT" for w in words)):
        assert each in text, text
    assert text.count("BESIDE") == 1 and text.find("ASKED") < text.find("BESIDE")
    assert all(m["content"] in text for m in later)


def test_the_text_beside_calls_is_there_in_each_turn(template: ChatTemplate) -> None:
    chat: Any = [USER, *turn("FIRST", "ONE"), *turn("SECOND", "TWO"), *turn("", "THREE"), *LATER]
    text = template.render(chat)
    assert all(text.count(word) == 1 for word in ("FIRST", "SECOND"))
    assert in_order(text, "ASKED", "FIRST", "SECOND", "ANSWERED", "AGAIN")
    assert in_order(text, "ONE", "TWO", "THREE", "ANSWERED")


def test_a_template_that_hides_text_and_wants_turns() -> None:
    strict = made(
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.tool_calls %}"
        "({{ m.tool_calls[0].function.arguments | tojson }}){% elif m.role == 'tool' %}"
        "[{{ m.content }}]{% else %}{% if (m.role == 'user') != (ns.n % 2 == 0) %}"
        "{{ raise_exception('by turns') }}{% endif %}{% set ns.n = ns.n + 1 %}"
        "{{ m.role[0] }}:{{ m.content }};{% endif %}{% endfor %}"
    )
    chat: Any = [USER, *turn("BESIDE", "ONE"), *LATER]
    shown = 'u:ASKED;a:BESIDE;u:;({"word": "ONE"})[ONE-OUT]a:ANSWERED;u:AGAIN;'
    assert strict.render(chat) == shown


# -- the system's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_system_is_there_whoever_spoke_last(template: ChatTemplate, role: str) -> None:
    """Mistral's show it with the user's last message, where that is the last of all."""
    system = {**SYSTEM, "role": role}
    for rest in ([*turn("", "ONE")], LATER, LATER[:1], [*LATER, *turn("", "ONE")]):
        text = template.render([system, USER, *rest])
        assert text.count("RULES") == 1, text
    if not template.name.startswith("deepseek"):  # which shows no end of what a tool has said
        begun = Conversation.of(
            [system, USER, {"role": "assistant", "content": "Well"}], continues=True
        )
        assert "RULES" in template.render_chat(begun)


# -- reasoning -------------------------------------------------------------------------------------


def test_reasoning_between_calls_goes_back_by_the_name_that_is_looked_for(
    data_file: Callable[[str], Path],
) -> None:
    source = data_file("templates/openai-gpt-oss-120b.jinja").read_text(encoding="utf-8")
    template = made(source)
    for beside in ("", "BESIDE"):
        chat: Any = [USER, *turn(beside, "ONE", reasoning_content="THOUGHT")]
        assert in_order(template.render(chat), "analysis<|message|>THOUGHT", "ONE")
        assert beside in template.render(chat)
        assert "THOUGHT" not in template.render([*chat, *LATER])  # as the template has it


# -- names -----------------------------------------------------------------------------------------

BY_ID = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}<call>{{ c.id }}<arguments>"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}{% if m.role == 'tool' %}"
    "<return of {{ m.tool_call_id }}>{% endif %}{{ m.content }}{% endfor %}"
)


def test_a_call_is_named_where_only_its_id_is_shown() -> None:
    text = made(BY_ID).render([USER, *turn("", "ONE", "TWO")])
    assert in_order(
        text, '<call>functions.look:0<arguments>{"word": "ONE"}</call>', "functions.look:1",
        "<return of functions.look:0>ONE-OUT", "<return of functions.look:1>TWO-OUT",
    )  # fmt: skip


def test_users_of_several_names_are_told_apart(template: ChatTemplate) -> None:
    def text(*names: str | None) -> str:
        said = [
            {"role": "user", "content": f"WORDS-{i}", **({"name": name} if name else {})}
            for i, name in enumerate(names)
        ]
        chat: Any = [said[0], LATER[0], *said[1:]]
        return template.render(chat)

    assert in_order(text("ANN", "BEN"), "ANN: WORDS-0", "BEN: WORDS-1")
    assert text("ANN", "ANN") == text("ANN", None) == text(None, None)


def test_a_name_that_the_template_shows_is_told_once() -> None:
    shows = made("{% for m in messages %}<{{ m.name or m.role }}>{{ m.content }}{% endfor %}")
    chat: Any = [{**USER, "name": name} for name in ("ANN", "BEN")]
    assert shows.render(chat) == "<ANN>ASKED<BEN>ASKED"


# -- documents -------------------------------------------------------------------------------------


def test_documents_are_shown_or_refused() -> None:
    documents = [{"title": "t", "text": "PAGE"}]
    shows = made("{% for d in documents or [] %}{{ d.text }}{% endfor %}{{ messages[0].content }}")
    assert shows.render([USER], documents=documents) == "PAGEASKED"
    with pytest.raises(InvalidRequestError, match="shows none; put them into a message") as error:
        made("{{ messages[0].content }}").render([USER], documents=documents)
    assert error.value.param == "documents"


# -- roles -----------------------------------------------------------------------------------------


class Counted(TemplateEngine):
    n = 0

    def render(self, *args: Any) -> str:
        self.n += 1
        return super().render(*args)


def test_a_role_is_tried_once() -> None:
    engine = Counted()
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", engine=engine
    )
    try:
        for role in ("poet", "poet", "critic"):
            engine.n, chat = 0, [USER, {"role": role, "content": "x"}]
            template.render(chat)
        assert engine.n == 2
        engine.n = 0
        template.render([USER, {"role": "poet", "content": "x"}])
        assert engine.n == 1
        for i in range(500):  # whatever comes, little is kept
            template._shows(f"role {i}" * (1 + i % 30), Budget())
        assert len(template._shown_roles) <= 64
        assert sum(map(len, template._shown_roles)) <= 6400
    finally:
        template.close()


def test_roles_without_end_are_refused() -> None:
    chat: Any = [{"role": f"role {i}", "content": "x"} for i in range(17)]
    everybody = made("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    assert everybody.render(chat[:16])
    with pytest.raises(InvalidRequestError, match="17 roles of other names, at most 16"):
        everybody.render(chat)


# -- any conversation ------------------------------------------------------------------------------

KINDS = st.sampled_from(["system", "developer", "user", "assistant"])
CALLS = st.tuples(st.booleans(), st.integers(1, 3), st.booleans(), st.booleans())
WORD = {"type": "object", "properties": {"word": {"type": "string"}}}
LOOK = {"name": "look", "description": "looks", "parameters": WORD}


def conversation(turns: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages, and the words in them: each is there once."""
    numbers = count()
    chat: list[dict[str, Any]] = []
    for each in turns:
        if isinstance(each, str):
            chat.append({"role": each, "content": f"W{next(numbers):03}W"})
            continue
        has_text, n, is_answered, is_reversed = each
        text = f"W{next(numbers):03}W" if has_text else ""
        called, *results = turn(text, *(f"W{next(numbers):03}" for _ in range(n)))
        chat += [called, *(results[:: -1 if is_reversed else 1] if is_answered else [])]
    return chat, re.findall(r"W\d{3}W|W\d{3}(?:-OUT)?", json.dumps(chat))


@pytest.mark.parametrize("name", [*TEMPLATES, *sorted(BUILT_IN)])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(KINDS | CALLS, min_size=1, max_size=7), st.booleans())
def test_whatever_was_said_is_there_once(
    name: str, data_file: Callable[[str], Path], turns: list[Any], has_tools: bool
) -> None:
    source = BUILT_IN.get(name) or data_file(f"templates/{name}.jinja").read_text(encoding="utf-8")
    chat, words = conversation(turns)
    tools = [{"type": "function", "function": LOOK}] if has_tools else None
    text = template_of(name, source).render(chat, tools=tools)
    found = re.findall(r"W\d{3}W|W\d{3}(?:-OUT)?", text)
    assert sorted(found) == sorted(words), text


@cache
def template_of(name: str, source: str) -> ChatTemplate:
    return made(source, bos_token="<s>", eos_token="</s>", name=name)
