"""Titles that the model finds while it is idle: in nobody's way, and never against a name."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeinfer.tui import titles
from edgeinfer.tui.app import ChatApp
from edgeinfer.tui.records import Node
from edgeinfer.tui.settings import ChatSettings
from tests.test_tui_chat import Chat, drive
from tests.tui_engine import Script, ScriptedModel, opener


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titles, "_IDLE_SECONDS", 0.1)


def test_a_title_comes_when_idle_is_given_up_for_a_message_and_never_replaces_a_name(
    tmp_path: Path,
) -> None:
    hold, seen = threading.Event(), threading.Event()
    model = ScriptedModel([
        Script("one"), Script("a b", hold=hold), Script("two"),
        Script('**Title: "Apples, and Pears."**', hold=seen), Script("three"), Script("Not wanted"),
    ])  # fmt: skip

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("tell me of apples")
        await chat.until(lambda: len(model.asked) == 2)  # the title
        assert model.asked[1][:-1] == [
            {"role": "user", "content": "tell me of apples"},
            {"role": "assistant", "content": "one"},
        ]
        await chat.ask("and pears?")
        assert model.streams[1].is_closed.is_set() and not hold.is_set()
        assert "two" in chat.shown and chat.app.session.conversation.title == "tell me of apples"
        seen.set()
        await chat.until(lambda: "Apples, and Pears" in chat.screen_text.splitlines()[1])
        assert len(chat.app.session.conversation.branch()) == 4
        await chat.pilot.pause(0.3)
        assert len(model.asked) == 4  # once is enough
        await chat.send("/clear")
        await chat.ask("next")
        await chat.send("/save a name")
        await chat.pilot.pause(0.3)
        assert chat.app.session.conversation.title == "a name"

    drive(body, model, folder=tmp_path, finds_titles=True)


@pytest.mark.parametrize(
    ("text", "reason", "title"),
    [
        ('"Apples and pears."\n', "stop", "Apples and pears"),
        ("## Title: **Pears**\n\nHere is why", "length", "Pears"),
        ("天气预报", "stop", "天气预报"),
        ("A\x1b[2J pear", "stop", "A pear"),
        ("Subject: growing pear trees", "stop", "growing pear trees"),
        ("An answer that goes on and", "length", ""),
        ("apples " * 9, "stop", ""),
        # As a model of 135 M parameters says it.
        ("Here's a possible title for the conversation:\n\nPears", "length", ""),
        ('The Pears Yearbook 1888: "The Pears Yearbook 1888"', "stop", ""),
        ("Estado de Portugal", "stop", ""),
        ("The water: Trees", "stop", ""),  # none of it was asked about
        ("x" * 61, "stop", ""),
        (" ** \n", "stop", ""),
        ("", "stop", ""),
        ("Cut off", None, ""),
    ],
)
def test_only_what_looks_like_a_title_is_one(text: str, reason: str | None, title: str) -> None:
    completion: Any = SimpleNamespace(finish_reason=reason) if reason else None
    branch = [
        Node(1, None, "user", "tell me of growing apples, Pears and 天气预报"),
        Node(2, 1, "assistant", "They are grown on trees, with water."),
    ]
    assert titles._title(text, completion, branch) == title


@pytest.mark.parametrize("value", ["on", "off", "maybe"])
def test_a_setting_asks_for_none(tmp_path: Path, value: str) -> None:
    (tmp_path / "settings.ini").write_text(f"[chat]\ntitles = {value}\n", encoding="utf-8")
    given: Any = {
        "data_folder": tmp_path,
        "open_model": opener(ScriptedModel()),
        "keeps_history": False,
    }
    app = ChatApp(ChatSettings(**given, finds_titles=True))
    assert app._finds_titles == (value != "off")
    assert bool(app.complaints) == (value == "maybe")
