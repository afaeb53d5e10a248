"""The chat history where its file is damaged, locked, full or gone: nothing is lost unsaid."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeinfer import EdgeInferError
from edgeinfer.cli.main import commands
from edgeinfer.tui.archive import clear_history
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.entries import blocks_of
from edgeinfer.tui.history_file import _PATIENCE_SECONDS
from edgeinfer.tui.history_screen import _row
from edgeinfer.tui.notes import answer_note
from edgeinfer.tui.palette import DARK, Palette
from edgeinfer.tui.schema import VERSION
from edgeinfer.tui.store import FILE_NAME, Store


def exchange(conversation: Conversation, text: str) -> None:
    """A question and its answer."""
    question = conversation.ask(text, (), conversation.leaf)
    answer = conversation.answer(question.id)
    answer.content, answer.state = f"answer to {text}", "done"
    conversation.save(answer)


def texts(path: Path, id: int | None) -> list[str]:
    """What another process reads of a conversation."""
    with closing(sqlite3.connect(path)) as db:
        query = "SELECT content FROM message WHERE conversation = ? ORDER BY id"
        return [row[0] for row in db.execute(query, (id,))]


def both(*questions: str) -> list[str]:
    return [text for each in questions for text in (each, f"answer to {each}")]


@contextmanager
def stored(path: Path) -> Iterator[Store]:
    store = Store(path)
    yield store
    store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE_NAME


# -- files that are no sound history -------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(20_000))


def cut(path: Path) -> None:
    with stored(path) as store:
        exchange(Conversation(store), "long " * 5000)
    os.truncate(path, path.stat().st_size // 2 + 100)


def holed(path: Path) -> None:
    """The head is sound: only what is looked up later is not."""
    with stored(path) as store:
        for i in range(40):
            exchange(Conversation(store), f"question {i} " * 100)
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "something").write_text("of value")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")


def foreign(path: Path) -> None:
    """Another program's database, which says that it is of our version."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE message (whatever TEXT)")
        db.execute(f"PRAGMA user_version = {VERSION}")


def half_made(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE conversation (id INTEGER PRIMARY KEY)")


UNSOUND = [garbage, cut, holed, folder, newer, foreign, half_made]
UNSOUND += [pipe] if hasattr(os, "mkfifo") else []


def content_of(path: Path) -> object:
    return path.read_bytes() if path.is_file() else sorted(p.name for p in path.glob("*"))


@pytest.mark.parametrize("damage", UNSOUND)
def test_an_unsound_history_is_named_left_alone_and_replaced_once_it_is_gone(
    path: Path, damage: Callable[[Path], None]
) -> None:
    damage(path)
    before = content_of(path)
    store = Store(path)
    conversation = Conversation(store)
    exchange(conversation, "one")
    exchange(conversation, "two")
    notice = store.notice(conversation.id)
    assert str(path) in notice and "\n" not in notice
    assert "move it away" in notice or "deleted" in notice
    assert store.search("two") and store.recent()
    assert content_of(path) == before
    path.rename(path.with_name("moved"))
    store._file.try_now()
    store.tend()
    assert store.notice(conversation.id) == ""
    assert texts(path, conversation.id) == both("one", "two")
    store.close()


@pytest.mark.parametrize("left", ["-wal", "-shm", "-journal"])
@pytest.mark.parametrize("content", [b"", b"left by another life" * 500, None])
def test_what_lies_beside_the_history_harms_nothing(
    path: Path, left: str, content: bytes | None
) -> None:
    with stored(path) as store:
        first = Conversation(store)
        exchange(first, "one")
    beside = Path(f"{path}{left}")
    beside.mkdir() if content is None else beside.write_bytes(content)
    store = Store(path)
    second = Conversation(store)
    exchange(second, "two")
    is_kept = store.notice(second.id) == ""
    store.close()
    if beside.is_dir():
        beside.rmdir()
    assert texts(path, first.id) == both("one")
    if is_kept:
        assert texts(path, second.id) == both("two")


def test_an_empty_file_becomes_a_history(path: Path) -> None:
    path.touch()
    with stored(path) as store:
        conversation = Conversation(store)
        exchange(conversation, "one")
        assert store.notice(conversation.id) == ""
    assert texts(path, conversation.id) == both("one")


VALUES: list[Any] = [
    None, 0, -1, 7, 1 << 62, 1.5, 1e300, float("inf"), "", "text", "\x1b[2J", "é" * 300, b"\xff\0",
    "[]", "{}", "[[]]", '[["a", 1, 2]]', '{"n_tokens": "x", "tok_s": [], "thinking_s": null}',
    '{"error": "\\ud800", "logprobs": [1, [2]]}', '{"thinking_s": 1e999, "n_tokens": 1e999}',
    "[" * 100_000, "null", "9" * 5000,
]  # fmt: skip


def test_rows_of_any_content_are_read_and_drawn(path: Path) -> None:
    with stored(path) as store:
        conversations = [Conversation(store, "a model") for _ in range(40)]
        for conversation in conversations:
            exchange(conversation, "one")
            exchange(conversation, "two")
    chance = random.Random(2)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        for table in ("conversation", "message"):
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")][1:]
            for (id,) in db.execute(f"SELECT id FROM {table}").fetchall():
                name, value = chance.choice(columns), chance.choice(VALUES)
                if name != "conversation":
                    try:
                        db.execute(f"UPDATE {table} SET {name} = ? WHERE id = ?", (value, id))
                    except sqlite3.IntegrityError:  # NOT NULL
                        continue
        # Parents in a circle would be followed for ever.
        db.execute("UPDATE message SET parent = id WHERE id % 3 = 0")
        db.execute("UPDATE message SET parent = id + 1 WHERE id % 3 = 1")
        db.commit()
    with stored(path) as store:
        palette = Palette.of(DARK)
        assert len([_row(summary, palette) for summary in store.recent()]) == 40
        store.prompts()
        for conversation in conversations:
            assert conversation.id is not None
            found = Conversation.load(store, conversation.id)
            assert found is not None and found.branch()
            for node in found.branch():
                blocks_of(node, answer_note(node, found.place(node)))
            exchange(found, "three")
            assert found.branch()[-1].content == "answer to three"
        assert store.notice(None) == ""


def test_text_that_no_encoding_takes_is_kept_as_far_as_it_goes(path: Path) -> None:
    with stored(path) as store:
        conversation = Conversation(store)
        exchange(conversation, "half of a pair: \ud83d")
        assert store.notice(conversation.id) == ""
    assert texts(path, conversation.id)[0] == "half of a pair: ?"


# -- locks ---------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, mode: str = "EXCLUSIVE") -> Iterator[None]:
    """As another program would hold it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        if mode == "WHOLE":
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE" if mode == "IMMEDIATE" else "BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("mode", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_lock_is_not_waited_for_and_what_was_said_meanwhile_is_kept(
    path: Path, mode: str
) -> None:
    with stored(path) as store:
        conversation = Conversation(store)
        exchange(conversation, "one")
        with locked(path, mode):
            start = time.monotonic()
            for i in range(40):
                exchange(conversation, f"locked {i}")
            store.set_preference("theme", "dark")
            assert store.preference("theme") == "dark"
            store.search("anything")
            store.prompts()
            assert time.monotonic() - start < 40 * _PATIENCE_SECONDS  # but once
            assert "locked" in store.notice(conversation.id)
            assert str(path) in store.notice(conversation.id)
        store._file.try_now()
        store.tend()
        assert store.notice(conversation.id) == ""
        asked = ["one", *(f"locked {i}" for i in range(40))]
        assert texts(path, conversation.id) == both(*asked)


@pytest.mark.parametrize("is_made", [False, True])
def test_a_history_that_is_locked_at_the_start_is_taken_up_later(path: Path, is_made: bool) -> None:
    if is_made:
        with stored(path) as store:
            exchange(Conversation(store), "before")
    with locked(path, "WHOLE"):
        start = time.monotonic()
        store = Store(path)
        conversation = Conversation(store)
        exchange(conversation, "one")
        for _ in range(40):
            store.recent()
        assert time.monotonic() - start < 40 * _PATIENCE_SECONDS  # but once
        assert "locked" in store.notice(conversation.id)
        assert [each.title for each in store.recent()] == ["one"]
    store._file.try_now()
    store.tend()
    assert store.notice(conversation.id) == ""
    assert texts(path, conversation.id) == both("one")
    assert len(store.recent()) == 1 + is_made
    store.close()


def test_a_lock_that_lasts_to_the_end_is_said_then(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeinfer.tui.history_file._LAST_WAIT_SECONDS", 0.3)
    store = Store(path)
    conversation = Conversation(store)
    with locked(path):
        exchange(conversation, "one")
        store.close()  # the lock stays: it would hang
        assert "locked" in store.notice(conversation.id)


# -- full disks ----------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_that_still_fits_later(path: Path) -> None:
    with stored(path) as store:
        conversation = Conversation(store)
        exchange(conversation, "one")
        assert store._file._db is not None
        (n,) = store._file._db.execute("PRAGMA page_count").fetchone()
        store._file._db.execute(f"PRAGMA max_page_count = {n}")  # SQLite says that the disk is full
        long = "word " * 20_000
        exchange(conversation, long)
        assert "no room" in store.notice(conversation.id)
        assert str(path) in store.notice(conversation.id)
        assert texts(path, conversation.id) == both("one")
        assert store.search("one")
        store._file._db.execute("PRAGMA max_page_count = 100000")
        store.tend()
        exchange(conversation, "two")
        assert store.notice(conversation.id) == ""
        assert texts(path, conversation.id) == both("one", long, "two")


# -- files that go -------------------------------------------------------------------------------


def unlink(path: Path) -> None:
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink()


def clear(path: Path) -> None:
    assert clear_history(path.parent) == 1


def delete_one(path: Path) -> None:
    with stored(path) as other:
        other.delete_conversation(other.recent()[0].id)


def replace(path: Path) -> None:
    with stored(path.with_name("new.db")) as other:
        exchange(Conversation(other), "of another file")
    unlink(path)
    path.with_name("new.db").rename(path)


@pytest.mark.parametrize("delete", [unlink, clear, delete_one, replace])
def test_a_conversation_that_others_delete_is_not_kept_unless_it_is_saved(
    path: Path, delete: Callable[[Path], None]
) -> None:
    with stored(path) as store:
        conversation = Conversation(store)
        exchange(conversation, "one")
        delete(path)
        exchange(conversation, "two")
        assert "/save" in store.notice(conversation.id)
        assert [node.content for node in conversation.branch()] == both("one", "two")
        assert texts(path, conversation.id) == []
        other = Conversation(store)
        exchange(other, "kept")
        assert store.notice(other.id) == "" and texts(path, other.id) == both("kept")
        conversation.keep()
        exchange(conversation, "three")
        assert store.notice(conversation.id) == ""
    assert texts(path, conversation.id) == both("one", "two", "three")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_history_that_is_read_only_is_said(path: Path) -> None:
    with stored(path) as store:
        exchange(Conversation(store), "one")
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        store = Store(path)
        conversation = Conversation(store)
        exchange(conversation, "two")
        assert "can't be written" in store.notice(conversation.id)
    finally:
        path.parent.chmod(0o700)


# -- whatever happens ----------------------------------------------------------------------------


class Window:
    """A store with the conversation that is open in it, and what it has acknowledged."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path, self.chance = path, chance
        self.store = Store(path)
        self.conversation = Conversation(self.store)
        self.kept: dict[int, list[str]] = {}

    def act(self, n: int) -> None:
        act = self.chance.choice([self.say] * 6 + [self.begin, self.open, self.delete, self.wait])
        act(n)
        conversation = self.conversation
        if conversation.id is not None and not self.store.notice(conversation.id):
            self.kept[conversation.id] = [node.content for node in conversation.branch()]

    def say(self, n: int) -> None:
        exchange(self.conversation, f"{n} " * self.chance.choice([1, 3000]))

    def begin(self, n: int) -> None:
        self.conversation = Conversation(self.store)

    def open(self, n: int) -> None:
        listed = self.store.recent()
        if listed:
            try:
                found = Conversation.load(self.store, self.chance.choice(listed).id)
            except EdgeInferError:
                return
            self.conversation = found or self.conversation

    def delete(self, n: int) -> None:
        others = [each.id for each in self.store.recent() if each.id != self.conversation.id]
        if others:
            id = self.chance.choice(others)
            try:
                self.store.delete_conversation(id)
            except EdgeInferError:
                return
            self.kept.pop(id, None)

    def wait(self, n: int) -> None:
        self.store._file.try_now()
        self.store.tend()


def run_windows(path: Path, seed: int, n_steps: int) -> int:
    """Two windows on one file, locked and full by turns; how many conversations were kept."""
    chance = random.Random(seed)
    windows = [Window(path, chance), Window(path, chance)]
    for n in range(n_steps):
        window = chance.choice(windows)
        fault = chance.random()
        if fault < 0.15:
            with locked(path, chance.choice(["IMMEDIATE", "EXCLUSIVE"])):
                window.act(n)
        elif fault < 0.3 and window.store._file._db is not None:
            db = window.store._file._db
            limit = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {limit}")
            window.act(n)
            db.execute("PRAGMA max_page_count = 1000000")
        else:
            window.act(n)
    for window in windows:
        window.store.close()
    # What either window kept is there unless the other one deleted it; nobody else does.
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        there = {row[0] for row in db.execute("SELECT id FROM conversation")}
    deleted = windows[0].kept.keys() ^ windows[1].kept.keys()
    for window in windows:
        for id, said in window.kept.items():
            found = texts(path, id)
            assert id in there or id in deleted, f"seed {seed}: conversation {id} is lost"
            assert id not in there or set(said) <= set(found), f"seed {seed}: messages are lost"
    return len(there)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_acknowledged_is_there(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeinfer.tui.history_file._PATIENCE_SECONDS", 0.01)
    assert run_windows(path, seed, 60) > 0


@pytest.mark.slow
def test_what_was_acknowledged_is_there_in_many_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeinfer.tui.history_file._PATIENCE_SECONDS", 0.01)
    for seed in range(100, 300):
        (tmp_path / str(seed)).mkdir()
        run_windows(tmp_path / str(seed) / FILE_NAME, seed, 80)


# -- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [None, *UNSOUND])
def test_the_history_command_says_what_it_finds(
    tmp_path: Path, damage: Callable[[Path], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path))
    path = tmp_path / "data" / FILE_NAME
    path.parent.mkdir()
    if damage is None:
        with stored(path) as store:
            exchange(Conversation(store), "one")
    else:
        damage(path)
    shown = CliRunner().invoke(commands, ["history"])
    assert shown.exit_code == 0 and str(path) in shown.stdout
    if damage in (garbage, folder, pipe, foreign):
        assert "can't be read" in shown.stderr
    cleared = CliRunner().invoke(commands, ["history", "--clear", "-y"])
    if damage is folder:
        assert isinstance(cleared.exception, EdgeInferError)
        assert str(path) in str(cleared.exception) and path.is_dir()
    else:
        assert "deleted" in cleared.stdout and not list(path.parent.iterdir())
