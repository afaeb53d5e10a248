"""What a CUDA stream is to a GPU, for the shim: does what it is told to, in order, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cuda.device import Event

# What to do, and whether to do it even after an error; None ends the thread.
_Queue = SimpleQueue[tuple[Callable[[], Any], bool] | None]


class HostStream:
    """After an error it does nothing more, and everything raises it: so does a GPU that faulted."""

    def __init__(self) -> None:
        self._queue: _Queue = SimpleQueue()
        self._errors: list[Exception] = []
        args = (self._queue, self._errors)
        self._thread = threading.Thread(target=_do_all, args=args, daemon=True, name="shim")
        self._thread.start()
        self._is_closed = False

    def do(self, action: Callable[[], Any]) -> None:
        """Have it done after everything before."""
        self.check()
        self._queue.put((action, False))

    def mark(self) -> StreamEvent:
        self.check()
        event = StreamEvent(self)
        self._queue.put((event.set, True))  # or who waits for it would never learn of an error
        return event

    def check(self) -> None:
        """DeviceError where anything has failed, or after `close`."""
        if self._errors:
            raise DeviceError(str(self._errors[0])) from self._errors[0]
        if self._is_closed:
            raise DeviceError("the device is closed")

    def close(self) -> None:
        """Let what is queued be done, and the thread end."""
        self._is_closed = True
        self._queue.put(None)
        if threading.current_thread() is self._thread:  # which collects garbage: nobody waits
            self._errors.append(DeviceError("the device is closed"))
        else:
            self._thread.join()


class StreamEvent:
    """See `Event`."""

    def __init__(self, stream: HostStream) -> None:
        self._stream = stream
        self.is_over = threading.Event()
        self._at = 0.0

    def set(self) -> None:
        self._at = time.perf_counter()
        self.is_over.set()

    def wait(self) -> None:
        self.is_over.wait()
        self._stream.check()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, StreamEvent)
        return self._at - earlier._at


def _do_all(queue: _Queue, errors: list[Exception]) -> None:
    while (item := queue.get()) is not None:
        action, is_certain = item
        if errors and not is_certain:
            continue
        try:
            action()
        except Exception as error:
            errors.append(error)
