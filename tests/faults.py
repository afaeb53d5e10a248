"""Makes the n-th call that touches a folder fail, as SQLite's own tests do, for every n.

Knows nothing of what is called.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES)
_CALLS = ("open", "mkdir", "replace", "rename", "unlink", "rmdir", "fsync", "truncate", "scandir")


class Faults:
    """Counts the calls below a folder; the n-th one fails, or from the n-th on all of them."""

    def __init__(self, folder: Path, n: int, code: int, *, lasts: bool) -> None:
        self.n_calls = 0
        self._folder, self._n, self._code, self._lasts = str(folder), n, code, lasts
        self._open_files: dict[int, str] = {}

    @property
    def has_fired(self) -> bool:
        return self.n_calls >= self._n

    def pass_(self, path: object) -> None:
        """Let a call through, or not."""
        if isinstance(path, int):
            path = self._open_files.get(path, "")
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self._folder):
            return
        self.n_calls += 1
        if self.n_calls == self._n or (self._lasts and self.has_fired):
            raise OSError(self._code, os.strerror(self._code), os.fspath(path))

    def system_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(path: Any, *rest: Any, **names: Any) -> Any:
            self.pass_(path)
            result = call(path, *rest, **names)
            if call.__name__ == "open":
                self._open_files[result] = os.fspath(path)
            return result

        return faulty

    def open(self, file: Any, mode: str = "r", *rest: Any, **names: Any) -> Any:
        """`io.open`, whose files fail when they write."""
        if not set(mode) & set("wax+"):
            self.pass_(file)
            return _open(file, mode, *rest, **names)
        path = self._open_files.get(file, "") if isinstance(file, int) else os.fspath(file)
        self.pass_(path)
        raw = _File(file, mode.replace("b", "").replace("t", ""), opener=names.get("opener"))
        raw.faults, raw.path = self, path
        whole = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return whole
        return io.TextIOWrapper(whole, encoding=names.get("encoding") or "utf-8")


_open = io.open


class _File(io.FileIO):
    faults: Faults
    path: str

    def write(self, data: Any) -> int:
        self.faults.pass_(self.path)
        return super().write(data)


@contextmanager
def failing(folder: Path, n: int, code: int, *, lasts: bool = False) -> Iterator[Faults]:
    """Inside, the n-th call below `folder` raises OSError(code); with `lasts` all after it too."""
    faults = Faults(folder, n, code, lasts=lasts)
    patches = [
        mock.patch.object(os, name, faults.system_call(getattr(os, name))) for name in _CALLS
    ]
    patches += [mock.patch.object(module, "open", faults.open) for module in (io, builtins)]
    for patch in patches:
        patch.start()
    try:
        yield faults
    finally:
        for patch in reversed(patches):
            patch.stop()


def sweep(
    folder: Path, make: Callable[[Path], Any], act: Callable[[Path, Any], None], *, lasts: bool
) -> Iterator[tuple[int, Path, Any, BaseException | None]]:
    """Make a fresh folder and act on it with a fault at every call in turn, until none is left.

    Yields the fault's number, the folder, what `make` gave, and what `act` raised.
    """
    n = 0
    while True:
        n += 1
        fresh = folder / f"{n}"
        fresh.mkdir(parents=True)
        made, error = make(fresh), None
        with failing(fresh, n, ERRORS[n % len(ERRORS)], lasts=lasts) as faults:
            try:
                act(fresh, made)
            except BaseException as raised:
                error = raised
        yield n, fresh, made, error
        if not faults.has_fired:
            return
