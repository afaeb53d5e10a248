"""Which result is of which call: by its id, its tool's name or its place, whatever clients send."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.server.requests import conversation
from edgeinfer.text.call_ids import with_naming_ids, with_short_ids
from edgeinfer.text.chat import ChatTemplate

from .server_for_tests import Running

USER: Any = {"role": "user", "content": "?"}


def call(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": "{}"}, **more}


def called(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def result(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def pairs(messages: Any) -> list[tuple[str, str]]:
    """Each call's name, and what came of it, for the last message that calls."""
    found = conversation(messages)
    at = max(i for i, message in enumerate(found) if message.get("tool_calls"))
    ids = [each["id"] for each in found[at]["tool_calls"]]
    assert len(set(ids)) == len(ids) and all(len(id) == 9 for id in ids)
    names = {each["id"]: each["function"]["name"] for each in found[at]["tool_calls"]}
    results = [m for m in found[at + 1 :] if m["role"] == "tool"]
    return sorted((names[m["tool_call_id"]], m["content"]) for m in results)


@pytest.mark.parametrize(
    ("calls", "results"),
    [
        ([call("f"), call("g")], [result("F"), result("G")]),
        ([call("f", id=""), call("g", id=None)], [result("F", tool_call_id=""), result("G")]),
        ([call("f"), call("g")], [result("G", name="g"), result("F", name="f")]),
        ([call("f", id="1"), call("g", id="2")],
         [result("G", tool_call_id="2"), result("F", tool_call_id="1")]),
        ([call("f", id="same"), call("g", id="same")],
         [result("F", tool_call_id="same"), result("G", tool_call_id="same")]),
        ([call("f"), call("g", id="2")],
         [result("G", tool_call_id="2"), result("F", tool_call_id="of another client")]),
        ([call("f", id="call_a-1"), call("g", id="toolu_a-1")],
         [result("G", tool_call_id="toolu_a-1"), result("F", tool_call_id="call_a-1")]),
    ],
)  # fmt: skip
def test_a_result_is_of_its_own_call(calls: Any, results: Any) -> None:
    assert pairs([USER, called(*calls), *results]) == [("f", "F"), ("g", "G")]
    # Also where the same ids, or none, were there before.
    before = [USER, called(*calls), *results, {"role": "assistant", "content": "so"}]
    assert pairs([*before, USER, called(*calls), *results]) == [("f", "F"), ("g", "G")]


def test_a_result_has_the_name_of_its_tool() -> None:
    found = conversation([USER, called(call("f"), call("g")), result("F"), result("G", name="x")])
    assert [message.get("name") for message in found[2:]] == ["f", "x"]
    (alone,) = conversation([result("F", tool_call_id="nobody's")])
    assert alone["name"] == "" and len(alone["tool_call_id"]) == 9


def test_short_ids_stay() -> None:
    """They are the same in the next request, or it would read all again."""
    chat = [USER, called(call("f"), call("f", id="x"), call("g", id="x")), result("F"), result("G")]
    once = with_short_ids(chat)
    assert with_short_ids(once) == once and with_short_ids([*chat, USER])[:4] == once[:4]
    assert conversation(chat) == conversation(once)


def test_two_calls_of_one_function_have_results_of_their_own(server: Running) -> None:
    """Ollama's clients tell them by name alone, OpenAI's older ones by nothing."""
    asked: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": {"city": city}}} for city in ("Rome", "Bonn")
        ]},
        *({"role": "tool", "content": text, "tool_name": "f"} for text in ("sunny", "rainy")),
    ]  # fmt: skip
    with server.replying("x") as prompts:
        server.post("/api/chat", {"model": "tiny", "messages": asked, "stream": False})
    ids = [prompts[0].partition(f'{{"city": "{city}"}}')[2][:9] for city in ("Rome", "Bonn")]
    assert ids[0] != ids[1] and all(id.isalnum() for id in ids)


ONE_CALL = (  # and its results by id, as some models were taught
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call') }}{% endif %}{{ m.tool_calls[0].function.arguments }}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("ids", [["1", "2"], ["same", "same"], [None, None]])
def test_each_call_stands_before_its_result(ids: list[str | None]) -> None:
    calls = [
        {"function": {"name": "f", "arguments": word}, **({"id": id} if id else {})}
        for word, id in zip(("ROME", "BONN"), ids, strict=True)
    ]
    results = [
        result(word, **({"tool_call_id": id} if id else {}))
        for word, id in zip(("SUNNY", "RAINY"), ids, strict=True)
    ]
    chat: Any = [USER, called(*calls), *results]
    shown = "<user>?ROME<tool>SUNNYBONN<tool>RAINY"
    template = ChatTemplate(ONE_CALL)
    try:
        assert template.render(chat) == shown
        if len(set(ids)) == 2:
            assert template.render([*chat[:2], *reversed(results)]) == shown
    finally:
        template.close()


def test_ids_that_name_are_counted_through() -> None:
    chat = [USER, called(call("f"), call("g")), result("F"), result("G"), called(call("f"))]
    found = with_naming_ids(chat)
    ids = [each["id"] for message in found for each in message.get("tool_calls", ())]
    assert ids == ["functions.f:0", "functions.g:1", "functions.f:2"]
    assert [m["tool_call_id"] for m in found if m["role"] == "tool"] == ids[:2]


IDS = st.none() | st.sampled_from(["", "1", "call_1", "same", "call_aBc123", "functions.f:0"])
TURNS = st.lists(
    st.lists(IDS, max_size=4).map(lambda ids: called(*[call("f", id=id) for id in ids]))
    | st.builds(lambda id, name: result("x", tool_call_id=id, name=name), IDS,
                st.sampled_from([None, "f", "g"]))
    | st.just(USER),
    max_size=12,
)  # fmt: skip


@given(TURNS)
def test_every_result_is_of_one_call_at_most(chat: Any) -> None:
    found = conversation(chat)
    assert conversation(found) == found and len(found) == len(chat)
    for at, message in enumerate(found):
        ids = [each["id"] for each in message.get("tool_calls") or ()]
        assert len(set(ids)) == len(ids)
        behind = found[at + 1 :]
        end = next((i for i, m in enumerate(behind) if m.get("tool_calls")), len(behind))
        answered = [m["tool_call_id"] for m in behind[:end] if m["role"] == "tool"]
        assert all(answered.count(id) <= max(1, given_twice(chat, at)) for id in ids)


def given_twice(chat: Any, at: int) -> int:
    """How many results came with one id behind a message that calls."""
    given = [m.get("tool_call_id") for m in chat[at + 1 :] if m["role"] == "tool"]
    return max((given.count(each) for each in given), default=0)


def test_many_calls_take_no_time() -> None:
    """Each result was looked for among all calls: minutes of a processor."""
    n = 20_000
    calls = [call("f", id=f"id {i}") for i in range(n)]
    begun = time.process_time()
    for ids in (range(n), range(n, 2 * n), reversed(range(n))):
        conversation([USER, called(*calls), *[result("x", tool_call_id=f"id {i}") for i in ids]])
    assert time.process_time() - begun < 20
