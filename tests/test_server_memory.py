"""Models of a server in one memory: who gives way, and who waits or is refused."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgeinfer import LLM
from edgeinfer.aio import AsyncLLM
from edgeinfer.errors import Keyword, PlanError
from edgeinfer.server.models import Models

from .server_for_tests import running, small_model
from .test_server_models import CHAT, HI, SMALL, states, until


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [small_model(folder, seed=seed) for seed in (1, 2, 3)]


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
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 300)
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
        until(lambda: states(found) == {"one": "loaded", "two": "loading"})
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
            each.join(120)
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
