"""The tables of the history file, and the steps that bring an older file up to date.

Knows nothing of what is read or written there.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

from edgeinfer import EdgeInferError

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
)
VERSION = len(_STEPS)


def connect(path: Path | None) -> sqlite3.Connection:
    """The history file, readable by its owner only; None keeps everything in memory."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _claim(path)
    db = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=5.0)
    try:
        db.row_factory = sqlite3.Row
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
    # Between looking and opening a link may come; of a pipe nobody waits for a reader.
    flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o600)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise EdgeInferError("it is no file, but a folder or a pipe; move it away")
        if os.name == "posix":
            if status.st_uid != os.geteuid() or status.st_nlink > 1:
                what = "belongs to another user" if status.st_nlink < 2 else "has a second name"
                raise EdgeInferError(f"it {what}; move it away")
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def migrate(db: sqlite3.Connection) -> None:
    """Run the steps that the file lacks, each as one transaction."""
    version = _version(db)
    if version > VERSION:
        raise EdgeInferError(
            f"the chat history was written by a newer edgeinfer (format {version}, this one "
            f"knows {VERSION}); update edgeinfer, or use --no-history"
        )
    while version < VERSION:
        db.execute("BEGIN IMMEDIATE")
        try:
            version = _version(db)  # another process may have been first
            if version < VERSION:
                for statement in _STEPS[version].split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {version + 1}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise
        version = _version(db)


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
