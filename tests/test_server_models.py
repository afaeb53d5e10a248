"""Models by name: loaded, unloaded and fetched on request, never beyond the plan of memory."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.cli import serve
from edgeinfer.hub.fetch import models_folder
from edgeinfer.server.durations import keep_alive
from edgeinfer.server.errors import ApiError
from edgeinfer.server.fields import Fields
from edgeinfer.server.pull import is_on_hub

from .fake_hub import FakeHub
from .server_for_tests import LOAD, Running, running, small_model
from .waiting import halting, wait_until

HI: Any = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
SMALL: Any = dict(LOAD, n_ctx=512)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [small_model(folder, seed=seed) for seed in (1, 2, 3)]


def states(found: Running) -> dict[str, str]:
    return {
        each["id"]: each["status"]["value"] for each in found.http.get("/models").json()["data"]
    }


def until(condition: Callable[[], bool]) -> None:
    wait_until(condition, "what the models come to")


def test_models_are_loaded_and_unloaded_by_name(paths: list[Path]) -> None:
    with running([("one", paths[0]), ("two", paths[1])], load=SMALL) as found:
        assert states(found) == {"one": "loaded", "two": "unloaded"}
        assert found.post("/models/load", {"model": "two"}).json() == {"success": True}
        assert states(found) == {"one": "loaded", "two": "loaded"}
        assert found.post("/v1/models/unload", {"model": "one"}).json() == {"success": True}
        assert states(found) == {"one": "unloaded", "two": "loaded"}
        assert found.post("/models/unload", {"model": "three"}).status_code == 404
        assert found.post("/models/load", {"model": "../one.gguf"}).status_code == 404
        endless = {"messages": HI, "max_tokens": 400, "logit_bias": {"257": -1000}}
        asked = {**endless, "model": "two", "stream": True}
        two = found.service.models.served[1].opened
        with halting(two), found.http.stream("POST", CHAT, json=asked) as reply:
            lines = reply.iter_lines()
            next(lines)
            assert found.post("/models/unload", {"model": "two"}).status_code == 409


def test_a_file_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9\n\x1b[31m.gguf")
    try:
        small_model(tmp_path).rename(path)
    except (OSError, UnicodeError):
        pytest.skip("no such name can be given here")
    assert serve._name(str(path), path) == "caf\ufffd "
    with running([(path.stem, path)], load=SMALL) as found:
        assert states(found) == {"caf\ufffd ": "loaded"}
        for named in ("/api/tags", "/metrics", "/v2/models/x/config", "/api/v1/models"):
            reply = found.http.get(named)
            assert reply.status_code == 200 and "caf\ufffd" in reply.text
        body = {"model": "caf\ufffd ", "messages": HI, "max_tokens": 1}
        assert found.post(CHAT, body).json()["model"] == "caf\ufffd "


def test_the_catalog_of_lm_studio(paths: list[Path]) -> None:
    with running([("one", paths[0]), ("two", paths[1])], load=SMALL) as found:
        one, two = found.http.get("/api/v1/models").json()["models"]
        assert (one["key"], one["loaded_instances"]) == (
            "one", [{"id": "one", "config": {"context_length": 512}}],
        )  # fmt: skip
        assert two["loaded_instances"] == [] and two["size_bytes"] == paths[1].stat().st_size
        loaded = found.post("/api/v1/models/load", {"model": "two"}).json()
        assert (loaded["instance_id"], loaded["status"]) == ("two", "loaded")
        told = found.post("/api/v1/models/unload", {"instance_id": "two"}).json()
        assert told == {"instance_id": "two"}
        older = found.http.get("/api/v0/models").json()["data"]
        assert [each["state"] for each in older] == ["loaded", "not-loaded"]


# -- how long they stay ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0), ("0", 0), ("0s", 0), (1.5, 1.5), (-1, None), ("-1", None), ("-1m", None),
        ("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("1.5h", 5400), (10**12, None),
        (300, 300), ("5", 5),
    ],
)  # fmt: skip
def test_durations(given: Any, seconds: float | None) -> None:
    assert keep_alive(Fields({"keep_alive": given})) == seconds


@pytest.mark.parametrize("given", ["", "m", "5x", "5 m", "--5m", "1e3s", True, [], "nan"])
def test_what_is_no_duration(given: Any) -> None:
    with pytest.raises(ApiError, match="keep_alive"):
        keep_alive(Fields({"keep_alive": given}))


def test_an_idle_model_leaves_when_it_was_told_to(paths: list[Path]) -> None:
    with running([("one", paths[0])], load=SMALL) as found:
        asked: Any = {"model": "one", "messages": HI, "options": {"num_predict": 2}}

        def answered(**more: Any) -> None:
            assert found.post("/api/chat", {**asked, "stream": False, **more}).status_code == 200

        answered(keep_alive="10m")
        assert states(found) == {"one": "loaded"}
        expires = found.http.get("/api/ps").json()["models"][0]["expires_at"]
        assert not expires.startswith("2099")
        answered(keep_alive="200ms")
        until(lambda: states(found) == {"one": "unloaded"})
        answered(keep_alive="200ms")
        answered(keep_alive=-1)
        time.sleep(0.4)
        assert states(found) == {"one": "loaded"}
        answered(keep_alive=0)
        until(lambda: states(found) == {"one": "unloaded"})
        answered()  # it is loaded anew, and what was said of the one before is forgotten
        assert found.http.get("/api/ps").json()["models"][0]["expires_at"].startswith("2099")
        refused = found.post("/api/chat", {**asked, "keep_alive": "soon"})
        assert refused.status_code == 400 and "keep_alive" in refused.json()["error"]
        found.wait_until_idle()


# -- from the hub ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b/c", "a/../b", "models/x.gguf", "C:\\x", "x", "~/x", ""]
)
def test_a_path_is_no_name_of_the_hub(name: str) -> None:
    assert not is_on_hub(name)


def test_models_are_fetched_where_that_is_allowed(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    asked: Any = {"messages": HI, "max_tokens": 2, "model": "org/Tiny-GGUF:Q4_0"}
    with FakeHub() as hub, contextlib.ExitStack() as stack:
        hub.repos["org/Tiny-GGUF"] = {"Tiny-Q4_0.gguf": paths[1].read_bytes()}
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        usual = stack.enter_context(running([("one", paths[0])], load=SMALL, strict=True))
        assert usual.post(CHAT, asked).status_code == 404 and not hub.requests
        refused = usual.post("/api/pull", {"model": "org/Tiny-GGUF:Q4_0"})
        assert refused.status_code == 403 and "--allow-pull" in refused.json()["error"]
        assert usual.post("/api/pull", {"model": "one"}).text.endswith('{"status":"success"}\n')
        assert usual.post("/api/pull", {}).status_code == 400 and not hub.requests
        found = stack.enter_context(running([("one", paths[0])], load=SMALL, may_pull=True))
        assert found.post(CHAT, {**asked, "model": "gpt-9"}).json()["model"] == "one"
        missing = found.post(CHAT, {**asked, "model": "org/none"})
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
        assert found.post("/api/pull", {"model": "gpt-9"}).status_code == 404
        lines = found.post("/api/pull", {"model": "org/none"}).text.splitlines()
        assert "error" in json.loads(lines[-1])
        lines = found.post("/api/pull", {"model": "org/Tiny-GGUF:Q4_0"}).text.splitlines()
        assert json.loads(lines[-1]) == {"status": "success"}
        assert found.post(CHAT, asked).json()["model"] == "org/Tiny-GGUF:Q4_0"
        assert list(models_folder().rglob("Tiny-Q4_0.gguf"))
        n_asked = len(hub.requests)
        assert found.post(CHAT, asked).status_code == 200 and len(hub.requests) == n_asked
        assert list(states(found)) == ["one", "org/Tiny-GGUF:Q4_0"]
        # What one client has fetched changes no names of others.
        assert found.post(CHAT, {**asked, "model": "gpt-9"}).json()["model"] == "one"


def test_what_is_fetched_ends_with_the_server(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be waited for, however much is left of it."""
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with FakeHub() as hub:
        whole = paths[1].read_bytes()
        hub.repos["org/Tiny-GGUF"] = {"Tiny-Q4_0.gguf": whole + bytes(8 << 20)}
        hub.hold, hub.held_after = threading.Event(), len(whole)
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        told: list[str] = []
        with running([("one", paths[0])], load=SMALL, may_pull=True, grace_seconds=0.1) as found:
            asked = {"model": "org/Tiny-GGUF:Q4_0"}
            asking = threading.Thread(
                target=lambda: told.append(found.post("/api/pull", asked).text)
            )
            asking.start()
            until(lambda: any("/resolve/" in path for path, _ in hub.requests))
            found.server.stop()
            asking.join(120)
        assert "the server is stopping" in told[0]
        assert not hub.bytes_sent  # which still waits
        hub.hold.set()
        assert list((tmp_path / "home").rglob("*.part"))
