"""One answer while a thread of its own reads it from the model.

Knows nothing of widgets: what happens is left in a queue that the screen empties when it draws.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeinfer import ContextLengthError

from .settings import AnswerStream, ChatModel

if TYPE_CHECKING:
    from edgeinfer import Event, Message, Sampling

_LEAST_ROOM = 512  # tokens kept free for the answer, a quarter of a small context


class Turn:
    """Runs a request. `events` are the model's; `error` is set when it failed."""

    def __init__(self, model: ChatModel, messages: Sequence[Message], sampling: Sampling) -> None:
        self.events: deque[Event] = deque()
        self.error: BaseException | None = None
        self.n_dropped = 0  # messages left out because the context is full
        self.n_prompt = 0
        self.started_at = time.perf_counter()
        self.is_over = False
        self._model, self._messages = model, list(messages)
        self._sampling: dict[str, Any] = dict(sampling)
        self._stream: AnswerStream | None = None
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

    def wait(self, timeout: float) -> bool:
        """Whether the thread has ended by then."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            stream = self._open()
            self._stream = stream
            if self._is_stopping.is_set():
                stream.close()
            for event in stream:
                if self._is_stopping.is_set():
                    break
                self.events.append(event)
        except BaseException as error:
            if not self._is_stopping.is_set():
                self.error = error
        finally:
            self.is_over = True

    def _open(self) -> AnswerStream:
        """Ask the model; while the prompt leaves no room to answer, leave out the oldest turns."""
        strict = self._sampling.get("overflow") == "error"
        sampling = {"overflow": "slide", **self._sampling}
        while True:
            stream = self._model.stream_chat(self._messages, **sampling)
            self.n_prompt, n_ctx = len(stream.prompt_ids), self._model.n_ctx
            room = min(_LEAST_ROOM, n_ctx // 4)
            if strict or self.n_prompt <= n_ctx - room or self._is_stopping.is_set():
                return stream
            stream.close()
            if not self._drop_oldest():
                raise ContextLengthError(
                    f"the message is {self.n_prompt:,} tokens, the context holds {n_ctx:,} and "
                    f"{room} of them are for the answer; shorten it, or start with a larger --ctx",
                    n_tokens=self.n_prompt,
                    n_ctx=n_ctx,
                )

    def _drop_oldest(self) -> bool:
        """Leave out the first turn that is not the system's, with its answer."""
        start = int(self._messages[0]["role"] == "system")
        end = start + 1
        while end < len(self._messages) and self._messages[end]["role"] != "user":
            end += 1
        if end >= len(self._messages):
            return False
        del self._messages[start:end]
        self.n_dropped += end - start
        return True
