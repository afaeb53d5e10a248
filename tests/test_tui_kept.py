"""What was typed, attached, queued or set up is kept, whatever one does next."""

from __future__ import annotations

import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from textual import events
from textual.widgets import Static

from edgeinfer import EdgeInferError, InvalidModelError, ModelNotFoundError, platform
from edgeinfer.tui.commands import COMMANDS, TYPED, parse
from edgeinfer.tui.editor import editor_command, write_in_editor
from edgeinfer.tui.records import Attachment, Draft
from tests.test_tui_chat import SLOW, Chat, drive
from tests.tui_engine import Script, ScriptedModel

KEYS = {
    "\x7f": "backspace",
    "\n": "ctrl+j",
    "\r": "enter",
    "\t": "tab",
    "\x0e": "ctrl+n",
    "\x0f": "ctrl+o",
    "\x1b": "escape",
}


def burst(chat: Chat, text: str) -> None:
    """All keys at once, as from a terminal that was slow to send them."""
    assert chat.app._driver is not None
    for character in text:
        key = KEYS.get(character, character if character.isalnum() else None)
        name = key or {" ": "space", "/": "slash", "-": "minus", "@": "at"}[character]
        chat.app._driver.send_message(
            events.Key(name, character if character.isprintable() else None)
        )


def notice(chat: Chat) -> str:
    return str(chat.app.composer.query_one("#notice", Static).content)


def contents(model: ScriptedModel) -> list[str]:
    return [messages[-1]["content"] for messages in model.asked]


# -- typed ahead ---------------------------------------------------------------------------------


def test_keys_that_come_all_at_once_mean_what_they_mean_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("in the file")

    async def body(chat: Chat) -> None:
        prompt = chat.app.composer.prompt
        await chat.idle()
        burst(chat, "first\rsecond\rthi")
        await chat.until(lambda: len(model.asked) == 2 and prompt.text == "thi")
        await chat.idle()
        burst(chat, "rd\r/theme edge-l\t\r\x0ein a new one\rrest")
        await chat.until(lambda: len(model.asked) == 4 and prompt.text == "rest")
        assert chat.app.theme == "edge-light" and len(chat.app.session.conversation.branch()) == 2
        await chat.idle()
        burst(chat, " of @not\tit\r\x0ffirst\r")
        await chat.until(lambda: "second" in chat.shown)
        assert prompt.text == "" and len(chat.app.screen_stack) == 1
        await chat.idle()
        burst(chat, "\x0fthi\x1bagain")
        await chat.until(lambda: prompt.text == "again")

    model = ScriptedModel()
    drive(body, model, folder=tmp_path)
    assert contents(model)[:4] == ["first", "second", "third", "in a new one"]
    assert contents(model)[4].endswith("in the file\n</file>\n\nrest of @notes.txt it")


PIECES = [
    "word", " ", "\r", "\r", "\t", "\x0e", "\x0f", "\x1b", "@no", "/theme ed", "/undo\r", "/s",
    "\x7f", "\x0a", "/params temperature 1\r",
]  # fmt: skip


def state_after(parts: list[str], folder: Path) -> list[Any]:
    """What is seen and was asked once the keys of each part, at once, have done their work."""
    hold, state = threading.Event(), []
    model = ScriptedModel([Script("never comes to its end", hold=hold)])

    async def body(chat: Chat) -> None:
        await chat.idle()
        for part in parts:
            burst(chat, part)
            await chat.pilot.pause(0.01)
            await chat.until(lambda: chat.app._taking is None)
            await chat.app._settle()
        session = chat.app.session
        state.extend([chat.app.composer.draft.text, [each.text for each in session.queue]])
        state.append([type(screen).__name__ for screen in chat.app.screen_stack])
        state.extend([contents(model), session.sampling, chat.app.theme])
        hold.set()

    drive(body, model, folder=folder, keeps_history=False)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_any_keys_at_once_are_what_they_are_one_by_one(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeinfer.tui.prompt._REPEAT_SECONDS", -1.0)  # no key is held
    text = "".join(random.Random(seed).choices(PIECES, k=25))
    (tmp_path / "notes.txt").write_text("in the file")
    ends = [state_after(parts, tmp_path) for parts in (list(text), [text])]
    assert ends[0] == ends[1]


# -- letters belong in the prompt ----------------------------------------------------------------


def test_letters_are_commands_only_where_a_key_marked_a_message() -> None:
    async def body(chat: Chat) -> None:
        prompt, transcript = chat.app.composer.prompt, chat.app.transcript
        await chat.idle()
        await chat.ask("question")
        await chat.pilot.click(transcript, offset=(8, 3))
        await chat.settle()
        assert transcript.selected is not None
        await chat.press(*"there is more")
        assert prompt.text == "there is more" and len(model.asked) == 1
        await chat.press("ctrl+up")  # the one that was clicked, now by a key
        assert chat.app.has_mark
        chat.app.post_message(events.Paste(" pasted"))
        await chat.until(lambda: prompt.text == "there is more pasted")
        await chat.press("tab", *" and", "f8", "x")
        assert prompt.text == "there is more pasted andx"
        chat.app.set_focus(None)
        await chat.press("y")
        assert prompt.text == "there is more pasted andxy" and len(model.asked) == 1
        await chat.press("f8", "r")
        await chat.until(lambda: len(model.asked) == 2)

    model = ScriptedModel()
    drive(body, model)


# -- queued, drafted, attached -------------------------------------------------------------------


def test_what_waits_or_is_written_survives_leaving_a_conversation_or_branch(
    tmp_path: Path,
) -> None:
    async def body(chat: Chat) -> None:
        composer, session = chat.app.composer, chat.app.session
        await chat.idle()
        await chat.ask("first")
        await chat.press("ctrl+r")
        await chat.idle()
        ways = (["f8", "up", "up", "left"], ["undo"], ["ctrl+n"], ["f2", *"first", "enter"])
        for leave in ways:
            await chat.send("go")
            composer.attach(Attachment("a.txt", "attached"))
            await chat.send("one")
            await chat.send("two")
            await chat.press(*"draft")
            if leave == ["undo"]:
                TYPED["undo"](chat.app)  # as the palette does
            else:
                await chat.press(*leave)
            await chat.until(lambda: session.running is None)
            assert composer.prompt.text == "one\ntwo\ndraft" and session.queue == [], leave
            assert [each.text for each in composer.attachments] == ["attached"]
            composer.show(Draft())
            await chat.press("escape")

    drive(body, ScriptedModel([Script(), Script(), SLOW]), folder=tmp_path)


def test_an_edit_keeps_the_draft_and_the_attachments_of_both() -> None:
    async def body(chat: Chat) -> None:
        composer, prompt, session = chat.app.composer, chat.app.composer.prompt, chat.app.session
        await chat.idle()
        composer.attach(Attachment("old.txt", "of old"))
        await chat.ask("first")
        composer.attach(Attachment("new.txt", "of new"))
        await chat.press(*"draft", "ctrl+up", "up", "e")
        assert prompt.text == "first" and composer.attachments[0].name == "old.txt"
        await chat.press(*" changed", "escape")
        assert prompt.text == "draft" and composer.attachments[0].name == "new.txt"
        await chat.press("up")
        assert prompt.text == "first changed"
        await chat.press("down", "ctrl+up", "up", "e", *" anew")
        await chat.press("enter")
        await chat.idle()
        assert prompt.text == "draft" and len(composer.attachments) == 1
        await chat.press("ctrl+up", "up", "e")
        kept, session.model = session.model, None
        await chat.press(*"!", "enter")
        assert prompt.text == "first anew!" and composer.attachments[0].name == "old.txt"
        session.model = kept
        await chat.press("ctrl+n")
        assert prompt.text == "draft" and composer.attachments[0].name == "new.txt"

    model = ScriptedModel()
    drive(body, model)
    assert "of old" in contents(model)[1] and contents(model)[1].endswith("first anew")


def test_a_held_backspace_stops_at_the_text_and_undo_brings_back_what_one_press_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def events_apart(seconds: float) -> None:
        monkeypatch.setattr("edgeinfer.tui.prompt._REPEAT_SECONDS", seconds)

    async def body(chat: Chat) -> None:
        composer = chat.app.composer

        def names() -> list[str]:
            return [each.name for each in composer.attachments]

        await chat.idle()
        for name in "abc":
            composer.attach(Attachment(name, "attached"))
        events_apart(60.0)  # at most, of a key that is held: this machine may be slow
        await chat.press(*"text", *["backspace"] * 12)
        assert composer.prompt.text == "" and names() == ["a", "b", "c"]
        events_apart(-1.0)  # later than any repeat would come
        await chat.press("backspace")
        events_apart(60.0)
        await chat.press("backspace", "backspace")
        assert names() == ["a", "b"]
        await chat.press("left", "backspace", "backspace")  # pressed anew, at whatever speed
        assert names() == ["a"]
        assert "ctrl+_ brings it back" in notice(chat)
        await chat.press("n", "ctrl+underscore")
        assert composer.prompt.text == "" and names() == ["a"]
        await chat.press("ctrl+underscore", "ctrl+underscore", "ctrl+underscore")
        assert names() == ["a", "b", "c"] and composer.prompt.text != ""
        await chat.press("enter")
        await chat.idle()
        await chat.press("ctrl+underscore", "ctrl+u")  # what was sent is not attached again
        assert names() == []

    drive(body)


def test_what_was_written_beside_an_earlier_prompt_is_among_them_then() -> None:
    async def body(chat: Chat) -> None:
        prompt = chat.app.composer.prompt
        prompt.set_history(["one", "two"])
        await chat.idle()
        await chat.press(*"draft", "up", *" more", "up", "down")
        assert prompt.text == "two more"
        await chat.press("down")
        assert prompt.text == "draft"
        await chat.press("up", "up", "enter")
        await chat.idle()
        seen = set()
        for _ in range(6):
            await chat.press("up")
            seen.add(prompt.text)
        assert seen == {"one", "two", "two more", "draft"}

    drive(body)


# -- what is no command, and what commands would replace -----------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/etc/hosts what is it", None),
        ("// comment", None),
        ("/home/me/a file.txt", None),
        ("/*", None),
        ("/ x", None),
        (" /clear", None),
        ("/3 of them", None),
        ("hello /clear", None),
        ("/CLEAR ", ("clear", "")),
        ("/new", ("clear", "")),
        ("/system line\nline", ("system", "line\nline")),
        ("/export  md  a b.md", ("export", "md  a b.md")),
        ("/", "no command /;"),
        ("/tmp", "no command /tmp;"),
        ("/themes", "did you mean /theme?"),
        ("/clear the table please", "/clear takes nothing after it"),
        ("/retry\nthat", "/retry takes nothing after it"),
    ],
)
def test_only_what_is_meant_as_a_command_is_one(
    text: str, found: tuple[str, str] | str | None
) -> None:
    if isinstance(found, str):
        with pytest.raises(ValueError, match=re.escape(found)):
            parse(text)
    else:
        parsed = parse(text)
        assert (parsed and (parsed[0].name, parsed[1])) == found


def test_what_can_not_be_done_stays_written(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")

    async def body(chat: Chat) -> None:
        prompt = chat.app.composer.prompt
        await chat.idle()
        chat.app.composer.attach(Attachment("a.txt", "attached"))
        for text in ("/nonsense", "/clear the table"):
            await chat.send(text)
            assert prompt.text == text and len(chat.app.composer.attachments) == 1
        await chat.send(" /clear is a command")
        await chat.idle()
        await chat.press("up")
        assert prompt.text == " /clear is a command"
        await chat.send("/export mine.txt")
        assert (tmp_path / "mine.txt").read_text() == "precious"
        await chat.until(lambda: "is there already; the same" in notice(chat))
        await chat.send("/export mine.txt")
        assert "/clear is a command" in (tmp_path / "mine.txt").read_text()

    model = ScriptedModel()
    drive(body, model, folder=tmp_path, size=(160, 30))
    assert contents(model)[0].endswith("\n\n/clear is a command")
    assert "attached" in contents(model)[0]


# -- models --------------------------------------------------------------------------------------


class Slow(ScriptedModel):
    """Takes its time to close, and notes in which thread that is."""

    closed_by: threading.Thread | None = None

    def close(self) -> None:
        self.closed_by = threading.current_thread()
        time.sleep(0.3)
        super().close()


def test_a_model_goes_only_for_one_that_can_work_and_off_the_screens_thread() -> None:
    models = {"scripted.gguf": Slow([SLOW]), "next.gguf": Slow([Script("from the next")])}
    opened, hold = list[str](), threading.Event()

    def open_model(path: str, progress: Any) -> ScriptedModel:
        opened.append(path)
        if path not in models:
            hold.wait(120)
            raise InvalidModelError("truncated", path=path)
        models[path].is_closed = False
        return models[path]

    def plan_model(path: str, freed: int = 0) -> Any:
        if path == "typo.gguf":
            raise ModelNotFoundError("no model 'typo.gguf'")
        return models["next.gguf"].plan

    async def body(chat: Chat) -> None:
        session = chat.app.session
        await chat.idle()
        await chat.send("go")
        await chat.until(lambda: "word" in chat.shown)
        await chat.send("/model typo.gguf")
        await chat.until(lambda: "Scripted 1B stays: no model 'typo.gguf'" in chat.screen_text)
        assert session.running is not None and opened == ["scripted.gguf"]
        await chat.send("/model broken.gguf")
        await chat.send("for the next")
        hold.set()
        await chat.until(lambda: len(opened) == 3 and session.is_ready)
        assert notice(chat) == "Scripted 1B stays: truncated (broken.gguf)"
        assert opened[1:] == ["broken.gguf", "scripted.gguf"]
        assert chat.app.composer.prompt.text == "for the next"
        await chat.send("/model next.gguf")
        await chat.send("for the next")
        await chat.until(lambda: "from the next" in chat.shown)
        assert session.model is models["next.gguf"] and models["scripted.gguf"].is_closed
        assert len(chat.app.screen_stack) == 1

    drive(body, open_model=open_model, plan_model=plan_model, size=(120, 30))
    for model in models.values():
        assert model.closed_by not in (None, threading.main_thread())


def test_a_second_model_waits_for_the_first_and_no_dialog_takes_what_is_typed() -> None:
    hold, models = threading.Event(), [ScriptedModel(), ScriptedModel()]

    def open_model(path: str, progress: Any) -> ScriptedModel:
        if path == "scripted.gguf":
            hold.wait(120)
            raise InvalidModelError("truncated", path=path)
        return models[path == "second.gguf"]

    async def body(chat: Chat) -> None:
        await chat.until(lambda: chat.app.session.loader)
        await chat.press(*"typing")
        hold.set()
        await chat.until(lambda: "The model did not load" in chat.screen_text)
        await chat.press(*" on")
        assert chat.app.composer.prompt.text == "typing on"
        hold.clear()
        await chat.send("/model scripted.gguf")
        await chat.send("/model second.gguf")
        hold.set()
        await chat.until(lambda: chat.app.session.model is models[1])
        assert len(chat.app.screen_stack) == 1

    drive(body, models[0], open_model=open_model)


# -- lines, clearing, leaving --------------------------------------------------------------------


def test_lines_begin_clearing_is_undone_and_only_an_empty_prompt_is_left() -> None:
    async def body(chat: Chat) -> None:
        prompt = chat.app.composer.prompt
        await chat.idle()
        await chat.press(*"a", "backslash", "enter", *"b", "alt+enter", *"c", "shift+enter", *"d")
        assert prompt.text == "a\nb\nc\nd" and model.asked == []
        await chat.press("backslash", "backslash", "escape", "x", "backspace", "escape", "escape")
        assert prompt.text == "" and "ctrl+_ brings it back" in notice(chat)
        await chat.press("ctrl+underscore")
        assert prompt.text == "a\nb\nc\nd\\\\"
        await chat.press("enter")  # two are the text's own
        await chat.idle()
        assert contents(model) == ["a\nb\nc\nd\\\\"]
        await chat.press("alt+z")  # even what was sent
        assert prompt.text == "a\nb\nc\nd\\\\"
        await chat.press("home", "ctrl+d")
        assert prompt.text == "a\nb\nc\n\\\\" and not chat.app._exit
        await chat.press("escape", "escape")
        chat.app.composer.attach(Attachment("a.txt", "attached"))
        await chat.press("ctrl+d")
        assert not chat.app._exit
        await chat.press("backspace")
        await chat.until(lambda: not chat.app.composer.attachments)
        await chat.press("ctrl+d")
        await chat.until(lambda: chat.app._exit)

    model = ScriptedModel()
    drive(body, model)


@pytest.mark.skipif(sys.platform == "win32", reason="reads a terminal of Unix")
@pytest.mark.parametrize(
    ("sequence", "key"),
    [
        ("\r", "enter"),
        ("\x1b\r", "alt+enter"),
        ("\x1b[13;2u", "shift+enter"),
        ("\x1b[13;3u", "alt+enter"),
        ("\x1b[27;2;13~", "shift+enter"),
        ("\x1b[27;5;13~", "ctrl+enter"),
        ("\x1f", "ctrl+underscore"),
        ("\x1b[122;3u", "alt+z"),
    ],
)
def test_terminals_write_enter_with_modifiers_in_several_ways(sequence: str, key: str) -> None:
    from edgeinfer.tui.driver import _Parser

    for parts in ([sequence], list(sequence)):
        parser = _Parser(False)
        found = [event for part in parts for event in parser.feed(part)]
        assert [event.key for event in found if isinstance(event, events.Key)] == [key]


# -- the editor ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({"EDITOR": "vim"}, ["vim"]),
        ({"VISUAL": "code --wait", "EDITOR": "vim"}, ["code", "--wait"]),
        ({"VISUAL": " ", "EDITOR": "'my editor' -x"}, ["my editor", "-x"]),
        ({"EDITOR": sys.executable}, [sys.executable]),
        ({}, ["notepad" if sys.platform == "win32" else "vi"]),
    ],
)
def test_the_editor_is_the_one_that_is_asked_for(
    variables: dict[str, str], command: list[str]
) -> None:
    assert editor_command(variables) == command
    with pytest.raises(EdgeInferError, match="EDITOR can't be read"):
        editor_command({"EDITOR": "vim '"})


WRITES = "open(sys.argv[1], 'a').write(' and more')"


@pytest.mark.parametrize(
    ("program", "written", "said"),
    [
        (WRITES, "draft\n and more", ""),
        (f"{WRITES}; sys.exit(3)", "draft\n and more", "ended with 3"),
        ("open(sys.argv[1], 'w')", "", ""),
        ("time.sleep(0.1)", "draft", ""),
        ("pass", "draft", "it may need --wait"),
        ("os.unlink(sys.argv[1])", "draft", "can't be read"),
        ("os.unlink(sys.argv[1]); os.mkdir(sys.argv[1])", "draft", "can't be read"),
        ("open(sys.argv[1], 'wb').write(b'\\xff\\xfe')", "draft", "can't be read"),
        ("open(sys.argv[1], 'wb').truncate(9 << 20)", "draft", "is over 4 MB and stays there"),
        (None, "draft", "can't be started (no such program in PATH); VISUAL or EDITOR names"),
    ],
)
def test_whatever_an_editor_does_the_draft_is_there(
    program: str | None,
    written: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = 0.05 if program == "time.sleep(0.1)" else 600.0  # however slow this machine is
    monkeypatch.setattr("edgeinfer.tui.editor._AT_ONCE_SECONDS", at_once)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = tmp_path / "editor with spaces"
    if program is not None:
        script.write_text(f"#!{sys.executable}\nimport os, sys, time\n{program}\n")
        script.chmod(0o700)
    app, said_lines = SimpleNamespace(), []
    app.settings = SimpleNamespace(
        environment={"EDITOR": str(script) if program else "nosuchprogram"},
        run_editor=platform.run_editor,
    )
    app.suspend, app.say = nullcontext, lambda text, severity: said_lines.append(text)
    try:
        text = write_in_editor(app, "draft")
    except EdgeInferError as error:
        text = "draft"
        said_lines.append(str(error))
    assert text == written
    assert said in said_lines[0] if said else said_lines == []
    left = list(tmp_path.glob("edgeinfer-*"))
    assert len(left) == (said.startswith(("it may", "is over")) or "read" in said)


def test_keys_are_changed_in_the_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_editor(command: Sequence[str], file: Path) -> int:
        text = file.read_text()
        assert "\n# retry = ctrl+r, f5, r\n" in text and text.count("\n#") == len(COMMANDS) + 1
        file.write_text(text.replace("# retry = ctrl+r", "retry = f9"))
        return 0

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.press(*"draft", "ctrl+g")
        assert "this terminal can't be given" in notice(chat)
        monkeypatch.setattr(type(chat.app._driver), "can_suspend", True)
        TYPED["settings"](chat.app)
        assert chat.app.keys.label("retry") == "f9" and chat.app.composer.prompt.text == "draft"

    drive(body, folder=tmp_path, run_editor=run_editor, environment={"EDITOR": "ed"})


def test_an_answer_that_is_over_when_it_is_stopped_lets_nothing_else_begin(tmp_path: Path) -> None:
    model = ScriptedModel([Script("one"), Script("two")])

    async def body(chat: Chat) -> None:
        await chat.idle()
        assert chat.app._timer is not None
        chat.app._timer.pause()  # nobody has looked yet whether the answer is over
        await chat.send("first")
        running = chat.app.session.running
        assert running is not None and running.turn.wait(120)
        await chat.send("second")
        assert [draft.text for draft in chat.app.session.queue] == ["second"]
        await chat.press("ctrl+n")
        assert chat.app.session.running is None and len(model.asked) == 1
        assert chat.app.composer.draft.text == "second"
        assert chat.app.session.conversation.branch() == []

    drive(body, model, folder=tmp_path)
