"""Which requests run now, on which pages, and which of them gives way when pages run out.

Used by one thread. What an error cuts short here is made good by `recover`. Knows nothing of pages
but how many there are.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from bisect import insort
from operator import attrgetter
from typing import TypeAlias

from edgeinfer.batch import StepLimits
from edgeinfer.engine.cache_store import CacheStore
from edgeinfer.engine.generation import Generation, LogitsJob, public_error
from edgeinfer.engine.leaders import waits
from edgeinfer.engine.next_rows import next_rows, with_drafts
from edgeinfer.engine.sequence import Finished, FinishReason, Rows, Work
from edgeinfer.engine.speculation import MAX_ROWS
from edgeinfer.engine.step_costs import StepCosts
from edgeinfer.errors import another

AnyWork: TypeAlias = Generation | LogitsJob


class Scheduler:
    """Requests that wait and run.

    They have an order, their rank: the largest priority first, and of equals who came first. Who
    runs may hold whatever pages it needs: they are taken from who is behind it, the last first,
    which then waits and computes its tokens again, the same ones. So whoever is first of all
    always gets on, and nobody waits for who is behind.
    """

    def __init__(self, limits: StepLimits, costs: StepCosts, store: CacheStore) -> None:
        self.limits, self.costs, self.store = limits, costs, store
        self.max_samples = max(
            limits.max_sequences, min(limits.max_outputs, MAX_ROWS * limits.max_sequences)
        )
        self.waiting: list[AnyWork] = []  # other threads append; also those that gave way
        self.running: list[Generation] = []  # by rank
        self.paused: list[Generation] = []  # until they are read; they may lose their pages
        self.jobs: list[LogitsJob] = []
        self.may_start = False  # whether something came or went since `admit` looked
        self.may_be_cancelled = False  # whether something was since `drop_cancelled` looked
        self._last_seconds = math.inf  # of a step
        self._arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        if self.waiting or self.running or self.jobs:
            return True
        return any(work.is_cancelled or work.events.has_room for work in self.paused)

    @property
    def n_bytes_waiting(self) -> int:
        """Held by all that don't run; other threads call this."""
        return sum([work.n_bytes for work in (*self.waiting, *self.paused)])

    def enqueue(self, work: AnyWork, priority: int = 0) -> None:
        """Have it wait behind all that have its priority; other threads call this too."""
        work.rank = -priority, next(self._arrivals)
        self.waiting.append(work)
        self.may_start = True

    # -- beginning and end -----------------------------------------------------------------------

    def drop_cancelled(self) -> None:
        if not self.may_be_cancelled:
            return
        self.may_be_cancelled = False
        for work in [w for w in (*self._begun, *self.waiting) if w.is_cancelled]:
            try:
                if isinstance(work, Generation) and work.error is not None:
                    self.fail(work, work.error)
                else:
                    self.finish(work, "cancelled")
            except BaseException as error:
                self.fail(work, error)

    def is_any_cancelled(self, parts: list[Rows]) -> bool:
        """Whether any of these was since `drop_cancelled` looked."""
        return self.may_be_cancelled and any([part.work.is_cancelled for part in parts])

    def pause_unread(self) -> None:
        """Without a reader a generation gives way to all that have one; it keeps what it can."""
        for generation in [g for g in self.running if g.events.is_full and g.is_unread]:
            self.may_start = True
            self.paused.append(generation)
            self.running.remove(generation)
            generation.rest()
            generation.events.pause()

    def admit(self) -> None:
        """Start all that there are places for, and pages beside those of who is in front.

        Each counts with a page more than it needs, so that it does not give way at once. Who does
        not fit lets others pass: they give way to it.
        """
        for generation in [g for g in self.paused if g.events.has_room]:
            self.enqueue(generation, -generation.rank[0])
            self.paused.remove(generation)
        if not self.may_start:
            return
        self.may_start = False
        n_free, n_places = self.store.n_pages, self.limits.max_sequences
        for work in sorted((*self._at_work, *self.waiting), key=_RANK):
            left = [n - needed for n, needed in zip(n_free, work.next_pages, strict=True)]
            takes_place = isinstance(work, Generation)  # logits may have steps of their own
            is_at_work = work in self.running or work in self.jobs
            if not is_at_work and (n_places < takes_place or min(left) < 0):
                continue
            n_free, n_places = left, n_places - takes_place
            if not is_at_work:
                self._try_start(work)
        for generation in self.running[self.limits.max_sequences :]:
            self._give_way(generation)

    @property
    def _at_work(self) -> tuple[AnyWork, ...]:
        return (*self.running, *self.jobs)

    @property
    def _begun(self) -> tuple[AnyWork, ...]:
        return (*self.running, *self.paused, *self.jobs)

    def _try_start(self, work: AnyWork) -> None:
        try:
            self._start(work)
        except BaseException as error:
            self.fail(work, error)

    def _start(self, work: AnyWork) -> None:
        if isinstance(work, LogitsJob):
            if not work.sequences:
                work.open(self.store)
            insort(self.jobs, work, key=_RANK)
            self.waiting.remove(work)
            return
        is_new = work.sequence is None
        if work.sequence is None:
            asked = work.request
            work.sequence = self.store.open(asked.ids, work.layout, asked.borders, asked.n_stable)
            work.next_row = Rows(work.sequence, 1, 1, work)
        insort(self.running, work, key=_RANK)
        self.waiting.remove(work)
        if is_new:
            work.emit(work.sequence.progress(time.perf_counter()))

    def _give_way(self, work: AnyWork) -> None:
        """It waits, with its rank, to compute again what is taken of its pages meanwhile."""
        self.waiting.append(work)
        for sequence in work.sequences:
            if isinstance(work, LogitsJob):
                self.store.free(sequence)
            else:
                self.store.park(sequence)
        if isinstance(work, LogitsJob):
            self.jobs.remove(work)
        else:
            self.running.remove(work)
            work.rest()

    def finish(self, work: AnyWork, reason: FinishReason, stop_id: int | None = None) -> None:
        """End a request: its pages are kept for a later prompt or go back at once."""
        self.may_start = True
        has_ended = reason in ("stop", "length")
        is_kept = isinstance(work, Generation) and (has_ended or work.keeps_cache)
        for sequence in work.sequences:
            if is_kept:
                self.store.keep(sequence)
            else:
                self.store.free(sequence)
        self._forget(work)
        if isinstance(work, LogitsJob):
            work.finish()
        else:
            work.emit(Finished(reason, time.perf_counter(), stop_id))

    def _forget(self, work: AnyWork) -> None:
        for group in (self.waiting, self.running, self.paused, self.jobs):
            with contextlib.suppress(ValueError):
                group.remove(work)  # type: ignore[arg-type]
        if isinstance(work, LogitsJob):
            work.sequences.clear()
        else:
            work.sequence = work.next_row = None

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
            self._tell(work, another(error))

    def _tell(self, work: AnyWork, error: BaseException) -> None:
        told = public_error(error)
        with contextlib.suppress(BaseException):  # whoever listens must not end the others
            if isinstance(work, LogitsJob):
                work.finish(told)
            else:
                work.emit(Finished("error", time.perf_counter(), error=told))

    def recover(self) -> None:
        """Make everything that is derived anew, after an error that may have come anywhere."""
        self.may_start = self.may_be_cancelled = True
        for work in self._begun:
            with contextlib.suppress(ValueError):
                self.waiting.remove(work)  # it was on its way from there, or to there
        self.paused = [work for work in self.paused if work not in self.running]
        works = (*self._begun, *self.waiting)
        self.store.recover(sequence for work in works for sequence in work.sequences)

    # -- steps -----------------------------------------------------------------------------------

    def next_steps(self) -> list[list[Rows]]:
        """The parts of the next steps, whose pages are held; a request has parts in one of them.

        Logits are computed beside answers where a step has room for their sequences and rows.
        """
        self._settle()
        parts, is_reading = next_rows(
            self.running, self.jobs, self.limits, self.costs, self.fail, self._may_read
        )
        if not is_reading:
            most = min(self.limits.max_rows, self.max_samples, self.store.most_rows())
            parts = with_drafts(parts, most, self.costs, self.fail)
        caches = [(part, part.sequence.cache) for part in parts]
        growing = [part for part, cache in caches if cache.n_tokens + part.n > cache.room]
        if not all([self._holds(part) for part in growing]):
            parts = [self._make_room(part) for part in sorted(parts, key=lambda p: p.work.rank)]
            at_work = set(self._at_work)  # whose pages were not taken meanwhile
            parts = [part for part in parts if part.work in at_work]
        if not self.jobs:
            return [parts] if parts else []
        return self._in_steps(parts)

    def seconds_of(self, parts: list[Rows]) -> float:
        """What a step will take: of rows that decode what the last one took, else nobody knows."""
        if all([part.is_decoding and part.work.hook is None for part in parts]):
            return self._last_seconds
        return math.inf

    def count(self, parts: list[Rows], seconds: float) -> None:
        """Count what a step has taken."""
        self._last_seconds = seconds
        n_decode = sum([part.n for part in parts if part.is_decoding])
        self.costs.count(n_decode, sum([part.n for part in parts]) - n_decode, seconds)

    def _in_steps(self, parts: list[Rows]) -> list[list[Rows]]:
        """Generations first, then logits in the same step, or in the next where it has no room."""
        steps = [[part for part in parts if isinstance(part.work, Generation)]]
        for job in self.jobs:
            more = [part for part in parts if part.work is job]
            together = [*steps[-1], *more]
            n_outputs = sum(part.n_wanted for part in together)
            fits = (
                len(together) <= self.limits.max_sequences and n_outputs <= self.limits.max_outputs
            )
            if fits:
                steps[-1] = together
            else:
                steps.append(more)
        return [step for step in steps if step]

    def _settle(self) -> None:
        """Count what the last step has left of borders and states; most have neither."""
        for generation in tuple(self.running):
            sequence = generation.sequence
            if sequence is None or not sequence.borders and sequence.cache.room:
                continue
            try:
                self.store.settle(sequence)
            except BaseException as error:
                self.fail(generation, error)

    def _may_read(self, work: AnyWork, parts: list[Rows]) -> bool:
        """Whether nobody else computes in this step what it needs next."""
        if isinstance(work, LogitsJob):
            return True
        (sequence,) = work.sequences
        self.store.catch_up(sequence)
        return not waits(sequence, [part.sequence for part in parts])

    def _holds(self, part: Rows) -> bool:
        """Whether it holds the pages for its rows now; False if too few are free or it fails."""
        try:
            return self.store.hold(part.sequence, part.n, len(part.drafts))
        except BaseException as error:
            self.fail(part.work, error)  # type: ignore[arg-type]
            return False

    def _make_room(self, part: Rows) -> Rows:
        """Hold its pages, or have it give way; parts of who is in front come first."""
        while part.work in self._at_work and not self._holds(part):
            if part.drafts:
                part = part.with_drafts(())  # nobody gives way to a guess
            else:
                self._take_pages_for(part.work)
        return part

    def _take_pages_for(self, work: Work) -> None:
        """Of who does not run, else of the last behind it, else it is the last itself."""
        for waiting in (*self.paused, *self.waiting):  # these hold some if they were paused
            if _holds_pages(waiting):
                self.store.park(waiting.sequences[0])
                return
        behind = [each for each in self._at_work if each.rank > work.rank and _holds_pages(each)]
        in_front = [each for each in self._at_work if each.rank < work.rank]
        # Who is alone lacks pages only while a session is saved or loaded, and waits for that.
        is_alone = not (behind or in_front or self.store.has_guests)
        assert not is_alone, "a request takes more pages than there are"
        # What has slid would compute all that it ever had again: only where nothing else is left.
        last = max(behind, key=lambda each: (not _has_slid(each), each.rank), default=work)
        self._give_way(last)  # type: ignore[arg-type]


_RANK = attrgetter("rank")


def _holds_pages(work: Work) -> bool:
    return any(not sequence.cache.is_empty for sequence in work.sequences)


def _has_slid(work: Work) -> bool:
    return any(sequence.cache.is_full for sequence in work.sequences)
