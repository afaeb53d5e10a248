"""What is being made in a thread of its own while others go on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from edgeinfer.engine.generation import WAKE_SECONDS
from edgeinfer.engine.waits import Outcome
from edgeinfer.errors import ClosedError, another

T = TypeVar("T")


class Later(Generic[T]):
    """A value that another thread is making; an error waits for whoever asks for the value."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._outcome = Outcome()
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._discard: Callable[[T], None] | None = None
        threading.Thread(target=self._run, name="edgeinfer-load", daemon=True).start()

    def wait(self) -> None:
        """ClosedError in the child of a fork, which the thread is not in."""
        while not self._outcome.wait(WAKE_SECONDS):
            if self._pid != os.getpid():
                raise ClosedError("this process was forked while the model was loaded")

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
            self._outcome.tell()
            return
        with self._lock:
            self._values.append(value)
            discard = self._discard
        self._outcome.tell()
        if discard is not None:
            discard(value)
