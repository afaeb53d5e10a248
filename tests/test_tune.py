"""The fastest schedule to run a decode step: found when idle, kept, and never another result."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import platform
from edgeinfer.batch import StepLimits
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cpu import layout, tune
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.cpu.lower import KernelOp, KernelPart, recut
from edgeinfer.kernels.cpu.probe import Probes
from edgeinfer.kernels.cpu.tune import Schedule, Tuning, fastest, schedules
from edgeinfer.model import Model

from .models_for_tests import tiny_model
from .native import cache_root
from .test_cpu_program import IDS, batch_of

KNOWN = schedules(4)


class Runs:
    """Steps whose time is given; counts them, and can hold one until it is interrupted."""

    def __init__(self, seconds: dict[Schedule, float]) -> None:
        self.seconds, self.n = seconds, 0
        self.holds = False
        self.began, self._stop = threading.Event(), threading.Event()

    def allow(self) -> None:
        self._stop.clear()

    def interrupt(self) -> None:
        self._stop.set()

    def run(self, schedule: Schedule) -> float | None:
        self.n += 1
        self.began.set()
        if self.holds and self._stop.wait(120):
            return None
        return self.seconds[schedule]


def test_ways_use_no_more_threads_than_there_are() -> None:
    assert [schedule.n_threads for schedule in schedules(1)] == [1, 1]
    assert {schedule.n_threads for schedule in schedules(2)} == {2, 1}
    assert {schedule.n_threads for schedule in schedules(8)} == {8, 6, 4}


def test_a_clear_gain_is_taken_and_chance_is_not() -> None:
    assert fastest([[1.0, 0.9, 1.2]] * 5) == 1
    assert fastest([[1.0, 0.99, 1.2]] * 5) == 0
    # A machine that is slow for a while slows what takes turns alike.
    assert fastest([[1.0, 0.9], [3.0, 2.7], [1.0, 0.9]]) == 1
    assert fastest([[1.0, 1.0], [9.0, 1.0], [1.0, 1.0]]) == 0


def test_what_was_found_is_kept_and_nonsense_is_not(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decode.json"
    runs = Runs({schedule: 1.0 - 0.1 * i for i, schedule in enumerate(KNOWN)})
    tuning = Tuning(KNOWN, path, runs)
    assert not tuning.is_done
    told: list[tuple[int, int]] = []
    tuning.finish(lambda: told.append(tuning.progress))
    assert tuning.schedule == KNOWN[-1]
    assert told[-1] == (15, 15), "who waits can see how far it is"
    again = Runs({})
    assert Tuning(KNOWN, path, again).schedule == KNOWN[-1]
    assert Tuning(schedules(1), path, again).schedule is None
    for text in ("", "{}", "[1]", "[4, 2.0", '["4", 2.0]', "[4, 99.0]", "null"):
        path.write_text(text)
        assert tune.read(path, KNOWN) is None
    assert again.n == 0
    for text, known in (("[4.0, 2]", KNOWN), ("[true, 2]", schedules(1))):  # equal, but in type
        path.write_text(text)
        found = tune.read(path, known)
        assert found is known[0] and type(found.n_threads) is int and type(found.share) is float


def test_a_step_interrupts_it_and_what_was_measured_stays(tmp_path: Path) -> None:
    runs = Runs(dict.fromkeys(KNOWN, 1.0))
    tuning = Tuning(KNOWN, tmp_path / "x.json", runs, idle_seconds=0.0)
    time.sleep(0.05)
    assert runs.n == 0, "nothing before the first step"
    runs.holds = True
    tuning.end_step()
    assert runs.began.wait(120)
    begun = time.monotonic()
    tuning.begin_step()
    time.sleep(0.1)
    n = runs.n
    assert tuning.schedule is None and time.monotonic() - begun < 60
    time.sleep(0.1)
    assert runs.n == n, "it went on beside a step"
    runs.holds = False
    tuning.end_step()
    assert tuning.wait(120) and tuning.schedule == KNOWN[0]
    tuning.close()


def test_closing_ends_it(tmp_path: Path) -> None:
    runs = Runs(dict.fromkeys(KNOWN, 1.0))
    runs.holds = True
    tuning = Tuning(KNOWN, tmp_path / "x.json", runs, idle_seconds=0.0)
    tuning.end_step()
    assert runs.began.wait(120)
    tuning.close()
    assert tuning._thread is not None and not tuning._thread.is_alive()


def test_recut_keeps_every_group() -> None:
    n_words = layout.MATMUL_BOUNDS // layout.WORD
    parts = [KernelPart("matmul.q4_0", [7] * n_words + [0, n], 1, n * 2880) for n in (72, 24, 24)]
    op = recut(KernelOp("qkv", parts), 2, 1.25)
    for part, n in zip(op.parts, (72, 24, 24), strict=True):
        bounds = part.args[n_words:]
        assert part.args[:n_words] == [7] * n_words
        assert bounds[0] == 0 and bounds[-1] == n and part.rule == len(bounds) - 1


@pytest.mark.parametrize("schedule", schedules(2), ids=str)
def test_every_way_gives_the_same_bits(tmp_path: Path, schedule: Schedule) -> None:
    limits = StepLimits(n_pages={0: 8}, max_rows=16, max_outputs=16, max_sequences=4, n_threads=2)
    with GGUFFile.open(tiny_model(tmp_path)) as file:
        segment = Model.load(file).graph.segment()
        with CpuBackend(cache_root()).compile(segment, limits) as program:
            program._tuning.schedule = schedule  # as good as tuned
            expected = [
                program.submit(batch_of(ids)).wait().logits.copy() for ids in (IDS[:4], IDS)
            ]
            program._tuning._probes = Probes([schedule], schedule)
            for ids, logits in zip((IDS[:4], IDS), expected, strict=True):
                assert np.array_equal(program.submit(batch_of(ids)).wait().logits, logits)
            assert program._tuning.current == schedule


def test_a_program_tunes_itself(tmp_path: Path) -> None:
    """On the real team: what a step left stays, and steps may come at any moment."""
    limits = StepLimits(n_pages={0: 8}, max_rows=16, max_outputs=16, max_sequences=4, n_threads=2)
    batch, path = batch_of(IDS[:4]), tmp_path / "decode.json"
    with GGUFFile.open(tiny_model(tmp_path)) as file:
        segment = Model.load(file).graph.segment()
        with CpuBackend(cache_root()).compile(segment, limits) as program:
            program._idle.close()
            for n_steps in (1, 20):
                path.unlink(missing_ok=True)
                tuning = Tuning(schedules(2), path, program._trial, idle_seconds=0.0)
                program._tuning = program._idle = tuning
                logits = program.submit(batch).wait().logits
                expected = logits.copy()
                for _ in range(1, n_steps):
                    logits = program.submit(batch).wait().logits
                assert program.tune() in ("on 1 thread", "on 2 threads")
                assert np.array_equal(logits, expected), "views are valid until the next step"
                assert tune.read(path, schedules(2)) == tuning.schedule
            assert np.array_equal(program.submit(batch).wait().logits, expected)


def test_what_a_step_finds_while_another_schedule_is_being_written_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = Tuning(KNOWN, path := tmp_path / "x.json", Runs(dict.fromkeys(KNOWN, 1.0)))
    tuning.schedule = KNOWN[2]
    write = platform.write_whole

    def write_slowly(*args: Any) -> None:
        write(*args)
        tuning.schedule = KNOWN[1]

    with monkeypatch.context() as context:
        context.setattr(platform, "write_whole", write_slowly)
        tuning.finish()
    tuning.close()
    assert tune.read(path, KNOWN) == KNOWN[1]


def run_steps(probes: Probes[str], seconds: dict[str, float], n: int) -> list[str]:
    """How n steps ran that take so long, and as long again wherever something disturbs them."""
    ran = []
    for i in range(n):
        schedule = probes.next(1)
        probes.took(schedule, 1, seconds[schedule] * (1 + (i % 7 == 0)))
        ran.append(schedule)
    return ran


def test_steps_find_the_fastest_schedule_and_follow_a_machine_that_changes() -> None:
    probes = Probes(["two", "coarse", "one"], "one")
    run_steps(probes, {"two": 1.0, "coarse": 1.2, "one": 1.5}, 60)
    assert probes.current == "two"
    run_steps(probes, {"two": 1.0, "coarse": 1.2, "one": 1.5}, 3000)  # looks seldom by now
    run_steps(probes, {"two": 3.0, "coarse": 2.0, "one": 1.5}, 1500)
    assert probes.current == "one"


def test_looking_for_a_faster_schedule_costs_little() -> None:
    slow = {"two": 1.0, "coarse": 5.0, "one": 1.02}
    ran = run_steps(Probes(["two", "coarse", "one"], "two"), slow, 1000)
    assert ran[:100].count("coarse") <= 8 and ran.count("coarse") <= 16
    assert ran.count("two") >= 940


def test_only_neighbours_of_as_many_rows_are_compared() -> None:
    probes = Probes(["two", "one"], "two")
    for i in range(200):
        schedule = probes.next(1 + i % 2)
        assert schedule == "two", "the step before had other rows"
        assert not probes.took(schedule, 1 + i % 2, 1.0)


@pytest.mark.parametrize("end", [Tuning.close, Tuning.finish])
@pytest.mark.parametrize("kept", [None, KNOWN[2]])
def test_what_steps_found_is_kept_for_the_next_process(
    tmp_path: Path, kept: Schedule | None, end: Callable[[Tuning], None]
) -> None:
    path, runs = tmp_path / "decode.json", Runs(dict.fromkeys(KNOWN, 1.0))
    if kept is not None:
        path.write_text(json.dumps(kept))
    tuning = Tuning([*reversed(KNOWN)], path, runs)
    for _ in range(100):
        schedule = tuning.next(1)
        tuning.took(schedule, 1, 1.0 + KNOWN.index(schedule))
    end(tuning)
    assert tune.read(path, KNOWN) == KNOWN[0] and runs.n == 0
