"""Runs the steps of a program, one at a time, and has what they yield become part of sequences.

Knows nothing of when a step is due, or which rows it has.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.backend import Program, Ticket
from edgeinfer.batch import Outputs
from edgeinfer.engine import hooks
from edgeinfer.engine.delivery import Delivery
from edgeinfer.engine.scheduler import Scheduler
from edgeinfer.engine.sequence import Rows
from edgeinfer.engine.step import Steps, commit, fill_masks
from edgeinfer.sampling.params import SampleTable

if TYPE_CHECKING:
    from edgeinfer.engine.drafter import Drafter


class StepRunner:
    """Steps are run in the engine's thread; others may break one off, `lock` held."""

    def __init__(
        self,
        program: Program,
        scheduler: Scheduler,
        delivery: Delivery,
        lock: threading.RLock,
        n_vocab: int,
        drafter: Drafter | None,
    ) -> None:
        self.program, self.drafter = program, drafter
        self._scheduler, self._delivery, self._lock = scheduler, delivery, lock
        self._samples = SampleTable(scheduler.max_samples)
        self._steps = Steps(self._samples, n_vocab)
        self._ticket: Ticket | None = None
        self._in_step: list[Rows] = []
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        """Whether the program is at work."""
        return self._ticket is not None

    def run(self, parts: list[Rows]) -> None:
        """Run a step. One that fails is repeated for each request: only whose own fails ends."""
        begun = time.perf_counter()
        try:
            outputs = self._run(parts)
        except BaseException as error:
            self._scheduler.recover()
            works = list(dict.fromkeys(part.work for part in parts))
            for work in works:
                if len(works) > 1:
                    self.run([part for part in parts if part.work is work])
                else:
                    self._scheduler.fail(work, error)  # type: ignore[arg-type]
            return
        # Rows of a step that did not run to its end are computed again, for who still wants them.
        if not outputs.aborted:
            try:
                self._scheduler.count(parts, time.perf_counter() - begun)
            except BaseException:  # it decides about rows, never about answers
                pass
            commit(parts, outputs, self._samples, self._scheduler)
            if self.drafter is not None:
                self.drafter.follow(parts, outputs)

    def abort_cancelled(self) -> None:
        """Break off a step that nobody wants. One that others share runs on: they need its rows."""
        if self._ticket is not None and all(part.work.is_cancelled for part in self._in_step):
            self._ticket.abort()

    def close(self) -> None:
        """Break off what runs; no step begins any more."""
        self._is_closed = True
        if self._ticket is not None:
            self._ticket.abort()

    def _run(self, parts: list[Rows]) -> Outputs:
        """The outputs of a step: views that the next one overwrites."""
        samples = self._samples
        batch, masked = self._steps.next(parts)
        if self.drafter is not None:
            self.drafter.ask(batch, parts)
        is_watched = any([part.work.hook is not None for part in parts])
        if is_watched:
            hooks.ask(batch, parts)
        with self._lock:
            if self._is_closed or self._scheduler.is_any_cancelled(parts):
                return _NOTHING
            self._in_step = parts
            self._ticket = ticket = self.program.submit(batch)
        try:
            # Both take no time where a device runs meanwhile.
            self._delivery.send(self._scheduler.seconds_of(parts))
            failed = fill_masks(masked)
            outputs = ticket.wait()
        except BaseException:
            # Nothing of it may run any more once its pages go to others.
            ticket.abort()
            with contextlib.suppress(BaseException):
                ticket.wait()
            raise
        finally:
            with self._lock:
                self._ticket, self._in_step = None, []
        if not outputs.aborted:
            if is_watched:
                failed += hooks.show(batch, outputs, parts)
            for part, error in failed:
                self._scheduler.fail(part.work, error)  # type: ignore[arg-type]
            if batch.samples is None and samples.n_rows:  # tokens are still to be picked
                self.program.sample(outputs.logits[: samples.n_rows], samples)
                outputs.ids = samples.ids[: samples.n_rows]
        return outputs


_NOTHING = Outputs(
    np.empty((0, 0), np.float32), np.empty((0, 0), np.float32), np.empty(0, np.int32), aborted=True
)
