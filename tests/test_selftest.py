"""The self-test of devices: green on the shim, and it finds what differs and says where."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import config
from edgeinfer.backend import Backend, find_device, open_backend
from edgeinfer.kernels.cuda.kernel import Sources
from edgeinfer.sampling.sampler import ReferenceSampler
from edgeinfer.selftest import fast, joined, judge, numerics, run, speed, table, tiny
from edgeinfer.selftest.cases import Case, limits
from edgeinfer.selftest.judge import Judge
from edgeinfer.selftest.run import Run

_REPOSITORY = Path(__file__).resolve().parent.parent
# What a machine for tests of GPUs does not have.
MISSING = (
    "platformdirs", "textual", "gguf", "numba", "llvmlite", "tokenizers", "minijinja", "jinja2",
    "sentencepiece",
)  # fmt: skip
WITHOUT = f"""
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Blocked())
from edgeinfer.__main__ import main
main()
"""
PLAIN = ("-m", "edgeinfer")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the shim")


def selftest(*args: str, home: Path, program: tuple[str, ...] = ("-c", WITHOUT)) -> Any:
    """The command, from a plain checkout; usually where packages are missing."""
    return subprocess.run(
        [sys.executable, *program, "selftest", *args],
        cwd=_REPOSITORY, env={**os.environ, config.HOME: str(home)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cpu() -> Backend:
    return open_backend(find_device("cpu").device)


@pytest.fixture(scope="module")
def shim() -> Iterator[Any]:
    device = find_device("shim").device
    backend: Any = open_backend(device, make_sampler=lambda n_vocab, n_threads: ReferenceSampler())
    yield backend
    backend.device.close()


def test_the_hashes_are_what_the_cpu_computes(cpu: Backend) -> None:
    """Of the cases whose kernels other tests build, too."""
    cases = [each for each in numerics.cases() if each.name.startswith(("matrix", "network"))]
    found = run.compare(cases, Run(cpu, "cpu", Judge.committed(), lambda text: None), np.inf)
    assert (found["state"], found["cases"]) == ("ok", len(cases)) and len(cases) == 48


@pytest.mark.slow
def test_all_hashes_are_what_the_cpu_computes(tmp_path: Path) -> None:
    path = tmp_path / "hashes.json"
    for _ in range(2):  # the first builds kernels, which may take longer than a step may
        selftest("--device", "cpu", "--write", str(path), home=tmp_path, program=PLAIN)
    assert path.read_text() == judge.COMMITTED.read_text()


@needs_compiler
def test_the_shim_computes_what_the_cpu_does_on_a_bare_machine(tmp_path: Path) -> None:
    """From a plain checkout, without packages that the self-test has no use for."""
    path = tmp_path / "report.json"
    config.cache_folder().mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").symlink_to(config.cache_folder())  # kernels that other tests have built
    done = selftest("--device", "shim", "--budget", "500", "--json", str(path), home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    steps, compared = report["steps"], {"numerics": numerics.cases(), "tiny": tiny.cases()}
    assert {name: len(cases) for name, cases in compared.items()} == {
        name: steps[name]["cases"] for name in compared
    }
    assert steps["facts"]["kernels"] > 100 and steps["speed"]["state"] == "skipped"
    assert report["ok"] and report["not_run"] == [] and "running" not in report


@needs_compiler
def test_speed_is_measured_by_what_every_device_has(shim: Any) -> None:
    """In small sizes; on a GPU the figures mean something."""
    checked = Run(shim, "cuda:0", None, lambda text: None)
    shape = speed.Shape(2, 256, 256, 4, (1, 4), (33,))
    sizes = speed.Sizes(1 << 20, 1 << 16, 1 << 16, 256, 512, (512,), 300, 3, {"tiny": shape})
    found = speed.measure(checked, np.inf, sizes)
    assert found["state"] == "ok" and found["copy"]["gb_s"] > 0
    assert found["upload"]["gb_s"] > 0 and found["attention 512"]["gb_s"] > 0
    assert found["matrices Q4_K"]["gb_s"] > 0 and found["model tiny"]["prompt_33_tok_s"] > 0
    assert list(found["model tiny"]["decode"]) == ["1", "4"]
    checked.report["steps"]["speed"] = {**found, "seconds": 1.0}
    lines = list(table.lines({**checked.report, "not_run": []}))
    assert len(lines) == 1 + 2 + 5 + 1 + 1 + 2 and "of a copy" in lines[-1]
    assert speed.measure(checked, 0, sizes)["left_out"][0] == "copy"


@needs_compiler
def test_joined_launches_are_compared_and_measured(
    shim: Any, cpu: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = joined.cases()[:1]
    monkeypatch.setattr(joined, "cases", lambda: some)
    checked = Run(shim, "shim:0", Judge.committed(), lambda text: None)
    found = run.compare_joined(checked, np.inf)
    assert (found["state"], found["cases"], found["differ"]) == ("ok", 1, [])
    assert run.compare_joined(Run(cpu, "cpu", None, print), np.inf)["state"] == "skipped"
    took = joined.measure(shim, shim.with_joined_kernels(True), layers=2, dim=256)
    assert all(len(each) == 2 and min(each) > 0 for each in took.values())
    wrong = {some[0].name: dict.fromkeys(json.loads(judge.COMMITTED.read_text())[some[0].name], "")}
    checked.judge = Judge(wrong)
    assert run.compare_joined(checked, np.inf)["state"] == "differs"


def test_every_kernel_is_tested() -> None:
    from edgeinfer.kernels.cuda.blueprint import Blueprint

    kernels = set()
    for case in (*numerics.cases(), *tiny.cases()):
        segment = case.segment()
        kernels |= Blueprint(segment, limits(segment), arch=90).kernels()
    for make in fast.cases().values():
        segment = make()
        kernels |= Blueprint(segment, limits(segment), 90, "fast").kernels()
    for case in joined.cases():
        segment = case.segment()
        drawn = Blueprint(segment, limits(segment), 90, joins=True)
        assert drawn.runs, case.name
        kernels |= drawn.kernels()
    assert {kernel.name for kernel in kernels} == set(Sources().names())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only cases whose CPU kernels other tests build, too."""
    names = ("matrix Q4_0 33x96", "network Q4_K", "llama Q4_0")
    for module in (numerics, tiny):
        cases = [each for each in module.cases() if each.name in names]
        monkeypatch.setattr(module, "cases", lambda cases=cases: cases)


@pytest.mark.usefixtures("few")
def test_a_result_that_differs_is_named(cpu: Backend, tmp_path: Path) -> None:
    """Of a wrong hash NumPy says that it is the hash; of a wrong value, which one it is."""
    hashes = json.loads(judge.COMMITTED.read_text())
    hashes["matrix Q4_0 33x96"]["3 rows"] = "0" * 16
    hashes["network Q4_K"]["9 rows"] = "0" * 16
    path = tmp_path / "report.json"
    checked = Run(cpu, "cpu", Judge(hashes), lambda text: None)
    checked.steps(["numerics"], 300, path)
    report = json.loads(path.read_text())
    assert not report["ok"] and report["steps"]["numerics"]["state"] == "differs"
    differ = [(each["case"], each["what"]) for each in report["steps"]["numerics"]["differ"]]
    assert differ == [("matrix Q4_0 33x96", "3 rows"), ("network Q4_K", "9 rows")]
    assert "though NumPy here computes the same" in report["steps"]["numerics"]["differ"][0]["why"]
    assert any("matrix Q4_0 33x96 3 rows: another hash" in each for each in table.lines(report))


def test_the_first_value_that_differs_is_named(cpu: Backend) -> None:
    case = next(each for each in numerics.cases() if each.name == "matrix Q6_K 33x256")

    def spoilt(program: Any, segment: Any) -> Any:
        results = dict(case.results(program, segment))
        if "cpu" in program.describe()["device"]:
            results["8 rows"][2, 30:] += np.float32(1)
        return results

    broken = Case(case.name, case.segment, spoilt)
    found = run.compare([broken], Run(cpu, "cpu", Judge.committed(), lambda text: None), np.inf)
    assert found["state"] == "differs"
    [difference] = found["differ"]
    assert difference["what"] == "8 rows"
    assert difference["why"].startswith("3 of 264 values differ, the first at (2, 30): ")


@pytest.mark.usefixtures("few")
def test_a_report_is_there_after_every_step(cpu: Backend, tmp_path: Path) -> None:
    path, seen = tmp_path / "report.json", []
    checked = Run(
        cpu, "cpu", Judge.committed(), lambda text: seen.append(json.loads(path.read_text()))
    )
    checked.steps(["numerics", "tiny"], 300, path)
    assert [list(report["steps"]) for report in seen] == [["numerics"], ["numerics", "tiny"]]
    assert [report["not_run"] for report in seen] == [["tiny"], []]
    assert "running" not in seen[1] and seen[1]["ok"]


KILLED = """
import os, signal, sys
from pathlib import Path
from edgeinfer.selftest import run
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
steps = run.Step("first", 1.0, lambda *args: {"found": 1}), run.Step("last", 1.0, die)
run.STEPS = steps
run.Run(None, "cuda:0", None, print).steps([step.name for step in steps], 9.0, Path(sys.argv[1]))
"""


def test_a_report_can_be_read_of_a_test_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=_REPOSITORY, check=False)
    report = json.loads(path.read_text())
    assert done.returncode == -9 and os.listdir(tmp_path) == ["report.json"]
    assert report["steps"]["first"]["found"] == 1
    assert report["running"] == "last" and report["not_run"] == ["last"]


def test_what_fails_is_named_and_the_rest_goes_on(cpu: Backend) -> None:
    first, second = (each for each in numerics.cases() if each.name.startswith("matrix Q4_0"))

    def fail(program: Any, segment: Any) -> Any:
        raise RuntimeError("a kernel that hangs")

    checked = Run(cpu, "cpu", Judge.committed(), lambda text: None)
    found = run.compare([Case(first.name, first.segment, fail), second], checked, np.inf)
    assert (found["state"], found["cases"], found["differ"]) == ("failed", 2, [])
    assert found["failed"][0]["case"] == first.name
    assert found["failed"][0]["why"].startswith("RuntimeError: a kernel that hangs (test_selftest")
    assert list(checked.hashes) == [second.name]


def test_a_step_that_takes_too_long_names_what_it_leaves_out(cpu: Backend) -> None:
    checked = Run(cpu, "cpu", Judge.committed(), lambda text: None)
    found = run.compare(tiny.cases(), checked, end=0)
    assert found["state"] == "cut" and found["left_out"] == [each.name for each in tiny.cases()]


def test_without_a_budget_nothing_runs(tmp_path: Path) -> None:
    done = selftest("--device", "cpu", "--budget", "0", home=tmp_path, program=PLAIN)
    assert done.returncode == 0 and done.stdout == f"not run: {', '.join(run.NAMES)}\n"


def test_errors_say_what_there_is(tmp_path: Path) -> None:
    done = selftest("--device", "cpu", "--only", "tiny,huge", home=tmp_path)
    assert done.returncode == 2 and f"no step huge; there are {', '.join(run.NAMES)}" in done.stderr
    done = selftest("--device", "reference", home=tmp_path)
    assert done.returncode == 2 and "choose cpu, shim or cuda" in done.stderr
    for path in (tmp_path, tmp_path / "there" / "hashes"):  # no folder is made
        done = selftest("--device", "cpu", "--write", str(path), home=tmp_path, program=PLAIN)
        assert done.returncode == 1 and "can't be written" in done.stderr and done.stdout == ""
    assert not (tmp_path / "there").exists()
    if not shutil.which("nvidia-smi"):
        done = selftest("--device", "cuda", home=tmp_path)
        assert done.returncode == 1 and "needs an NVIDIA driver" in done.stderr


@needs_compiler
def test_fast_numerics_are_judged_by_how_far_they_are(
    shim: Any, cpu: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that has them; what is far, or not the same in all steps, is told."""
    some = dict(list(fast.cases().items())[:1])
    assert len(fast.cases()) == 6
    monkeypatch.setattr(fast, "cases", lambda: some)
    checked = Run(shim, "shim:0", None, lambda text: None)
    found = fast.compare(checked, np.inf)
    assert (found["state"], found["cases"]) == ("ok", 1) and 0 < found["divergence"] < 1e-6
    assert fast.compare(checked, 0)["left_out"] == list(some)
    assert fast.compare(Run(cpu, "cpu", None, print), np.inf)["state"] == "skipped"
    monkeypatch.setattr(fast, "MOST_DIVERGENCE", 0.0)
    monkeypatch.setattr(fast, "_IN_PARTS", (8, 32, 40, 39, 1, 0)[:5])
    far = fast.compare(checked, np.inf)
    assert far["state"] == "differs" and "nats from exact numerics" in far["differ"][0]["why"]
