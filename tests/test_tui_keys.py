"""The table of commands and keys of the chat: what they mean, and what a settings file changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual import events
from textual.widgets import OptionList

from edgeinfer.tui.commands import COMMANDS, TYPED, Place
from edgeinfer.tui.completions import Sources, complete
from edgeinfer.tui.keys import Keys
from edgeinfer.tui.settings_file import FILE_NAME, read_settings
from tests.test_tui_chat import Chat, drive
from tests.tui_engine import Script, ScriptedModel

PLACES: tuple[Place, ...] = ("prompt", "message", "main", "always")


def keys_of(text: str, folder: Path) -> Keys:
    (folder / FILE_NAME).write_text(text, "utf-8")
    return Keys(read_settings(folder / FILE_NAME)[0].get("keys", {}))


def meaning(keys: Keys, key: str, *places: Place) -> str:
    command = keys.find(events.Key(key, key if len(key) == 1 else None), places or PLACES)
    return command.name if command else ""


def test_the_table_has_no_two_of_anything() -> None:
    assert Keys({}).complaints == []
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)
    assert all(command.is_typed or command.keys for command in COMMANDS)


@pytest.mark.parametrize("name", TYPED)
def test_what_is_written_whole_is_what_enter_means(name: str) -> None:
    values = [("a.gguf.gguf", ""), ("a.gguf", "")]
    sources = Sources(tuple((each, "") for each in TYPED), lambda _: values, lambda _: [])
    assert complete(f"/{name}", True, sources)[0].label == f"/{name}"
    assert complete(f"/{name} a.gguf", True, sources) == []


def test_keys_that_tmux_macos_and_shells_own_have_others_beside_them() -> None:
    owned = {"ctrl+b", "ctrl+up", "ctrl+down", "ctrl+l", "ctrl+r", "ctrl+s", "ctrl+z"}
    for command in COMMANDS:
        mains = {key for key in command.keys.split(",") if "+" in key or key[1:].isdecimal()}
        is_meant = command.name == "suspend"  # the shell's key for what is the shell's
        assert not mains & owned or mains - owned or is_meant, command.name


@pytest.mark.parametrize(
    ("text", "key", "command", "complaint"),
    [
        ("retry = f9", "f9", "retry", ""),
        ("retry = f9", "ctrl+r", "", ""),
        ("retry =", "r", "", ""),
        ("retry = 'f9, R'", "R", "retry", ""),
        ("retry = left_square_bracket", "[", "retry", "[ means retry, no longer branch-before"),
        ("retry = ctrl+y", "ctrl+y", "retry", "line 2: ctrl+y means retry, no longer copy"),
        ("retry = f9\ncopy = f9", "f9", "retry", "line 3: f9 means retry, no longer copy"),
        ("retri = f9", "f9", "", "line 2: no command retri; did you mean retry"),
        ("retry = contrl+r, f9", "f9", "retry", "line 2: no key contrl+r; keys are written"),
        ("send = a, ctrl+s", "ctrl+s", "send", "line 2: a could not be typed any more"),
        ("send = alt+enter\nnewline = enter", "enter", "newline", ""),
        ("# note\n; note\nretry = f9", "f9", "retry", ""),
        ("mark = up", "up", "mark", "up means mark, no longer previous"),
    ],
)
def test_a_settings_file_gives_keys_and_bad_entries_are_left_aside(
    text: str, key: str, command: str, complaint: str, tmp_path: Path
) -> None:
    keys = keys_of(f"[keys]\n{text}\n", tmp_path)
    assert meaning(keys, key) == command
    assert any(complaint in each for each in keys.complaints) if complaint else not keys.complaints


ROWS = st.tuples(
    st.sampled_from([*TYPED, "send", "newline", "nothing"]),
    st.lists(st.sampled_from(["a", "f5", "ctrl+r", "up", "enter", "escape", "+", "ctrl+"])),
)
FILES = st.lists(ROWS).map(
    lambda rows: "\n".join(["[keys]", *(f"{name} = {','.join(keys)}" for name, keys in rows)])
)


@settings(max_examples=60, deadline=None)
@given(st.text() | FILES)
def test_whatever_a_settings_file_says_the_prompt_can_be_typed_in(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    keys = keys_of(text, tmp_path_factory.getbasetemp())
    for key in ("a", "R", "[", "up", "backspace", "space"):
        assert meaning(keys, key, "prompt", "main", "always") == ""


def test_a_settings_file_is_any_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    assert read_settings(path) == ({}, [])
    path.write_bytes(b"\xef\xbb\xbf[keys]\nretry = f9\nretry = f8\nnonsense\n\xff = \xfe\n")
    found, complaints = read_settings(path)
    assert found["keys"]["retry"].value == "f9" and len(complaints) == 2
    path.unlink()
    path.mkdir()
    assert "is no file of settings" in read_settings(path)[1][0]


def test_keys_of_the_settings_file_are_those_of_the_chat(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("[keys]\nretry = f9\nhelp = ctrl+k\nsend = alt+s\nnope = x\n")

    async def body(chat: Chat) -> None:
        await chat.idle()
        assert "no command nope" in chat.screen_text and "ctrl+k keys" in chat.screen_text
        await chat.press(*"one", "alt+s")
        await chat.until(lambda: "first answer" in chat.shown and chat.app.session.is_ready)
        await chat.press("ctrl+r", "f9")
        await chat.until(lambda: "second answer" in chat.shown and chat.app.session.is_ready)
        await chat.press("ctrl+k")
        await chat.until(lambda: "settings.ini" in chat.screen_text)
        text = chat.screen_text
        assert "/retry" in text and "f9" in text and "no command nope" in text

    model = ScriptedModel([Script("first answer"), Script("second answer")])
    assert len(drive(body, model, folder=tmp_path, size=(100, 120)).asked) == 2


def test_keys_over_a_dialog_in_which_nothing_has_the_focus_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press("ctrl+p", "a")
        found = chat.app.screen.query_one(OptionList)
        found.highlighted = 0
        found._index_to_line.clear()  # as between a new size and its layout
        await chat.press("pagedown")
        chat.app.set_focus(None)  # as a click beside everything does
        for key in (*"abcdefgh", "escape"):
            chat.app.post_message(events.Key(key, key if len(key) == 1 else None))
        await chat.until(lambda: len(chat.app.screen_stack) == 1)

    monkeypatch.setattr("edgeinfer.tui.terminal_app._MOST_ROUNDS", 1 << 60)  # it would hang
    drive(body)
