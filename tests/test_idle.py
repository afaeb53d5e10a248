"""Kernels for this very processor, built while nothing runs: never in the way, never left."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edgeinfer.batch import StepLimits
from edgeinfer.errors import ClosedError
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cpu import builders, kept_objects, ready
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.cpu.idle import IdleBuild, IdleWork
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.ready import Ready
from edgeinfer.kernels.cpu.targets import Target
from edgeinfer.model import Model

from .models_for_tests import tiny_model
from .native import cache_root
from .test_cpu_program import IDS, batch_of
from .waiting import wait_until

LIMITS = StepLimits(n_pages={0: 8}, max_rows=16, max_outputs=16, max_sequences=4, n_threads=2)
NAMES = ["norm", "swiglu"]
MOST_SECONDS = 900.0  # for what runs only where a busy machine has nothing else to do


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds however little is free."""
    monkeypatch.setattr("edgeinfer.kernels.cpu.idle._LEAST_MEMORY", 0)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def test_it_builds_when_idle_and_a_step_ends_it_at_once(tmp_path: Path) -> None:
    build = IdleBuild(NAMES, tmp_path, Target.host(), idle_seconds=0.05)
    time.sleep(0.2)
    assert build._thread is None  # nothing before the first step
    build.begin_step()
    build.end_step()
    wait_until(lambda: build._job, "a process that builds")
    process = build._job
    assert process is not None
    if hasattr(os, "getpriority"):
        lowest = partial(os.getpriority, os.PRIO_PROCESS, process.pid)
        wait_until(lambda: lowest() == 19, "the lowest priority")
    build.begin_step()
    assert build._job is None
    wait_until(lambda: process.returncode is not None, "its end")
    assert process.returncode, "it was left to end by itself"
    time.sleep(0.3)
    assert build._job is None  # a step runs, for however long
    build.end_step()
    assert build.wait(MOST_SECONDS)
    assert all(kept_objects.read_object(tmp_path, name) for name in NAMES)
    build.close()


class Ended(IdleWork):
    """Work on a team of threads that has ended: an interpreter that exits closes that first."""

    is_done = False

    def _go_on(self) -> bool:
        raise ClosedError("this program ends")

    def _interrupt(self) -> None:
        pass


def test_the_end_of_the_program_is_no_fault_of_its(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    work = Ended(idle_seconds=0.0)
    work.end_step()
    assert work._thread is not None
    work._thread.join(120)
    assert not work._thread.is_alive() and not told


def test_closing_ends_its_process(tmp_path: Path) -> None:
    build = IdleBuild(NAMES, tmp_path, Target.host(), idle_seconds=0.0)
    build.end_step()
    wait_until(lambda: build._job, "a process that builds")
    process = build._job
    assert process is not None
    build.close()
    wait_until(lambda: process.returncode is not None, "its end")
    assert not is_running(process.pid)
    build.end_step()
    assert build._thread is not None and not build._thread.is_alive()


def test_what_cannot_be_built_is_not_tried_again(tmp_path: Path) -> None:
    build = IdleBuild(["nonsense", "norm"], tmp_path, Target.host(), idle_seconds=0.0)
    build.end_step()
    assert build.wait(MOST_SECONDS)
    assert not list(tmp_path.glob("*.o"))


def test_a_program_changes_to_exact_kernels_without_changing_a_bit(tmp_path: Path) -> None:
    """The kernels of a family, then those of this processor: contract 1 across a rebuild."""
    host = Target.host()
    portable = Target.any(host.family, host.machine, host.triple)
    with GGUFFile.open(tiny_model(tmp_path)) as file:
        segment = Model.load(file).graph.segment()
        with CpuBackend(cache_root()).compile(segment, LIMITS) as program:
            names = [*program._backend.library.origins]
            expected = program.submit(batch_of(IDS)).wait().logits.copy()
        exact = kept_objects.cache_folder(cache_root(), host)
        # Only one kernel is another than the exact one, so that the test takes no minute.
        objects = builders.build_objects(tmp_path / "objects", ["norm"], portable, None)
        objects |= {
            name: data
            for name in names
            if name not in objects and (data := kept_objects.read_object(exact, name))
        }
        ready.write(tmp_path, portable, objects)
        backend = CpuBackend(tmp_path / "cache")
        backend.library = Library(host, tmp_path / "cache", Ready.of(portable, tmp_path))
        with backend.compile(segment, LIMITS) as program:
            assert set(backend.library.origins.values()) == {"ready"}
            idle = program._idle = IdleBuild(
                ["norm"], backend.library.folder, host, idle_seconds=0.0
            )
            assert np.array_equal(program.submit(batch_of(IDS)).wait().logits, expected)
            assert idle.wait(MOST_SECONDS)
            assert np.array_equal(program.submit(batch_of(IDS)).wait().logits, expected)
        backend.library = Library(host, tmp_path / "cache", Ready.of(portable, tmp_path))
        with backend.compile(segment, LIMITS) as program:
            assert backend.library.origins["norm"] == "cached"
            assert np.array_equal(program.submit(batch_of(IDS)).wait().logits, expected)


@pytest.mark.parametrize("family", [None, "generic"])
def test_only_kernels_that_can_become_better_are_built(tmp_path: Path, family: str | None) -> None:
    """Kernels of a family that is forced are what they are."""
    target = Target.host(family)
    lib = Library(target, tmp_path, Ready())
    lib.origins |= {"norm": "ready", "swiglu": "cached", "read": "built"}
    is_exact = target == Target.any(target.family, target.machine, target.triple)
    assert lib.inexact() == ([] if is_exact else ["norm"])
    assert is_exact or family is None
