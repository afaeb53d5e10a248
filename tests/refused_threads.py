"""A system that gives no more threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@contextmanager
def _given_only(
    is_given: Callable[[threading.Thread], bool], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    start = threading.Thread.start

    def start_or_refuse(self: threading.Thread) -> None:
        if not is_given(self):
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_or_refuse)
        yield


def without_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """None of this name can be started."""
    return _given_only(lambda thread: not thread.name.startswith(name), monkeypatch)


def few_threads(n_given: int, monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """Only so many can be started."""
    asked = itertools.count()
    return _given_only(lambda _: next(asked) < n_given, monkeypatch)
