"""The texts that a person gives a command: on the command line, in files, through a pipe."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

import click

from edgeinfer import platform
from edgeinfer.cli.console import note, noted_after
from edgeinfer.text.plain_text import decode

_MOST_TEXT = 256 << 20  # bytes of a prompt or a book
_QUIET_SECONDS = 2.0
_STDIN = "standard input"


def read_prompt(words: Sequence[str], prompt: str | None, files: Sequence[str]) -> str:
    """The prompt, what is piped in and the files, in this order, empty lines between them.

    A "-" says where stdin belongs; UsageError where there is nothing to read.
    """
    if words and prompt is not None:
        raise click.UsageError(f"two prompts: -p {prompt!r} and {' '.join(words)!r}; give one")
    prompt = " ".join(words) if words else prompt
    first = [] if prompt in (None, "-") else [prompt]
    sources = [*(["-"] if prompt == "-" else []), *files]
    if sources.count("-") > 1:
        raise click.UsageError("stdin can be read once: give one -")
    if "-" not in sources and (_is_piped() or not (first or sources)):
        sources.insert(0, "-")
        if not first and sys.stdin.isatty():
            raise click.UsageError("no prompt: give a text, -f FILE, or pipe text in")
    return "\n\n".join(filter(None, first + [read_file(path) for path in sources]))


def read_file(path: str) -> str:
    """The text of a file, or of stdin for "-"; EdgeInferError where it holds something else."""
    if path == "-":
        name, data = _STDIN, _read_stdin()
    else:
        name = path
        with open(path, "rb") as file:
            data = _read(file, path)
    text, n_lost = decode(data, name)
    if n_lost:
        note(f"{name}: {n_lost:,} characters are not UTF-8 and were left as \ufffd")
    return text


def _read_stdin() -> bytes:
    if sys.stdin.isatty():
        note("reading the terminal: end with Ctrl-D, on Windows with Ctrl-Z and Enter")
    return _read(sys.stdin.buffer, _STDIN)


def _read(file: BinaryIO, name: str) -> bytes:
    with _told_if_it_waits(file, name):
        return platform.read_whole(file, _MOST_TEXT)


def _told_if_it_waits(file: BinaryIO, name: str) -> AbstractContextManager[None]:
    """Whoever did not know that a pipe would be read is told what is waited for."""
    if _kind(file) not in (stat.S_IFIFO, stat.S_IFSOCK):
        return nullcontext()
    how = ", or give </dev/null" if name == _STDIN else ""
    return noted_after(_QUIET_SECONDS, f"waiting for {name} to end{how}")


def _is_piped() -> bool:
    """Whether stdin was given: a pipe or a file, not a terminal or /dev/null."""
    return _kind(sys.stdin) in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG)


def _kind(file: object) -> int:
    """The type of an open file as `stat` has it; 0 for one that is none of the system's."""
    try:
        return stat.S_IFMT(os.fstat(file.fileno()).st_mode)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return 0
