"""Which requests run now, on which pages, and which rows the next step computes of them.

Used by one thread. What an error cuts short here is made good by `recover`. Knows nothing of pages
but how many there are.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from typing import TypeAlias

from edgeinfer.batch import StepLimits
from edgeinfer.engine.cache_store import CacheStore
from edgeinfer.engine.generation import Generation, LogitsJob, public_error
from edgeinfer.engine.sequence import Finished, FinishReason, Rows, Sequence
from edgeinfer.engine.speculation import MAX_ROWS, StepCosts, best_drafts

AnyWork: TypeAlias = Generation | LogitsJob


class Scheduler:
    """Requests that wait and run."""

    def __init__(self, limits: StepLimits, costs: StepCosts, store: CacheStore) -> None:
        self.limits, self.costs, self.store = limits, costs, store
        self.max_samples = max(
            limits.max_sequences, min(limits.max_outputs, MAX_ROWS * limits.max_sequences)
        )
        self.waiting: list[AnyWork] = []  # in order of arrival; other threads append
        self.running: list[Generation] = []
        self.paused: list[Generation] = []  # until they are read; they may lose their pages
        self.jobs: list[LogitsJob] = []
        self.may_start = False  # whether something came or went since `admit` looked
        self._n_steps = 0

    @property
    def has_work(self) -> bool:
        if self.waiting or self.running or self.jobs:
            return True
        return any(work.is_cancelled or work.events.has_room for work in self.paused)

    # -- beginning and end -----------------------------------------------------------------------

    def drop_cancelled(self) -> None:
        for work in [w for w in (*self._begun, *self.waiting) if w.is_cancelled]:
            try:
                self.finish(work, "cancelled")
            except BaseException as error:
                self.fail(work, error)

    def pause_unread(self) -> None:
        """Without a reader a generation promises itself no pages; it keeps them while it can."""
        for generation in [g for g in self.running if g.is_unread]:
            self.may_start = True
            self.paused.append(generation)
            self.running.remove(generation)
            generation.events.pause()

    def admit(self) -> None:
        """Start what waits, in order of arrival, while all that runs can grow to its full length.

        Where the first in line does not fit, later ones that fit pass it if they end, at the
        latest, before it would fit for certain: they never make it wait longer. Those that were
        paused and are read again have waited before.
        """
        resumed = [generation for generation in self.paused if generation.events.has_room]
        if not (self.may_start or resumed):
            return
        self.may_start = False
        n_free = self.store.n_pages
        for work in self._at_work:
            n_free = _added(n_free, work.most_pages, -1)
        deadline: float | None = None
        for work in (*resumed, *self.waiting):
            if not _fit(work.most_pages, n_free) or self._n_places(work) < 1:
                if deadline is None:
                    deadline = self._reserve(work, n_free)
            elif deadline is None or self._n_steps + self._steps_left(work) <= deadline:
                n_free = _added(n_free, work.most_pages, -1)
                try:
                    self._start(work)
                except BaseException as error:
                    self.fail(work, error)

    def _n_places(self, work: AnyWork) -> float:
        """How many like it a step has room for; logits are computed in steps of their own."""
        is_job = isinstance(work, LogitsJob)
        return math.inf if is_job else self.limits.max_sequences - len(self.running)

    def _reserve(self, work: AnyWork, n_free: list[int]) -> float:
        """The step from which on `work` fits for certain; noted, it only ever gets nearer."""
        n_places = self._n_places(work)
        ends = [(self._steps_left(w), w.most_pages, w in self.running) for w in self._at_work]
        for n_steps, n_pages, is_place in sorted(ends):
            n_free, n_places = _added(n_free, n_pages), n_places + is_place
            if _fit(work.most_pages, n_free) and n_places >= 1:
                work.starts_by = min(work.starts_by, self._n_steps + n_steps)
                break
        return work.starts_by

    @property
    def _at_work(self) -> tuple[AnyWork, ...]:
        return (*self.running, *self.jobs)

    @property
    def _begun(self) -> tuple[AnyWork, ...]:
        return (*self.running, *self.paused, *self.jobs)

    def _steps_left(self, work: AnyWork) -> float:
        """The most steps until it ends, as far as is known; company may delay a prompt."""
        if isinstance(work, LogitsJob):
            return work.n_left / min(work.chunk, self.limits.max_outputs)
        sequence, n_prompt, n_done = work.sequence, len(work.request.ids), 0
        if sequence is not None:
            n_prompt, n_done = sequence.n_waiting, sequence.n_generated
        most = math.inf if work.max_tokens is None else work.max_tokens
        return -(-n_prompt // self.limits.shared_rows) + most - n_done

    def _start(self, work: AnyWork) -> None:
        if isinstance(work, LogitsJob):
            work.open(self.store)
            self.jobs.append(work)
            self.waiting.remove(work)
            return
        if work.sequence is not None:
            self.running.append(work)
            self.paused.remove(work)
            return
        sequence = work.sequence = self._open(work)
        self.running.append(work)
        self.waiting.remove(work)
        work.emit(sequence.progress(time.perf_counter()))

    def _open(self, generation: Generation) -> Sequence:
        asked = generation.request
        return self.store.open(asked.ids, generation.layout, asked.borders, asked.n_stable)

    def finish(self, work: AnyWork, reason: FinishReason, stop_id: int | None = None) -> None:
        """End a request: its pages are kept for a later prompt or go back at once."""
        self.may_start = True
        if isinstance(work, LogitsJob):
            for sequence in work.sequences:
                self.store.free(sequence)
            self._forget(work)
            work.finish()
            return
        has_ended = reason in ("stop", "length")
        if work.sequence is not None and (has_ended or work.keeps_cache):
            self.store.keep(work.sequence)
        elif work.sequence is not None:
            self.store.free(work.sequence)
        self._forget(work)
        work.emit(Finished(reason, time.perf_counter(), stop_id))

    def _forget(self, work: AnyWork) -> None:
        for group in (self.waiting, self.running, self.paused, self.jobs):
            with contextlib.suppress(ValueError):
                group.remove(work)  # type: ignore[arg-type]
        if isinstance(work, Generation):
            work.sequence = None

    def fail(self, work: AnyWork, error: BaseException) -> None:
        """End a request because of an error, wherever that came; its pages are free then."""
        self._forget(work)
        self.recover()
        self._tell(work, error)

    def fail_all(self, error: BaseException, *, also_waiting: bool = False) -> None:
        """End all that has begun."""
        ended = (*self._begun, *(self.waiting if also_waiting else ()))
        for work in ended:
            self._forget(work)
        self.recover()
        for work in ended:
            self._tell(work, error)

    def _tell(self, work: AnyWork, error: BaseException) -> None:
        told = public_error(error)
        with contextlib.suppress(BaseException):  # whoever listens must not end the others
            if isinstance(work, LogitsJob):
                work.finish(told)
            else:
                work.emit(Finished("error", time.perf_counter(), error=told))

    def recover(self) -> None:
        """Make everything that is derived anew, after an error that may have come anywhere."""
        self.may_start = True
        for work in self._at_work:
            with contextlib.suppress(ValueError):
                self.waiting.remove(work)  # it was being started
        self.paused = [work for work in self.paused if work not in self.running]
        begun = (*self.running, *self.paused)
        used = [generation.sequence for generation in begun if generation.sequence]
        used += [sequence for job in self.jobs for sequence in job.sequences]
        self.store.recover(used)

    # -- steps -----------------------------------------------------------------------------------

    def next_step(self) -> list[Rows]:
        """One row of every generation that decodes, and a slice of the prompts that wait."""
        self._n_steps += 1
        decoding: list[Rows] = []
        reading: list[Rows] = []
        n_left = self.limits.max_rows
        # Decoding rows first: at most max_sequences, so there is always room for them.
        for is_reading, parts in ((False, decoding), (True, reading)):
            for generation in tuple(self.running):
                try:
                    part = self._part(generation, n_left, is_reading, reading)
                except BaseException as error:
                    self.fail(generation, error)
                    continue
                if part is None:
                    continue
                if part.n:
                    parts.append(part)
                n_left -= part.n
                if part.sequence.n_generated:
                    n_left = min(n_left, max(self.limits.shared_rows, len(self.running)))
        parts = decoding + reading
        if all(part.sequence.is_decoding for part in parts):
            return self._with_drafts(parts)
        return parts

    def _part(
        self, generation: Generation, n_left: int, is_reading: bool, reading: list[Rows]
    ) -> Rows | None:
        sequence = generation.sequence
        assert sequence is not None, "the generation does not run"
        if not is_reading:
            self.store.settle(sequence)
        if (sequence.n_waiting > 1) != is_reading:
            return None
        if is_reading:
            self.store.catch_up(sequence)
            if self.store.waits(sequence, [part.sequence for part in reading]):
                return None
        n_waiting = sequence.n_waiting
        n = min(n_waiting, n_left, sequence.cache.step_limit())
        return Rows(sequence, n, int(n == n_waiting), generation)

    def _with_drafts(self, parts: list[Rows]) -> list[Rows]:
        """With guesses of the tokens after the next ones, as far as checking them pays."""
        kept: list[Rows] = []
        guesses: list[tuple[list[int], list[float]]] = []
        for part in parts:
            assert isinstance(part.work, Generation)
            try:
                guesses.append(part.work.guess())
                kept.append(part)
            except BaseException as error:
                self.fail(part.work, error)
        if not any(tokens for tokens, _ in guesses):
            return kept
        most = min(self.limits.max_rows, self.max_samples, self.store.most_rows())
        try:
            n_drafts = best_drafts([chances for _, chances in guesses], self.costs, most)
            return [
                part.with_drafts(tokens[:n])
                for part, (tokens, _), n in zip(kept, guesses, n_drafts, strict=True)
            ]
        except BaseException:  # guesses are nobody's answer: the step does without
            return kept

    def make_room(self, part: Rows) -> None:
        """Hold the pages for a part's rows, taken of what has ended, then of what is paused.

        A paused generation computes its tokens again from the first on: the same bits.
        """
        while not self.store.hold(part.sequence, part.n, len(part.drafts)):
            paused = [
                g.sequence for g in self.paused if g.sequence and any(g.sequence.cache.n_pages)
            ]
            assert paused, "what runs holds more pages than were promised"
            self.store.park(paused[0])


def _fit(n_pages: Iterable[int], n_free: Iterable[int]) -> bool:
    """Whether there are as many pages of every cache group."""
    return all(n <= free for n, free in zip(n_pages, n_free, strict=True))


def _added(n_free: Iterable[int], n_pages: Iterable[int], sign: int = 1) -> list[int]:
    return [free + sign * n for free, n in zip(n_free, n_pages, strict=True)]
