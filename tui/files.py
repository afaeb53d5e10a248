"""Files under the working folder: found by a few letters, read as text to attach.

Knows nothing of widgets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from edgeinfer import EdgeInferError
from edgeinfer.tui.records import Attachment

_MOST_FILES = 4000
_STALE_SECONDS = 10.0
_SECONDS = 0.08  # a slow disk gives fewer names, not a frozen screen
_MOST_BYTES = 4 << 20
_SKIPPED = {"node_modules", "__pycache__", "venv", "build", "dist", "target", "site-packages"}


class FileNames:
    """The names under a folder, looked up again after a while."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: list[str] = []
        self._at = -_STALE_SECONDS

    def names(self) -> list[str]:
        now = time.monotonic()
        if now - self._at >= _STALE_SECONDS:
            self._names, self._at = list_files(self._root), now
        return self._names


def list_files(root: Path) -> list[str]:
    """Paths relative to `root`, near ones first; hidden and generated folders are left out."""
    end = time.perf_counter() + _SECONDS
    found: list[str] = []
    for path in _walk(root):
        found.append(path)
        if len(found) >= _MOST_FILES or time.perf_counter() > end:
            break
    return sorted(found, key=lambda path: (path.count("/"), path))


def _walk(root: Path) -> Iterator[str]:
    folders = [""]
    while folders:
        folder = folders.pop(0)
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _SKIPPED:
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            else:
                yield path


def match(query: str, names: list[str], limit: int = 8) -> list[str]:
    """Names that hold the letters of `query` in order; those in a run and at the end first."""
    wanted = query.lower()
    scored = []
    for name in names:
        low = name.lower()
        if wanted in low:
            base = low.rsplit("/", 1)[-1]
            scored.append((0 if base.startswith(wanted) else 1 if wanted in base else 2, name))
        elif _has_in_order(wanted, low):
            scored.append((3, name))
    return [name for _, name in sorted(scored, key=lambda each: (each[0], len(each[1])))[:limit]]


def _has_in_order(letters: str, text: str) -> bool:
    at = iter(text)
    return all(letter in at for letter in letters)


def read_attachment(root: Path, name: str) -> Attachment:
    """The text of a file; EdgeInferError says why it can't be attached."""
    path = (root / Path(name).expanduser()).resolve()
    try:
        if not path.is_file():  # a pipe would be waited for, a device may have no end
            raise EdgeInferError(f"{name} is no file")
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise EdgeInferError(
                f"{name} is {size >> 20} MB, at most {_MOST_BYTES >> 20} MB can be attached"
            )
        data = path.read_bytes()
    except OSError as error:
        raise EdgeInferError(f"{name} can't be read: {error.strerror}") from error
    if b"\0" in data[:8192]:
        raise EdgeInferError(f"{name} is not a text file")
    return Attachment(name, data.decode("utf-8", "replace"))
