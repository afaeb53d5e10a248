"""What commands write: answers to stdout, everything else to stderr, safe on a terminal.

Knows nothing of models.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TextIO

from edgeinfer.terminal import StreamFilter, printable

_QUIET_SECONDS = 1.0  # what takes no longer needs no progress line
_REDRAW_SECONDS = 0.1
_SILENT_SECONDS = 10.0  # of a server, before a person is told what is waited for


def draws_screens(environment: Mapping[str, str]) -> bool:
    """Whether there is a terminal that takes a full-screen view, which is drawn on stderr."""
    is_terminal = all(s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr))
    return is_terminal and takes_escapes(environment) and _has_characters(sys.stderr)


def _has_characters(stream: TextIO) -> bool:
    """Whether frames and bars can be drawn; where the locale lacks them, all would be "?"."""
    try:
        "╭─▌█●".encode(stream.encoding)
    except UnicodeEncodeError:
        note(f"(line by line: the locale's {stream.encoding} lacks the full screen's characters)")
        return False
    return True


def takes_escapes(environment: Mapping[str, str]) -> bool:
    """Whether a terminal, if there is one, obeys escape sequences."""
    # Windows' consoles have no TERM.
    return os.name == "nt" or environment.get("TERM", "") not in ("", "dumb", "unknown")


class Output:
    """Text of a model as it comes; filtered only where a terminal would obey it."""

    def __init__(self) -> None:
        self._filter = StreamFilter() if sys.stdout.isatty() else None
        self._ends_line = True

    def write(self, text: str) -> None:
        shown = self._filter.push(text) if self._filter else text
        if shown:
            sys.stdout.write(shown)
            sys.stdout.flush()
            self._ends_line = shown.endswith("\n")

    def end(self) -> None:
        """Finish the text, and its last line."""
        if self._filter:
            sys.stdout.write(self._filter.flush())
        if not self._ends_line:
            sys.stdout.write("\n")
        self._ends_line = True
        sys.stdout.flush()


class ProgressLine:
    """One line on stderr, redrawn on a terminal; shown only once something takes its time.

    It is gone when its block is left.
    """

    def __init__(self) -> None:
        self._start = self._drawn_at = time.perf_counter()
        self._is_terminal = sys.stderr.isatty()
        self._last_stage = ""
        self._width = 0

    def show(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._start < _QUIET_SECONDS and stage != _BUILDS:
            return
        if not self._is_terminal:
            if stage != self._last_stage:
                note(f"{_STAGES.get(stage, stage)} ...")
            self._last_stage = stage
            return
        if now - self._drawn_at < _REDRAW_SECONDS and done < total:
            return
        share = 100 * done // total if total else 100
        text = f"{_STAGES.get(stage, stage)} {share} %"
        tell("\r" + text.ljust(self._width))
        self._width, self._drawn_at = len(text), now

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def on_terminals(self, stage: str, done: int, total: int) -> None:
        """`show`, but nothing at all where no person looks."""
        if self._is_terminal:
            self.show(stage, done, total)

    def clear(self) -> None:
        """Take the line away, if there is one."""
        if self._width:
            tell("\r" + " " * self._width + "\r")
            self._width = 0


class DownloadLine:
    """Bytes, speed and time left of a download: one redrawn line, or one per tenth in a log."""

    def __init__(self) -> None:
        self._start = self._drawn_at = 0.0
        self._first: int | None = None
        self._is_terminal = sys.stderr.isatty()
        self._tenth = -1
        self._width = 0

    def show(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._first is None:  # what is here from an earlier try has no speed
            self._first, self._start = done, now
        if self._is_terminal:
            if now - self._drawn_at < _REDRAW_SECONDS and done < total:
                return
        elif 10 * done // max(1, total) == self._tenth:
            return
        self._tenth, self._drawn_at = 10 * done // max(1, total), now
        speed = (done - self._first) / max(1e-6, now - self._start)
        left = f", {(total - done) / speed:.0f} s left" if speed and done < total else ""
        share = done / max(1, total)
        text = (
            f"{share:5.0%} {done / 1e6:.0f} of {total / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s{left}"
        )
        if not self._is_terminal:
            note(text)
            return
        bar = "#" * int(_BAR_WIDTH * share)
        text = f"[{bar:{_BAR_WIDTH}}] {text}"
        tell("\r" + text.ljust(self._width))
        self._width = len(text)

    def clear(self) -> None:
        """End the line; its last state stays readable."""
        if self._width:
            tell("\n")
            self._width = 0


_BAR_WIDTH = 24
_BUILDS = "kernels"
_STAGES = {
    _BUILDS: "building kernels for this machine (only this once)",
    "weights": "loading weights",
    "prompt": "reading the prompt",
    "depth": "reading the context before",
    "bench": "measuring",
    "llama-bench": "waiting for llama-bench",
    "steps": "measuring steps",
    "tuning": "measuring ways to decode",
}


def prepare_streams() -> None:
    """UTF-8 wherever the bytes go to a file or pipe; no character can end the program.

    What a pipe is given of a file's name are the bytes that it has. A stream that whoever started
    us has closed is empty, or takes what nobody reads.
    """
    codecs.register_error(_AS_NAMED, _bytes_of_name)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # In this order they get the numbers of those: else a model's file might.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            if stream.isatty():
                reconfigure(encoding=stream.encoding, errors="replace")
            else:
                reconfigure(encoding="utf-8", errors=_AS_NAMED)


_AS_NAMED = "edgeinfer.names"


def _bytes_of_name(error: UnicodeError) -> tuple[bytes, int]:
    """What Python could not decode of a name, as it was; "?" for what nothing can encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = map(ord, error.object[error.start : error.end])
    return bytes(c - 0xDC00 if 0xDC80 <= c <= 0xDCFF else ord("?") for c in codes), error.end


def drop(stream: TextIO) -> None:
    """Nobody reads any more; without this the interpreter complains when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def unheard() -> Iterator[None]:
    """What stderr does not take, on a full disk or without a reader, costs no answer."""
    try:
        yield
    except OSError:
        drop(sys.stderr)


def tell(text: str) -> None:
    """Text for the person at the terminal."""
    with unheard():
        sys.stderr.write(text)
        sys.stderr.flush()


def note(text: str) -> None:
    """One line for the person at the terminal."""
    tell(printable(text) + "\n")


@contextmanager
def noted_after(seconds: float, text: str) -> Iterator[None]:
    """A line for whoever waits, where the block takes longer."""
    timer = threading.Timer(seconds, note, (text,))
    timer.daemon = True
    with suppress(RuntimeError):  # no thread is to be had for it
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def noted_if_silent(place: str) -> AbstractContextManager[None]:
    """The same of a server that is asked for something."""
    return noted_after(_SILENT_SECONDS, f"waiting for {place} to answer; Ctrl-C stops")


def show(text: str) -> None:
    """Lines of an answer that is not a model's, metadata included."""
    sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + "\n")


def show_json(value: dict[str, Any]) -> None:
    """One object on one line; escapes make it safe everywhere. What is no number is null."""
    try:
        text = json.dumps(value, ensure_ascii=sys.stdout.isatty(), allow_nan=False)
        text.encode()
    except ValueError:  # infinite, or a name that is not UTF-8; JSON must be
        text = json.dumps(_finite(value))
    sys.stdout.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
