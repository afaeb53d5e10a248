"""Hands events to those who read them; where many are to wake up, in a thread of its own.

Knows nothing of what the events are.
"""

from __future__ import annotations

import contextlib
import threading
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

from edgeinfer.engine.event_queue import EventQueue


class Receiver(Protocol):
    """Whose events these are."""

    @property
    def events(self) -> EventQueue[Any]: ...

    def break_off(self, error: BaseException) -> None:
        """A callback of its reader's has raised, in any thread."""
        ...


_Batch: TypeAlias = list[tuple[Receiver, Any]]


class Delivery:
    """Events on their way from the engine's thread to their queues, those of each in order.

    To wake up a reader takes the system 5 to 10 us, and none goes on before the engine's thread has
    begun the next step. So where there are many they are woken beside that step.
    """

    def __init__(self) -> None:
        self._events: _Batch = []
        self._batches: SimpleQueue[_Batch | None] = SimpleQueue()
        self._n_begun = self._n_done = 0  # batches; each is counted in one thread only
        self._thread: threading.Thread | None = None

    def put(self, receiver: Receiver, event: Any) -> None:
        """Have an event delivered with the next batch."""
        self._events.append((receiver, event))

    def send(self) -> None:
        """Deliver what has been put."""
        if not self._events:
            return
        events, self._events = self._events, []
        is_idle = self._n_begun == self._n_done
        if is_idle and (len(events) <= _FEW or not self._has_thread()):
            self._deliver(events)
        else:
            self._n_begun += 1
            self._batches.put(events)

    def is_here(self) -> bool:
        """Whether the caller is called back by the thread that delivers."""
        return threading.current_thread() is self._thread

    def close(self, timeout: float) -> None:
        """Deliver what is left; nothing comes after that."""
        self.send()
        if self._thread is not None:
            self._batches.put(None)
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
        while (events := self._batches.get()) is not None:
            self._deliver(events)
            self._n_done += 1

    def _deliver(self, events: _Batch) -> None:
        for receiver, event in events:
            try:
                receiver.events.put(event)
            except BaseException as error:  # the event is in the queue all the same
                receiver.break_off(error)


_FEW = 2
