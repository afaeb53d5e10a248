"""How one thread waits for what another does, whatever interrupts it meanwhile.

A signal's handler may raise between any two lines of Python, and `threading` is lines of Python:
its `Event` and `Condition` would leave a lock taken that the other thread waits for, and `Thread`
would say that one is dead which runs. What is here waits in single calls of C.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from edgeinfer.errors import KeptError

T = TypeVar("T")


class Bell:
    """Wakes up the one thread that waits; what was rung before that is not forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # it was rung, and nobody has waited since
            self._lock.release()

    def wait(self, timeout: float = -1) -> None:
        """Until it is rung, or so many seconds are over."""
        self._lock.acquire(timeout=timeout)


class Outcome:
    """How something has ended that one thread does and others wait for."""

    def __init__(self) -> None:
        self._told: SimpleQueue[None] = SimpleQueue()
        self._error = KeptError()
        self.is_told = False

    def tell(self, error: BaseException | None = None) -> None:
        """Once: that it has ended well, or with an error."""
        if error is not None:
            self._error.keep(error)
        self.is_told = True
        self._told.put(None)

    def wait(self, timeout: float) -> bool:
        """Whether it has ended by then."""
        if not self.is_told:
            with suppress(Empty):
                self._told.put(self._told.get(timeout=timeout))  # for who waits beside this one
        return self.is_told

    def check(self) -> None:
        """Raise the error that it has ended with, if one did."""
        self._error.raise_once()


class Errand(Generic[T]):
    """An action of another thread's, and what it has returned or raised once it is done."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._found: list[T] = []
        self.outcome = Outcome()

    def run(self) -> bool:
        """Do it, in this thread; whether it went well."""
        try:
            self._found.append(self._action())
        except BaseException as error:
            self.outcome.tell(error)
            return False
        self.outcome.tell()
        return True

    def result(self) -> T:
        """What it has returned, once it was waited for; an error is raised once."""
        self.outcome.check()
        return self._found[0]
