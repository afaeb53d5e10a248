"""The loop that runs generations: schedules them into steps, commits tokens, streams events.

Sees token ids only; knows nothing of text, files or devices.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.backend import Program, Ticket
from edgeinfer.batch import Outputs, StepLimits
from edgeinfer.errors import (
    ClosedError,
    EdgeInferError,
    InvalidRequestError,
)
from edgeinfer.generation import (
    Generation,
    LogitsJob,
    check_ids,
    check_length,
    public_error,
)
from edgeinfer.kvcache import CacheLayout, PagePool, SequenceCache
from edgeinfer.sampling import OK, SampleTable
from edgeinfer.sequence import (
    Finished,
    FinishReason,
    Prefilled,
    Request,
    Rows,
    Sequence,
    Token,
    Work,
    build_batch,
)
from edgeinfer.speculation import MAX_ROWS, StepCosts, best_drafts

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Prompt rows in a step that also decodes: the other generations wait no longer than these take.
_SHARED_PREFILL = 64
_JOIN_SECONDS = 5.0
_FORKED = "this process was forked from the one that loaded the model; load it again here"


class Engine:
    """Owns the cache bookkeeping and the one thread that runs steps of a program."""

    def __init__(
        self,
        program: Program,
        limits: StepLimits,
        n_ctx: int,
        n_vocab: int,
        costs: StepCosts | None = None,
    ) -> None:
        self.limits, self.n_ctx, self.n_vocab = limits, n_ctx, n_vocab
        self.pool = PagePool(limits.n_pages)
        self._program = program
        self._costs = costs or StepCosts()
        n_samples = min(limits.max_outputs, MAX_ROWS * limits.max_sequences)
        self._samples = SampleTable(max(limits.max_sequences, n_samples))
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._jobs: deque[LogitsJob] = deque()
        self._running: list[Generation] = []
        self._paused: list[Generation] = []  # until they are read; they may lose their pages
        self._idle: list[Sequence] = []  # ended ones, the latest last
        self._ticket: Ticket | None = None
        self._in_step: list[Work] = []
        self._closed = ""
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._loop, name="edgeinfer-engine", daemon=True)
        self._thread.start()
        _engines.add(self)

    # -- any thread ------------------------------------------------------------------------------

    def submit(self, request: Request) -> Generation:
        """Queue a request; what can be refused is refused here."""
        check_ids(request.ids, self.n_vocab)
        if request.max_tokens is not None and request.max_tokens < 1:
            raise InvalidRequestError(
                f"max_tokens is {request.max_tokens}, need at least 1", param="max_tokens"
            )
        if request.overflow == "error":
            check_length(len(request.ids), self.n_ctx)
        request.params.check_vocabulary(self.n_vocab)
        layout = CacheLayout.of(request.overflow, self.n_ctx, request.n_pinned)
        generation = Generation(self, request, layout)
        with self._changed:
            self._check_open()
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    def logits(
        self,
        ids: SequenceOf[int],
        last: int | None = None,
        prefill_chunk: int | None = None,
        batch_with: SequenceOf[SequenceOf[int]] | None = None,
    ) -> NDArray[np.float32]:
        """Logits after each of the `last` tokens of `ids` (all by default), (last, V)."""
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
    ) -> None:
        """Call `take(row, logits)` for runs of rows, row 0 being position `first`.

        Steps take at most `prefill_chunk` rows of `ids`, beside rows of the `batch_with` lists.
        """
        lists = (ids, *(batch_with or ()))
        for each in lists:
            check_ids(each, self.n_vocab)
            check_length(len(each), self.n_ctx)
        layout = CacheLayout.of("error", self.n_ctx)
        job = LogitsJob.of(lists, first, prefill_chunk, self.limits, layout, take)
        with self._changed:
            self._check_open()
            self._jobs.append(job)
            self._changed.notify()
        job.wait(self)

    @property
    def n_running(self) -> int:
        """Generations whose tokens are being computed."""
        return len(self._running)

    def interrupt(self, work: Work) -> None:
        """Look at cancelled work now, also when a step of it is running."""
        if self._pid != os.getpid():
            return
        with self._changed:
            if self._ticket is not None and any(work is each for each in self._in_step):
                self._ticket.abort()
            self._changed.notify()

    def wake(self) -> None:
        """Look at what is paused now."""
        if self._pid == os.getpid():
            with self._changed:
                self._changed.notify()

    def check_alive(self) -> None:
        """Raise ClosedError unless events can still come."""
        if self._pid != os.getpid() or not self._thread.is_alive():
            raise ClosedError(self._closed or _FORKED)

    def close(self, timeout: float = _JOIN_SECONDS) -> None:
        """End every generation and the thread; safe to call twice and from any thread."""
        if self._pid != os.getpid():
            return
        with self._changed:
            self._closed = self._closed or "the model was closed"
            if self._ticket is not None:
                self._ticket.abort()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        # A thread that is still in a step keeps its memory: freeing it would crash.
        if not self._thread.is_alive():
            self._program.close()

    def mark_forked(self) -> None:
        """In the child of a fork the thread does not exist: every use is an error."""
        self._closed, self._changed = _FORKED, threading.Condition()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(self._closed)

    # -- the engine's thread: one step after the other -------------------------------------------

    def _loop(self) -> None:
        try:
            self._serve()
        except Exception as error:  # a bug: whoever waits is told, nobody hangs
            self._closed = f"the engine failed: {error!r}"
        self._end_all(ClosedError(self._closed))

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._has_work):
                    self._changed.wait()
            if self._closed:
                return
            self._drop_cancelled()
            self._pause_unread()
            self._admit()
            if self._running:
                self._step(self._schedule())
            if self._jobs:
                self._advance_job(self._jobs[0])

    @property
    def _has_work(self) -> bool:
        if self._waiting or self._running or self._jobs:
            return True
        return any(g.is_cancelled or g.events.has_room for g in self._paused)

    def _drop_cancelled(self) -> None:
        for generation in [g for g in (*self._running, *self._paused) if g.is_cancelled]:
            self._finish(generation, "cancelled")
        for generation in [g for g in tuple(self._waiting) if g.is_cancelled]:
            self._waiting.remove(generation)
            generation.emit(Finished("cancelled", time.perf_counter()))

    def _pause_unread(self) -> None:
        """Without a reader a generation promises itself no pages; it keeps them while it can."""
        for generation in [g for g in self._running if g.is_unread]:
            self._running.remove(generation)
            self._paused.append(generation)
            generation.events.pause()

    def _admit(self) -> None:
        """Start waiting requests, in order, while all that run can grow to their full length.

        Those that were paused and are read again have waited before.
        """
        while len(self._running) < self.limits.max_sequences:
            resumed = [g for g in self._paused if g.events.has_room]
            candidates = resumed or self._waiting
            if not candidates:
                return
            generation = candidates[0]
            if generation.most_pages > self.pool.n_pages - self._n_reserved:
                return
            self._running.append(generation)
            if resumed:
                self._paused.remove(generation)
                continue
            self._waiting.popleft()
            sequence = generation.sequence = self._open_sequence(generation)
            done = sequence.n_cached
            generation.emit(Prefilled(done, sequence.n_prompt, done, time.perf_counter()))

    @property
    def _n_reserved(self) -> int:
        """Pages promised to what runs."""
        promised = sum(generation.most_pages for generation in self._running)
        return promised + sum(job.n_pages for job in self._jobs if job.sequences)

    def _open_sequence(self, generation: Generation) -> Sequence:
        """A sequence for the request, on the cache of an ended one where their tokens agree."""
        ids, layout = generation.request.ids, generation.layout
        n_cached, best = 0, None
        for ended in self._idle:
            n = ended.common_prefix(ids, layout)
            if n > n_cached:
                n_cached, best = n, ended
        if best is None:
            return Sequence(list(ids), len(ids), SequenceCache(self.pool, layout))
        self._idle.remove(best)
        best.cache.truncate(n_cached)
        return Sequence(list(ids), len(ids), best.cache, n_cached)

    def _schedule(self) -> list[Rows]:
        """One row of every generation that decodes, and a slice of the prompts that wait."""
        parts: list[Rows] = []
        n_left = self.limits.max_rows
        # Decoding rows first: at most max_sequences, so there is always room for them.
        for generation in sorted(self._running, key=lambda g: _sequence(g).n_waiting > 1):
            sequence = _sequence(generation)
            n = min(sequence.n_waiting, n_left, sequence.cache.step_limit())
            if n:
                parts.append(Rows(sequence, n, int(n == sequence.n_waiting), generation))
            n_left -= n
            if sequence.n_generated:
                n_left = min(n_left, max(_SHARED_PREFILL, len(self._running)))
        if all(part.sequence.is_decoding for part in parts):
            self._add_drafts(parts)
        return parts

    def _add_drafts(self, parts: list[Rows]) -> None:
        """Guess tokens after the next ones, as far as checking them in this step pays."""
        guesses = [part.work.guess() for part in parts if isinstance(part.work, Generation)]
        if not any(tokens for tokens, _ in guesses):
            return
        most = min(self.limits.max_rows, len(self._samples.rows))
        n_drafts = best_drafts([chances for _, chances in guesses], self._costs, most)
        for part, (tokens, _), n in zip(parts, guesses, n_drafts, strict=True):
            part.add_drafts(tokens[:n])

    def _step(self, parts: list[Rows]) -> None:
        begun, is_decode = time.perf_counter(), all(part.sequence.is_decoding for part in parts)
        try:
            samples = self._fill_samples([part for part in parts if part.n_wanted])
            outputs = self._run(parts, samples)
            # The rows of an aborted step are computed again, without what was cancelled.
            if not outputs.aborted:
                self._commit(parts, outputs)
                if is_decode:
                    n_rows = sum(part.n for part in parts)
                    self._costs.measure(n_rows, time.perf_counter() - begun)
        except Exception as error:
            for part in parts:
                if isinstance(part.work, Generation) and part.work in self._running:
                    self._finish(part.work, "error", error=public_error(error))

    def _fill_samples(self, parts: list[Rows]) -> SampleTable:
        self._samples.clear()
        row = 0
        for part in parts:
            assert isinstance(part.work, Generation)
            params, sequence = part.work.request.params, part.sequence
            history = part.history(params.n_history)
            n_before = len(history) - len(part.drafts)
            for i in range(part.n_wanted):
                index, tokens = sequence.n_generated + i, history[: n_before + i]
                self._samples.set_row(row, params, params.seed or 0, index, tokens, sequence.mu)
                row += 1
        return self._samples

    def _run(self, parts: list[Rows], samples: SampleTable | None) -> Outputs:
        """Run one step; its outputs are views that the next step overwrites."""
        for part in parts:
            self._make_room(part)
            part.sequence.cache.grow(part.n)
        batch = build_batch(parts, samples)
        with self._changed:
            if self._closed or any(part.work.is_cancelled for part in parts):
                return _NOTHING
            self._in_step = [part.work for part in parts]
            self._ticket = ticket = self._program.submit(batch)
        try:
            return ticket.wait()
        finally:
            with self._changed:
                self._ticket, self._in_step = None, []

    def _make_room(self, part: Rows) -> None:
        """Take pages of what has ended, then of what is paused, until the new ones are free.

        A paused generation computes its tokens again from the first on: the same bits.
        """
        cache = part.sequence.cache
        n_new = cache.layout.pages_needed(cache.n_tokens + part.n) - cache.n_pages
        while self.pool.n_free < n_new:
            if self._idle:
                self._idle.pop(0).cache.free()
                continue
            paused = [g for g in self._paused if _sequence(g).cache.n_pages]
            assert paused, "what runs holds more pages than were promised"
            _sequence(paused[0]).cache.free()

    def _commit(self, parts: list[Rows], outputs: Outputs) -> None:
        now, row = time.perf_counter(), 0
        for part in parts:
            sequence = part.sequence
            sequence.cache.n_tokens += part.n - len(part.drafts)
            assert isinstance(part.work, Generation)
            if not sequence.n_generated:
                done = sequence.cache.n_tokens
                part.work.emit(Prefilled(done, sequence.n_prompt, sequence.n_cached, now))
            if part.n_wanted:
                self._take_tokens(part, outputs.ids, row, now)
                row += part.n_wanted

    def _take_tokens(self, part: Rows, ids: NDArray[np.int32], row: int, now: float) -> None:
        """The sampled token and, while the drafts are what was sampled, those after them."""
        generation, sequence = part.work, part.sequence
        assert isinstance(generation, Generation)
        n_before = len(sequence.ids)
        generation.n_proposed += len(part.drafts)
        for i in range(part.n_wanted):
            if i:
                if part.drafts[i - 1] != ids[row + i - 1]:
                    break
                # Only now does its row in the cache count as stored.
                sequence.cache.n_tokens += 1
                generation.n_accepted += 1
            self._take_token(generation, sequence, int(ids[row + i]), row + i, now)
            if generation.sequence is None:
                return
        if generation.speculator is not None:
            generation.speculator.learn(len(sequence.ids) - n_before)

    def _take_token(
        self, generation: Generation, sequence: Sequence, token: int, row: int, now: float
    ) -> None:
        request, samples = generation.request, self._samples
        if samples.status[row] != OK:
            error = EdgeInferError("the model yields no number to choose a token by")
            self._finish(generation, "error", error=error)
            return
        sequence.mu = float(samples.mu[row])
        if token in request.stop_ids:
            self._finish(generation, "stop", stop_id=token)
            return
        sequence.ids.append(token)
        if request.params.logprobs is None:
            generation.emit(Token(token, now))
        else:
            ids, logprobs = samples.top(row)
            top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
            generation.emit(Token(token, now, float(samples.logprobs[row]), top))
        if sequence.n_generated == request.max_tokens or not sequence.cache.step_limit():
            self._finish(generation, "length")

    def _finish(
        self,
        generation: Generation,
        reason: FinishReason,
        *,
        stop_id: int | None = None,
        error: BaseException | None = None,
    ) -> None:
        """End a generation: its pages are kept for a later prompt or go back at once."""
        (self._paused if generation in self._paused else self._running).remove(generation)
        sequence = _sequence(generation)
        # An aborted step may have overwritten pages that a slid cache still needs.
        is_whole = reason in ("stop", "length") or not sequence.cache.is_full
        if reason in ("stop", "length") or (generation.keeps_cache and is_whole):
            sequence.cache.truncate(sequence.cache.n_tokens)  # a page of failed drafts only
            self._idle.append(sequence)
            if len(self._idle) > self.limits.max_sequences:
                self._idle.pop(0).cache.free()
        else:
            sequence.cache.free()
        generation.sequence = None
        generation.emit(Finished(reason, time.perf_counter(), stop_id, error))

    def _end_all(self, error: ClosedError) -> None:
        for generation in [*self._running, *self._paused]:
            self._finish(generation, "error", error=error)
        while self._waiting:
            self._waiting.popleft().emit(Finished("error", time.perf_counter(), error=error))
        while self._jobs:
            self._jobs.popleft().finish(error)

    # -- the engine's thread: logits -------------------------------------------------------------

    def _advance_job(self, job: LogitsJob) -> None:
        """One step of a job, once there is room for all of it."""
        error: BaseException | None = None
        if not job.sequences and not job.is_cancelled:
            if job.n_pages > self.pool.n_pages - self._n_reserved:
                return
            job.open(self.pool)
        try:
            if not job.is_cancelled:
                parts = job.next_rows(self.limits)
                outputs = self._run(parts, None)
                if not outputs.aborted:
                    job.commit(parts, outputs.logits)
        except Exception as caught:
            error = public_error(caught)
        if error or job.is_cancelled or job.is_complete:
            self._jobs.popleft()
            job.free()
            job.finish(error)


def _sequence(generation: Generation) -> Sequence:
    assert generation.sequence is not None, "the generation does not run"
    return generation.sequence


_NOTHING = Outputs(
    np.empty((0, 0), np.float32), np.empty((0, 0), np.float32), np.empty(0, np.int32), aborted=True
)

# NOTE: the only module state; the interpreter's exit and fork have no other way to find engines.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_engines() -> None:
    for engine in list(_engines):
        engine.close(timeout=2.0)


def _mark_forked() -> None:
    for engine in list(_engines):
        engine.mark_forked()


atexit.register(_close_engines)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)
