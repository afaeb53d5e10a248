"""The loop that runs generations, one step after the other, and who may ask for one.

Sees token ids only; knows nothing of text, files or devices.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from edgeinfer.backend import Program
from edgeinfer.batch import StepLimits
from edgeinfer.engine import hooks, process_end
from edgeinfer.engine.cache import CacheLayout, Overflow, PagePool
from edgeinfer.engine.cache_store import CacheStore
from edgeinfer.engine.delivery import Delivery
from edgeinfer.engine.generation import (
    WAKE_SECONDS,
    Ended,
    Generation,
    LogitsJob,
    check_ids,
    check_length,
)
from edgeinfer.engine.plan_rows import WAITING_BYTES, size_text
from edgeinfer.engine.scheduler import AnyWork, Scheduler
from edgeinfer.engine.sequence import Request
from edgeinfer.engine.speculation import Acceptance
from edgeinfer.engine.step_costs import StepCosts
from edgeinfer.engine.step_runner import StepRunner
from edgeinfer.engine.waits import Bell, Errand
from edgeinfer.errors import BusyError, ClosedError, InvalidRequestError
from edgeinfer.segment import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeinfer.engine.drafter import Drafter
    from edgeinfer.engine.session import Sessions

T = TypeVar("T")

_MOST_FAULTS = 3  # turns in a row that an error ended outside of any one request
_JOIN_SECONDS = 5.0
_GUEST_SECONDS = 0.01
_FORKED = "this process was forked from the one that loaded the model; load it again here"


class Engine:
    """Owns the one thread that runs steps of a program, and what is scheduled on it."""

    def __init__(
        self,
        program: Program,
        limits: StepLimits,
        n_ctx: int,
        n_vocab: int,
        costs: StepCosts | None = None,
        segment: Segment | None = None,
        is_naive: bool = False,
    ) -> None:
        """`is_naive` answers one request at a time and reuses nothing: to measure against."""
        self.limits, self.n_ctx, self.n_vocab = limits, n_ctx, n_vocab
        self._costs = costs or StepCosts(limits.row_cost)
        drafter: Drafter | None = None
        if segment is not None and segment.draft is not None:
            from edgeinfer.engine.drafter import Drafter  # few models have a block that guesses

            drafter = Drafter.of(program, segment, limits, self._costs)
        self._store = _store_class(is_naive)(limits, program)
        places = limits._replace(max_sequences=1) if is_naive else limits
        self._scheduler = Scheduler(places, self._costs, self._store)
        self.delivery, self.acceptance = Delivery(), Acceptance.of_all()
        # Reentrant: what a signal's handler calls may interrupt what holds it.
        self._lock = threading.RLock()
        self._bell = Bell()  # rung when something has changed that the thread waits for
        self._runner = StepRunner(
            program, self._scheduler, self.delivery, self._lock, n_vocab, drafter
        )
        self._errands: deque[Errand[Any]] = deque()
        self._closed, self._is_exit = "", False
        self.has_ended = self._is_left = False  # by its thread, by who opened it
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._loop, name="edgeinfer-engine", daemon=True)
        self._thread.start()
        process_end.tell(self)

    # -- any thread ------------------------------------------------------------------------------

    def submit(self, request: Request) -> Generation:
        """Make a generation and begin it; what can be refused is refused here."""
        generation = self.generation(request)
        self.begin(generation)
        return generation

    def generation(self, request: Request) -> Generation:
        """One that has not begun: who makes it owns it before it holds anything."""
        check_ids(request.ids, self.n_vocab, "prompt", "the prompt")
        if request.overflow == "error":
            n_answer = int(request.max_tokens != 0)
            check_length(len(request.ids), self.n_ctx, n_answer, may_slide=True)
        request.params.check_vocabulary(self.n_vocab)
        layout = self.layout(request.overflow, request.n_pinned)
        # An eighth of what Python's integers take, for as long as it waits and runs.
        return Generation(self, replace(request, ids=array("i", request.ids)), layout)

    def begin(self, work: AnyWork) -> None:
        """Queue what was made here; where an interrupt cuts that short nothing of it goes on."""
        try:
            self._queue(work)
        except BusyError:
            raise
        except BaseException:
            self._cancel(work)
            raise

    def _cancel(self, work: AnyWork) -> None:
        work.is_cancelled = True
        self.interrupt()

    def logits(
        self,
        ids: SequenceOf[int],
        last: int | None = None,
        prefill_chunk: int | None = None,
        batch_with: SequenceOf[SequenceOf[int]] | None = None,
    ) -> NDArray[np.float32]:
        """Logits after each of the `last` tokens of `ids` (all by default), (last, V)."""
        check_ids(ids, self.n_vocab, "token_ids")
        n_out = len(ids) if last is None else last
        if not 0 < n_out <= len(ids):
            raise InvalidRequestError(f"last is {last}, need 1 to {len(ids)}", param="last")
        out = np.empty((n_out, self.n_vocab), np.float32)

        def take(row: int, logits: NDArray[np.float32]) -> None:
            out[row : row + len(logits)] = logits

        self.each_logits(ids, take, len(ids) - n_out, prefill_chunk, batch_with)
        return out

    def each_logits(
        self,
        ids: SequenceOf[int],
        take: Callable[[int, NDArray[np.float32]], None],
        first: int = 0,
        prefill_chunk: int | None = None,
        batch_with: SequenceOf[SequenceOf[int]] | None = None,
        overflow: Overflow = "error",
    ) -> None:
        """Call `take(row, logits)` for runs of rows, row 0 being position `first`.

        Steps take at most `prefill_chunk` rows of `ids`, beside rows of the `batch_with` lists.
        Where they slide the first token stays, as that of an answer does.
        """
        lists = (ids, *(batch_with or ()))
        for i, each in enumerate(lists):
            check_ids(each, self.n_vocab, "batch_with" if i else "token_ids")
            if overflow == "error":
                check_length(len(each), self.n_ctx)
        layout = self.layout(overflow, n_pinned=1)
        job = LogitsJob.of(lists, first, prefill_chunk, self.limits, layout, take)
        self._check_thread()
        self.run(job)

    def job(self, ids: SequenceOf[int], hook: hooks.Hook, ended: Ended = None) -> LogitsJob:
        """To show a hook all rows of `ids` in order, again from the first after giving way.

        It has not begun. Of its end `ended`, which can't raise, is told in the engine's thread.
        """
        check_ids(ids, self.n_vocab, "token_ids")
        check_length(len(ids), self.n_ctx)
        layout = self.layout("error")
        job = LogitsJob.of((ids,), len(ids), None, self.limits, layout, lambda *_: None, hook)
        job.ended = ended
        return job

    def run(self, job: LogitsJob) -> None:
        """Begin a job and wait until every row was taken; an interrupt ends it."""
        try:
            self._queue(job)
            while not job.outcome.wait(WAKE_SECONDS):
                self.check_waiting()
        except BaseException:
            self._cancel(job)
            raise
        job.outcome.check()

    def sessions(self, model: str) -> Sessions:
        """What saves and loads what the cache holds: see there for `model`."""
        from edgeinfer.engine.session import Sessions  # most starts need none

        layout, program = self.layout("error"), self._runner.program
        return Sessions(self._store, program, layout, model, self.n_vocab, self.between_steps)

    def forget(self) -> bool:
        """Give up what is kept of all that has ended; whether nobody holds anything then."""
        return self.between_steps(self._store.forget)

    def between_steps(self, action: Callable[[], T]) -> T:
        """Call `action` in the engine's thread while no step runs; what it returns or raises."""
        self._check_thread()  # a callback is called while one runs
        errand = Errand(action)
        with self._lock:
            if is_open := not self._closed:
                self._errands.append(errand)
                self._bell.ring()
        if not is_open:
            self._refuse()
        while not errand.outcome.wait(WAKE_SECONDS):
            self.check_alive()
        return errand.result()

    @property
    def is_forked(self) -> bool:
        """Whether this is the child of a fork: it has no thread, and locks as others held them."""
        return self._pid != os.getpid()

    @property
    def n_running(self) -> int:
        """Generations whose tokens are being computed."""
        return len(self._scheduler.running)

    @property
    def pools(self) -> SequenceOf[PagePool]:
        """The pages of each cache group."""
        return self._store.pools

    def interrupt(self) -> None:
        """Look at cancelled work now. A step that others share runs on: they need its rows."""
        if self.is_forked:
            return
        # Before the lock: this thread may get that only after another step has been submitted.
        self._scheduler.may_be_cancelled = True
        with self._lock:
            self._runner.abort_cancelled()
            self._bell.ring()

    def wake(self) -> None:
        """Look at what is paused now."""
        if not self.is_forked:
            self._bell.ring()

    def check_alive(self) -> None:
        """Raise ClosedError unless events can still come."""
        # NOTE: not `Thread.is_alive`: once an interrupt comes inside it calls a thread dead.
        if self.is_forked or self.has_ended:
            self._refuse()

    def _refuse(self) -> NoReturn:
        if self._is_exit and threading.current_thread().daemon:
            threading.Event().wait()  # all such threads end now: none needs an error for that
        raise ClosedError(self._closed or _FORKED)

    def check_waiting(self) -> None:
        """The same for who waits for them here: a callback that does stops all that runs."""
        self.check_alive()
        self._check_thread()

    def _check_thread(self) -> None:
        if threading.current_thread() is self._thread or self.delivery.is_here():
            raise InvalidRequestError("a callback can't wait for an answer; wait in a thread")

    def close(self, timeout: float = _JOIN_SECONDS, *, is_exit: bool = False) -> None:
        """End every generation and the thread; safe to call twice and from any thread.

        `is_exit` says that the interpreter ends: nobody is told.
        """
        if self.is_forked:
            return
        with self._lock:
            if self._is_exit:  # nobody waits for it twice
                return
            self._is_exit, self._is_left = is_exit, True
            self._closed = self._closed or "the model was closed"
            self._runner.close()
            self._bell.ring()
        if threading.current_thread() is not self._thread and not self.delivery.is_here():
            self._thread.join(timeout)
        self._free()

    def mark_forked(self) -> None:
        """In the child of a fork the thread does not exist: every use is an error."""
        self._closed, self._lock = _FORKED, threading.RLock()

    def layout(self, overflow: Overflow, n_pinned: int = 0) -> CacheLayout:
        """How the cache of a sequence is cut here."""
        limits = self.limits
        windows, has_state = limits.n_pages, limits.n_states > 0
        return CacheLayout.of(overflow, self.n_ctx, n_pinned, windows, limits.max_rows, has_state)

    def _queue(self, work: AnyWork) -> None:
        priority = work.request.priority if isinstance(work, Generation) else 0
        with self._lock:
            if is_open := not self._closed:
                # One that nobody waits in front of is taken whatever it holds: it starts at once.
                n_bytes = self._scheduler.n_bytes_waiting
                if n_bytes and n_bytes + work.n_bytes > WAITING_BYTES:
                    raise BusyError(
                        f"requests of {size_text(n_bytes)} wait already; try again later",
                        n_bytes=work.n_bytes,
                        most=WAITING_BYTES,
                    )
                self._scheduler.enqueue(work, priority)
                self._bell.ring()
        if not is_open:
            self._refuse()

    # -- the engine's thread: one step after the other -------------------------------------------

    def _loop(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # a bug: whoever waits is told, nobody hangs
            self._closed = f"the engine failed: {error!r}"
        try:
            if not self._is_exit:
                self._scheduler.fail_all(ClosedError(self._closed), also_waiting=True)
                while self._errands:
                    self._errands.popleft().outcome.tell(ClosedError(self._closed))
                self.delivery.close(_JOIN_SECONDS)
        finally:
            self.has_ended = True
        self._free()

    def _free(self) -> None:
        """Once nobody needs the memory: a step that outlasts `close`, or calls it, does."""
        with self._lock:
            is_last = self.has_ended and self._is_left
            self._is_left = self._is_left and not is_last
        if is_last:
            self._runner.program.close()

    def _serve(self) -> None:
        """Turns until it is closed. An error outside of any one request costs a turn at first."""
        n_faults = 0
        while True:
            try:
                if not self._wait_for_work():
                    return
                self._turn()
                n_faults = 0
            except BaseException as error:
                n_faults += 1
                if n_faults == _MOST_FAULTS:
                    raise
                self._scheduler.recover()
                if n_faults > 1:  # it stays: those that run can't go on
                    self._scheduler.fail_all(error)

    def _wait_for_work(self) -> bool:
        """False once the engine is closed."""
        scheduler = self._scheduler
        if scheduler.has_work:
            return not self._closed
        self.delivery.send()
        while not (self._closed or scheduler.has_work or self._errands):
            self._bell.wait()
        return not self._closed

    def _wait_for_guests(self) -> None:
        """Who gave way to a session that is saved or loaded looks for pages now and then."""
        if self._store.has_guests and not (self._errands or self._closed):
            self._bell.wait(_GUEST_SECONDS)

    def _turn(self) -> None:
        scheduler = self._scheduler
        while self._errands:
            self.delivery.send()  # which an errand may hold up for long
            if not self._errands.popleft().run():
                scheduler.recover()
            scheduler.may_start = True  # it may have given pages back
        scheduler.drop_cancelled()
        if self.delivery.take_full():
            scheduler.pause_unread()
        scheduler.admit()
        steps = scheduler.next_steps()
        if not steps:
            self.delivery.send()
            self._wait_for_guests()
        for parts in steps:
            self._runner.run(parts)


def _store_class(is_naive: bool) -> type[CacheStore]:
    if not is_naive:
        return CacheStore
    from edgeinfer.engine.unshared_store import UnsharedStore  # only for measurements

    return UnsharedStore
