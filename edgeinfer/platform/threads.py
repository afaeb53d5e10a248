"""Threads as far as the system gives them: fewer do the same work, and none leaves it to us."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

A = TypeVar("A")
B = TypeVar("B")


def start_some(threads: Sequence[threading.Thread]) -> list[threading.Thread]:
    """Start threads, up to the first that can't be; those that were started."""
    started: list[threading.Thread] = []
    with suppress(RuntimeError):
        for thread in threads:
            thread.start()
            started.append(thread)
    return started


def mapped(work: Callable[[A], B], items: Sequence[A], n_threads: int) -> Iterator[B]:
    """What `work` gives of each, in order, from up to so many threads; the first error it raises.

    Nothing is begun after that, or once nobody asks for more; what has begun is waited for.
    """
    from concurrent.futures import Future  # 10 ms that most starts don't need

    futures: list[Future[B]] = [Future() for _ in items]
    waiting = deque(zip(futures, items, strict=True))

    def run() -> None:
        while True:
            try:
                future, item = waiting.popleft()
            except IndexError:
                return
            _set(work, future, item)

    n = min(n_threads, len(items))
    threads = start_some([threading.Thread(target=run, daemon=True) for _ in range(n)])
    try:
        for future in futures:
            if not threads:
                _set(work, *waiting.popleft())
            yield future.result()
    finally:
        waiting.clear()
        for thread in threads:
            thread.join()


def _set(work: Callable[[A], B], future: Future[B], item: A) -> None:
    try:
        future.set_result(work(item))
    except BaseException as error:  # it belongs to who asks
        future.set_exception(error)
