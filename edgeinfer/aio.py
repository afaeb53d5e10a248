"""`LLM` and its streams for asyncio: work takes one thread, waiting for events takes none.

Knows nothing of models; a module of its own because importing asyncio takes 50 ms.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeinfer import platform
from edgeinfer.engine.event_queue import HasReaderError
from edgeinfer.engine.generation import public_error
from edgeinfer.errors import ClosedError, DeviceError, InvalidRequestError
from edgeinfer.llm import LLM
from edgeinfer.options import LoadOptions, Sampling, Unpack
from edgeinfer.parameters import shown
from edgeinfer.results import Completion, Event
from edgeinfer.stream import Stream
from edgeinfer.text.messages import Message

T = TypeVar("T")


class AsyncLLM:
    """`LLM` for asyncio: `async with AsyncLLM(path) as llm: await llm.chat(...)`.

    Loading, templates and tokens are work for a thread, in the order in which they are asked for.
    """

    def __init__(self, model: str | PathLike[str] | LLM, **load: Unpack[LoadOptions]) -> None:
        if isinstance(model, LLM) and load:
            raise InvalidRequestError(
                f"{next(iter(load))} is given with a model that is open; it says how one is loaded",
                param=next(iter(load)),
            )
        self._given, self._load = model, load
        self._llm = model if isinstance(model, LLM) else None
        self._opening = platform.ProcessLock()
        self._is_closed = False
        self._worker = Worker()

    async def open(self) -> LLM:
        """The model, loaded when first asked for."""
        if self._llm is None:
            return await self._worker.do(self._open)
        return self._llm

    def _open(self) -> LLM:
        with self._opening.own:  # `_close` waits for what is still being loaded
            llm = self._llm
            if llm is None:
                if self._is_closed:
                    raise ClosedError("the model was closed")
                assert not isinstance(self._given, LLM)
                llm = self._llm = LLM(self._given, **self._load)
        return llm

    async def generate(
        self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]
    ) -> Completion:
        """Continue a text or a list of token ids."""
        return await (await self.stream(prompt, **sampling)).run()

    async def stream(
        self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]
    ) -> AsyncStream:
        """`generate`, as events while it runs."""
        return await self._begin(lambda llm: llm.stream(prompt, **sampling))

    async def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """Answer a conversation."""
        stream = await self.stream_chat(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            template_args=template_args,
            **sampling,
        )
        return await stream.run()

    async def stream_chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        template_args: Mapping[str, Any] | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """`chat`, as events while it runs."""
        return await self._begin(
            lambda llm: llm.stream_chat(
                messages,
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                template_args=template_args,
                **sampling,
            )
        )

    async def embed(
        self,
        texts: str | Sequence[int] | Sequence[str | Sequence[int]],
        *,
        pooling: str | None = None,
        dimensions: int | None = None,
        truncate: bool | None = None,
    ) -> NDArray[np.float32]:
        """A vector of length 1 for each text; see `LLM.embed`."""
        given = dict(pooling=pooling, dimensions=dimensions, truncate=truncate)
        return (await self.embedding(texts, given))[0]

    async def embedding(self, texts: Any, given: dict[str, Any]) -> tuple[NDArray[Any], int]:
        """The same, and how many tokens the texts have; a cancelled task ends it."""
        from edgeinfer.embedding import Embedding, embedding_of  # most programs need none

        # Many texts may take long to become tokens: chats don't wait behind them.
        begun = await Worker().do(
            lambda: embedding_of(self._open().runtime, texts, given).begin(), Embedding.cancel
        )
        try:
            loop = asyncio.get_running_loop()
            done = loop.create_future()
            begun.notify(lambda: _tell(loop, _wake, done))
            begun.check_waiting()
            await done
        except BaseException:
            begun.cancel()
            raise
        return begun.result(), begun.n_tokens

    async def _begin(self, stream: Callable[[LLM], Stream]) -> AsyncStream:
        return AsyncStream(await self._worker.do(lambda: stream(self._open()), Stream.close))

    async def close(self) -> None:
        """Close the model, unless it was given open."""
        if self._llm is not self._given:
            await Worker().do(self._close)  # not behind what waits for its turn

    def _close(self) -> None:
        with self._opening.own:
            self._is_closed = True  # also for who asked for it and has not begun to load it
            if self._llm is not None:
                self._llm.close()

    def __repr__(self) -> str:
        what = shown(self._given) if self._llm is None else repr(self._llm)
        return f"<AsyncLLM of {what}{', not loaded yet' if self._llm is None else ''}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model can't be copied or pickled; make another AsyncLLM there")

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
    def stream(self) -> Stream:
        """The same for who reads it with `poll` and `notify` instead."""
        return self._stream

    @property
    def completion(self) -> Completion:
        return self._stream.completion

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens of the prompt, template included."""
        return self._stream.prompt_ids

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Event:
        if not self._reading.acquire(blocking=False):
            raise HasReaderError
        try:
            # Also when there is an event: the loop's other tasks get their turn.
            await asyncio.sleep(0)
            while (event := self._stream.poll()) is None:
                await self._wait()
            return event
        except StopIteration:
            raise StopAsyncIteration from None
        except HasReaderError:
            raise
        except BaseException:
            self._stream.close()
            raise
        finally:
            self._reading.release()

    async def _wait(self) -> None:
        """Until the engine's thread has an event; a closed loop ends the answer there."""
        self._stream.check_waiting()
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        self._stream.notify(partial(loop.call_soon_threadsafe, _wake, woken))
        await woken

    async def run(self) -> Completion:
        """Wait for the end; an interrupted wait cancels the generation."""
        async for _ in self:
            pass
        return self.completion

    async def close(self) -> None:
        """Cancel what is left."""
        self._stream.close()

    def __repr__(self) -> str:
        return f"<AsyncStream of {self._stream!r}>"

    def __reduce__(self) -> NoReturn:
        self._stream.__reduce__()

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


class Worker:
    """Does what would hold up an event loop, one after the other, in a thread while there is any.

    A thread of its own: a loop's executor is for what else the program waits for.
    """

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None  # while there is any work
        self._pid = os.getpid()  # of the process that it is in
        self._lock = platform.ProcessLock()

    async def do(
        self, work: Callable[[], T], discard: Callable[[T], object] = lambda found: None
    ) -> T:
        """The result of `work`; `discard` it where the task was cancelled meanwhile."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            if done.cancelled():
                return
            try:
                found = work()
            except BaseException as error:
                _tell(loop, _fail, done, error)
            else:
                if not _tell(loop, _finish, done, found, discard):
                    discard(found)

        self._add(job)
        try:
            return await done
        except BaseException:
            # It may have come already: a task that is cancelled then is not given it.
            if done.done() and not done.cancelled() and done.exception() is None:
                discard(done.result())
            raise

    def _add(self, job: Callable[[], None]) -> None:
        with self._lock.own:
            if self._thread is None or self._pid != os.getpid():  # a fork has no threads
                thread = threading.Thread(target=self._run, name="edgeinfer-text", daemon=True)
                if not platform.start_some([thread]):
                    raise DeviceError(
                        "can't start the thread that works beside the event loop; raise this "
                        "process's limits (ulimit -u, -v)"
                    )
                self._thread, self._pid = thread, os.getpid()
            self._jobs.append(job)

    def _run(self) -> None:
        while True:
            with self._lock.own:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            with suppress(BaseException):  # of what gives up what nobody wants
                job()


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *values: Any) -> bool:
    """Have the loop make a call; False where it was closed."""
    try:
        loop.call_soon_threadsafe(call, *values)
    except RuntimeError:
        return False
    return True


def _finish(done: asyncio.Future[T], found: T, discard: Callable[[T], object]) -> None:
    if done.done():  # its task was cancelled
        discard(found)
    else:
        done.set_result(found)


def _fail(done: asyncio.Future[T], error: BaseException) -> None:
    if isinstance(error, StopIteration):  # which no future takes: nobody would be told
        error = public_error(error)
    if not done.done():
        done.set_exception(error)
