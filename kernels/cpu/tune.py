"""Which of a few schedules runs a decode step fastest here: measured, remembered, and doubted.

They differ in threads and in how work is cut, never in results. Knows no operations: it is given
what runs a step by a schedule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from edgeinfer import platform
from edgeinfer.errors import reason_of
from edgeinfer.kernels.cpu.commands import SHARE
from edgeinfer.kernels.cpu.idle import IDLE_SECONDS, IdleWork
from edgeinfer.kernels.cpu.probe import Probes

_ROUNDS = 15
_LEAST_GAIN = 0.03  # of the time: less may be chance


class Schedule(NamedTuple):
    """Threads, and how many times smaller a chunk is than a thread's even share of the rest."""

    n_threads: int
    share: float


def schedules(n_threads: int) -> list[Schedule]:
    """What is tried where a program may use so many threads; the first is right untuned.

    Larger chunks read memory faster, and wait longer for the slowest core. Memory may be busy
    with fewer threads: those of one core disturb each other, and slow cores hold up fast ones.
    """
    fewer = {n_threads - n_threads // 4, n_threads // 2} - {0, n_threads}
    return [
        Schedule(n_threads, SHARE),
        Schedule(n_threads, 1.25),
        *(Schedule(n, SHARE) for n in sorted(fewer, reverse=True)),
    ]


def read(path: Path, known: Sequence[Schedule]) -> Schedule | None:
    """What was found before; None where nothing was, or nothing that makes sense."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        schedule = Schedule(*json.loads(platform.read_private(path)))
        # Not what was read: True and 1.0 are equal to 1 thread.
        return next((each for each in known if each == schedule), None)
    return None


def fastest(rounds: Sequence[Sequence[float]]) -> int:
    """Index of the schedule to take, from the seconds of every schedule in rounds of turns."""
    import statistics  # 5 ms that starts don't need

    ratios = [
        statistics.median(seconds[i] / seconds[0] for seconds in rounds)
        for i in range(len(rounds[0]))
    ]
    best = min(range(len(ratios)), key=ratios.__getitem__)
    return best if ratios[best] < 1 - _LEAST_GAIN else 0


class Runs(Protocol):
    """What can be measured: see `trial.Trial`."""

    def allow(self) -> None: ...
    def interrupt(self) -> None: ...
    def run(self, schedule: Schedule) -> float | None: ...


class Tuning(IdleWork):
    """Measures when idle, and on steps as they come; `schedule` is None until one is known."""

    def __init__(
        self, known: Sequence[Schedule], path: Path, runs: Runs, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        super().__init__(idle_seconds)
        self._known, self._path, self._runs = known, path, runs
        self._rounds: list[list[float]] = []
        self.schedule = self._kept = read(path, known)
        self.unkept = ""  # why the next process will have to measure again
        self._probes = Probes(known, self.schedule or known[0])

    @property
    def current(self) -> Schedule:
        """The fastest so far."""
        return self._probes.current

    def next(self, n_rows: int) -> Schedule:
        """How the next step of so many rows is to run."""
        return self._probes.next(n_rows)

    def took(self, schedule: Schedule, n_rows: int, seconds: float) -> None:
        """Such a step has run."""
        if self._probes.took(schedule, n_rows, seconds):
            self.schedule = self.current

    def finish(self, look: Callable[[], object] = lambda: None) -> None:
        super().finish(look)
        self._keep_found()

    def close(self) -> None:
        super().close()
        self._keep_found()

    @property
    def is_done(self) -> bool:
        return self.schedule is not None

    @property
    def progress(self) -> tuple[int, int]:
        """Rounds that are measured, and how many there will be."""
        return len(self._rounds), _ROUNDS

    def _go_on(self) -> bool:
        while len(self._rounds) < _ROUNDS:
            seconds: list[float] = []
            for schedule in self._known:
                with self._changed:
                    if self._must_stop:
                        return True
                    self._runs.allow()
                measured = self._runs.run(schedule)
                if measured is None:
                    return True
                seconds.append(measured)
            self._rounds.append(seconds)
        self._probes.current = self.schedule = self._known[fastest(self._rounds)]
        self._keep_found()
        return True

    def _keep_found(self) -> None:
        schedule = self.schedule  # a step may find another one meanwhile
        if schedule in (None, self._kept):
            return
        try:
            platform.write_whole(self._path, json.dumps(schedule).encode())
            self._kept, self.unkept = schedule, ""
        except OSError as error:  # the next process measures again
            self.unkept = reason_of(error)

    def _interrupt(self) -> None:
        self._runs.interrupt()
