"""The package as others get it: a checkout without links, a released wheel, a frozen program."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from edgeinfer.kernels.cpu import library, ready
from edgeinfer.kernels.cpu.ready import Ready
from edgeinfer.kernels.cpu.targets import Target

from .models_for_tests import tiny_model

ROOT = Path(__file__).resolve().parent.parent
RUN = ("-p", "hi", "-n", "4", "--seed", "1", "--raw")
LINKS = ("kernels", "models", "tui")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    folder = tmp_path_factory.mktemp("model")
    return tiny_model(folder, head_dim=64, chat_template=template)


def run(
    *command: str | Path, home: Path | None = None, cwd: Path | None = None, text: str = ""
) -> subprocess.CompletedProcess[str]:
    changes = {} if home is None else {"EDGEINFER_HOME": str(home)}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**os.environ, **changes}, input=text, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


# -- a checkout without symbolic links ------------------------------------------------------------


@pytest.fixture
def linkless(tmp_path: Path) -> Path:
    """What git leaves on a system without symbolic links: a small text file in place of each."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs git and a checkout of it")
    folder = tmp_path / "checkout"
    run("git", "-c", "core.symlinks=false", "checkout-index", "-a", f"--prefix={folder}/", cwd=ROOT)
    for name in LINKS:
        left = folder / "edgeinfer" / name
        assert left.is_file() and not left.is_symlink()
    return folder


def test_a_checkout_without_links_runs(linkless: Path, model: Path) -> None:
    expected = run(sys.executable, "-m", "edgeinfer", "run", model, *RUN, cwd=ROOT).stdout
    done = run(sys.executable, "-m", "edgeinfer", "run", model, *RUN, cwd=linkless)
    assert done.stdout == expected
    code = "import edgeinfer.tui.launch as t, edgeinfer.models.llama as m; print(t.__file__)"
    assert run(sys.executable, "-c", code, cwd=linkless).stdout.startswith(str(linkless / "tui"))


@pytest.mark.slow
@pytest.mark.network
def test_a_checkout_without_links_installs_whole(linkless: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, linkless)
    run(*pip)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    kinds = (".py", ".tcss", ".cu", ".cuh", ".h", ".cpp")
    for folder in ("edgeinfer", *LINKS):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kinds and not {"examples", "screenshots"} & {*path.parts}:
                inside = path.relative_to(ROOT).as_posix()
                prefix = "" if folder == "edgeinfer" else "edgeinfer/"
                assert prefix + inside in packed


# -- a released wheel -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, made for this machine's family alone.

    The wheel's dependencies are those of this environment.
    """
    folder = tmp_path_factory.mktemp("release")
    host = Target.host()
    name = ready.path(Path(), Target.any(host.family, host.machine)).stem
    run(sys.executable, ROOT / ".ci" / "wheel.py", folder, name)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = environment / scripts / Path(sys.executable).name
    purelib = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(run(python, "-c", purelib).stdout.strip())
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site)
    run(*pip, wheel)
    (site / "of-the-tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run(python, "-c", "import edgeinfer; print(edgeinfer.__file__)", cwd=folder).stdout
    assert Path(where.strip()).is_relative_to(site)
    return python


@pytest.mark.slow
@pytest.mark.network
def test_a_released_wheel_runs_without_building(
    installed: Path, model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    code = (
        "import sys\nfrom edgeinfer import LLM\n"
        "with LLM(sys.argv[1]) as llm:\n    llm.generate('hi', max_tokens=4, seed=1)\n"
        "    origins = set(llm.runtime.program._backend.library.origins.values())\n"
        "print('numba' in sys.modules, origins)"
    )
    done = run(installed, "-c", code, model, home=home, cwd=tmp_path)
    assert done.stdout.strip() == "False {'ready'}"
    assert not list(home.rglob("*.o"))
    here = run(sys.executable, "-m", "edgeinfer", "run", model, *RUN, cwd=ROOT)
    there = run(installed, "-m", "edgeinfer", "run", model, *RUN, home=home, cwd=tmp_path)
    assert there.stdout == here.stdout and "building" not in there.stderr
    origins = json.loads(
        run(installed, "-m", "edgeinfer", "doctor", "--json", home=home, cwd=tmp_path).stdout
    )["kernels"]["origins"]
    assert origins == {"cached": 0, "ready": len(ready.NAMES), "to_build": 0}


@pytest.mark.slow
@pytest.mark.network
def test_warmup_makes_a_wheels_kernels_this_machines_own(
    installed: Path, model: Path, tmp_path: Path
) -> None:
    command = (installed, "-m", "edgeinfer", "warmup", model)
    told = run(*command, home=tmp_path, cwd=tmp_path).stderr
    assert "rebuilt for this very processor" in told and "decodes fastest on" in told
    assert list(tmp_path.rglob("*.o"))
    assert "rebuilt" not in run(*command, home=tmp_path, cwd=tmp_path).stderr


# -- a frozen program -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(
    importlib.util.find_spec("PyInstaller") is None,
    reason="needs PyInstaller: pip install pyinstaller",
)
def test_a_frozen_program_runs(installed: Path, model: Path, tmp_path: Path) -> None:
    script, home = tmp_path / "app.py", tmp_path / "home"
    script.write_text("from edgeinfer.cli.main import main\n\nmain()\n")
    freeze = ("-m", "PyInstaller", "--noconfirm", "--log-level=WARN", script)
    run(installed, *freeze, cwd=tmp_path)
    app = next((tmp_path / "dist" / "app").glob("app*"))
    assert not list(app.parent.rglob("numba*"))
    here = run(sys.executable, "-m", "edgeinfer", "run", model, *RUN, cwd=ROOT)
    done = run(app, "run", model, *RUN, home=home)
    assert done.stdout == here.stdout and not list(home.rglob("*.o"))
    facts = json.loads(run(app, "doctor", "--json", home=home).stdout)
    assert facts["kernels"]["origins"] == {"cached": 0, "ready": len(ready.NAMES), "to_build": 0}
    chat = ("chat", model, "--plain", "-n", "4")
    assert run(app, *chat, home=home, text="hi\n/stats\n").stdout
    assert "rebuilt" not in run(app, "warmup", model, home=home).stderr
    for command in ("history", "list", "cache"):
        run(app, command, home=home)
    for left in (app.parent / "_internal" / "edgeinfer").rglob("*.kernels"):
        left.unlink()
    lacking = subprocess.run(
        [app, "run", model, *RUN], env={**os.environ, "EDGEINFER_HOME": str(home)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert lacking.returncode == 1 and "frozen without the kernels" in lacking.stderr


def test_only_ready_kernels_of_these_sources_are_frozen(tmp_path: Path) -> None:
    current, old = (Target.any("generic", machine) for machine in ("x86_64", "aarch64"))
    path = ready.write(tmp_path, current, {"norm": b"some machine code"})
    stale = ready.write(tmp_path, old, {"norm": b"some machine code"})
    data = stale.read_bytes()
    key = Ready.open(stale).entries["norm"].key.encode()
    stale.write_bytes(data.replace(key, key[::-1]))
    (tmp_path / "damaged.kernels").write_bytes(data[:50])
    assert library.current_files(tmp_path) == [path]
