"""The chat screen where the history fails: it goes on, says what is not kept, and loses nothing."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from textual.widgets import Static

from edgeinfer.tui.archive import clear_history
from edgeinfer.tui.store import FILE_NAME, Store
from tests.test_history_faults import both, locked, texts
from tests.test_tui_chat import Chat, drive
from tests.tui_engine import Script, ScriptedModel


def answering() -> ScriptedModel:
    return ScriptedModel([Script(f"answer to {text}") for text in ("one", "two", "three")])


def flat(chat: Chat) -> str:
    """What the terminal shows, its lines joined."""
    return " ".join(chat.screen_text.split())


def test_a_locked_history_holds_up_nothing_and_gets_all_of_it_later(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    Store(path).close()

    async def body(chat: Chat) -> None:
        await chat.idle()
        with locked(path):
            await chat.ask("one")
            await chat.ask("two")
            chat.app.composer.prompt.set_text("typed")
            await chat.until(lambda: "is locked by another program" in flat(chat))
            assert "not kept" in chat.screen_text.splitlines()[1]
            assert "answer to two" in chat.shown and chat.app.composer.prompt.text == "typed"
        await chat.until(lambda: "is locked" not in flat(chat))
        assert "not kept" not in flat(chat)
        assert texts(path, chat.app.session.conversation.id) == both("one", "two")

    drive(body, answering(), folder=tmp_path)


def test_a_history_that_is_garbage_is_said_for_as_long_as_the_chat_lasts(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(b"garbage" * 1000)

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("one")
        await chat.until(lambda: "is damaged" in flat(chat))
        await chat.send("/clear")
        await chat.ask("two")
        await chat.press("ctrl+o")
        await chat.settle()
        assert "one" in chat.screen_text and "damaged" in chat.screen_text
        await chat.press("down", "enter")
        await chat.settle()
        assert "answer to one" in chat.shown
        await chat.send("/save")
        await chat.send("/theme textual-dark")
        assert "edgeinfer history --clear" in flat(chat)

    drive(body, answering(), folder=tmp_path, size=(160, 30))
    assert path.read_bytes() == b"garbage" * 1000


def test_a_history_that_another_window_clears_is_said_and_can_be_saved_anew(
    tmp_path: Path,
) -> None:
    path = tmp_path / FILE_NAME

    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("one")
        clear_history(tmp_path)
        await chat.ask("two")
        await chat.until(lambda: "deleted in another window" in flat(chat))
        assert "answer to one" in chat.shown
        await chat.send("/save")
        await chat.until(lambda: "deleted in another window" not in flat(chat))
        assert texts(path, chat.app.session.conversation.id) == both("one", "two")

    drive(body, answering(), folder=tmp_path)


def test_a_conversation_deleted_behind_the_list_opens_no_other(tmp_path: Path) -> None:
    async def body(chat: Chat) -> None:
        await chat.idle()
        await chat.ask("one")
        await chat.send("/clear")
        await chat.ask("two")
        await chat.press("ctrl+o")
        await chat.settle()
        with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
            db.execute("DELETE FROM conversation WHERE title = 'one'")
            db.commit()
        await chat.press("down", "enter")
        await chat.settle()
        assert "answer to two" in chat.shown
        notice = str(chat.app.composer.query_one("#notice", Static).content)
        assert notice == "that conversation was deleted in another window"

    drive(body, answering(), folder=tmp_path)


BROKEN_CHAT = """
import sys
from edgeinfer.cli.main import main
from edgeinfer.tui.app import ChatApp

def fail(self):
    self.composer.prompt.set_text("what was typed")
    raise RuntimeError("a mistake of ours")

ChatApp._begin = fail
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("is_debug", [False, True])
def test_a_chat_that_ends_by_an_error_exits_with_1_and_a_line(
    tmp_path: Path, is_debug: bool
) -> None:
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-c", BROKEN_CHAT, "chat", *(["--debug"] if is_debug else [])]
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child,
        env={**os.environ, "EDGEINFER_HOME": str(tmp_path), "TERM": "xterm"},
    )  # fmt: skip
    os.close(child)
    seen = b""
    try:
        while chunk := os.read(parent, 65536):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(parent)
    assert process.wait(120) == 1
    assert b"edgeinfer: unexpected RuntimeError: a mistake of ours (--debug shows where)" in seen
    assert b"not sent: what was typed" in seen
    assert (b"Traceback" in seen) == is_debug
