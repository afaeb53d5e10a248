"""The README keeps its promises: commands, the tour of the API, paths, files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgeinfer import config
from edgeinfer.cli.main import commands
from edgeinfer.hub.discovery import models_folder
from edgeinfer.model import architectures

from .models_for_tests import tiny_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (
    "python3 -m venv .venv && .venv/bin/python -m pip install . && .venv/bin/edgeinfer chat -y",
    "python3 -m venv .venv && .venv/bin/python -m pip install '.[test]' "
    "&& .venv/bin/python -m pytest -n auto",
)


def between(mark: str) -> str:
    """The text from a mark to the next end."""
    return README.partition(f"<!-- {mark}")[2].partition("-->")[2].partition("<!-- end -->")[0]


def test_the_two_commands_are_there_as_they_are() -> None:
    assert f"\n{START[0]}\n" in README
    assert between("test command").strip().splitlines() == ["```", START[1], "```"]


def test_the_tour_of_the_api_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(config, "model_folders", dict)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    made = tiny_model(tmp_path, n_ctx=2048, chat_template=template)
    target = models_folder() / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    target.parent.mkdir(parents=True)
    shutil.move(made, target)
    tour = between("api tour").strip().removeprefix("```python\n").removesuffix("```")
    assert len(tour.strip().splitlines()) <= 12
    exec(compile(tour, "README.md", "exec"), {})
    assert "(1, 320)" in capsys.readouterr().out


def test_every_command_is_in_the_table_and_has_one_example() -> None:
    listed = re.findall(r"^\| `(\w+)", between("commands"), re.MULTILINE)
    context = click.Context(commands)
    assert sorted(listed) == commands.list_commands(context)
    for name in listed:
        command = commands.get_command(context, name)
        assert isinstance(command, click.Command)
        assert (command.epilog or "").startswith(f"Example: edgeinfer {name}"), name
        assert command.help, name


def test_every_environment_variable_is_named() -> None:
    for name in (config.HOME, config.ISA, config.THREADS, config.DEBUG):
        assert f"`{name}`" in README


def test_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_every_architecture_is_listed() -> None:
    assert sorted(architectures()) == sorted(
        re.findall(r"(?m)^\| `(\w+)`", between("architectures"))
    )


def test_every_folder_is_listed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: only Git knows which files are ours")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "file_tree.py", "--check"])
    assert done.returncode == 0, "python .ci/file_tree.py writes the list anew"
