"""The two kinds of work that callers hand to the engine, and how they wait for it.

Knows nothing of scheduling.
"""

from __future__ import annotations

import queue
import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from edgeinfer.batch import PAGE, StepLimits
from edgeinfer.engine.cache import LEAST_SLIDING, STEP_SLOTS, CacheLayout
from edgeinfer.engine.cache_store import CacheStore
from edgeinfer.engine.delivery import Delivery
from edgeinfer.engine.drafting import Drafting
from edgeinfer.engine.event_queue import EventQueue
from edgeinfer.engine.sequence import (
    ID_BYTES,
    REQUEST_BYTES,
    EngineEvent,
    Finished,
    Rank,
    Request,
    Rows,
    Sequence,
    Token,
)
from edgeinfer.engine.speculation import MAX_ROWS, Acceptance, Speculator
from edgeinfer.engine.waits import Outcome
from edgeinfer.errors import (
    ContextLengthError,
    EdgeInferError,
    InvalidRequestError,
    Keyword,
    PlanError,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeinfer.engine.constraint import Matcher
    from edgeinfer.engine.hooks import Hook

WAKE_SECONDS = 0.1  # lets signals in where a wait can't be interrupted
MOST_UNREAD = 256  # events; a step may add a few more, 40 KiB in all
_LEAST_UNREAD = 8  # so that who reads is not waited for
_TOKEN_BYTES, _TOP_BYTES = 160, 107  # measured, CPython 3.11: an event, one of its likeliest tokens


class Worker(Protocol):
    """What a generation asks of the engine that runs it."""

    @property
    def delivery(self) -> Delivery:
        """What its events take to who reads them."""
        ...

    @property
    def acceptance(self) -> Acceptance:
        """How the guesses of all answers fare."""
        ...

    @property
    def is_forked(self) -> bool:
        """Whether this is the child of a fork, which it does not run in."""
        ...

    def interrupt(self) -> None:
        """Look at cancelled work now, also when a step of it is running."""

    def wake(self) -> None:
        """Look at what is paused now: one that waits for its reader has room again."""

    def check_waiting(self) -> None:
        """Raise unless events can still come to who waits for them in this thread."""


_FORCED = 0.999  # the chance of a token that must follow


def most_unread(n_logprobs: int | None) -> int:
    """Events that may be unread: as many as take what MOST_UNREAD of plain tokens do."""
    n_bytes = _TOKEN_BYTES + _TOP_BYTES * (n_logprobs or 0)
    return min(MOST_UNREAD, max(_LEAST_UNREAD, MOST_UNREAD * _TOKEN_BYTES // n_bytes))


def _possible(
    matcher: Matcher, tokens: list[int], chances: list[float]
) -> tuple[list[int], list[float]]:
    n = matcher.count_possible(tokens) if tokens else 0
    return tokens[:n], chances[:n]


class Generation:
    """A request on its way: yields its events to one consumer, in any thread.

    With more than `most_unread` events unread it pauses once its prompt is read: others may take
    its place and its pages. It goes on, with the same tokens, when half of them have been read.
    """

    def __init__(self, worker: Worker, request: Request, layout: CacheLayout) -> None:
        self.request, self.layout, self.hook = request, layout, request.hook
        self.matcher = request.constraint.begin() if request.constraint is not None else None
        self.sequence: Sequence | None = None  # the engine's, while it runs
        self.next_row: Rows | None = None  # the engine's: of a step in which it decodes
        self.can_guess = request.can_speculate
        self.n_history, self.n_logprobs = request.params.n_history, request.params.logprobs
        self.has_mirostat = request.params.mirostat != 0
        self.drafting = Drafting()  # what the model's own block guesses, where it has one
        self.speculator: Speculator | None = None  # the engine's
        self.n_proposed, self.n_accepted = 0, 0  # tokens guessed, and those that came true
        self.submitted_at = time.perf_counter()
        self.is_cancelled = False
        self.keeps_cache = False
        self.error: BaseException | None = None  # what it was cancelled for
        self.rank: Rank = (0, 0)  # the scheduler's
        self.n_bytes = request.n_bytes  # about what it takes while it does not run
        # Prompt and answer are no longer together than the context, but what slides has no end.
        most = request.max_tokens
        self.max_tokens = None if most is None else max(1, most)  # of none its prompt is read
        if layout.n_ctx is not None and most != 0:
            room = layout.n_ctx - len(request.ids)
            self.max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        self.events: EventQueue[EngineEvent] = EventQueue(most_unread(self.n_logprobs), worker.wake)
        self._worker, self._delivery = worker, worker.delivery
        self._is_finished = False

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> EngineEvent:
        if self._is_finished:
            raise StopIteration
        while True:
            try:
                event = self.events.get(WAKE_SECONDS)
                break
            except queue.Empty:
                self.check_waiting()
        self._is_finished = isinstance(event, Finished)
        return event

    def check_waiting(self) -> None:
        """Raise unless events can still come to who waits for them in this thread."""
        self._worker.check_waiting()

    @property
    def is_forked(self) -> bool:
        """Whether this is the child of a fork: nothing comes any more."""
        return self._worker.is_forked

    def is_of(self, worker: object) -> bool:
        """Whether this one runs it."""
        return self._worker is worker

    @property
    def sequences(self) -> list[Sequence]:
        """Those that hold pages for it."""
        return [] if self.sequence is None else [self.sequence]

    @property
    def next_pages(self) -> tuple[int, ...]:
        """Pages of each cache group for what it has, and a page's worth of tokens after that."""
        n_tokens = len(self.request.ids if self.sequence is None else self.sequence.ids) + PAGE
        if self.max_tokens is not None:  # the last token generated is never stored
            n_tokens = min(n_tokens, len(self.request.ids) + self.max_tokens - 1)
        return self.layout.pages_needed(n_tokens)

    @property
    def is_unread(self) -> bool:
        """Whether it should pause."""
        return self.events.is_full and self.sequence is not None and self.sequence.n_generated > 0

    def next_rows(self, most: int, most_outputs: int) -> list[Rows]:
        """Up to `most` rows of its prompt, or of what it computes again; one output at most."""
        sequence = self.sequence
        assert sequence is not None, "the generation does not run"
        n = min(sequence.n_waiting, most, sequence.cache.step_limit())
        return [Rows(sequence, n, int(n == sequence.n_waiting), self)]

    def guess(self) -> tuple[list[int], list[float]]:
        """Tokens that may follow, as many as a step may check, and the chance of each."""
        sequence = self.sequence
        if sequence is None or not self.can_guess:
            return [], []
        if self.speculator is None:
            self.speculator = Speculator(sequence.ids, self._worker.acceptance)
        most = min(MAX_ROWS, sequence.cache.step_limit()) - 1
        if self.max_tokens is not None:
            most = min(most, self.max_tokens - sequence.n_generated - 1)
        guesses = [self.speculator.guess(most), self.drafting.guess(len(sequence.ids), most)]
        if self.matcher is not None:
            guesses = [_possible(self.matcher, *guess) for guess in guesses]
            forced = self.matcher.forced(most)
            guesses.append((forced, [_FORCED] * len(forced)))
        return max(guesses, key=lambda found: sum(found[1]))

    def rest(self) -> None:
        """Hold no more than what it goes on from: an index of guesses is made again."""
        self.speculator = None
        self.n_bytes = self.request.n_bytes + sum([each.n_bytes for each in self.sequences])

    def emit(self, event: EngineEvent) -> None:
        """Have it delivered. Only a token that others have come before can wait for a step."""
        is_more = self.sequence is not None and self.sequence.n_generated > 1
        self._delivery.put(self, event, can_wait=is_more and isinstance(event, Token))

    def cancel(self, *, keep_cache: bool = False) -> None:
        """End it now, from any thread. With `keep_cache` its pages may serve a later prompt."""
        self.keeps_cache = keep_cache
        self.is_cancelled = True
        self._worker.interrupt()

    def take(self, event: EngineEvent) -> None:
        """Pass an event on to the reader; behind one that may be lost only the end, an error."""
        if self.error is None:
            self.events.put(event)
        elif isinstance(event, Finished):
            error = event.error or public_error(self.error)
            self.events.put(Finished("error", event.at, error=error))

    def break_off(self, error: BaseException) -> None:
        """End it with an error of its reader's, from any thread."""
        self.error = error
        self.is_cancelled = True
        self._worker.interrupt()


# Told of a job's end, with the error that ended it if one did, in the engine's thread.
Ended: TypeAlias = "Callable[[BaseException | None], object] | None"


@dataclass(slots=True, eq=False)
class LogitsJob:
    """Logits of `ids` from position `first` on, computed beside the token lists `others`.

    `take(row, logits)` is called in the engine's thread with views of the next rows.
    """

    ids: array[int]
    others: list[array[int]]
    first: int
    chunk: int
    layout: CacheLayout
    take: Callable[[int, NDArray[np.float32]], None]
    n_bytes: int  # about what it takes while it does not run
    sequences: list[Sequence] = field(default_factory=list)  # the engine's, while it runs
    is_cancelled: bool = False
    rank: Rank = (0, 0)  # the scheduler's
    hook: Hook | None = None
    n_taken: int = 0  # positions up to which logits were passed on
    ended: Ended = None
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def next_pages(self) -> tuple[int, ...]:
        """Pages of each cache group that it holds in the end."""
        needed = [self.layout.pages_needed(len(ids)) for ids in (self.ids, *self.others)]
        return tuple(map(sum, zip(*needed, strict=True)))

    @property
    def is_complete(self) -> bool:
        """Whether every row has been computed; what is left of `others` does not matter."""
        return bool(self.sequences) and not self.sequences[0].n_waiting

    @classmethod
    def of(
        cls,
        lists: SequenceOf[SequenceOf[int]],
        first: int,
        prefill_chunk: int | None,
        limits: StepLimits,
        layout: CacheLayout,
        take: Callable[[int, NDArray[np.float32]], None],
        hook: Hook | None = None,
    ) -> LogitsJob:
        """A job for the first of `lists`; raises where it asks for too much."""
        if prefill_chunk is not None and prefill_chunk < 1:
            raise InvalidRequestError(
                f"prefill_chunk is {prefill_chunk}, need at least 1", param="prefill_chunk"
            )
        ids, *others = (array("i", each) for each in lists)
        most = limits.max_sequences
        if limits.n_states:
            most = min(most, limits.n_states // STEP_SLOTS)
        if len(others) > most - 1:
            raise InvalidRequestError(
                f"{len(others)} token lists, at most {most - 1} fit in a step", param="batch_with"
            )
        chunk = min(prefill_chunk or limits.max_rows, limits.max_rows - len(others))
        n_bytes = REQUEST_BYTES + ID_BYTES * sum(map(len, (ids, *others)))
        job = cls(ids, others, first, chunk, layout, take, n_bytes, hook=hook)
        for n_pages, there_are in zip(job.next_pages, limits.n_pages.values(), strict=False):
            if n_pages > there_are:
                raise PlanError(
                    f"the token lists take {n_pages * PAGE} cache positions, there are "
                    f"{there_are * PAGE}",
                    advice=("raise ", Keyword("slots")),
                )
        return job

    def open(self, store: CacheStore) -> None:
        """Make the sequences, on caches of their own."""
        lists = (self.ids, *self.others)
        self.sequences = [store.open_empty(ids, self.layout) for ids in lists]

    def next_rows(self, most: int, most_outputs: int) -> list[Rows]:
        """The parts of its next step: about `most` rows."""
        main, *others = self.sequences
        start = main.cache.n_tokens
        n = min(self.chunk, main.n_waiting, main.cache.step_limit(), max(1, most - len(others)))
        n_wanted = max(0, start + n - max(start, self.first, self.n_taken))
        excess = max(0, n_wanted - max(1, most_outputs))
        n, n_wanted = n - excess, n_wanted - excess
        parts = [Rows(main, n, n_wanted, self)]
        for i, other in enumerate(others):
            n_other = min(other.n_waiting, other.cache.step_limit(), (most - n) // len(others))
            if n_other:
                # Before and after, so that the rows of `ids` lie anywhere in the step.
                parts.insert(0 if i % 2 else len(parts), Rows(other, n_other, 0, self))
        return parts

    def commit(self, part: Rows, logits: NDArray[np.float32]) -> None:
        """Count what a step has stored of a part and pass its logits on."""
        part.sequence.cache.advance(part.n)
        if len(logits):
            end = part.sequence.cache.n_tokens
            self.take(end - len(logits) - self.first, logits)
            self.n_taken = end

    def finish(self, error: BaseException | None = None) -> None:
        self.outcome.tell(error)
        if self.ended is not None:
            self.ended(error)


def check_ids(ids: SequenceOf[int], n_vocab: int, param: str, name: str = "") -> None:
    """Raise unless these are one or more tokens of the vocabulary; `name` is theirs in words."""
    if not len(ids):
        raise InvalidRequestError(f"{name or param} has no tokens", param=param)
    for id in (min(ids), max(ids)):
        if not 0 <= id < n_vocab:
            raise InvalidRequestError(
                f"token id {id} is outside the vocabulary of {n_vocab} tokens", param=param
            )


def check_length(
    n_tokens: int, n_ctx: int, n_answer: int = 0, *, is_least: bool = False, may_slide: bool = False
) -> None:
    """Raise where a context can't hold so many tokens, and so many of an answer.

    `is_least` says that there are more, which nobody has counted; `may_slide` that the caller has a
    keyword for that.
    """
    if n_tokens + n_answer > n_ctx:
        room = f" with {n_answer} of an answer" if n_answer and n_tokens == n_ctx else ""
        counted = f"at least {n_tokens}" if is_least else f"{n_tokens}"
        raise ContextLengthError(
            f"the prompt is {counted} tokens, the context holds {n_ctx}{room}",
            advice=_TO_SLIDE if may_slide and n_ctx >= LEAST_SLIDING else _TO_FIT,
            n_tokens=n_tokens,
            n_ctx=n_ctx,
        )


_TO_FIT = ("raise ", Keyword("n_ctx"), " or shorten the prompt")
_TO_SLIDE = (
    "raise ", Keyword("n_ctx"), ", shorten the prompt, or use ", Keyword("overflow", "slide"),
)  # fmt: skip


def public_error(error: BaseException) -> BaseException:
    """What the caller is told: what ended a step may mean something else in another thread."""
    if isinstance(error, EdgeInferError):
        return error
    if isinstance(error, MemoryError):  # like memory that would run out
        lower = ("lower ", Keyword("n_ctx"), " or ", Keyword("slots"))
        return PlanError("memory ran out in a step", advice=lower)
    if isinstance(error, Exception) and not isinstance(error, (StopIteration, StopAsyncIteration)):
        return error
    return EdgeInferError(f"the request was cut short by {error!r}")
