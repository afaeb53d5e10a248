"""Renders chat templates in a process of their own, which can be ended, within a budget.

A template is a program from a stranger: nothing it does holds this process up or fills it.
"""

from __future__ import annotations

import marshal
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from edgeinfer import platform
from edgeinfer.errors import TemplateError, reason_of
from edgeinfer.text.jinja_process import ERROR, LENGTH, LIMIT, REPLY, Request, most_chars

if TYPE_CHECKING:
    import subprocess

    from edgeinfer.platform import ForkedProcess

    Process = subprocess.Popen[bytes] | ForkedProcess

MAX_SOURCE = 1 << 16  # characters; the largest of 82 public templates has 16,714
_SECONDS = 1.0  # of a processor, for all renders of a request together
_PATIENCE = 5.0  # by the clock, should the system not end what runs too long
_START_PATIENCE = 30.0
_MOST_RENDERED = 8
_MODULE = "edgeinfer.text.jinja_process"
_LIMIT = "the template asks for more %s than a chat template needs"


class RenderError(Exception):
    """The template failed in `line` (None: unknown)."""

    def __init__(self, message: str, line: int | None = None) -> None:
        self.line = line
        super().__init__(message)


class LimitError(RenderError):
    """The template would take too long or too much memory."""


class TimeLimitError(LimitError):
    """It would take too long, or somebody else has ended the process."""


class Budget:
    """Seconds of a processor that the renders of one request share."""

    def __init__(self) -> None:
        self.seconds = _SECONDS


class TemplateEngine:
    """A process that renders, started when first needed and kept; usable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._rendered = set[str]()  # the latest sources that have come to their end

    def start(self, *, may_fork: bool = False) -> None:
        """Let the process get ready meanwhile; that it can't is told by whoever renders.

        It `may_fork` from one that holds nothing which a template should not be near.
        """
        with self._lock, suppress(TemplateError):
            self._running(may_fork)

    def render(self, source: str, variables: Mapping[str, Any], budget: Budget) -> str:
        """The text; RenderError where the template is to blame, TemplateError where none runs.

        `variables` is plain data: dicts, lists, tuples, strings, numbers, booleans and None.
        """
        return self._answer(source, dict(variables), budget)

    def check(self, source: str) -> None:
        """RenderError where a template can't be compiled; nothing of it runs."""
        self._answer(source, None, Budget())

    def _answer(self, source: str, variables: dict[str, Any] | None, budget: Budget) -> str:
        if len(source) > MAX_SOURCE:
            raise LimitError(_LIMIT % f"source (over {MAX_SOURCE} characters)")
        with self._lock:
            if budget.seconds <= 0:
                raise TimeLimitError(_LIMIT % "time")
            try:
                text = self._rendered_anew(source, variables, budget)
            except RenderError as error:
                if isinstance(error, LimitError):
                    self._give_up(budget)
                raise
            except BaseException:  # an interrupt leaves half an answer in the pipe
                self._give_up(budget)
                raise
            if len(self._rendered) >= _MOST_RENDERED:
                self._rendered.clear()
            self._rendered.add(source)
            return text

    def _rendered_anew(self, source: str, variables: dict[str, Any] | None, budget: Budget) -> str:
        """The text; once more where it was no fault of the template's, as far as is known.

        A machine that stops for a second, or has no memory left, ends what took a millisecond
        before.
        """
        given = budget.seconds
        try:
            return self._running().render(source, variables, budget)
        except TimeLimitError:
            if source not in self._rendered or given < _SECONDS / 2:
                raise
        self._rendered.remove(source)
        self._end()
        budget.seconds = _SECONDS
        return self._running().render(source, variables, budget)

    def close(self) -> None:
        """End the process; a later render starts another."""
        with self._lock:
            self._end()

    def _running(self, may_fork: bool = False) -> _Worker:
        if self._worker is None or not self._worker.is_usable():
            self._end()
            self._worker = _Worker(may_fork)
        return self._worker

    def _give_up(self, budget: Budget) -> None:
        budget.seconds = 0
        self._end()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Worker:
    """One process and its pipes; it is ended by `close`, and when nobody holds it any more."""

    def __init__(self, may_fork: bool) -> None:
        try:
            self._process = platform.start_isolated(_MODULE, _folders(), may_fork=may_fork)
        except OSError as error:
            raise TemplateError(
                "chat templates run in a process of their own, which can't be started "
                f"({reason_of(error)}); a prompt without a template (`run --raw`, generate) "
                "needs none"
            ) from error
        self._requests, self._replies = _pipes(self._process)
        self._patience: float | None = None
        self._owner = os.getpid()
        self.close = weakref.finalize(self, _end_process, self._process, self._owner)

    def is_usable(self) -> bool:
        """Whether it lives, and is not the parent's in a process that was forked."""
        return self._owner == os.getpid() and self._process.poll() is None

    def render(self, source: str, variables: dict[str, Any] | None, budget: Budget) -> str:
        if self._patience is None:
            self._patience = self._await_start()
        data = marshal.dumps(tuple(Request(source, variables, budget.seconds)))
        with _Alarm(self._patience, self._process):
            with suppress(OSError):  # it has ended: nothing comes back either
                self._requests.write(LENGTH.pack(len(data)) + data)
                self._requests.flush()
            header = self._replies.read(REPLY.size)
            if len(header) < REPLY.size:
                raise self._why_it_ended()
            kind, seconds, line, n_bytes = REPLY.unpack(header)
            if n_bytes > 4 * most_chars(len(data)):
                raise LimitError(_LIMIT % "text")
            text = self._replies.read(n_bytes).decode("utf-8", "surrogatepass")
        budget.seconds -= seconds
        if kind == LIMIT:
            limit = TimeLimitError if text == "time" else LimitError
            raise limit(_LIMIT % text, line or None)
        if kind == ERROR:
            raise RenderError(text, line or None)
        return text

    def _await_start(self) -> float:
        """Seconds to wait for an answer, once the process is ready."""
        with _Alarm(_START_PATIENCE, self._process):
            ends_loops = self._replies.read(1)
        if not ends_loops:
            raise TemplateError(
                "the process in which chat templates run did not start; if the package jinja2 is "
                "damaged, this mends it: pip install --force-reinstall jinja2 markupsafe"
            )
        return _PATIENCE if ends_loops[0] else _SECONDS

    def _why_it_ended(self) -> LimitError:
        status = self._process.wait()
        if platform.ended_for_time(status):
            return TimeLimitError(_LIMIT % "time")
        return LimitError(f"the template ended the process that ran it (status {status})")


def _pipes(process: Process) -> tuple[IO[bytes], IO[bytes]]:
    return cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)


class _Alarm:
    """Kills a process unless the block is left within some seconds."""

    def __init__(self, seconds: float, process: Process) -> None:
        self._timer = threading.Timer(seconds, process.kill)
        self._timer.daemon = True

    def __enter__(self) -> None:
        try:
            self._timer.start()
        except RuntimeError as error:
            raise TemplateError(
                f"{error}: rendering a chat template takes one that ends it in time; raise this "
                "process's limits (ulimit -u, -v)"
            ) from None

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _end_process(process: Process, owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in _pipes(process):
        with suppress(OSError):
            pipe.close()


def _folders() -> list[str]:
    """Where the process finds us and Jinja: not in the folder that someone happens to be in."""
    if getattr(sys, "frozen", False):
        return []
    ours = str(Path(__file__).resolve().parents[2])
    folders = [ours]
    for package in ("jinja2", "markupsafe"):
        for folder in (ours, *platform.module_folders()):
            spec = PathFinder.find_spec(package, [folder])
            if spec is not None and spec.origin is not None:
                folders.append(folder)
                break
        else:
            raise TemplateError(f"chat templates need the package {package}: pip install {package}")
    return list(dict.fromkeys(folders))
