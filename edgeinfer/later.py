"""What is being made in a thread of its own while others go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from edgeinfer.engine.generation import WAKE_SECONDS
from edgeinfer.errors import another

T = TypeVar("T")


class Later(Generic[T]):
    """A value that another thread is making; an error waits for whoever asks for the value."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._discard: Callable[[T], None] | None = None
        self._thread = threading.Thread(target=self._run, name="edgeinfer-load", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(WAKE_SECONDS)

    def result(self) -> T:
        self.wait()
        if self._error is not None:
            raise another(self._error)
        return self._values[0]

    def abandon(self, discard: Callable[[T], None]) -> None:
        """Nobody wants the value any more: `discard` it, as soon as it is there."""
        with self._lock:
            self._discard = discard
            values = list(self._values)
        for value in values:
            discard(value)

    def _run(self) -> None:
        try:
            value = self._make()
        except BaseException as error:
            self._error = error
            return
        with self._lock:
            self._values.append(value)
            discard = self._discard
        if discard is not None:
            discard(value)
