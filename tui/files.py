"""Files to attach: found by a few letters or by a path, and read as text.

Knows nothing of widgets. Nothing here waits for a pipe, and nobody waits for a slow disk.
"""

from __future__ import annotations

import errno
import heapq
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from edgeinfer import EdgeInferError, reason_of
from edgeinfer.tui.loader import Task
from edgeinfer.tui.records import Attachment
from edgeinfer.tui.settings import Decode

_MOST_FILES = 4000  # below the working folder
_MOST_ENTRIES = 200_000  # of a folder that is named
_STALE_SECONDS = 10.0
_WALK_SECONDS = 1.0
_PATIENCE_SECONDS = 0.03  # of the screen, with a search
_MOST_SEARCHES = 4  # at once, where disks do not answer
_MOST_SHOWN = 8
_MOST_BYTES = 4 << 20
_PORTION = 1 << 18
_SEPARATORS = r"[/\\]" if os.name == "nt" else "/"
_SKIPPED = {"node_modules", "__pycache__", "venv", "build", "dist", "target", "site-packages"}


class FoundFile(NamedTuple):
    """A file or folder; `name` is what is shown of `path`, which may not be UTF-8."""

    name: str
    path: str
    is_folder: bool = False


# -- finding -------------------------------------------------------------------------------------


class FileSearch:
    """Finds files in threads; what takes long is there at a later look."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._query, self._asked_at = "", -_STALE_SECONDS
        self._searches: list[Task[list[FoundFile]]] = []
        self._locks: dict[str, threading.Lock] = {}
        self._walk_lock = threading.Lock()
        self._walked: tuple[float, list[FoundFile]] = (-_STALE_SECONDS, [])
        self._listed: tuple[str, float, list[FoundFile]] = ("", -_STALE_SECONDS, [])
        self._was_early = False

    def find(self, query: str) -> list[FoundFile]:
        """The best few for what was typed; none yet where this `was_early`."""
        now = time.monotonic()
        if query != self._query or now - self._asked_at >= _STALE_SECONDS:
            self._searches = [each for each in self._searches if not each.is_over]
            if len(self._searches) >= _MOST_SEARCHES:
                self._was_early = True
                return []
            self._query, self._asked_at = query, now
            self._searches.append(Task(lambda: self._search(query)))
            self._searches[-1].wait(_PATIENCE_SECONDS)
        latest = self._searches[-1]
        self._was_early = not latest.is_over
        return latest.result if not self._was_early and latest.error is None else []

    def was_early(self) -> bool:
        """Whether there was a look since this was asked last that may find something if repeated.

        Not whether a search goes on: it may have ended since, and nobody has seen what it found.
        """
        was_early, self._was_early = self._was_early, False
        return was_early

    def file(self, name: str) -> FoundFile:
        """What a name would mean; whether there is such a file is not known."""
        path = from_shown(os.path.join(self._root, os.path.expanduser(name)))
        return FoundFile(name, path)

    def _search(self, query: str) -> list[FoundFile]:
        """Entries of the folder that is named, then whatever holds the letters."""
        if query == "~":
            return [FoundFile("~/", os.path.expanduser("~/"), is_folder=True)]
        base = re.split(_SEPARATORS, query)[-1]
        folder = query[: len(query) - len(base)]
        named = [each for each in self._entries(folder) if base.lower() in _base(each).lower()]
        named = [each for each in named if base.startswith(".") or not _is_hidden(each)]
        named = heapq.nsmallest(_MOST_SHOWN, named, key=lambda each: _rank(each, base))
        if os.path.isabs(os.path.expanduser(folder)):
            return named
        others = match(query, self._files())
        if not query:
            return others
        at_start = [each for each in named if not _rank(each, base)[0]]
        return list(dict.fromkeys([*at_start, *others, *named]))[:_MOST_SHOWN]

    def _entries(self, folder: str) -> list[FoundFile]:
        """What a folder holds, as it is named by whoever types."""
        with self._locks.setdefault(folder, threading.Lock()):  # one look serves all searches
            listed, at, entries = self._listed
            if listed != folder or time.monotonic() - at >= _STALE_SECONDS:
                path = from_shown(os.path.join(self._root, os.path.expanduser(folder)))
                entries = list(_scan(path, folder, _MOST_ENTRIES))
                self._listed = (folder, time.monotonic(), entries)
            return entries

    def _files(self) -> list[FoundFile]:
        with self._walk_lock:
            at, files = self._walked
            if time.monotonic() - at >= _STALE_SECONDS:
                files = list_files(self._root)
                self._walked = (time.monotonic(), files)
            return files


def list_files(root: Path) -> list[FoundFile]:
    """Files below `root`, near ones first; hidden and generated folders are left out."""
    end = time.perf_counter() + _WALK_SECONDS
    found: list[FoundFile] = []
    for file in islice(_walk(root), _MOST_FILES):
        found.append(file)
        if time.perf_counter() > end:
            break
    return sorted(found, key=lambda file: (file.name.count("/"), file.name))


def _walk(root: Path) -> Iterator[FoundFile]:
    folders = [FoundFile("", str(root), is_folder=True)]
    while folders:
        folder = folders.pop(0)
        entries = _scan(folder.path, folder.name, _MOST_FILES)
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _is_hidden(entry) or _base(entry) in _SKIPPED:
                continue
            if not entry.is_folder:
                yield entry
            elif not os.path.islink(entry.path):
                folders.append(entry)


def _scan(folder: str, shown: str, most: int) -> Iterable[FoundFile]:
    """The entries of a folder; none where it can't be read."""
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, most):
                try:
                    is_folder = entry.is_dir()
                except OSError:
                    is_folder = False
                name = shown + shown_name(entry.name)
                yield FoundFile(f"{name}/" if is_folder else name, entry.path, is_folder)
    except (OSError, ValueError):
        return


def _base(file: FoundFile) -> str:
    return os.path.basename(file.path)


def _is_hidden(file: FoundFile) -> bool:
    return _base(file).startswith(".")


def _rank(file: FoundFile, base: str) -> tuple[bool, str]:
    name = _base(file).lower()
    return not name.startswith(base.lower()), name


def match(query: str, files: list[FoundFile]) -> list[FoundFile]:
    """Files that hold the letters of `query` in order; those in a run and at the end first."""
    wanted = query.lower()
    scored = []
    for file in files:
        low = file.name.lower()
        if wanted in low:
            base = low.rsplit("/", 1)[-1]
            scored.append((0 if base.startswith(wanted) else 1 if wanted in base else 2, file))
        elif _has_in_order(wanted, low):
            scored.append((3, file))
    scored.sort(key=lambda each: (each[0], len(each[1].name)))
    return [file for _, file in scored[:_MOST_SHOWN]]


def _has_in_order(letters: str, text: str) -> bool:
    at = iter(text)
    return all(letter in at for letter in letters)


# -- names ---------------------------------------------------------------------------------------


def shown_name(name: str) -> str:
    """A name as text that can be shown, stored and told from others, whatever its bytes are."""
    return name if name.isprintable() else "".join(map(_shown_character, name))


def _shown_character(c: str) -> str:
    code = ord(c)
    if c.isprintable():
        return c
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:  # a control, or a byte that Python can't decode
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def from_shown(name: str) -> str:
    """The name that `shown_name` shows so; itself where there is such a file."""
    return name if os.path.lexists(name) else _ESCAPED.sub(_from_escape, name)


_ESCAPED = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


def _from_escape(found: re.Match[str]) -> str:
    code = int(found[0][2:], 16)
    is_byte = found[0][1] == "x" and code >= 0x80
    return chr(0xDC00 + code if is_byte else min(code, sys.maxunicode))


# -- reading -------------------------------------------------------------------------------------


def read_attachment(path: str, name: str, decode: Decode) -> tuple[Attachment, str]:
    """The text of a file, called `name`, and what is to be told of it, "" for nothing.

    EdgeInferError says why it can't be attached.
    """
    try:
        data = _read_plain(path)
    except (OSError, ValueError) as error:  # a name with a zero byte is no OSError
        reason = reason_of(error)
        raise EdgeInferError(f"{name} can't be attached: {reason}") from error
    text, n_lost = decode(data, name)
    lost = f"{name}: {n_lost:,} characters are not UTF-8 and were left as \ufffd"
    return Attachment(name, text), lost if n_lost else ""


def _read_plain(path: str) -> bytes:
    """A file, whatever becomes of it meanwhile; OSError for what is none, and for large ones."""
    _check_plain(os.stat(path))
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        _check_plain(os.fstat(file.fileno()))
        data = bytearray()
        while part := file.read(_PORTION):
            data += part
            if len(data) > _MOST_BYTES:  # it grows, or does not know its size
                raise OSError(errno.EFBIG, f"it is more than {_MOST_BYTES >> 20} MB")
        if part is None:
            raise OSError(errno.EAGAIN, "it gives nothing now")
    return bytes(data)


def _open_at_once(path: str, flags: int) -> int:
    """What was a file a moment ago may be a pipe now, which would be waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _check_plain(status: os.stat_result) -> None:
    mode, n_bytes = status.st_mode, status.st_size
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise OSError(errno.EINVAL, f"it is {kind}; only text files can be")
    if n_bytes > _MOST_BYTES:
        raise OSError(
            errno.EFBIG, f"it is {n_bytes / 1e6:,.0f} MB, at most {_MOST_BYTES >> 20} MB can be"
        )


_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
