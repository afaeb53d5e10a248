"""The steps of a self-test, one after the other, and the report that is written after each.

Knows nothing of what the steps compute.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from edgeinfer import platform
from edgeinfer.backend import Backend, RunsOnGpu
from edgeinfer.errors import EdgeInferError
from edgeinfer.selftest import fast, joined, numerics, speed, tiny
from edgeinfer.selftest.cases import Case, limits
from edgeinfer.selftest.judge import Judge, hash_of

Tell: TypeAlias = Callable[[str], None]


class Step(NamedTuple):
    """A part of the self-test; on a GPU, which may be lent, it begins no case after `seconds`."""

    name: str
    seconds: float
    run: Callable[[Run, float], dict[str, Any]]  # until a time of `time.monotonic`
    needs_gpu: bool = False


class Run:
    """A device under test, and what has been found of it."""

    def __init__(self, backend: Backend, device: str, judge: Judge | None, tell: Tell) -> None:
        self.backend, self.judge, self.tell = backend, judge, tell
        self.hashes: dict[str, dict[str, str]] = {}  # of all that was computed
        self.report: dict[str, Any] = {
            "device": device,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "steps": {},
        }

    @property
    def is_ok(self) -> bool:
        """Whether nothing that has run differs or failed."""
        return all(step["state"] not in _BAD for step in self.report["steps"].values())

    @property
    def is_whole(self) -> bool:
        """Whether every case of every step was computed."""
        is_cut = any(step["state"] == "cut" for step in self.report["steps"].values())
        return not is_cut and not self.report["not_run"] and set(self.report["steps"]) == set(NAMES)

    def steps(self, names: Sequence[str], budget: float, path: Path | None) -> None:
        """Run the steps of these names until the budget, in seconds, is used up."""
        end, report = time.monotonic() + budget, self.report
        report["not_run"] = list(dict.fromkeys(names))
        self._write(path)
        for step in STEPS:
            if step.name not in names or time.monotonic() >= end:
                continue
            report["running"] = step.name
            self._write(path)
            report["steps"][step.name] = found = self._step(step, end)
            report["not_run"].remove(step.name)
            del report["running"]
            report["ok"] = self.is_ok
            self._write(path)
            self.tell(f"{step.name}: {found['state']}, {found['seconds']} s")

    def _step(self, step: Step, end: float) -> dict[str, Any]:
        is_on_gpu = self.report["device"].startswith("cuda")
        if step.needs_gpu and not is_on_gpu:
            return {"state": "skipped", "why": "it measures a GPU", "seconds": 0.0}
        begin = time.monotonic()
        until = min(end, begin + step.seconds) if is_on_gpu else end
        found = self.attempt(step.name, lambda: step.run(self, until))
        return {"state": "ok", **found, "seconds": round(time.monotonic() - begin, 2)}

    def attempt(self, name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a part finds, or that it failed and why: whatever comes after it still runs."""
        try:
            return part()
        except Exception as error:
            self.tell(f"{name}: {_why(error)}")
            return {"state": "failed", "why": _why(error)}

    def _write(self, path: Path | None) -> None:
        if path is not None:
            with platform.replaced_whole(path) as file:
                file.write((json.dumps(self.report, indent=1) + "\n").encode())


_BAD = ("differs", "failed")


def facts(run: Run, end: float) -> dict[str, Any]:
    """What it runs on; on a GPU all kernels of the steps after it are compiled."""
    import numpy as np

    found: dict[str, Any] = {
        "cpu": platform.cpu_name(),
        "board": platform.board_name(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "cupy": getattr(sys.modules.get("cupy"), "__version__", None),
    }
    if not isinstance(run.backend, RunsOnGpu):
        return found
    found["gpu"] = run.backend.device.facts._asdict()
    found["free"], found["memory"] = run.backend.device.memory()
    driver = platform.cuda_driver()
    if driver is not None:
        found["driver"] = driver.version
    begin = time.monotonic()
    segments = [case.segment() for case in (*numerics.cases(), *tiny.cases())]
    found["kernels"] = run.backend.prepare((each, limits(each)) for each in segments)
    found["compiled_in"] = round(time.monotonic() - begin, 2)
    return found


def compare(cases: Sequence[Case], run: Run, end: float) -> dict[str, Any]:
    """Compute cases; without a judge their hashes are all that is made of them."""
    differ, failed, done = [], [], 0
    for case in cases:
        if time.monotonic() >= end:
            break
        done += 1
        results = run.attempt(case.name, partial(_results, run.backend, case))
        if "state" in results:
            failed.append({"case": case.name, "why": results["why"]})
            continue
        run.hashes[case.name] = {name: hash_of(array) for name, array in results.items()}
        for each in run.judge.differences(case, results) if run.judge else ():
            differ.append(each._asdict())
            run.tell(f"{each.case}, {each.what}: {each.why}")
    state = "failed" if failed else "differs" if differ else "ok" if done == len(cases) else "cut"
    return {
        "state": state,
        "cases": done,
        "differ": differ,
        "failed": failed,
        "left_out": [case.name for case in cases[done:]],
    }


def compare_joined(run: Run, end: float) -> dict[str, Any]:
    """The same bits where launches for one row are joined; on a GPU also what that gains."""
    apart = run.backend
    other = apart.with_joined_kernels(True) if isinstance(apart, RunsOnGpu) else apart
    if not isinstance(apart, RunsOnGpu) or not isinstance(other, RunsOnGpu) or not other.joins:
        return {"state": "skipped", "why": "its blocks can't be promised to run at once"}
    checked = Run(other, run.report["device"], run.judge, run.tell)
    segments = [case.segment() for case in joined.cases()]
    other.prepare((each, limits(each)) for each in segments)
    found = compare(joined.cases(), checked, end)
    if run.report["device"].startswith("cuda") and time.monotonic() < end:
        apart = apart.with_joined_kernels(False)
        measured = run.attempt("joined", lambda: joined.measure(apart, other))
        run.tell(f"joined: {measured}")
        found = {**found, **measured}
    return found


def _why(error: Exception) -> str:
    """A line that says what ended a step, and where if that is our own mistake."""
    if isinstance(error, EdgeInferError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def _results(backend: Backend, case: Case) -> dict[str, Any]:
    segment = case.segment()
    program = backend.compile(segment, limits(segment))
    try:
        return dict(case.results(program, segment))
    finally:
        program.close()


STEPS = (
    Step("facts", 60, facts),
    Step("numerics", 90, lambda run, end: compare(numerics.cases(), run, end)),
    Step("tiny", 60, lambda run, end: compare(tiny.cases(), run, end)),
    Step("fast", 40, fast.compare),
    Step("joined", 40, compare_joined),
    Step("speed", 150, speed.measure, needs_gpu=True),
)
NAMES = tuple(step.name for step in STEPS)
