"""Answers that say the same again and again: what is one, what is none, and how a chat ends it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer import RepeatGuard
from edgeinfer.cli.chat import command
from edgeinfer.cli.console import Output
from edgeinfer.cli.opening import follow
from edgeinfer.tui import launch
from tests.test_tui_chat import Chat, drive
from tests.tui_engine import Script, ScriptedModel, ScriptedStream

SENTENCE = "I'm here to help you with any questions or topics you'd like to discuss. "
PROSE = " ".join(random.Random(7).choices(SENTENCE.split(), k=3000))


def stops_at(text: str, part: int = 5) -> int | None:
    """After how many characters the guard has seen enough."""
    guard = RepeatGuard()
    for i in range(0, len(text), part):
        if guard.push(text[i : i + part]):
            return i + part
    return None


@pytest.mark.parametrize("unit", ["\n", "ha", SENTENCE, PROSE[:900] + "\n\n", "ß🙂 "])
@pytest.mark.parametrize("begin", ["", PROSE[:700]])
def test_what_only_repeats_is_found_after_five_times(unit: str, begin: str) -> None:
    least = len(begin) + max(1200, 5 * len(unit))
    at = stops_at(begin + unit * 3000)
    assert at is not None and least - len(unit) <= at <= least + 200


@pytest.mark.parametrize("unit", ["！", "🐵", "我很乐意帮助您。", "─" * 60 + "\n"])
def test_what_repeats_in_wide_characters_is_found_after_half_as_many(unit: str) -> None:
    at = stops_at(PROSE[:700] + unit * 600)
    assert at is not None and 1300 - len(unit) <= at <= 1500


BOARD = ("├" + "───┼" * 7 + "───┤\n" + "│   " * 8 + "│\n") * 8


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        BOARD,
        PROSE[:900] + "─" * 500 + PROSE[:200],
        SENTENCE * 4 + PROSE,
        "-" * 1000 + PROSE[:200] + "=" * 1000,
        "".join(f"{i}. the same line but for its number\n" for i in range(300)),
        "".join(f"| {i} | 0 | 0 |\n" for i in range(300)),
        (PROSE[:1100] + "\n") * 4,
        (SENTENCE + str(random.Random(1).random())) * 4,
    ],
)
def test_what_goes_on_is_left_alone(text: str) -> None:
    assert stops_at(text) is None


@given(st.text(min_size=1, max_size=300), st.integers(1, 400), st.text(max_size=400))
def test_it_does_not_matter_how_a_text_comes_in_parts(unit: str, part: int, begin: str) -> None:
    at = stops_at(begin + unit * (4000 // len(unit) + 6), part)
    assert at is not None and at <= len(begin) + max(1200, 5 * len(unit)) + 100 + 2 * part


class Repeating(ScriptedStream):
    """As a model's stream, it has what has come once it is closed."""

    def __init__(self, text: str, **more: Any) -> None:
        model = ScriptedModel()
        super().__init__(Script(text, **more), model)


@pytest.mark.parametrize("kind", ["text", "reasoning"])
def test_a_plain_chat_ends_it_and_says_so(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = SENTENCE * 500
    stream: Any = Repeating(
        text if kind == "text" else "", reasoning="" if kind == "text" else text
    )
    follow(stream, Output(), stops_repeats=True)
    told = capsys.readouterr()
    assert stream.is_closed.is_set() and len(told.out) < 1500
    assert told.err.endswith(
        "(stopped: it repeats itself; chat --let-repeat lets an answer go on)\n"
    )


def test_other_answers_are_as_long_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for text, stops in ((SENTENCE * 50, False), (PROSE, True)):
        stream: Any = Repeating(text)
        follow(stream, Output(), stops_repeats=stops)
        told = capsys.readouterr()
        assert told.out.strip() == text.strip() and not told.err


def test_the_full_screen_chat_ends_it_says_so_and_goes_on(tmp_path: Path) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("hi")
        node = chat.app.session.conversation.last("assistant")
        assert node is not None and node.state == "stopped" and len(node.content) < 1500
        assert "stopped: it repeats itself" in chat.shown
        await chat.ask("and now?")
        assert "ok" in chat.shown

    model = ScriptedModel([Script(SENTENCE * 500), Script("ok")])
    drive(body, model, folder=tmp_path, stops_repeats=True)
    assert SENTENCE.strip() in model.asked[1][1]["content"]


@pytest.mark.parametrize("flags", [[], ["--let-repeat"]])
def test_the_command_asks_for_it_unless_told_not_to(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("edgeinfer.cli.chat.draws_screens", lambda environment: True)
    monkeypatch.setattr(
        launch, "run_chat", lambda *_, **given: asked.append(given["stops_repeats"])
    )
    context = command.make_context("chat", ["--url", "http://127.0.0.1:1", *flags])
    command.invoke(context)
    assert asked == [not flags]
