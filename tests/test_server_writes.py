"""How a reply gets to its socket: what is there in one write, no write for ever."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from edgeinfer.server import wire
from edgeinfer.server.doorbell import Doorbell
from edgeinfer.server.wire import EVENTS, Frames

from .server_for_tests import Running


class Parts:
    """Batches of parts, with a wait between; whether it was closed."""

    def __init__(self, *batches: list[bytes]) -> None:
        self.batches, self.n_ready, self.is_closed = batches, 0, False

    @property
    def has_ready(self) -> bool:
        return self.n_ready > 0

    async def close(self) -> None:
        self.is_closed = True

    async def parts(self) -> AsyncGenerator[bytes, None]:
        for batch in self.batches:
            await asyncio.sleep(0.01)
            for i, part in enumerate(batch):
                self.n_ready = len(batch) - i - 1
                yield part


async def write(source: Parts, send: Callable[[Any], Any]) -> None:
    async def receive() -> Any:
        await asyncio.sleep(60)

    await Frames(source.parts(), EVENTS, source)({"type": "http"}, receive, send)


def test_what_is_there_at_a_time_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_MOST_AT_ONCE", 8)
    source = Parts([b"a", b"b"], [b"c"], [b"d" * 7, b"e" * 7, b"f"])
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    asyncio.run(write(source, send))
    assert sent == [None, b"ab", b"c", b"d" * 7 + b"e" * 7, b"f", b""] and source.is_closed


def test_a_write_that_nobody_takes_ends_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_STALLED_SECONDS", 0.2)
    source = Parts([b"a"], [b"b"])

    async def send(message: Any) -> None:
        if message.get("body") == b"b":
            await asyncio.sleep(60)
        await asyncio.sleep(0.3 if message.get("body") is None else 0)

    begun = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(write(source, send))
    assert 0.2 < time.monotonic() - begun < 10 and source.is_closed


def test_a_doorbell_loses_no_call_and_keeps_their_order() -> None:
    bell, n_threads, n = Doorbell(), 4, 2000
    heard: list[tuple[int, int]] = []

    async def listen() -> None:
        loop, all_heard = asyncio.get_running_loop(), asyncio.Event()

        def hear(who: int, i: int) -> None:
            heard.append((who, i))
            if len(heard) == n_threads * n:
                all_heard.set()

        def ring(who: int) -> None:
            for i in range(n):
                bell.ring(loop, lambda i=i: hear(who, i))  # type: ignore[misc]

        threads = [threading.Thread(target=ring, args=(who,)) for who in range(n_threads)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(all_heard.wait(), 30)
        for thread in threads:
            thread.join()

    asyncio.run(listen())
    assert [[i for who, i in heard if who == w] for w in range(n_threads)] == [[*range(n)]] * 4


def test_a_closed_loop_is_told_to_who_rings() -> None:
    bell, loop = Doorbell(), asyncio.new_event_loop()
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            bell.ring(loop, lambda: None)


def test_what_came_before_an_error_is_told_before_it(server: Running) -> None:
    """All events of the answer are there when it is looked at, the error as the last one."""
    body: Any = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with server.replying("one two", reason="error", error=RuntimeError("broken")):
        told = server.post("/v1/chat/completions", body).text
    *chunks, last = [json.loads(line[6:]) for line in told.split("\n") if line.startswith("data: ")]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "one two" and "error" in last
