"""The tables of the history file, and the steps that bring an older file up to date.

Knows nothing of what is read or written there.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeinfer import EdgeInferError, reason_of
from edgeinfer.tui.records import message_tokens, title_tokens

# Step i brings a file from version i to i + 1. Steps are never changed, only added.
_STEPS = (
    """
    CREATE TABLE conversation (
        id INTEGER PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL,
        model TEXT NOT NULL DEFAULT '', leaf INTEGER);
    CREATE TABLE message (
        id INTEGER PRIMARY KEY, parent INTEGER, role TEXT NOT NULL, content TEXT NOT NULL,
        reasoning TEXT NOT NULL DEFAULT '', attachments TEXT NOT NULL DEFAULT '[]',
        state TEXT NOT NULL, details TEXT NOT NULL DEFAULT '{}', created REAL NOT NULL,
        conversation INTEGER NOT NULL REFERENCES conversation(id) ON DELETE CASCADE);
    CREATE INDEX message_conversation ON message (conversation);
    CREATE INDEX conversation_updated ON conversation (updated);
    CREATE TABLE preference (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
    """
    ALTER TABLE conversation ADD COLUMN system TEXT;
    CREATE VIRTUAL TABLE found USING fts5 (text, tokenize = 'unicode61 remove_diacritics 2');
    INSERT INTO found (rowid, text) SELECT id, content FROM message;
    """,
    # Tokens of our own: SQLite's know no words without spaces, and no sign newer than 2012. A
    # title is found by the number of its conversation, less than zero.
    """
    ALTER TABLE conversation ADD COLUMN tags TEXT NOT NULL DEFAULT '';
    DROP TABLE found;
    CREATE VIRTUAL TABLE found USING fts5 (text, tokenize = 'ascii');
    INSERT INTO found (rowid, text) SELECT id, message_tokens(content, attachments) FROM message;
    INSERT INTO found (rowid, text) SELECT -id, title_tokens(title) FROM conversation;
    """,
)
VERSION = len(_STEPS)


_NO_FILE = "it is no file, but a folder or a pipe; move it away"
# What must be there, in a file that claims to be of our version.
_PROBE = (
    "SELECT id, title, created, updated, model, system, leaf, tags FROM conversation LIMIT 0",
    "SELECT id, parent, role, content, reasoning, attachments, state, details, created, "
    "conversation FROM message LIMIT 0",
    "SELECT name, value FROM preference LIMIT 0",
    "SELECT rowid, text FROM found LIMIT 0",
)


def connect(path: Path | None, seconds: float = 0.25) -> sqlite3.Connection:
    """The history file, readable by its owner only; None keeps everything in memory.

    No statement waits longer than `seconds` for another process. Raises sqlite3.Error, OSError, or
    EdgeInferError for a file that is another's or a newer version's.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _claim(path)
    db = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=seconds)
    try:
        db.row_factory = sqlite3.Row
        db.text_factory = lambda data: data.decode("utf-8", "replace")
        db.create_function("message_tokens", 2, message_tokens)
        db.create_function("title_tokens", 1, title_tokens)
        _check_kind(db)  # before anything is written
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("PRAGMA secure_delete=ON")
        migrate(db)
    except BaseException:
        db.close()
        raise
    return db


def _claim(path: Path) -> None:
    """Have the file there, for its owner alone; EdgeInferError for what isn't this user's to open.

    SQLite gives its -wal and -shm files the mode of the file itself.
    """
    if path.is_symlink():
        raise EdgeInferError("it is a link; put the file itself there, or move the link away")
    if path.is_dir():
        raise EdgeInferError(_NO_FILE)
    # Between looking and opening a link may come; of a pipe nobody waits for a reader.
    flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o600)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise EdgeInferError(_NO_FILE)
        if os.name == "posix":
            if status.st_uid != os.geteuid() or status.st_nlink > 1:
                what = "belongs to another user" if status.st_nlink < 2 else "has a second name"
                raise EdgeInferError(f"it {what}; move it away")
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def _check_kind(db: sqlite3.Connection) -> None:
    """Refuse what a newer version or another program has made."""
    version = _version(db)
    if version > VERSION:
        raise EdgeInferError(
            f"it was written by a newer edgeinfer (format {version}, this one knows {VERSION}); "
            "update edgeinfer, or move it away"
        )
    is_empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version < 0 or (version == 0 and not is_empty):
        raise EdgeInferError("it is another program's database; move it away")
    for query in _PROBE if version == VERSION else ():
        db.execute(query)


def migrate(db: sqlite3.Connection) -> None:
    """Run the steps that the file lacks, each as one transaction."""
    version = _version(db)
    while version < VERSION:
        with transaction(db):
            version = _version(db)  # another process may have been first
            if version < VERSION:
                for statement in _STEPS[version].split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {version + 1}")
        version = _version(db)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of what is written inside, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors, a full disk among them.
        if db.in_transaction:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
        raise


def is_damaged(error: Exception) -> bool:
    """Whether the file is not to be touched again, until another lies there."""
    is_passing = any(sign in str(error) for sign in (*_WAITS, *_PASSES))
    return isinstance(error, EdgeInferError) or isinstance(error, sqlite3.Error) and not is_passing


def can_wait(error: Exception) -> bool:
    """Whether the same connection will do once the reason is gone."""
    return isinstance(error, sqlite3.Error) and any(sign in str(error) for sign in _WAITS)


def explain(error: Exception, path: Path) -> str:
    """Why the history is not written, and what to do about it: one line."""
    text = reason_of(error)
    if isinstance(error, EdgeInferError):
        return f"{path} is left alone: {text}"
    if is_damaged(error):
        what = f"{path} is damaged ({text})"
        return f"{what}: move it away, or `edgeinfer history --clear` deletes it"
    if "locked" in text:
        return f"{path} is locked by another program; it is written once that lets go"
    if "full" in text:
        return f"no room for {path}: it is written once there is room on the disk"
    return f"{path} can't be written ({text}); mend that, or set EDGEINFER_HOME to another folder"


# Parts of SQLite's messages: Python 3.10 has no error codes.
_WAITS = ("locked", "full", "readonly")
_PASSES = ("unable to open", "disk I/O", "too big", "memory")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
