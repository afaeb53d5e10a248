"""Thousands of random requests at once, good ones and bad: none hurts another, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgeinfer import platform

from .server_for_tests import Running, running_small, small_model
from .storm_requests import asked, content, streamed_content
from .waiting import wait_until

N_CONNECTIONS = 64
N_ASKED = 66  # requests that are also asked alone, six of each endpoint
SPACE = 64 << 20  # bytes that a process may take beyond what it had when it was warm
KINDS = {
    "whole": 5, "wrong": 3, "streamed": 3, "cancelled": 1, "left": 1, "broken": 1, "cut": 1,
    "looked": 1,
}  # fmt: skip
LOOKS = ("/health", "/metrics", "/v1/models", "/props", "/api/tags", "/api/ps", "/v2", "/v1/none")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_small(tmp_path_factory.mktemp("storm")) as found:
        yield found


def wrong(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A field of another type, a text that does not fit, or a role that is none."""
    key = rng.choice([*body, "stream", "tools", "stop", "input", "options", "response_format"])
    value = rng.choice([None, 5, -1, "x", [], {}, [{}], [[]], 1e300, True, "x" * 3000, "\x00"])
    return {**body, key: value}


class Storm:
    """Requests of many connections, and what each of them must be answered."""

    def __init__(self, http: httpx2.Client) -> None:
        self.http = http
        self.told: Counter[str] = Counter()
        self.alone = [self._content(i) for i in range(N_ASKED)]

    def _content(self, i: int) -> Any:
        path, body, can_stream = asked(i)
        reply = self.http.post(path, json={**body, "stream": False} if can_stream else body)
        assert reply.status_code == 200, (path, reply.text)
        return content(path, reply.json())

    def blow(self, n: int) -> None:
        self.told.clear()
        asyncio.run(self._blow(n))

    async def _blow(self, n: int) -> None:
        left = iter(range(n))

        async def connection() -> None:
            async with httpx2.AsyncClient(base_url=self.http.base_url, timeout=240) as client:
                for i in left:
                    self.told[await self._ask(client, random.Random(i))] += 1

        await asyncio.gather(*(connection() for _ in range(N_CONNECTIONS)))

    async def _ask(self, client: httpx2.AsyncClient, rng: random.Random) -> str:
        """What kind of request it was."""
        (kind,) = rng.choices([*KINDS], [*KINDS.values()])
        i = rng.randrange(N_ASKED)
        path, body, can_stream = asked(i)
        if kind == "streamed" and not can_stream:
            kind = "whole"
        if kind == "whole":
            reply = await client.post(path, json={**body, "stream": False} if can_stream else body)
            assert reply.status_code == 200, reply.text
            assert content(path, reply.json()) == self.alone[i], path
        elif kind == "wrong":
            reply = await client.post(path, json=wrong(rng, body))
            assert reply.status_code in (200, 400, 404), reply.text
        elif kind == "broken":
            data = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200)))
            reply = await client.post(path, content=data)
            assert reply.status_code == 400, reply.text
        elif kind == "looked":
            reply = await client.get(looked := rng.choice(LOOKS))
            assert reply.status_code == (404 if looked.endswith("none") else 200)
        elif kind == "streamed":
            await self._read(client, rng, i)
        else:
            await self._leave(client, rng, kind, path, body)
        return kind

    async def _read(self, client: httpx2.AsyncClient, rng: random.Random, i: int) -> None:
        """A stream to its end, some of them slowly."""
        (path, body, _), data = asked(i), b""
        async with client.stream("POST", path, json={**body, "stream": True}) as reply:
            assert reply.status_code == 200
            async for chunk in reply.aiter_bytes():
                data += chunk
                if rng.random() < 0.02:
                    await asyncio.sleep(0.05)
        assert streamed_content(path, data) == self.alone[i], path

    async def _leave(
        self, client: httpx2.AsyncClient, rng: random.Random, kind: str, path: str, body: Any
    ) -> None:
        """Go away inside a stream, before any reply, or with half of the body sent."""
        body = {**body, "stream": True, "max_tokens": 40}
        if kind == "cancelled":
            async with client.stream("POST", path, json=body) as reply:
                assert reply.status_code in (200, 400)
                async for _ in reply.aiter_bytes():
                    break
            return
        data = json.dumps(body).encode()
        sent = data if kind == "left" else data[: rng.randrange(len(data))]
        host, port = client.base_url.host, client.base_url.port
        _, writer = await asyncio.open_connection(host, port)
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + sent)
        await writer.drain()
        await asyncio.sleep(rng.random() * 0.02)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize("n", [80, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_storm(served: Running, n: int) -> None:
    storm = Storm(served.http)
    storm.blow(40)  # so that it is warm
    before = platform.rss()
    storm.blow(n)
    assert storm.told.total() == n and len(storm.told) == len(KINDS)
    served.wait_until_idle()
    model = served.service.models.served[0]
    assert model.n_users == 0 and model.metrics.n_running == 0 and not served.service.answers
    assert platform.rss() - before < SPACE
    check_all_free(served)
    path, body, _ = asked(0)
    assert content(path, served.post(path, body).json()) == storm.alone[0]


def peak_of(process: int) -> int:
    """The most memory that a process has held."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(line) << 10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_a_storm_takes_no_more_memory_than_is_planned(tmp_path: Path) -> None:
    path, memory = small_model(tmp_path), 112 << 20
    command = [sys.executable, "-m", "edgeinfer", "serve", str(path), "--port", "0"]
    command += ["--device", "cpu", "--pooling", "mean", "--memory", str(memory)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        try:
            while "Ctrl-C" not in (line := program.stderr.readline()):
                assert line, f"it ended with {program.wait()}"
            with httpx2.Client(base_url=line.split("/v1")[0].split()[-1], timeout=300) as http:
                storm = Storm(http)
                storm.blow(2000)
            assert storm.told.total() == 2000
            assert peak_of(program.pid) < memory
        finally:
            program.kill()


class SlowProgram:
    """A program whose steps last, and are counted."""

    def __init__(self, program: Any) -> None:
        self.program, self.n_steps = program, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def submit(self, batch: Any) -> Any:
        self.n_steps += 1
        time.sleep(0.2)
        return self.program.submit(batch)


def test_a_stop_frees_its_slot_within_one_step(served: Running) -> None:
    engine: Any = served.llm.runtime.engine
    runner = engine._runner
    usual, runner.program = runner.program, (slow := SlowProgram(runner.program))
    path, body, _ = asked(0)
    body |= {"stream": True, "max_tokens": 500, "ignore_eos": True}
    try:
        with served.http.stream("POST", path, json=body):
            with served.http.stream("POST", path, json=body):
                wait_until(lambda: engine.n_running == 2, "both answers")
            wait_until(lambda: len(served.service.answers) == 1, "the end of its connection")
            n_before = slow.n_steps
            wait_until(lambda: engine.n_running == 1, "a free slot")
            assert slow.n_steps <= n_before + 1
    finally:
        runner.program = usual
    served.wait_until_idle()
    check_all_free(served)


def check_all_free(served: Running) -> None:
    """Every page is free, or kept for a prompt to come."""
    engine = served.llm.runtime.engine
    scheduler, store = engine._scheduler, engine._store
    assert not (scheduler.running or scheduler.waiting or scheduler.jobs or scheduler.paused)
    for i, pool in enumerate(engine.pools):
        assert pool.n_free + store.index.n_idle(i) == pool.n_pages
