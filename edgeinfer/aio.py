"""`LLM` and its streams for asyncio: loading takes a thread, waiting for events takes none.

Knows nothing of models; a module of its own because importing asyncio takes 50 ms.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any

from typing_extensions import Unpack

from edgeinfer.chat import Message
from edgeinfer.errors import InvalidRequestError
from edgeinfer.llm import LLM
from edgeinfer.options import LoadOptions, Sampling
from edgeinfer.results import Completion, Event
from edgeinfer.stream import Stream


class AsyncLLM:
    """`LLM` for asyncio: `async with AsyncLLM(path) as llm: await llm.chat(...)`."""

    def __init__(self, model: str | PathLike[str] | LLM, **load: Unpack[LoadOptions]) -> None:
        self._given, self._load = model, load
        self._llm = model if isinstance(model, LLM) else None
        self._opening = threading.Lock()

    async def open(self) -> LLM:
        """The model, loaded in a thread when first asked for."""
        if self._llm is None:
            return await asyncio.to_thread(self._open)
        return self._llm

    def _open(self) -> LLM:
        with self._opening:  # tasks that ask at once get the same
            llm = self._llm
            if llm is None:
                assert not isinstance(self._given, LLM)
                llm = self._llm = LLM(self._given, **self._load)
        return llm

    async def generate(
        self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]
    ) -> Completion:
        return await (await self.stream(prompt, **sampling)).run()

    async def stream(
        self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]
    ) -> AsyncStream:
        llm = await self.open()
        return AsyncStream(llm.stream(prompt, **sampling))

    async def chat(
        self,
        messages: str | Sequence[Message],
        *,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        stream = await self.stream_chat(messages, template_args=template_args, **sampling)
        return await stream.run()

    async def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        llm = await self.open()
        return AsyncStream(llm.stream_chat(messages, template_args=template_args, **sampling))

    async def close(self) -> None:
        """Close the model, unless it was given open."""
        if self._llm is not self._given:
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._opening:  # what is still being loaded too
            if self._llm is not None:
                self._llm.close()

    async def __aenter__(self) -> AsyncLLM:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncStream(AsyncIterator[Event]):
    """The same for asyncio: `async for`, `async with`; cancelling the task cancels the answer."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reading = threading.Lock()

    @property
    def completion(self) -> Completion:
        return self._stream.completion

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Event:
        if not self._reading.acquire(blocking=False):
            raise InvalidRequestError("the stream is being read already; it has one reader")
        try:
            # Also when there is an event: the loop's other tasks get their turn.
            await asyncio.sleep(0)
            while (event := self._stream.poll()) is None:
                await self._wait()
            return event
        except StopIteration:
            raise StopAsyncIteration from None
        except InvalidRequestError:  # someone else is reading it
            raise
        except BaseException:
            self._stream.close()
            raise
        finally:
            self._reading.release()

    async def _wait(self) -> None:
        """Until the engine's thread has an event; a closed loop ends the answer there."""
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        self._stream.notify(partial(loop.call_soon_threadsafe, _wake, woken))
        await woken

    async def run(self) -> Completion:
        """Wait for the end."""
        async with self:
            async for _ in self:
                pass
        return self.completion

    async def close(self) -> None:
        """Cancel what is left."""
        self._stream.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
