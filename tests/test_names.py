"""Names of files that are not UTF-8: shown with a sign of it, given to pipes as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeinfer import printable
from edgeinfer.hub import recent
from edgeinfer.tui.model_choices import find_models
from edgeinfer.tui.settings import ChatSettings
from edgeinfer.tui.store import FILE_NAME, Store

from .models_for_tests import tiny_model
from .tui_engine import ScriptedModel, opener

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
LATIN = os.fsdecode(b"caf\xe9")


def test_a_lone_surrogate_is_never_shown() -> None:
    assert printable(f"a {LATIN}\ud800 ü🦙") == "a caf\ufffd\ufffd ü🦙"


def test_the_latest_model_is_found_again_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / LATIN))
    model = tmp_path / f"{LATIN}.gguf"
    model.write_bytes(b"GGUF")
    assert recent.remember(str(model)) == "" and recent.last_model() == str(model)


def test_a_pipe_gets_the_bytes_of_a_name_and_json_stays_json(tmp_path: Path) -> None:
    home = tmp_path / LATIN
    folder = home / "data" / "models" / "tiny"
    folder.mkdir(parents=True)
    tiny_model(folder, n_ctx=64).rename(folder / f"{LATIN}.gguf")

    def told(*arguments: str) -> bytes:
        environment = {**os.environ, "EDGEINFER_HOME": str(home)}
        command = [sys.executable, "-m", "edgeinfer", *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, check=True, timeout=300
        ).stdout

    assert os.fsencode(home / "data" / "history.db") in told("history")
    (listed,) = json.loads(told("list", "--json").decode("utf-8"))["models"]
    assert listed["path"] == str(folder / f"{LATIN}.gguf")


def test_the_history_keeps_a_path_of_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / LATIN / FILE_NAME
    for model in (f"/models/{LATIN}.gguf", "/models/ü.gguf"):
        Store(path).set_preference("model", model)
        assert Store(path).preference("model") == model


def test_models_that_can_not_be_looked_at_are_left_out(tmp_path: Path) -> None:
    """A home that nobody knows, a name with a zero byte, one that is too long, links in a ring."""
    (tmp_path / "ring.gguf").symlink_to("ring.gguf")
    settings = ChatSettings(
        data_folder=tmp_path, open_model=opener(ScriptedModel()), model=str(tmp_path / "ring.gguf")
    )
    for model in ("~nosuchuser/x.gguf", "a\0b.gguf", "x" * 999 + ".gguf"):
        store = Store(None)
        store.set_preference("model", model)
        assert find_models(settings, store) == []
