"""The events of one answer as its reader gets them: deltas as they come, a completion at the end.

Knows nothing of prompts or of how tokens are made.
"""

from __future__ import annotations

import contextlib
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeVar

from edgeinfer.engine.event_queue import HasReaderError
from edgeinfer.engine.generation import WAKE_SECONDS, Generation
from edgeinfer.engine.sequence import Finished, Prefilled, Request, Token
from edgeinfer.errors import BusyError, ClosedError, InvalidRequestError, KeptError
from edgeinfer.parameters import Parameter, shown
from edgeinfer.results import (
    Completion,
    Delta,
    Done,
    Event,
    PromptProgress,
    Timings,
    TokenLogprob,
    Usage,
)
from edgeinfer.text.reply import AnswerText
from edgeinfer.text.tokenizer import Tokenizer
from edgeinfer.values import function

_Self = TypeVar("_Self", bound="Stream")
_Reason = Literal["stop", "length", "cancelled"]
_CALLBACK = Parameter("callback", function, "Called once there is an event.")
MOST_OPEN = 256  # streams of a batch: more than steps take, fewer than may wait


class Stream(Iterator[Event]):
    """The events of one answer, for one reader at a time.

    `close`, from any thread, cancels it; so do dropping the last reference and an exception that
    ends the wait for an event. Unread it runs some 250 tokens ahead, fewer
    with `logprobs`, and then pauses.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        answer: AnswerText,
        *,
        model: str,
        load_s: float,
        owner: object,
        dropped_turns: int = 0,
    ) -> None:
        self._generation, self._tokenizer, self._answer = generation, tokenizer, answer
        self._model, self._load_s = model, load_s
        self.dropped_turns = dropped_turns  # the oldest ones, that the prompt has no room for
        self._owner = owner  # keeps the model open while someone iterates
        # Reentrant: a signal's handler may close the stream that its thread is reading.
        self._lock = threading.RLock()
        self._reader = 0  # the thread that is in `__next__` or `poll`
        self._ready: deque[Event] = deque()
        self._ids = array("i")
        self._first_at = self._last_at = 0.0  # of its tokens
        self._logprobs: list[TokenLogprob] = []
        self._n_shown = 0  # tokens that deltas have had
        self._prefill: list[Prefilled] = []
        self._completion: Completion | None = None
        self._is_over = False
        self._error = KeptError()  # that ended it

    @property
    def completion(self) -> Completion:
        """The whole answer, once the stream has ended or was closed."""
        if self._completion is None:
            raise ClosedError("the stream has not ended, or failed: there is no completion")
        return self._completion

    @property
    def request(self) -> Request:
        """What was asked for, every setting resolved."""
        return self._generation.request

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens of the prompt, template included."""
        return tuple(self._generation.request.ids)

    def check_engine(self, engine: object, param: str) -> None:
        """Raise unless this engine makes its tokens."""
        if not self._generation.is_of(engine):
            raise InvalidRequestError("the stream is not one of this model", param=param)

    def __iter__(self: _Self) -> _Self:
        return self

    def __next__(self) -> Event:
        self._begin_reading()
        try:
            while (event := self._next_ready()) is None:
                self._take(next(self._generation))
            return event
        except StopIteration:
            raise
        except BaseException:  # an interrupt too: whoever keeps its traceback keeps the stream
            self.close()
            raise
        finally:
            self._reader = 0

    def poll(self) -> Event | None:
        """The next event if it has come, else None; raises StopIteration after the last."""
        self._begin_reading()
        try:
            while (event := self._next_ready()) is None:
                taken = self._generation.events.poll()
                if taken is None:
                    return None
                self._take(taken)
                del taken
            return event
        except StopIteration:
            raise
        except BaseException:  # an interrupt may have lost the event that it came in between
            self.close()
            raise
        finally:
            self._reader = 0

    def notify(self, callback: Callable[[], object], *, is_quick: bool = False) -> None:
        """Call `callback` once when `poll` has something: at once, or in the engine's thread.

        It must not block; if it raises in that thread, the answer ends with the error. One that
        `is_quick` takes microseconds and never gives the interpreter to another thread: the next
        step waits for it.
        """
        callback = _CALLBACK.check(callback)
        self._check_process()
        if self._ready or self._is_over:
            callback()
        else:
            self._generation.events.notify(callback, is_quick=is_quick)

    def check_waiting(self) -> None:
        """Raise unless events can still come to who waits for them in this thread."""
        self._generation.check_waiting()

    def run(self) -> Completion:
        """Wait for the end; an interrupted wait cancels the generation."""
        try:
            for _ in self:
                pass
        except HasReaderError:
            raise
        except BaseException:
            self.close()
            raise
        return self.completion

    def close(self) -> None:
        """Cancel what is left of the generation; what was generated is in `completion`.

        What was read and written stays in the cache until the room is needed.
        """
        if self._generation.is_forked:  # the parent's goes on
            return
        with self._lock:
            if not self._is_over:
                self._generation.cancel(keep_cache=True)
                self._end("cancelled", None)
            self._ready.clear()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        done = self._completion
        state = done.finish_reason if done is not None else "ended" if self._is_over else "running"
        return f"<Stream of {shown(self._model)}: {len(self._ids)} tokens, {state}>"

    def __reduce__(self) -> NoReturn:
        # A copy that is dropped would end the answer of the one that is read.
        raise TypeError("a stream can't be copied or pickled; its completion can")

    def __del__(self) -> None:
        if not getattr(self, "_is_over", True):
            with contextlib.suppress(Exception):
                self._generation.cancel()

    def _check_process(self) -> None:
        """Raise in the child of a fork, where waiting for the lock may have no end either."""
        if self._generation.is_forked:
            self._generation.check_waiting()

    def _begin_reading(self) -> None:
        self._check_process()
        with self._lock:
            if self._reader not in (0, threading.get_ident()):
                raise HasReaderError
            self._reader = threading.get_ident()

    def _next_ready(self) -> Event | None:
        with self._lock:
            if self._ready:
                return self._ready.popleft()
            self._error.raise_once()
            if self._is_over:
                raise StopIteration
            return None

    def _take(self, event: Prefilled | Token | Finished) -> None:
        with self._lock:
            if self._is_over:  # another thread has closed it
                return
            if isinstance(event, Token):
                self._take_token(event)
            elif isinstance(event, Prefilled):
                self._prefill.append(event)
                self._ready.append(PromptProgress(done=event.done, total=event.total))
            elif event.error is not None:
                self._error.keep(event.error)
                self._is_over = True
            else:
                assert event.reason != "error"
                self._end(event.reason, event.stop_id)

    def _take_token(self, token: Token) -> None:
        self._first_at = self._first_at or token.at
        self._last_at = token.at
        self._ids.append(token.id)
        if token.logprob is not None:
            self._logprobs.append(self._logprob(token))
        self._show(self._answer.push(token.id))
        if self._answer.is_whole:
            self._generation.cancel(keep_cache=True)
            self._end("stop", self._answer.stop)

    def _show(self, deltas: list[Delta]) -> None:
        """With the tokens since the last one; those of several go with the first."""
        for delta in deltas:
            start, self._n_shown = self._n_shown, len(self._ids)
            has_logprobs = self._generation.request.params.logprobs is not None
            self._ready.append(
                Delta(
                    text=delta.text,
                    reasoning=delta.reasoning,
                    call=delta.call,
                    token_ids=tuple(self._ids[start:]),
                    logprobs=tuple(self._logprobs[start:]) if has_logprobs else None,
                )
            )

    def _end(self, reason: _Reason, stop: str | int | None) -> None:
        self._is_over = True
        last = self._answer.flush(stop if isinstance(stop, int) else None)
        self._show(last or ([Delta()] if self._n_shown < len(self._ids) else []))
        if self._answer.stop is not None:
            reason, stop = "stop", self._answer.stop
        prompt, read = self._generation.request, self._prefill[-1:]
        self._completion = Completion(
            text=self._answer.text,
            reasoning=self._answer.reasoning,
            tool_calls=self._answer.tool_calls,
            token_ids=tuple(self._ids),
            finish_reason=reason,
            stop=stop,
            logprobs=None if prompt.params.logprobs is None else tuple(self._logprobs),
            usage=Usage(
                prompt_tokens=len(prompt.ids),
                completion_tokens=len(self._ids),
                cached_tokens=read[0].cached if read else 0,
                cache_miss=read[0].miss if read else "",
            ),
            timings=self._timings(),
            seed=prompt.params.seed or 0,
            model=self._model,
        )
        self._ready.append(Done(completion=self._completion))

    def _logprob(self, token: Token) -> TokenLogprob:
        assert token.logprob is not None
        text = self._tokenizer.piece(token.id).decode(errors="replace")
        return TokenLogprob(id=token.id, text=text, logprob=token.logprob, top=token.top)

    def _timings(self) -> Timings:
        submitted = self._generation.submitted_at
        prefill_s, n_prefilled, decode_s = 0.0, 0, self._last_at - self._first_at
        if self._prefill:
            start, end = self._prefill[0], self._prefill[-1]
            prefill_s, n_prefilled = end.at - start.at, end.done - end.cached
        return Timings(
            load_s=self._load_s,
            first_token_s=self._first_at - submitted if self._ids else 0.0,
            prefill_tok_s=n_prefilled / prefill_s if prefill_s else 0.0,
            decode_tok_s=(len(self._ids) - 1) / decode_s if decode_s else 0.0,
            total_s=time.perf_counter() - submitted,
            proposed_tokens=self._generation.n_proposed,
            accepted_tokens=self._generation.n_accepted,
        )


def _read_all(openers: Iterable[Callable[[], Stream]]) -> list[Completion]:
    """The completions of streams that are opened as there is room, and read as their events come.

    At most MOST_OPEN are open, and no more than the engine lets wait.
    """
    ready: SimpleQueue[Stream] = SimpleQueue()
    opened: list[Stream] = []
    more, n_open, has_room = iter(openers), 0, True
    opener = next(more, None)
    while True:
        while opener is not None and has_room and n_open < MOST_OPEN:
            try:
                stream = opener()
            except BusyError:
                if not n_open:
                    raise
                has_room = False  # until one has ended
                break
            opened.append(stream)
            stream.notify(partial(ready.put, stream))
            n_open, opener = n_open + 1, next(more, None)
        if not n_open:
            return [stream.completion for stream in opened]
        try:
            stream = ready.get(timeout=WAKE_SECONDS)
            while stream.poll() is not None:
                pass
            stream.notify(partial(ready.put, stream))
        except Empty:
            opened[-1].check_waiting()
        except StopIteration:
            n_open, has_room = n_open - 1, True


def run_all(
    open_stream: Callable[[Any], Stream], asked: Iterable[Any], param: str
) -> list[Completion]:
    """Run streams side by side; one that fails ends them all."""
    with contextlib.ExitStack() as stack:

        def opened(each: Any) -> Stream:
            return stack.enter_context(open_stream(each))

        return _read_all(partial(opened, each) for each in items(asked, param))


def items(given: Iterable[Any], param: str) -> Iterable[Any]:
    """What to go through; a text would be gone through letter by letter."""
    with contextlib.suppress(
        TypeError
    ):  # NumPy's arrays of no dimension are iterable by their type alone
        if not isinstance(given, (str, bytes, bytearray, memoryview, Mapping)):
            return iter(given)
    raise InvalidRequestError(f"{param} is {shown(given)}; it must be a list", param=param)
