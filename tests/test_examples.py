"""Every example and the notebook run, on a small random model in the place of the usual one."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from edgeinfer import config

from .models_for_tests import tiny_model

FOLDER = Path(__file__).resolve().parent.parent / "edgeinfer" / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NOTEBOOK = FOLDER / "tour.ipynb"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
SHOWS = {
    "chat": "tokens were known)", "stream": "tokens a second]", "many": " Lima: ",
    "logprobs": "else ", "hooks": "what enters layer 2 is", "replay": "equal: True",
    "sessions": "loaded: ", "schema": " is a ",
}  # fmt: skip


@pytest.fixture
def home(models_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for this process, which keeps its kernels where they are."""
    monkeypatch.setattr(config, "data_folder", lambda: models_home / "data")
    monkeypatch.setattr(config, "model_folders", dict)
    return models_home


@pytest.fixture(scope="module")
def models_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that has a model by the usual name."""
    home = tmp_path_factory.mktemp("home")
    made = tiny_model(home, n_ctx=2048, n_layers=3, chat_template=TEMPLATE)
    target = home / "data" / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    target.parent.mkdir(parents=True)
    shutil.move(made, target)
    return home


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(
    script: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name])
    runpy.run_path(str(script), run_name="__main__")
    assert SHOWS[script.stem] in capsys.readouterr().out


def test_the_notebook_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cell by cell in a running loop, where a cell may await: as a notebook's kernel does."""
    cells = [each for each in json.loads(NOTEBOOK.read_text())["cells"]]
    assert not any(each.get("outputs") for each in cells), "outputs are not kept"
    sources = ["".join(each["source"]) for each in cells if each["cell_type"] == "code"]

    async def run() -> None:
        names: dict[str, object] = {}
        for i, source in enumerate(sources):
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            cell = compile(source, f"cell {i}", "exec", flags=flags)
            if inspect.isawaitable(result := eval(cell, names)):
                await result

    asyncio.run(run())
    assert capsys.readouterr().out


def test_the_notebook_runs_in_a_kernel(models_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one: it is no part of the test requirements."""
    for module in ("nbclient", "ipykernel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    import nbclient
    import nbformat

    (models_home / "cache").symlink_to(config.cache_folder())
    environment = {"EDGEINFER_HOME": str(models_home), "PYTHONPATH": str(FOLDER.parent.parent)}
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert all(each.execution_count for each in notebook.cells if each.cell_type == "code")
