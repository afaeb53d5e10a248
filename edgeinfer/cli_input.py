"""The texts that a person gives a command: on the command line, in files, through a pipe."""

from __future__ import annotations

import sys
from typing import BinaryIO

import click

from edgeinfer import platform

_MOST_TEXT = 256 << 20  # bytes of a prompt or a book


def read_prompt(prompt: str | None, files: tuple[str, ...]) -> str:
    parts = []
    if prompt == "-" or (prompt is None and not files):
        if prompt is None and sys.stdin.isatty():
            raise click.UsageError("no prompt: give -p TEXT, -f FILE, or pipe text in")
        parts.append(_read_text(sys.stdin.buffer))
    elif prompt is not None:
        parts.append(prompt)
    parts += map(read_file, files)
    return "\n\n".join(parts)


def read_file(path: str) -> str:
    with open(path, "rb") as file:
        return _read_text(file)


def _read_text(file: BinaryIO) -> str:
    return platform.read_whole(file, _MOST_TEXT).decode("utf-8", "replace")
