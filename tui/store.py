"""Conversations in a SQLite file: written as they happen, searched, exported, deleted.

Knows nothing of widgets or models.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from edgeinfer.tui.schema import connect

FILE_NAME = "history.db"
State: TypeAlias = Literal["done", "partial", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """A text that goes with a message; `n_tokens` None until it was counted."""

    name: str
    text: str
    n_tokens: int | None = None


@dataclass(slots=True, eq=False)
class Node:
    """A message of the tree. An answer is `partial` from its first token to its end."""

    id: int
    parent: int | None
    role: str
    content: str
    reasoning: str = ""
    attachments: tuple[Attachment, ...] = ()
    state: State = "done"
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """A line of the list of conversations; `snippet` is where a search matched."""

    id: int
    title: str
    updated: float
    model: str
    n_messages: int
    snippet: str = ""


class Store:
    """The history file; `Store(None)` forgets everything at the end."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._db = connect(path)

    def close(self) -> None:
        self._db.close()

    # -- conversations ---------------------------------------------------------------------------

    def add_conversation(self, title: str, model: str, system: str | None) -> int:
        now = time.time()
        row = self._db.execute(
            "INSERT INTO conversation (title, created, updated, model, system) "
            "VALUES (?, ?, ?, ?, ?)",
            (title, now, now, model, system),
        )
        assert row.lastrowid is not None
        return row.lastrowid

    def conversation(self, id: int) -> sqlite3.Row | None:
        """Its columns, None when it was deleted."""
        row = self._db.execute("SELECT * FROM conversation WHERE id = ?", (id,)).fetchone()
        return row if isinstance(row, sqlite3.Row) else None

    def update_conversation(self, id: int, **columns: str | int | None) -> None:
        """Set `title`, `model`, `system` or `leaf`."""
        assert columns.keys() <= {"title", "model", "system", "leaf"}
        sets = ", ".join(f"{name} = ?" for name in columns)
        self._db.execute(
            f"UPDATE conversation SET {sets}, updated = ? WHERE id = ?",
            (*columns.values(), time.time(), id),
        )

    def delete_conversation(self, id: int) -> None:
        with self._transaction():
            self._db.execute(
                "DELETE FROM found WHERE rowid IN (SELECT id FROM message WHERE conversation = ?)",
                (id,),
            )
            self._db.execute("DELETE FROM conversation WHERE id = ?", (id,))

    def recent(self, limit: int = 200) -> list[Summary]:
        """The latest conversations, newest first."""
        rows = self._db.execute(
            "SELECT id, title, updated, model, (SELECT count(*) FROM message "
            "WHERE conversation = c.id) AS n, '' AS snippet FROM conversation AS c "
            "ORDER BY updated DESC LIMIT ?",
            (limit,),
        )
        return [_summary(row) for row in rows]

    def search(self, words: str, limit: int = 100) -> list[Summary]:
        """Conversations whose messages hold all words, the last one possibly unfinished."""
        terms = re.findall(r"\w+", words)
        if not terms:
            return self.recent(limit)
        query = " ".join(f'"{term}"' for term in terms[:-1]) + f' "{terms[-1]}"*'
        rows = self._db.execute(
            "WITH hit AS (SELECT rowid AS id, snippet(found, 0, '', '', '…', 12) AS snippet, rank "
            "FROM found WHERE found MATCH ? ORDER BY rank LIMIT 1000) "
            "SELECT c.id, c.title, c.updated, c.model, hit.snippet, min(hit.rank), "
            "(SELECT count(*) FROM message WHERE conversation = c.id) AS n "
            "FROM hit JOIN message AS m ON m.id = hit.id JOIN conversation AS c "
            "ON c.id = m.conversation GROUP BY c.id ORDER BY min(hit.rank), c.updated DESC LIMIT ?",
            (query.strip(), limit),
        )
        return [_summary(row) for row in rows]

    # -- messages --------------------------------------------------------------------------------

    def add_message(self, conversation: int, node: Node) -> int:
        """Write a new message and make it the end of the conversation's current branch."""
        with self._transaction():
            row = self._db.execute(
                "INSERT INTO message (conversation, parent, role, content, reasoning, attachments,"
                " state, details, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (conversation, node.parent, *_columns(node), time.time()),
            )
            assert row.lastrowid is not None
            self._db.execute(
                "UPDATE conversation SET leaf = ?, updated = ? WHERE id = ?",
                (row.lastrowid, time.time(), conversation),
            )
            self._index(row.lastrowid, node)
        return row.lastrowid

    def update_message(self, node: Node) -> None:
        """Write what a message has become; one that still grows is not indexed yet."""
        with self._transaction():
            self._db.execute(
                "UPDATE message SET role = ?, content = ?, reasoning = ?, attachments = ?, "
                "state = ?, details = ? WHERE id = ?",
                (*_columns(node), node.id),
            )
            self._index(node.id, node)

    def messages(self, conversation: int) -> list[Node]:
        rows = self._db.execute(
            "SELECT * FROM message WHERE conversation = ? ORDER BY id", (conversation,)
        )
        return [_node(row) for row in rows]

    def prompts(self, limit: int = 200) -> list[str]:
        """What was typed lately, oldest first, each text once."""
        rows = self._db.execute(
            "SELECT content, max(id) AS last FROM message WHERE role = 'user' AND content <> '' "
            "GROUP BY content ORDER BY last DESC LIMIT ?",
            (limit,),
        )
        return [str(row["content"]) for row in rows][::-1]

    # -- preferences -----------------------------------------------------------------------------

    def preference(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM preference WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_preference(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO preference VALUES (?, ?)", (name, value))

    # -- inside ----------------------------------------------------------------------------------

    def _index(self, id: int, node: Node) -> None:
        if node.state == "partial":
            return
        text = "\n".join([node.content, *(each.name for each in node.attachments)])
        self._db.execute("DELETE FROM found WHERE rowid = ?", (id,))
        self._db.execute("INSERT INTO found (rowid, text) VALUES (?, ?)", (id, text))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise


def clear_history(data_folder: Path) -> int:
    """Delete the history file; the number of conversations that were in it."""
    path = data_folder / FILE_NAME
    if not path.exists():
        return 0
    db = sqlite3.connect(path)
    try:
        (n,) = db.execute("SELECT count(*) FROM conversation").fetchone()
    except sqlite3.DatabaseError:
        n = 0
    finally:
        db.close()
    for suffix in ("-wal", "-shm", ""):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    return int(n)


def _columns(node: Node) -> tuple[str, ...]:
    attachments = [[each.name, each.text, each.n_tokens] for each in node.attachments]
    return (
        node.role, node.content, node.reasoning, json.dumps(attachments), node.state,
        json.dumps(node.details),
    )  # fmt: skip


def _node(row: sqlite3.Row) -> Node:
    return Node(
        id=row["id"],
        parent=row["parent"],
        role=row["role"],
        content=row["content"],
        reasoning=row["reasoning"],
        attachments=tuple(Attachment(*each) for each in json.loads(row["attachments"])),
        state=row["state"],
        details=json.loads(row["details"]),
    )


def _summary(row: sqlite3.Row) -> Summary:
    return Summary(
        row["id"], row["title"], row["updated"], row["model"], row["n"], row["snippet"] or ""
    )
