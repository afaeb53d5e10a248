"""How a reply gets to its socket: what is there in one write, no write for ever."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgeinfer.server import connections, frames
from edgeinfer.server.app import make_app
from edgeinfer.server.doorbell import Doorbell
from edgeinfer.server.models import Models
from edgeinfer.server.service import Limits, Service

from .server_for_tests import LOAD, Running, small_model

CHAT = "/v1/chat/completions"
BODY: Any = {"messages": [{"role": "user", "content": "hi"}], "stream": True}

LONG = "0123456789" * 2200  # a token each
LONG_BODY = {**BODY, "logprobs": True, "top_logprobs": 1}


def exchange(
    server: Running, body: Any, read: Callable[[socket.socket], bytes], version: str = "1.1"
) -> bytes:
    """All that comes for a request, by a reader with little room."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/{version}\r\nhost: localhost\r\n"
        head += f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        client.sendall(head.encode() + content)
        return read(client)


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def chunks(reply: bytes) -> list[bytes]:
    """Those of a chunked body."""
    found, at = list[bytes](), reply.index(b"\r\n\r\n") + 4
    while at < len(reply):
        start = reply.index(b"\r\n", at) + 2
        end = start + int(reply[at:start], 16)
        found.append(reply[start:end])
        at = end + 2
    return found


def text_of(body: str) -> str:
    """What a streamed chat says."""
    frames = [json.loads(line[6:]) for line in body.split("\n") if line.startswith("data: {")]
    return "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames)


def test_what_is_there_at_a_time_is_one_write(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.replying("one two three"):
        *told, done, end = chunks(exchange(server, BODY, read_all))
        assert (len(told), done, end) == (1, b"data: [DONE]\n\n", b"")
        assert text_of(told[0].decode()) == "one two three"
        monkeypatch.setattr(frames, "_MOST_AT_ONCE", 400)
        told = chunks(exchange(server, BODY, read_all))[:-2]
    assert len(told) > 3 and all(len(chunk) < 1000 for chunk in told)
    assert text_of(b"".join(told).decode()) == "one two three"


def test_who_reads_slowly_gets_all_of_it(server: Running) -> None:
    """The reply is larger than what the system keeps of it."""

    def read(client: socket.socket) -> bytes:
        time.sleep(0.2)
        return read_all(client)

    with server.replying(LONG):
        reply = exchange(server, LONG_BODY, read)
    assert len(reply) > 6e6 and text_of(b"".join(chunks(reply)).decode()) == LONG


def test_who_reads_nothing_is_cut_off_without_a_word(
    server: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.2)

    def read(client: socket.socket) -> bytes:
        end = time.monotonic() + 20
        while not server.service.answers and time.monotonic() < end:
            time.sleep(0.01)
        server.wait_until_idle()
        return read_all(client)  # what the system has kept

    with server.replying(LONG):
        assert b"[DONE]" not in exchange(server, LONG_BODY, read)
    assert capfd.readouterr().err == ""


def test_a_client_of_http_1_0_gets_no_chunks(server: Running) -> None:
    with server.replying("one two three"):
        head, _, body = exchange(server, BODY, read_all, "1.0").partition(b"\r\n\r\n")
    assert b"chunked" not in head and text_of(body.decode()) == "one two three"
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


def test_any_server_of_asgi_can_send_an_answer(server: Running, tmp_path: Path) -> None:
    """One whose connections can't `write_now`."""

    async def ask() -> str:
        models = Models([("m", small_model(tmp_path))], LOAD)
        await models.start()
        transport = httpx2.ASGITransport(app=make_app(Service(models, Limits())))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            told = (await client.post(CHAT, json={**BODY, "max_tokens": 20, "temperature": 0})).text
        await models.close()
        return told

    wanted = server.post(CHAT, {**BODY, "max_tokens": 20, "temperature": 0}).text
    told = asyncio.run(ask())
    assert text_of(told) == text_of(wanted) != "" and told.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("is_listening", [True, False])
def test_a_doorbell_loses_no_call_and_keeps_their_order(is_listening: bool) -> None:
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
        with bell.listening(loop) if is_listening else contextlib.nullcontext():
            for thread in threads:
                thread.start()
            await asyncio.wait_for(all_heard.wait(), 120)
        for thread in threads:
            thread.join()

    asyncio.run(listen())
    assert [[i for who, i in heard if who == w] for w in range(n_threads)] == [[*range(n)]] * 4


def test_a_doorbell_that_is_rung_again_makes_a_call_once() -> None:
    bell, heard = Doorbell(), list[int]()

    def hear() -> None:
        heard.append(1)

    async def listen() -> None:
        for n in range(1, 4):
            for _ in range(3):
                bell.ring(asyncio.get_running_loop(), hear)
            await asyncio.sleep(0.01)
            assert len(heard) == n

    asyncio.run(listen())


def test_what_is_rung_while_nobody_listens_is_heard_once_somebody_does() -> None:
    """Whatever a thread that rings has seen of who listens: no later call is lost by it."""
    bell, heard = Doorbell(), list[str]()

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        for name in ("first", "second"):
            with bell.listening(loop), bell.listening(loop):
                bell.ring(loop, partial(heard.append, name))
            with bell.listening(loop):
                await asyncio.sleep(0.01)
            assert heard[-1:] == [name]
        bell.ring(loop, partial(heard.append, "third"))
        await asyncio.sleep(0.01)

    asyncio.run(listen())
    assert heard == ["first", "second", "third"]


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
