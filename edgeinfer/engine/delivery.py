"""Hands events to those who read them; where many are to wake up, in a thread of its own.

Knows nothing of what the events are.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import Any, Protocol

from edgeinfer.engine.event_queue import EventQueue


class Receiver(Protocol):
    """Whose events these are."""

    @property
    def events(self) -> EventQueue[Any]: ...

    def take(self, event: Any) -> None:
        """Pass an event on to its reader; once broken off, its end alone."""
        ...

    def break_off(self, error: BaseException) -> None:
        """A callback of its reader's has raised, in any thread."""
        ...


class Delivery:
    """Events on their way from the engine's thread to their queues, in order.

    To wake up a reader takes the system 5 to 10 us, and none goes on before the engine's thread has
    begun the next step. So where there are many they are woken beside that step; so is one whose
    callback may take longer. And a reader that wakes up takes a processor from the step, and finds
    its code and data gone from the caches: what can wait comes with every second of quick steps.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[Receiver, Any]] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()  # False ends the thread
        # How often it was called and has come; each is counted in one thread only.
        self._n_called = self._n_come = 0
        self._thread: threading.Thread | None = None
        self._is_full = False  # whether a queue was, that something has come to since one asked
        self._is_due = self._is_held = False  # what can't wait; what has waited
        self._sent_at = -math.inf

    def put(self, receiver: Receiver, event: Any, *, can_wait: bool = False) -> None:
        """Have an event delivered with the next `send`; with the one after it, where it can."""
        self._events.append((receiver, event))
        self._is_due |= not can_wait

    def send(self, next_in: float = math.inf) -> None:
        """Deliver what has been put; this is called again in `next_in` seconds."""
        if not self._events:
            return
        now = time.perf_counter()
        is_quick = max(now - self._sent_at, next_in) < _MOST_WAIT
        if is_quick and not (self._is_due or self._is_held):
            self._is_held = True
            return
        self._is_due, self._is_held, self._sent_at = False, False, now
        is_idle = self._n_called == self._n_come
        if is_idle and (self._wakes_few() or not self._has_thread()):
            self._deliver()
        else:
            self._n_called += 1
            self._calls.put(True)

    def _wakes_few(self) -> bool:
        receivers = {receiver for receiver, _ in self._events}
        return len(receivers) <= _FEW and not any([each.events.takes_time for each in receivers])

    def take_full(self) -> bool:
        """Whether a queue was full, as something came to it since this was asked last."""
        is_full, self._is_full = self._is_full, False
        return is_full

    def is_here(self) -> bool:
        """Whether the caller is called back by the thread that delivers."""
        return threading.current_thread() is self._thread

    def close(self, timeout: float) -> None:
        """Deliver what is left; nothing comes after that."""
        self.send()
        if self._thread is not None:
            self._calls.put(False)
            self._thread.join(timeout)

    def _has_thread(self) -> bool:
        """False where the system has none to give."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="edgeinfer-events", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread
        return self._thread is not None

    def _run(self) -> None:
        while self._calls.get():
            self._deliver()
            self._n_come += 1

    def _deliver(self) -> None:
        events = self._events
        while events:
            receiver, event = events[0]
            try:
                del events[0]
                receiver.take(event)
                if receiver.events.is_full:
                    self._is_full = True
            except BaseException as error:  # a callback's
                receiver.break_off(error)
                with contextlib.suppress(BaseException):
                    receiver.take(event)  # an end is waited for


_FEW = 4  # readers that are woken in the engine's thread
_MOST_WAIT = 0.004  # seconds between wakings of readers, and that an event waits for the next one
