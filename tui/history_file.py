"""The history file: opened when it is needed, left alone where it fails, tried again later.

Knows nothing of what is read or written there.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from edgeinfer import EdgeInferError
from edgeinfer.tui.schema import can_wait, connect, explain, is_damaged, transaction

T = TypeVar("T")

_PATIENCE_SECONDS = 0.25  # with a lock
_RETRY_SECONDS = 1.0
_LAST_WAIT_SECONDS = 2.0  # at the end, for another program to let go


class _NotNow(Exception):
    """The file failed a moment ago: it is not tried again yet."""


_FAULTS = (sqlite3.Error, OSError, EdgeInferError, _NotNow)


class HistoryFile:
    """`trouble` says why it could not be used, until something was written again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.trouble = ""
        self._db: sqlite3.Connection | None = None
        self._opened: tuple[float, ...] = ()  # which file that is
        self._patience = _PATIENCE_SECONDS
        self._retry_at = 0.0
        self._refused: tuple[float, ...] | None = None  # the damaged file, as it was

    def ask(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """What the file says; EdgeInferError where it says nothing."""
        try:
            return query(self._connection())
        except _FAULTS as error:
            self._fail(error)
            raise EdgeInferError(f"the history can't be used now: {self.trouble}") from error

    def write(self, write: Callable[[sqlite3.Connection], None]) -> bool:
        """Whether all of it is written; else nothing is."""
        try:
            db = self._connection()
            with transaction(db):
                write(db)
        except _FAULTS as error:
            self._fail(error)
            return False
        self.trouble = ""
        self._wait_at_most(_PATIENCE_SECONDS)
        return True

    @property
    def may_be_tried(self) -> bool:
        """Whether it is some time since it failed."""
        return time.monotonic() >= self._retry_at

    def try_now(self, *, is_last: bool = False) -> None:
        """Do not wait any longer for it to be tried again; the last time be patient with locks."""
        self._retry_at = 0.0
        if is_last:
            self._wait_at_most(_LAST_WAIT_SECONDS)

    def close(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
        self._db = None

    def _connection(self) -> sqlite3.Connection:
        """Opened anew where another file, or none, lies at the path."""
        if self._db is not None and self._opened != self._file_now():
            self.close()
        if self._db is None:
            is_refused = self._refused is not None and self._refused == self._state_now()
            if not self.may_be_tried or is_refused:
                raise _NotNow
            self._db = connect(self.path, self._patience)
            self._opened = self._file_now()
        return self._db

    def _fail(self, error: Exception) -> None:
        """Note why the file can't be used; what it said of itself stays where it was not asked."""
        if isinstance(error, _NotNow) or self.path is None:
            return
        self.trouble = explain(error, self.path)
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        if not can_wait(error):
            self.close()
        self._wait_at_most(0.0)
        self._refused = self._state_now() if is_damaged(error) else None

    def _wait_at_most(self, seconds: float) -> None:
        """For a lock: no longer than nobody notices, and not again while one is known."""
        if self._db is not None and seconds != self._patience:
            self._db.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")
        self._patience = seconds

    def _state_now(self) -> tuple[float, ...] | None:
        """Whether the file, or what is in it, is another than before."""
        try:
            found = os.stat(self.path or "")
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _file_now(self) -> tuple[float, ...]:
        return (self._state_now() or ())[:2]
