"""Models by name: loaded, unloaded and fetched on request, never beyond the plan of memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgeinfer import LLM
from edgeinfer.aio import AsyncLLM
from edgeinfer.cli import serve
from edgeinfer.errors import Keyword, PlanError
from edgeinfer.hub.fetch import models_folder
from edgeinfer.server.durations import keep_alive
from edgeinfer.server.errors import ApiError
from edgeinfer.server.fields import Fields
from edgeinfer.server.models import Models
from edgeinfer.server.pull import is_on_hub

from .fake_hub import FakeHub
from .server_for_tests import LOAD, Running, running, small_model

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
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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
        with found.http.stream("POST", CHAT, json=asked) as reply:
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

        answered(keep_alive="200ms")
        assert states(found) == {"one": "loaded"}
        expires = found.http.get("/api/ps").json()["models"][0]["expires_at"]
        assert not expires.startswith("2099")
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


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_requests_takes_more_than_the_plan(
    paths: list[Path], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded, unloaded, asked and given up at random by many tasks: all end, none exceeds."""
    with LLM(paths[0], **SMALL) as llm:
        budget = llm.plan.host.total_bytes * 5 // 2  # for two of three
    alive: dict[int, int] = {}
    most = 0
    opened, closed = LLM._take, LLM.close

    def take(self: LLM, loaded: Any) -> None:
        nonlocal most
        opened(self, loaded)
        alive[id(self)] = self.plan.host.total_bytes
        most = max(most, sum(alive.values()))

    def close(self: LLM) -> None:
        closed(self)
        time.sleep(0.002)
        alive.pop(id(self), None)

    monkeypatch.setattr(LLM, "_take", take)
    monkeypatch.setattr(LLM, "close", close)
    names = ["a", "b", "c"]

    async def work(models: Models, rng: random.Random) -> None:
        for _ in range(6):
            name = rng.choice(names)
            if rng.random() < 0.3:
                await models.unload(models.find(name))
            elif rng.random() < 0.1:
                models.keep(models.find(name), rng.choice([None, 0, 0.01]))
            else:
                async with models.lease(name) as model:
                    face = model.face
                    assert face is not None
                    await face.generate("hi", max_tokens=2)
                    await asyncio.sleep(rng.random() / 100)

    async def main() -> None:
        rng = random.Random(seed)
        models = Models(list(zip(names, paths, strict=True)), {**SMALL, "memory": budget})
        await models.start()
        tasks = [asyncio.create_task(work(models, random.Random(rng.random()))) for _ in range(12)]
        for task in rng.sample(tasks, 3):
            asyncio.get_running_loop().call_later(rng.random() / 5, task.cancel)
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert [each for each in ended if isinstance(each, Exception)] == []
        assert all(model.n_users == 0 for model in models.served)
        await models.close()

    asyncio.run(main())
    assert 0 < most <= budget and not alive


def test_memory_that_would_fit_is_the_servers(paths: list[Path]) -> None:
    """What a model lacks is said of the memory that was given, of which it has a part."""

    async def start(memory: str) -> None:
        models = Models([("one", paths[0])], {**SMALL, "memory": memory})
        await models.start()
        await models.close()

    with pytest.raises(PlanError, match="beside 24 MiB of the server; memory='") as caught:
        asyncio.run(start("60M"))
    (advised,) = [each for each in caught.value.advice if isinstance(each, Keyword)]
    assert advised.name == "memory" and isinstance(advised.value, str)
    asyncio.run(start(advised.value))
    less = int(advised.value.removesuffix("M")) - 2
    with pytest.raises(PlanError):
        asyncio.run(start(f"{less}M"))


def test_what_never_fits_costs_no_other_its_place(paths: list[Path], tmp_path: Path) -> None:
    """Nor is its client told to come back."""
    large = small_model(tmp_path, n_layers=40, dim=256, n_heads=8, ffn_dim=1024)
    with LLM(paths[0], **SMALL) as llm:
        budget = llm.plan.host.total_bytes * 3 // 2 + (24 << 20)
    served = [("one", paths[0]), ("large", large), ("two", paths[1])]
    with running(served, load={**SMALL, "memory": budget}) as found:
        for path, body in (
            (CHAT, {"messages": HI, "max_tokens": 1}), ("/v1/messages", {"messages": HI}),
            ("/api/chat", {"messages": HI}), ("/models/load", {}),
        ):  # fmt: skip
            refused = found.post(path, {**body, "model": "large"})
            assert refused.status_code == 507 and "retry-after" not in refused.headers
            assert refused.headers["x-should-retry"] == "false"
            assert "the model needs" in refused.text and "beside 24 MiB" in refused.text
            assert str(tmp_path) not in refused.text
            assert states(found) == {"one": "loaded", "large": "unloaded", "two": "unloaded"}
        assert found.post("/models/load", {"model": "two"}).status_code == 200
        assert states(found) == {"one": "unloaded", "large": "unloaded", "two": "loaded"}


def test_who_has_gone_waits_for_no_model(paths: list[Path]) -> None:
    """One whose memory another model has, while that answers: its place is free at once."""
    with LLM(paths[0], **SMALL) as llm:
        budget = llm.plan.host.total_bytes * 3 // 2 + (24 << 20)
    served = [("one", paths[0]), ("two", paths[1])]
    with running(served, load={**SMALL, "memory": budget}) as found:
        one = found.service.models.served[0]
        one.n_users += 1  # it answers
        for path, stream in ((CHAT, True), (CHAT, False), ("/tokenize", False)):
            body = {"model": "two", "messages": HI, "content": "x", "stream": stream}
            with pytest.raises(httpx2.TimeoutException):
                found.post(path, body, timeout=0.2)
            until(lambda: not found.service.is_busy)
        assert states(found) == {"one": "loaded", "two": "loading"}
        one.n_users -= 1


def test_who_waits_for_a_model_is_told_that_the_server_stops(
    paths: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(paths[0], **SMALL) as llm:
        budget = llm.plan.host.total_bytes * 3 // 2 + (24 << 20)
    served, told = [("one", paths[0]), ("two", paths[1])], []
    load: Any = {**SMALL, "memory": budget}
    with running(served, load=load, grace_seconds=0.1) as found:
        found.service.models.served[0].n_users += 1  # it answers
        body = {"model": "two", "messages": HI, "content": "x", "stream": True}
        asking = [
            threading.Thread(target=lambda path=path: told.append(found.post(path, body)))  # type: ignore[misc]
            for path in (CHAT, "/tokenize")
        ]
        for each in asking:
            each.start()
        until(lambda: found.service._n_open == 2)
        found.server.stop()
        for each in asking:
            each.join(20)
    assert [each.status_code for each in told] == [503, 503]
    assert all("the server is stopping" in each.text for each in told)
    assert caplog.records == []


def test_a_model_is_shown_without_being_loaded(paths: list[Path], tmp_path: Path) -> None:
    """Front-ends ask for each that there is: that none of them loses its place."""
    settings = {"general.sampling.temp": 0.25}
    other = small_model(tmp_path, metadata=settings)
    with running([("one", paths[0]), ("two", other)], load=SMALL) as found:
        before = found.post("/api/show", {"model": "two"}).json()
        assert states(found) == {"one": "loaded", "two": "unloaded"}
        assert before["parameters"] == "temperature 0.25" and "[assistant]" in before["template"]
        assert found.post("/models/load", {"model": "two"}).status_code == 200
        assert found.post("/api/show", {"model": "two"}).json() == before
        assert found.post("/models/unload", {"model": "two"}).status_code == 200
        other.write_bytes(b"GGUF")
        refused = found.post("/api/show", {"model": "two"})
        assert refused.status_code == 500 and str(tmp_path) not in refused.text
        assert found.post("/api/show", {"model": "none"}).status_code == 404


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
        hub.repos["org/Tiny-GGUF"] = {"Tiny-Q4_0.gguf": whole + bytes(64 << 20)}
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
            threading.Timer(1.0, hub.hold.set).start()
            found.server.stop()
            asking.join(20)
        assert "the server is stopping" in told[0]
        assert hub.bytes_sent < 64 << 20 or list((tmp_path / "home").rglob("*.part"))


def test_a_server_of_one_model_keeps_as_much_as_its_contexts_hold(paths: list[Path]) -> None:
    kept = []
    for served, load in (
        ([("one", paths[0])], SMALL),
        ([("one", paths[0]), ("two", paths[1])], SMALL),
        ([("one", paths[0])], dict(SMALL, kept_tokens=64)),
        ([("one", paths[0])], {**SMALL, "naive": True, "slots": None}),
    ):
        with running(served, load=load) as found:
            plan = found.llm.plan
            kept.append(plan.n_spare_pages * 32)
            assert plan.fits
    assert kept[0] == SMALL["slots"] * SMALL["n_ctx"] > kept[1] > kept[2] == 64
    assert kept[3] == 0 and plan.slots == 1  # it answers one at a time, and uses nothing again


def test_memory_that_vanishes_before_loading_takes_what_nobody_asked_for(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the server chose itself no error speaks: it goes without."""
    opened = AsyncLLM.open
    tried: list[Any] = []

    async def open_unless_kept(face: AsyncLLM) -> LLM:
        tried.append(face._load.get("kept_tokens"))
        if face._load.get("kept_tokens"):
            raise PlanError("there was more memory a moment ago")
        return await opened(face)

    monkeypatch.setattr(AsyncLLM, "open", open_unless_kept)
    with running([("one", paths[0])], load={**SMALL, "slots": None}) as found:
        assert found.llm.plan.slots == 1 and tried[0] and tried[1:] == [None]


def test_a_plan_that_failed_is_not_tried_again(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a server adds nothing, that is: slots and kept tokens were given."""
    opened = AsyncLLM.open
    tried: list[Any] = []

    async def fail_first(face: AsyncLLM) -> LLM:
        tried.append(face._load)
        if len(tried) == 1:
            raise PlanError("there was more memory a moment ago")
        return await opened(face)

    monkeypatch.setattr(AsyncLLM, "open", fail_first)
    models = Models([("one", paths[0])], {**SMALL, "kept_tokens": 64})
    with pytest.raises(PlanError):
        asyncio.run(models.start())
    assert len(tried) == 1
