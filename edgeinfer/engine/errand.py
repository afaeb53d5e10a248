"""Something that the engine's thread does for another one, which waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Errand(Generic[T]):
    """An action and, once it is done, what it has returned or raised."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._done = threading.Event()
        self._found: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> bool:
        """Do it, in this thread; whether it went well."""
        try:
            self._found.append(self._action())
        except BaseException as error:
            self._error = error
        self._done.set()
        return self._error is None

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.set()

    def wait(self, timeout: float) -> bool:
        """Whether it is done by then."""
        return self._done.wait(timeout)

    def result(self) -> T:
        """Once: an error that was kept here would keep the frames of who waited for it."""
        error, self._error = self._error, None
        if error is None:
            return self._found[0]
        try:
            raise error
        finally:
            del error
