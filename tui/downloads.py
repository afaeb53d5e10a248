"""Models that are being fetched: one at a time, in a thread, whatever is on the screen meanwhile.

Knows nothing of widgets.
"""

from __future__ import annotations

import time

from edgeinfer.tui.gauge import progress_bar, size_text
from edgeinfer.tui.loader import Task
from edgeinfer.tui.settings import Fetch

_LAST_WAIT_SECONDS = 0.5  # at the end, for a program that fetches to be ended


class _Cancelled(Exception):
    """Nobody wants it any more."""


class Download:
    """A model that is fetched; what has come stays where `fetch` keeps it."""

    def __init__(self, name: str, fetch: Fetch, before: Task[str] | None) -> None:
        self.name = name
        self.done = self.total = 0
        self.is_awaited = False  # by a screen that takes the result
        self._is_cancelled = False
        self._began_at, self._first = 0.0, 0

        def run() -> str:
            if before is not None:  # it may hold what this one goes on with
                before.wait()
            self._check()
            return fetch(name, self._note)

        self.task: Task[str] = Task(run)

    def cancel(self) -> None:
        """End it at the next byte."""
        self._is_cancelled = True

    @property
    def share(self) -> float:
        return self.done / self.total if self.total else 0.0

    def text(self) -> str:
        """How far it is, how fast, and how long it will take."""
        if not self.total:
            return f"downloading {self.name}  starting"
        seconds, n = time.perf_counter() - self._began_at, self.done - self._first
        speed = n / seconds if seconds > 1 else 0.0
        text = f"downloading {self.name}  {progress_bar(self.share, 24)}"
        text += f"  {size_text(self.done)} of {size_text(self.total)}"
        if speed:
            left = (self.total - self.done) / speed
            text += f"  {size_text(int(speed))}/s  {left:.0f} s left"
        return text

    def _note(self, done: int, total: int) -> None:
        self._check()
        if not self.total:
            self._began_at, self._first = time.perf_counter(), done
        self.done, self.total = done, total

    def _check(self) -> None:
        if self._is_cancelled:
            raise _Cancelled


class Downloads:
    """Starts and ends them; `current` is the one that runs, or is over and was not taken."""

    def __init__(self, fetch: Fetch | None) -> None:
        self._fetch = fetch
        self._ending: Task[str] | None = None
        self.current: Download | None = None

    def start(self, name: str) -> Download | None:
        """None where nothing can be fetched, or something is already."""
        if self._fetch is None or self.current is not None:
            return None
        self.current = Download(name, self._fetch, self._ending)
        return self.current

    def take(self) -> Download | None:
        """The one that is over, once."""
        current = self.current
        if current is None or not current.task.is_over:
            return None
        self.current = None
        return current

    def cancel(self) -> None:
        if self.current is not None:
            self.current.cancel()
            self._ending, self.current = self.current.task, None

    def close(self) -> str:
        """End what runs; a line that says how far it was, "" where nothing did."""
        current = self.current
        if current is None or current.task.is_over:
            return ""
        self.cancel()
        current.task.wait(_LAST_WAIT_SECONDS)
        return (
            f"the download of {current.name} was stopped at {current.share:.0%}; "
            f"`edgeinfer pull {current.name}` fetches it"
        )
