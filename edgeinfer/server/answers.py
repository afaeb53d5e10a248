"""Answers on their way: their events are passed on in the very call of the loop that brings them.

No task wakes up for a token. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial

from edgeinfer.aio import AsyncStream
from edgeinfer.errors import InvalidRequestError
from edgeinfer.results import Completion, Delta, Done, Event, TokenLogprob
from edgeinfer.server.doorbell import Doorbell
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.models import ServedModel
from edgeinfer.server.structure import Structure


class Listener:
    """Who is told of an answer's events. It must not block; what it raises ends the answer."""

    def hear(self, i: int, event: Event) -> bool:
        """An event of the `i`-th answer; False where the next one has to wait."""
        return True

    def rest(self) -> bool:
        """All that has come was heard; False where what comes next has to wait."""
        return True

    def idle(self) -> None:
        """Nothing has come for a while; `rest` follows."""


class Answer:
    """One request's answers while they run. `close` gives everything back, however it ends."""

    def __init__(
        self,
        model: ServedModel,
        streams: list[AsyncStream],
        ping_seconds: float,
        doorbell: Doorbell,
        stack: AsyncExitStack,
        structure: Structure,
    ) -> None:
        self.model, self.streams, self.stack = model, streams, stack
        self._structure = structure
        self.completions: dict[int, Completion] = {}
        self.has_begun = False
        self._left = {i: stream.stream for i, stream in enumerate(streams)}
        self._wakers = [partial(self._wake, i) for i in self._left]
        self._woken = deque(self._left)  # those that may have events
        self._ping_seconds = ping_seconds
        self._doorbell = doorbell
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[bool | Exception] | None = None  # while somebody listens
        self._is_cut_short = False
        model.metrics.n_running += 1
        stack.callback(self._leave)
        stack.enter_context(doorbell.listening(self._loop))

    def prompt_ids(self, i: int) -> tuple[int, ...]:
        """The tokens of a prompt, template included."""
        return self.streams[i].prompt_ids

    def _leave(self) -> None:
        self.model.metrics.n_running -= 1

    async def listen(self, listener: Listener) -> bool:
        """Tell it what comes: until that has to wait, then True, or to the end, then False."""
        self._listener, self._waiter = listener, self._loop.create_future()
        self._heard_at = self._loop.time()
        self._look_later()
        self._pass_on()
        try:
            found = await self._waiter
        finally:
            self._waiter = None
            del self._listener  # which holds this, as a rule
            self._alarm.cancel()
        if isinstance(found, InvalidRequestError):  # of a grammar that proves too large
            raise self._structure.renamed(found)
        if isinstance(found, Exception):
            raise found
        return found

    def _wake(self, i: int) -> None:
        """A stream has events; called in any thread."""
        self._woken.append(i)
        self._doorbell.ring(self._loop, self._pass_on)

    def _pass_on(self) -> None:
        """Tell of what has come."""
        if self._waiter is None or self._waiter.done():
            return
        try:
            is_behind = not (self._tell_all() and self._listener.rest())
        except Exception as error:
            self._waiter.set_result(error)  # one that nobody waits for any more is no news
        else:
            if is_behind or not self._left:
                self._waiter.set_result(is_behind)

    def _tell_all(self) -> bool:
        """False where the listener has not heard all."""
        if self._is_cut_short:
            raise ApiError(503, "the server is stopping; the answer was cut short")
        self._heard_at = self._loop.time()
        while self._woken:
            event = self._poll(self._woken[0])
            if event is None:
                self._woken.popleft()
                continue
            self._note(self._woken[0], event)
            if not self._listener.hear(self._woken[0], event):
                return False
        return True

    def _poll(self, i: int) -> Event | None:
        """A stream's next event; without one it wakes this later, or has ended."""
        stream = self._left[i]
        try:
            event = stream.poll()
        except StopIteration:
            del self._left[i]
            return None
        if event is None:
            stream.notify(self._wakers[i], is_quick=True)
        return event

    def _note(self, i: int, event: Event) -> None:
        self.has_begun = True
        if isinstance(event, Done):
            self.completions[i] = event.completion
            self.model.metrics.add(event.completion)

    def _look_later(self) -> None:
        self._alarm = self._loop.call_at(self._heard_at + self._ping_seconds, self._look)

    def _look(self) -> None:
        if self._loop.time() >= self._heard_at + self._ping_seconds:
            self._listener.idle()
            self._pass_on()
        self._look_later()

    async def collect(self, take: Callable[[Delta], object] | None = None) -> list[Completion]:
        """All answers, once they are whole; `take` is given their deltas as these come."""
        listener = _Taker(take) if take is not None else Listener()
        try:
            await self.listen(listener)
        finally:
            await self.close()
        return [self.completions[i] for i in range(len(self.streams))]

    def logprobs_json(self, found: Iterable[TokenLogprob]) -> list[Json]:
        """Tokens as OpenAI and Ollama both spell them, with the likeliest in their places."""
        piece = self.model.opened.runtime.tokenizer.piece

        def shown(id: int, logprob: float) -> Json:
            data = piece(id)
            return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

        return [
            {**shown(each.id, each.logprob), "top_logprobs": [shown(*top) for top in each.top]}
            for each in found
        ]

    def cut_short(self) -> None:
        self._is_cut_short = True
        self._pass_on()

    async def close(self) -> None:
        """Cancel what is left; safe to call twice."""
        await self.stack.aclose()


class _Taker(Listener):
    """Gives deltas on."""

    def __init__(self, take: Callable[[Delta], object]) -> None:
        self._take = take

    def hear(self, i: int, event: Event) -> bool:
        if isinstance(event, Delta):
            self._take(event)
        return True
