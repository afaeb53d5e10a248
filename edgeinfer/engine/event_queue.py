"""The queue between the engine and whoever reads an answer, in a thread or in an event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from edgeinfer.errors import InvalidRequestError

T = TypeVar("T")


class HasReaderError(InvalidRequestError):
    """Who is refused for that must not end what another one reads."""

    def __init__(self) -> None:
        super().__init__("the stream is being read already; it has one reader")

    def __reduce__(self) -> tuple[type[HasReaderError], tuple[()]]:
        return type(self), ()


class EventQueue(Generic[T]):
    """Events from one producer, which never waits, to one reader.

    `put` takes whatever comes: a producer keeps it short by making no more while it `is_full`.
    `on_room` is called in the reader's thread once half of a queue that was paused has been read.
    """

    def __init__(self, size: int, on_room: Callable[[], None]) -> None:
        self._size, self._on_room = size, on_room
        self._events: SimpleQueue[T] = SimpleQueue()
        self._callbacks: list[Callable[[], object]] = []  # one at most
        self._is_quick = True  # that one
        self._arming = threading.Lock()
        self._is_paused = False

    @property
    def is_full(self) -> bool:
        return self._events.qsize() >= self._size

    @property
    def has_room(self) -> bool:
        """Whether so much has been read that it pays to go on."""
        return self._events.qsize() <= self._size // 2

    @property
    def takes_time(self) -> bool:
        """Whether the next event is told to a callback that may take longer than a wait ends."""
        return bool(self._callbacks) and not self._is_quick

    def put(self, event: T) -> None:
        self._events.put(event)
        if self._callbacks:
            self._call_back()

    def pause(self) -> None:
        """The producer stops. It must look at `has_room` once more before it waits."""
        self._is_paused = True

    def get(self, timeout: float) -> T:
        """The next event; raises `queue.Empty` after `timeout` seconds."""
        event = self._events.get(timeout=timeout)
        if self._is_paused:
            self._tell_room()
        return event

    def poll(self) -> T | None:
        """The next event if there is one."""
        try:
            event = self._events.get_nowait()
        except Empty:
            return None
        if self._is_paused:
            self._tell_room()
        return event

    def notify(self, callback: Callable[[], object], *, is_quick: bool = False) -> None:
        """Call `callback` once as soon as there is an event: at once, or in the producer's thread.

        It must not block; one that `is_quick` takes microseconds and keeps the interpreter. Who
        asks while another waits is refused.
        """
        with self._arming:
            if self._callbacks:
                raise HasReaderError
            self._is_quick = is_quick
            self._callbacks.append(callback)
        # NOTE: after arming, or an event that comes in between would wake nobody.
        if not self._events.empty():
            self._call_back()

    def _call_back(self) -> None:
        try:
            callback = self._callbacks.pop()
        except IndexError:  # the other side has called it
            return
        callback()

    def _tell_room(self) -> None:
        if self.has_room:
            self._is_paused = False
            self._on_room()
