"""Searching the history: any script, any piece of a text without spaces, titles, and any input."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.records import Header, Node
from edgeinfer.tui.schema import _STEPS, VERSION
from edgeinfer.tui.search import excerpt, holds, tokens
from edgeinfer.tui.store import FILE_NAME, Store

TEXTS = {
    "weather": "今天天气很好",
    "code": 'my_var = "x" OR y; it costs 100% -> C++ 🤖sure',
    "cafe": "Un café dans la Straße, ΟΔΟΣ, e\u0301te\u0301",
    "thai": "วันนี้อากาศดี",
    "kana": "プログラムを書く",
    "hangul": "오늘날씨가 좋다",
    "hindi": "मौसम अच्छा है",
}
FOUND = {
    "天气": "weather", "天": "weather", "气很": "weather", "今天 好": "weather",
    "100%": "code", "%": "code", "_": "code", '"x" OR': "code", "->": "code", "c++": "code",
    "🤖": "code", "MY_VAR": "code", "ure": "code", "-y": "code",
    "cafe": "cafe", "CAFÉ": "cafe", "strasse": "cafe", "STRASSE": "cafe", "οδος": "cafe",
    "été": "cafe", "ete": "cafe", "อากาศ": "thai", "ラム": "kana", "ﾗﾑ": "kana", "书": None,
    "날씨": "hangul", "मौसम": "hindi", "अच्छा": "hindi", "NEAR(": None, "title:": None,
    "x\0y": "code", "\ud800": None, "é" * 4000: None, "' OR 1=1 --": None, "*": None, "!": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("history") / FILE_NAME)
    for title, text in TEXTS.items():
        say(store, text, title)
    return store


def say(store: Store, text: str, title: str = "") -> Conversation:
    conversation = Conversation(store)
    conversation.ask(text, (), None)
    if title:
        conversation.rename(title)
    return conversation


@pytest.mark.parametrize("words", FOUND)
def test_what_is_typed_is_found_literally_in_any_script(store: Store, words: str) -> None:
    titles = [each.title for each in store.search(words)][:1]
    assert titles == ([FOUND[words]] if FOUND[words] else []) and store.notice(None) == ""


def test_titles_are_found_as_they_are_now(tmp_path: Path) -> None:
    store = Store(tmp_path / FILE_NAME)
    conversation = say(store, "a question", "Über das Wetter 天气预报")
    assert [len(store.search(words)) for words in ("uber", "预报", "wetter 天")] == [1, 1, 1]
    conversation.rename("another")
    assert store.search("wetter") == [] and len(store.search("another")) == 1
    assert conversation.id is not None
    store.delete_conversation(conversation.id)
    assert store.search("another") == [] == store.search("question")
    store.close()


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=60))
def test_no_text_and_no_query_is_too_odd(text: str) -> None:
    store = Store(None)
    say(store, text + "x")
    for words in (text, text[: len(text) // 2], text.upper()):
        store.search(words)
        assert store.notice(None) == ""
        excerpt(text, words)
    assert len(store.search("x")) == 1 or tokens(text)
    store.close()


@settings(max_examples=30, deadline=None)
@given(st.text("天气很好今日本語カナ한글🤖", min_size=1, max_size=12), st.data())
def test_any_piece_of_a_text_without_spaces_is_found(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    piece = text[start : data.draw(st.integers(start + 1, len(text)))]
    store = Store(None)
    say(store, f"before{text}after")
    (found,) = store.search(piece)
    assert piece in found.title + found.snippet and holds(text, piece)
    store.close()


@pytest.mark.parametrize("version", [1, 2])
def test_older_files_are_searched_alike_and_lose_nothing(tmp_path: Path, version: int) -> None:
    path = tmp_path / FILE_NAME
    with closing(sqlite3.connect(path)) as db:
        for step in _STEPS[:version]:
            db.executescript(step)
        db.execute(
            "INSERT INTO conversation (id, title, created, updated) VALUES (7, '旧标题', 1, 1)"
        )
        db.execute(
            "INSERT INTO message (role, content, attachments, state, created, conversation) VALUES "
            "('user', '今天天气很好', '[[\"notes.txt\", \"\", null]]', 'done', 1, 7)"
        )
        db.execute(
            "INSERT INTO message (role, content, state, created, conversation) VALUES "
            "('assistant', x'ff00', 'done', 1, 7)"
        )  # a column may hold anything
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()
    store = Store(path)
    for words in ("天气", "标题", "notes"):
        assert [each.id for each in store.search(words)] == [7], words
    assert [node.content for node in store.messages(7)] == ["今天天气很好", "\ufffd\0"]
    store.close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)


def test_what_was_typed_lately_is_read_from_the_end_of_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / FILE_NAME)
    conversation = Conversation(store)
    texts = [f"question {i % 300}" for i in range(2000)]
    nodes = [Node(i + 1, i or None, "user", text) for i, text in enumerate(texts)]
    store.insert([(None, Header("many", "", None, 2000), nodes, (0.0, 0.0))])
    conversation.ask("the last one", (), None)
    steps: list[int] = []
    assert store._file._db is not None
    store._file._db.set_progress_handler(lambda: steps.append(1), 1000)
    assert store.prompts() == [*texts[-199:], "the last one"]
    assert len(steps) < 20
    store.close()
