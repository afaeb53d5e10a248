"""Thousands of random requests at once, good ones and bad: none hurts another, nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from edgeinfer import platform

from .server_for_tests import Running, running, small_model

N_CONNECTIONS = 64
SPACE = 64 << 20  # bytes that a process may take beyond what it had when it was warm
APIS = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat")
WORDS = ("one", "two", "three", "four", "five", "six", "é", "😀")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = small_model(tmp_path_factory.mktemp("storm"))
    with running([("tiny", path)], load={"device": "cpu", "slots": 2, "n_ctx": 1024}) as found:
        yield found


def question(i: int) -> dict[str, Any]:
    """One of a few, so that each can be asked alone first."""
    rng = random.Random(i)
    text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 30)))
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": rng.randrange(1, 20),
        "seed": rng.randrange(100),
        "temperature": rng.choice([0, 1.0]),
    }


def wrong(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A field of another type, a text that does not fit, or a role that is none."""
    key = rng.choice([*body, "stream", "tools", "stop", "input", "options"])
    value = rng.choice([None, 5, -1, "x", [], {}, [{}], [[]], 1e300, True, "x" * 3000, "\x00"])
    return {**body, key: value}


async def ask(client: httpx2.AsyncClient, rng: random.Random, alone: list[Any]) -> str:
    """What kind of request it was."""
    i = rng.randrange(len(alone))
    kind = rng.choices(["whole", "wrong", "cancelled", "broken", "streamed"], [5, 3, 1, 1, 3])[0]
    path = rng.choice(APIS)
    if kind == "whole":
        reply = await client.post(APIS[0], json=question(i))
        assert reply.status_code == 200 and reply.json()["choices"] == alone[i]
    elif kind == "wrong":
        reply = await client.post(path, json=wrong(rng, question(i)))
        assert reply.status_code in (200, 400, 404), reply.text
    elif kind == "broken":
        data = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200)))
        reply = await client.post(path, content=data)
        assert reply.status_code == 400
    else:
        body = {**question(i), "stream": True, "max_tokens": 40}
        body |= {"input": "hi"} if path.endswith("responses") else {}
        async with client.stream("POST", path, json=body) as reply:
            assert reply.status_code == 200
            async for _ in reply.aiter_bytes():
                if kind == "cancelled":
                    break
                if rng.random() < 0.02:
                    await asyncio.sleep(0.05)  # a slow reader
    return kind


async def storm(url: str, n: int, alone: list[Any]) -> Counter[str]:
    told: Counter[str] = Counter()
    left = iter(range(n))

    async def connection() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
            for i in left:
                told[await ask(client, random.Random(i), alone)] += 1

    await asyncio.gather(*(connection() for _ in range(N_CONNECTIONS)))
    return told


@pytest.mark.parametrize("n", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_storm(served: Running, n: int) -> None:
    alone = [served.post(APIS[0], question(i)).json()["choices"] for i in range(20)]
    asyncio.run(storm(served.url, 40, alone))  # so that it is warm
    before = platform.rss()
    told = asyncio.run(storm(served.url, n, alone))
    assert sum(told.values()) == n and len(told) == 5
    served.wait_until_idle()
    model = served.service.models.served[0]
    assert model.n_users == 0 and model.metrics.n_running == 0 and not served.service.answers
    assert platform.rss() - before < SPACE
    assert served.post(APIS[0], question(3)).json()["choices"] == alone[3]
