"""The fleet of examples/ray on this machine: several copies, their streams, and who gets what.

Ray is large, so that only a run that asks for slow tests needs it: pip install '.[ray]'
"""

from __future__ import annotations

import asyncio
import importlib
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from .server_for_tests import small_model

ray = pytest.importorskip("ray", reason="pip install '.[ray]' has what this test runs on")
serve: Any = pytest.importorskip("ray.serve", reason="pip install '.[ray]' has it")
pytestmark = pytest.mark.slow
SYSTEM = "You answer in few words. " * 20


@pytest.fixture(scope="module")
def fleet() -> Any:
    return importlib.import_module("edgeinfer.examples.ray.fleet")


@pytest.fixture(scope="module")
def http(fleet: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    model = small_model(tmp_path_factory.mktemp("model"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8731})
    app = fleet.fleet(
        model, least=2, most=3, cores=1, device="reference", slots=2, n_ctx=4096,
        limits=fleet.Limits(most_body=1 << 20),
    )  # fmt: skip
    serve.run(app)
    with httpx2.Client(base_url="http://127.0.0.1:8731", timeout=120) as client:
        yield client
    serve.shutdown()
    ray.shutdown()


def chat(*words: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": SYSTEM}]
    turns += [
        {"role": ("user", "assistant")[i % 2], "content": each} for i, each in enumerate(words)
    ]
    return {"model": "any", "messages": turns, "max_tokens": 8, "temperature": 0, **more}


def test_a_conversation_stays_with_the_copy_that_has_read_it(http: httpx2.Client) -> None:
    for i in range(6):
        first = f"Conversation {i} begins. " * 60
        http.post("/v1/chat/completions", json=chat(first)).raise_for_status()
        again = http.post("/v1/chat/completions", json=chat(first, "yes", "and?")).json()
        usage = again["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0.8 * usage["prompt_tokens"]


def test_streams_come_as_they_are_made_and_equal_the_whole(http: httpx2.Client) -> None:
    whole = http.post("/v1/chat/completions", json=chat("hello")).json()
    text, times = "", []
    with http.stream("POST", "/v1/chat/completions", json=chat("hello", stream=True)) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
    assert text == whole["choices"][0]["message"]["content"]
    assert len(times) > 3


def test_all_apis_and_errors_pass(http: httpx2.Client) -> None:
    said = {"role": "user", "content": "hi"}
    message = {"model": "x", "max_tokens": 3, "messages": [said]}
    assert http.post("/v1/messages", json=message).json()["type"] == "message"
    assert http.get("/v1/models").json()["data"]
    assert http.get("/api/tags").json()["models"]
    assert http.get("/nothing").status_code == 404
    assert http.post("/v1/chat/completions", content=b"{").status_code == 400
    assert http.post("/v1/chat/completions", json=chat("x" * (2 << 20))).status_code == 413
    long = http.post(
        "/v1/messages", json={**message, "messages": [{**said, "content": "a " * 9999}]}
    )
    assert long.status_code == 400 and "prompt is too long" in long.json()["error"]["message"]


def test_a_reader_that_leaves_ends_its_answer(http: httpx2.Client) -> None:
    asking = chat("a long answer", stream=True, max_tokens=3000, ignore_eos=True)
    for _ in range(6):  # more than all copies can answer at a time
        with http.stream("POST", "/v1/chat/completions", json=asking) as reply:
            next(reply.iter_lines())
    begun = time.monotonic()
    http.post("/v1/chat/completions", json=chat("still there?")).raise_for_status()
    assert time.monotonic() - begun < 30


def test_a_third_copy_comes_when_all_are_busy(http: httpx2.Client) -> None:
    """Clients ask again and again until it is there."""

    def n_copies() -> int:
        copies = serve.status().applications["default"].deployments["Copy"]
        return int(copies.replica_states.get("RUNNING", 0))

    async def ask(client: httpx2.AsyncClient, i: int) -> None:
        end = time.monotonic() + 120
        while n_copies() < 3:
            assert time.monotonic() < end, "no third copy has come"
            asking = chat(f"question {i}", max_tokens=400)
            (await client.post("/v1/chat/completions", json=asking)).raise_for_status()

    async def ask_all() -> None:
        async with httpx2.AsyncClient(base_url=str(http.base_url), timeout=300) as client:
            await asyncio.gather(*(ask(client, i) for i in range(16)))

    asyncio.run(ask_all())
