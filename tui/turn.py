"""One answer while a thread of its own reads it from the model.

Knows nothing of widgets: what happens is left in a queue that the screen empties when it draws.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeinfer.tui.params import CHAT_DEFAULTS

if TYPE_CHECKING:
    from edgeinfer import ChatModel, ChatStream, Event, Message, RepeatGuard


class Turn:
    """Runs a request. `events` are the model's; `error` is set when it failed.

    A `guard` ends an answer that says the same again and again.
    """

    def __init__(
        self,
        model: ChatModel,
        messages: Sequence[Message],
        sampling: Mapping[str, Any],
        guard: RepeatGuard | None = None,
    ) -> None:
        self.events: deque[tuple[float, Event]] = deque()  # with the time they came
        self.error: BaseException | None = None
        self.n_dropped = 0  # turns that the prompt has no room for
        self.started_at = time.perf_counter()
        self.is_over = False
        self.is_repeating = False  # and was stopped for that
        self._guard = guard
        self._model, self._messages = model, list(messages)
        self._sampling = {**CHAT_DEFAULTS, **sampling}
        self._stream: ChatStream | None = None
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgeinfer-turn", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it now; safe from any thread and more than once."""
        self._is_stopping.set()
        stream = self._stream
        if stream is not None:
            # NOTE: the stream is being read elsewhere; what it makes of that is not shown.
            with contextlib.suppress(Exception):
                stream.close()

    @property
    def is_stopped(self) -> bool:
        """Whether it was ended before its end."""
        return self._is_stopping.is_set()

    def wait(self, timeout: float) -> bool:
        """Whether the thread has ended by then."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            stream = self._model.stream_chat(self._messages, **self._sampling)
            self._stream = stream
            self.n_dropped = stream.dropped_turns
            if self._is_stopping.is_set():
                stream.close()
            for event in stream:
                self.n_dropped = stream.dropped_turns  # a server has said by now
                if self._is_stopping.is_set():
                    break
                self.events.append((time.perf_counter(), event))
                if event.type == "delta" and self._guard is not None:
                    self.is_repeating = self._guard.push(event.reasoning + event.text)
                    if self.is_repeating:
                        self.stop()
        except BaseException as error:
            if not self._is_stopping.is_set():
                self.error = error
        finally:
            self.is_over = True
