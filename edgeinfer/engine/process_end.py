"""What becomes of engines when the interpreter ends, and in the child of a fork."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol


class Told(Protocol):
    """Who is told."""

    def close(self, timeout: float = ..., *, is_exit: bool = ...) -> None: ...

    def mark_forked(self) -> None: ...


# NOTE: the only module state; the interpreter's exit and fork have no other way to find them.
_told: weakref.WeakSet[Told] = weakref.WeakSet()


def tell(engine: Told) -> None:
    """Close it at exit, and mark it in a child, as long as it lives."""
    _told.add(engine)


def _close_all() -> None:
    for engine in list(_told):
        engine.close(timeout=2.0, is_exit=True)


def close_first_at_exit() -> None:
    """Before all that was registered for the exit until now, as what engines run on may be."""
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _mark_forked() -> None:
    for engine in list(_told):
        engine.mark_forked()


close_first_at_exit()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)
