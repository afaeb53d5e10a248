"""Conversations in a SQLite file: written as they happen, searched, exported, deleted.

What can't be written is held here and written as soon as that is possible again; `notice` says so.
Knows nothing of widgets or models.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from edgeinfer import EdgeInferError
from edgeinfer.tui import search
from edgeinfer.tui.history_file import HistoryFile
from edgeinfer.tui.records import (
    Header,
    Node,
    Summary,
    columns_of,
    header_of,
    message_tokens,
    node_of,
    summary_of,
    text_of,
    title_tokens,
)
from edgeinfer.tui.schema import transaction

FILE_NAME = "history.db"
T = TypeVar("T")
Times: TypeAlias = tuple[float, float]  # begun, changed

_GONE = (
    "not kept: this conversation was deleted in another window, or the history with it; /save "
    "keeps it anew, /clear begins another"
)


@dataclass(slots=True)
class _Unsaved:
    """What a conversation has become since it was written; all of it where it `is_new`."""

    is_new: bool = False
    columns: dict[str, Any] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)


class Store:
    """The history file; `Store(None)` forgets everything at the end.

    No method but those that say so raises where the file fails. One thread uses it.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = HistoryFile(path)
        self._unsaved: dict[int, _Unsaved] = {}
        self._preferences: dict[str, str] = {}  # those that are not written yet
        self._gone: set[int] = set()  # deleted by others
        self._last_id = 0
        with suppress(EdgeInferError):
            self._file.ask(lambda db: None)

    @property
    def path(self) -> Path | None:
        return self._file.path

    def notice(self, id: int | None) -> str:
        """Why conversation `id` is not being kept; "" while it is."""
        if self._file.trouble:
            return f"not kept: {self._file.trouble}"
        return _GONE if id in self._gone else ""

    def tend(self) -> None:
        """Write what could not be written before; to be called now and then."""
        if (self._file.trouble or self._unsaved) and self._file.may_be_tried:
            self._flush()

    def close(self) -> None:
        """Write what is left, if that is possible; `notice` knows afterwards whether it was."""
        if self._unsaved or self._preferences:
            self._file.try_now(is_last=True)
            self._flush()
        else:
            self._file.trouble = ""  # nothing was said that is not kept
        self._file.close()

    # -- conversations ---------------------------------------------------------------------------

    def add_conversation(self, title: str, model: str, system: str | None) -> int:
        """A new one; it is written with its first message."""
        id = self._new_id()
        columns = {"title": title, "model": model, "system": system, "leaf": None}
        self._unsaved[id] = _Unsaved(is_new=True, columns=columns)
        return id

    def conversation(self, id: int) -> Header | None:
        """None when it was deleted; raises EdgeInferError where the file can't be read."""
        unsaved = self._unsaved.get(id)
        if unsaved is not None and unsaved.is_new:
            return Header(**unsaved.columns)
        query = "SELECT * FROM conversation WHERE id = ?"
        row = self._file.ask(lambda db: db.execute(query, (id,)).fetchone())
        return None if row is None else header_of(row)

    def update_conversation(self, id: int, **columns: str | int | None) -> None:
        """Set `title`, `model`, `system`, `leaf` or `tags`."""
        assert columns.keys() <= {each.name for each in fields(Header)}
        self._changed(id).columns.update(columns)
        self._flush()

    def keep_anew(self, id: int, header: Header, nodes: Iterable[Node]) -> None:
        """Write a whole conversation that others may have deleted."""
        self._gone.discard(id)
        self._unsaved[id] = _Unsaved(True, asdict(header), {node.id: node for node in nodes})
        self._file.try_now()
        self._flush()

    def insert(
        self, conversations: Iterable[tuple[int | None, Header, Iterable[Node], Times]]
    ) -> int:
        """Write whole conversations from elsewhere, all or none; how many were not here yet.

        Messages get numbers of their own, and conversations without one. Raises EdgeInferError
        where the file can't be written.
        """

        def insert(db: sqlite3.Connection) -> int:
            n = 0
            with transaction(db):
                for id, header, nodes, times in conversations:
                    if db.execute("SELECT 1 FROM conversation WHERE id = ?", (id,)).fetchone():
                        continue
                    id = self._new_id() if id is None else id
                    header, renumbered = self._renumbered(header, nodes)
                    _write(db, id, _Unsaved(True, asdict(header), renumbered))
                    query = "UPDATE conversation SET created = ?, updated = ? WHERE id = ?"
                    db.execute(query, (*times, id))
                    n += 1
            return n

        return self._file.ask(insert)

    def _renumbered(self, header: Header, nodes: Iterable[Node]) -> tuple[Header, dict[int, Node]]:
        new: dict[int | None, int] = {}
        kept: dict[int, Node] = {}
        for node in nodes:
            id = new[node.id] = self._new_id()
            parent = new[node.parent] if node.parent is not None else None
            kept[id] = replace(node, id=id, parent=parent)
        leaf = new[header.leaf] if header.leaf is not None else None
        return replace(header, leaf=leaf), kept

    def times(self, id: int) -> Times:
        """When a conversation was begun, and changed."""
        query = "SELECT created, updated FROM conversation WHERE id = ?"
        row = self._file.ask(lambda db: db.execute(query, (id,)).fetchone())
        return (float(row[0]), float(row[1])) if row else (0.0, 0.0)

    def delete_conversation(self, id: int) -> None:
        """Delete it for good; raises EdgeInferError where that fails."""

        def delete(db: sqlite3.Connection) -> None:
            with transaction(db):
                db.execute(
                    "DELETE FROM found WHERE rowid = ? OR rowid IN "
                    "(SELECT id FROM message WHERE conversation = ?)",
                    (-id, id),
                )
                db.execute("DELETE FROM conversation WHERE id = ?", (id,))

        try:
            self._file.ask(delete)
        except EdgeInferError:
            if not self._unsaved.get(id, _Unsaved()).is_new:
                raise
        self._unsaved.pop(id, None)

    def recent(self, limit: int = 200) -> list[Summary]:
        """The latest conversations, newest first."""
        query = f"SELECT {search.SUMMARY} FROM conversation AS c ORDER BY c.updated DESC LIMIT ?"
        kept = map(summary_of, self._rows(query, limit))
        return [*self._new_ones(lambda text: True), *kept][:limit]

    def search(self, words: str, limit: int = 100) -> list[Summary]:
        """Conversations of which a message or the title has all words, the last one unfinished.

        Where none has, those that hold what was typed as it is, within words too.
        """
        words = search.typed(text_of(words))
        if not words:
            return self.recent(limit)
        found = next(
            (rows for each in search.queries(words) if (rows := self._rows(*each, limit))), []
        )
        kept = [summary_of(row, search.excerpt(text_of(row["content"]), words)) for row in found]
        kept.sort(key=lambda each: not search.is_literal(_shown(each), words))
        return [*self._new_ones(lambda text: search.holds(text, words)), *kept][:limit]

    def _new_ones(self, is_sought: Callable[[str], bool]) -> list[Summary]:
        """Conversations that are not in the file, of which a text is sought."""
        now, found = time.time(), []
        for id, each in reversed(self._unsaved.items()):
            title, model = each.columns.get("title", ""), each.columns.get("model", "")
            texts = [title, *(node.content for node in each.nodes.values())]
            if each.is_new and each.nodes and any(map(is_sought, texts)):
                found.append(Summary(id, title, now, model, len(each.nodes)))
        return found

    # -- messages --------------------------------------------------------------------------------

    def add_message(self, conversation: int, node: Node) -> int:
        """Give a new message its id, and make it the end of the conversation's current branch."""
        node.id = self._new_id()
        changed = self._changed(conversation)
        changed.nodes[node.id] = node
        changed.columns["leaf"] = node.id
        self._flush()
        return node.id

    def update_message(self, conversation: int, node: Node) -> None:
        """Write what a message has become; one that still grows is not indexed yet."""
        self._changed(conversation).nodes[node.id] = node
        self._flush()

    def messages(self, conversation: int) -> list[Node]:
        """Oldest first; raises EdgeInferError where the file can't be read."""
        unsaved = self._unsaved.get(conversation, _Unsaved())
        nodes: dict[int, Node] = {}
        if not unsaved.is_new:
            query = "SELECT * FROM message WHERE conversation = ? ORDER BY id"
            rows = self._file.ask(lambda db: db.execute(query, (conversation,)).fetchall())
            nodes = {row["id"]: node_of(row) for row in rows}
        nodes |= unsaved.nodes
        self._last_id = max([self._last_id, *nodes])
        return [nodes[id] for id in sorted(nodes)]

    def prompts(self, limit: int = 200) -> list[str]:
        """What was typed lately, oldest first, each text once."""
        # From the end of the file: all of it would be read to find the latest ones by their text.
        query = (
            "SELECT content FROM message WHERE role = 'user' AND content <> '' "
            "ORDER BY id DESC LIMIT ?"
        )
        latest = dict.fromkeys(text_of(row[0]) for row in self._rows(query, 2 * limit))
        return list(latest)[:limit][::-1]

    # -- preferences -----------------------------------------------------------------------------

    def preference(self, name: str) -> str | None:
        if name in self._preferences:
            return self._preferences[name]
        query = "SELECT value FROM preference WHERE name = ?"
        return next((_path_of(row[0]) for row in self._rows(query, name)), None)

    def set_preference(self, name: str, value: str) -> None:
        self._preferences[name] = value
        self._flush()

    # -- reading and writing ---------------------------------------------------------------------

    def _new_id(self) -> int:
        """Of no other message, whichever process makes it, and larger than what it may follow."""
        now = time.time_ns() // 1000 << 10 | random.getrandbits(10)
        self._last_id = max(now, self._last_id + 1)
        return self._last_id

    def _changed(self, id: int) -> _Unsaved:
        return self._unsaved.setdefault(id, _Unsaved())

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """None where the file can't be read."""
        try:
            return self._file.ask(lambda db: db.execute(query, values).fetchall())
        except EdgeInferError:
            return []

    def _flush(self) -> None:
        """Write all that is not written; where that fails it stays, until the next time."""
        gone: set[int] = set()

        def write(db: sqlite3.Connection) -> None:
            for id, each in self._unsaved.items():
                if id in self._gone or not _write(db, id, each):
                    gone.add(id)
            for name, value in self._preferences.items():
                query = "INSERT OR REPLACE INTO preference VALUES (?, ?)"
                db.execute(query, (name, _column_of(value)))

        if self._file.write(write):
            self._gone |= gone
            self._unsaved, self._preferences = {}, {}


def _column_of(value: str) -> str | bytes:
    """A preference as a column takes it: a path that is not UTF-8 as the bytes that it is."""
    return value if text_of(value) == value else os.fsencode(value)


def _path_of(column: object) -> str:
    return os.fsdecode(column) if isinstance(column, bytes) else text_of(column)


def _write(db: sqlite3.Connection, id: int, unsaved: _Unsaved) -> bool:
    """Write what has changed; False where others have deleted the conversation."""
    now = time.time()
    if unsaved.is_new:
        db.execute(
            "INSERT OR IGNORE INTO conversation (id, title, created, updated) VALUES (?, '', ?, ?)",
            (id, now, now),
        )
    elif not db.execute("SELECT 1 FROM conversation WHERE id = ?", (id,)).fetchone():
        return False
    if unsaved.columns:
        sets = ", ".join(f"{name} = ?" for name in unsaved.columns)
        values = [text_of(v) if isinstance(v, str) else v for v in unsaved.columns.values()]
        db.execute(f"UPDATE conversation SET {sets}, updated = ? WHERE id = ?", (*values, now, id))
    if {"title", "tags"} & unsaved.columns.keys():
        row = db.execute("SELECT title, tags FROM conversation WHERE id = ?", (id,)).fetchone()
        _make_found(db, -id, title_tokens(" ".join(map(text_of, row))))
    for node in unsaved.nodes.values():
        db.execute(
            "INSERT INTO message (id, conversation, parent, role, content, reasoning, attachments,"
            " state, details, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO "
            "UPDATE SET content = excluded.content, reasoning = excluded.reasoning, "
            "state = excluded.state, details = excluded.details",
            (node.id, id, node.parent, *columns_of(node), now),
        )
        if node.state != "partial":
            columns = columns_of(node)
            _make_found(db, node.id, message_tokens(columns[1], columns[3]))
    return True


def _shown(summary: Summary) -> str:
    tags = "".join(f" #{tag}" for tag in summary.tags.split())
    return f"{summary.title}{tags} {summary.snippet}"


def _make_found(db: sqlite3.Connection, id: int, words: str) -> None:
    db.execute("DELETE FROM found WHERE rowid = ?", (id,))
    db.execute("INSERT INTO found (rowid, text) VALUES (?, ?)", (id, words))
