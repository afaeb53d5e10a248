"""Work that needs a deeper stack than the system gives threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from edgeinfer.platform.locks import ProcessLock

T = TypeVar("T")
_lock = ProcessLock()


def with_stack(n_bytes: int, work: Callable[[], T]) -> T:
    """What `work` gives, or raises, in a thread with so large a stack.

    MemoryError where there is no room for one. Of a stack only what is used takes memory.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="edgeinfer-deep", daemon=True)
    with _lock.own:
        try:
            before = threading.stack_size(n_bytes)
        except (ValueError, RuntimeError):  # a system that has none so large: its own must do
            before = threading.stack_size()
        try:
            thread.start()
        except RuntimeError as error:
            raise MemoryError(f"no room for a stack of {n_bytes >> 20} MiB") from error
        finally:
            threading.stack_size(before)
    thread.join()
    if failed:
        raise failed.pop()  # kept here it would keep this frame, and all that `work` has made
    return found[0]
