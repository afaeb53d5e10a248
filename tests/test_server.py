"""What every API shares: who may ask, limits, cancelling, several models, the command itself."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest

from edgeinfer.cli import serve
from edgeinfer.server import connections
from edgeinfer.server.gate import _bare, _host_name
from edgeinfer.server.requests import conversation

from .server_for_tests import LOAD, N_CTX, Running, read_reply, running, small_model
from .waiting import halting, wait_until

HI: Any = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
ENDLESS: Any = {"messages": HI, "max_tokens": 3000, "logit_bias": {"257": -1000}}  # without its end
STREAMED: Any = {**ENDLESS, "stream": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models"))


# -- who may ask ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(path: Path) -> Iterator[Running]:
    limits: Any = {"api_keys": ("one", "two"), "hosts": ("box.lan",), "most_body": 5000}
    with running([("tiny", path)], origins=("https://ok.org",), **limits) as found:
        yield found


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
def test_a_key_is_asked_for(guarded: Running, header: str) -> None:
    def status(value: str, path: str = "/v1/models") -> int:
        headers = {header.encode(): value.encode()}
        return guarded.http.get(path, headers=headers).status_code

    prefix = "Bearer " if header == "authorization" else ""
    assert status(f"{prefix}one") == status(f"{prefix}two") == 200
    assert status(f"{prefix}three") == status("") == status(f"{prefix}é") == 401
    assert status("", "/health") == status("", "/") == 200
    assert status("", "/metrics") == status("", "/props") == 401


def test_each_api_refuses_in_its_own_words(guarded: Running) -> None:
    refused = guarded.post(CHAT, {}).json()["error"]
    assert (refused["type"], refused["code"]) == ("authentication_error", "invalid_api_key")
    told = guarded.post("/v1/messages", {}).json()
    assert (told["type"], told["error"]["type"]) == ("error", "authentication_error")
    assert isinstance(guarded.post("/api/chat", {}).json()["error"], str)


def test_only_its_own_names_are_answered_to(guarded: Running) -> None:
    def status(host: str) -> int:
        return guarded.http.get("/health", headers={"host": host}).status_code

    assert [
        status(h) for h in ("localhost:1", "127.0.0.2", "[::1]:80", "box.lan", "a.localhost")
    ] == [200] * 5
    assert [
        status(h) for h in ("evil.org", "localhost.evil.org", "10.0.0.1", "127.0.0.1.nip.io")
    ] == [403] * 4


def test_pages_of_strangers_may_not_ask(guarded: Running) -> None:
    def reply(origin: str, method: str = "OPTIONS") -> httpx2.Response:
        headers = {
            "origin": origin,
            "access-control-request-headers": "authorization,x-stainless-os",
        }
        return guarded.http.request(method, "/v1/models", headers=headers)

    for origin in (
        "http://localhost:3000",
        "https://ok.org",
        "vscode-webview://x",
        "app://obsidian.md",
    ):
        told = reply(origin)
        assert told.status_code == 204
        assert told.headers["access-control-allow-origin"] == origin
        assert "x-stainless-os" in told.headers["access-control-allow-headers"]
    assert reply("http://localhost:1", "GET").headers["access-control-allow-origin"]
    for origin in (
        "https://evil.org",
        "http://localhost.evil.org",
        "null",
        "https://ok.org.evil.org",
    ):
        told = reply(origin)
        assert told.status_code == 403 and "access-control-allow-origin" not in told.headers


def test_paths_with_and_without_a_prefix_are_one() -> None:
    for spelled in ("/v1/models", "/models", "/v1/models/", "/v1/v1/models//", "//v1//models"):
        assert _bare(spelled) == "/models"
    assert (_bare("/v1"), _bare("/"), _bare("/v12/x")) == ("/", "/", "/v12/x")
    assert [_host_name(h) for h in ("A.b:1", "[::1]:2", "x.", "")] == ["a.b", "::1", "x", ""]


# -- bodies ---------------------------------------------------------------------------------------

KEY = {"x-api-key": "one"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b"[" * 4000, 400), (b"", 400),
        (b'"x"', 400),
        (b'{"messages": [' + b"[" * 2000, 400), (b'{"a": "' + b"x" * 5000 + b'"}', 413),
        (b'{"messages": "hi"}', 400), (b'{"messages": [{}]}', 400), (b'{"messages": [5]}', 400),
        (b'{"messages": [{"role": "user", "content": 5}]}', 400), (b'{"model": 5}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "stream": 1}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 1000}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e99}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": 0.5}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "stop": [5]}', 400),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(guarded: Running, body: bytes, status: int) -> None:
    reply = guarded.http.post(CHAT, content=body, headers=KEY)
    assert reply.status_code == status and reply.json()["error"]["message"]


def test_bodies_of_other_forms_are_refused(guarded: Running) -> None:
    zipped = guarded.http.post(CHAT, content=b"x", headers={**KEY, "content-encoding": "gzip"})
    assert zipped.status_code == 415

    def parts() -> Iterator[bytes]:
        for _ in range(10):
            yield b"x" * 1000

    assert guarded.http.post(CHAT, content=parts(), headers=KEY).status_code == 413


def test_who_sends_no_request_is_cut(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for answered, part in ((b"", b""), (b"", b"GET / HT"), (request, b"GET")):
        monkeypatch.setattr(connections, "HEADER_SECONDS", 60 if answered else 0.2)
        with socket.create_connection(address) as connection:
            connection.settimeout(120)
            if answered:
                connection.sendall(answered)
                assert b"200 OK" in read_reply(connection)
            monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
            with suppress(ConnectionError):  # a thread that is late sends to who has left
                connection.sendall(part)
                assert connection.recv(1 << 16) == b""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 60)
    with socket.create_connection(address) as connection:  # who was answered may be silent
        for seconds in (60, 0.2, 60):  # only between requests is there as little
            monkeypatch.setattr(connections, "HEADER_SECONDS", seconds)
            connection.sendall(request)
            assert b"200 OK" in read_reply(connection)
            time.sleep(0.4 if seconds < 1 else 0)


# -- answers --------------------------------------------------------------------------------------


def test_who_goes_away_frees_the_slot(server: Running) -> None:
    with halting(server.llm):
        with server.http.stream("POST", CHAT, json=STREAMED) as reply:
            lines = reply.iter_lines()
            next(lines)
            assert server.service.answers
        wait_until(lambda: not server.service.answers, "the end of an answer that nobody reads")
    server.wait_until_idle()
    with halting(server.llm), pytest.raises(httpx2.TimeoutException):
        server.post(CHAT, ENDLESS, timeout=0.3)
    server.wait_until_idle()
    assert server.service.models.served[0].n_users == 0


def test_something_comes_while_a_prompt_is_read(server: Running) -> None:
    """Until something has come twice, nothing else does."""
    engine = server.llm.runtime.engine
    held: list[Any] = []  # an answer, and the events that are kept from it
    with server.replying("x"):
        scripted = engine.generation

        def slow(request: Any) -> Any:
            generation = scripted(request)
            held[:] = [generation, [generation.events.poll() for _ in range(3)]]
            return generation

        engine.generation = slow  # type: ignore[method-assign]
        anthropic: Any = {**STREAMED, "max_tokens": 5}
        for path, body, ping in (
            (CHAT, STREAMED, ": ping\n\n"),
            ("/v1/messages", anthropic, 'event: ping\ndata: {"type":"ping"}'),
        ):
            told = ""
            with server.http.stream("POST", path, json=body) as reply:
                for part in reply.iter_text():
                    told += part
                    if held and told.count(ping) >= 2:
                        generation, events = held
                        held.clear()
                        for event in filter(None, events):
                            generation.events.put(event)
            assert not held


def test_progress_is_told_where_it_is_asked_for(server: Running) -> None:
    assert (
        '"prompt_progress":{"processed":'
        in server.post(CHAT, {**STREAMED, "max_tokens": 1, "return_progress": True}).text
    )
    assert "prompt_progress" not in server.post(CHAT, {**STREAMED, "max_tokens": 1}).text


def test_the_same_answer_alone_and_beside_others(server: Running) -> None:
    """Some break off, some read slowly; who is left gets what it gets alone."""
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"question {i % 5}"}], "seed": i % 5}
        for i in range(40)
    ]
    alone = [
        server.post(CHAT, {**bodies[i], "max_tokens": 8}).json()["choices"][0]["message"]["content"]
        for i in range(5)
    ]

    async def ask(client: httpx2.AsyncClient, i: int) -> None:
        rng = random.Random(i)
        if i % 4 == 3:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.post(CHAT, json={**ENDLESS, **bodies[i]}), 0.2)
            return
        reply = await client.post(CHAT, json={**bodies[i], "max_tokens": 8})
        await asyncio.sleep(rng.random() / 50)
        assert reply.json()["choices"][0]["message"]["content"] == alone[i % 5]

    async def main() -> None:
        async with httpx2.AsyncClient(base_url=server.url, timeout=300) as client:
            await asyncio.gather(*(ask(client, i) for i in range(len(bodies))))

    asyncio.run(main())
    server.wait_until_idle()
    engine = server.llm.runtime.engine
    assert engine.n_running == 0 and not engine._scheduler.waiting


def test_no_more_than_the_queue_holds(path: Path) -> None:
    with running([("tiny", path)], most_waiting=1) as found:
        with halting(found.llm), found.http.stream("POST", CHAT, json=STREAMED) as reply:
            lines = reply.iter_lines()
            next(lines)
            refused = found.post("/v1/messages", {"messages": HI, "max_tokens": 1})
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert refused.json()["error"]["type"] == "rate_limit_error"
        found.wait_until_idle()
        assert found.post(CHAT, {"messages": HI, "max_tokens": 1}).status_code == 200


def test_a_stop_ends_streams_with_an_event(path: Path) -> None:
    with running([("tiny", path)], grace_seconds=0.1) as found:
        with halting(found.llm), found.http.stream("POST", CHAT, json=STREAMED) as reply:
            lines = reply.iter_lines()
            next(lines)
            found.server.stop()
            last = [line for line in lines if line][-1]
        assert (
            "the server is stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
        )


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_answers_at_once(path: Path, second: signal.Signals) -> None:
    with running([("one", path)], grace_seconds=10) as found:
        with halting(found.llm), found.http.stream("POST", CHAT, json=STREAMED) as reply:
            lines = reply.iter_lines()
            next(lines)
            found.server.handle_exit(signal.SIGTERM, None)
            wait_until(lambda: found.service.is_stopping, "the first signal")
            found.server.handle_exit(second, None)
            assert "the server is stopping" in "".join(lines)
            assert found.server.force_exit


def test_metrics(server: Running) -> None:
    server.post(CHAT, {"messages": HI, "max_tokens": 3})
    text = server.http.get("/metrics").text
    assert '\nedgeinfer_request_success_total{model_name="tiny",finished_reason="length"} ' in text
    assert 'edgeinfer_time_to_first_token_seconds_bucket{model_name="tiny",le="+Inf"}' in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("#")]
    assert len(names) == len(set(names))


def test_tokens(server: Running) -> None:
    told = server.post("/tokenize", {"content": "hé", "with_pieces": True}).json()["tokens"]
    ids = [each["id"] for each in told]
    assert ids == server.post("/v1/tokenize", {"content": "hé"}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["content"] == "hé"
    prompt = server.post("/apply-template", {"messages": HI}).json()["prompt"]
    assert prompt == "[user]hi[assistant]"
    props = server.http.get("/v1/props").json()
    assert props["default_generation_settings"]["n_ctx"] == N_CTX and props["total_slots"] == 2
    assert server.post("/detokenize", {"tokens": ["x"]}).status_code == 400


def test_heads_are_answered(server: Running) -> None:
    for path in ("/", "/health", "/v1/models", "/metrics", "/api/tags"):
        reply = server.http.head(path)
        assert reply.status_code == 200 and not reply.content
    assert server.http.head(CHAT).status_code == 405


# -- several models -------------------------------------------------------------------------------


def test_models_take_turns_in_memory(path: Path, tmp_path: Path) -> None:
    other = small_model(tmp_path, seed=1)
    load: Any = dict(LOAD, n_ctx=512)
    with running([("one", path)], load=load) as found:
        n_bytes = found.llm.plan.host.total_bytes
    load["memory"] = n_bytes + n_bytes // 2  # for one at a time
    with running([("one", path), ("two", other)], load=load) as found:

        def loaded() -> list[str]:
            return [m["model"] for m in found.http.get("/api/ps").json()["models"]]

        asked = {"messages": HI, "max_tokens": 3, "seed": 1}
        first = found.post(CHAT, {**asked, "model": "one"}).json()
        assert loaded() == ["one:latest"]
        second = found.post(CHAT, {**asked, "model": "two:latest"}).json()
        assert loaded() == ["two:latest"] and second["model"] == "two"
        assert first["choices"] == found.post(CHAT, {**asked, "model": "ONE"}).json()["choices"]
        unknown = found.post(CHAT, {**asked, "model": "three"})
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
        assert "'one', 'two'" in unknown.json()["error"]["message"]
        ids = [model["id"] for model in found.http.get("/v1/models").json()["data"]]
        assert ids == ["one", "two"]
        asked_one = {**STREAMED, "model": "one"}
        with halting(found.llm), found.http.stream("POST", CHAT, json=asked_one) as reply:
            lines = reply.iter_lines()
            next(lines)  # it is not unloaded while it answers
            with pytest.raises(httpx2.TimeoutException):
                found.post(CHAT, {**asked, "model": "two"}, timeout=0.3)
            assert loaded() == ["one:latest"]
        assert second["choices"] == found.post(CHAT, {**asked, "model": "two"}).json()["choices"]


def test_names_of_one_model(path: Path, server: Running) -> None:
    asked = {"messages": HI, "max_tokens": 1}
    assert server.post(CHAT, {**asked, "model": "claude-sonnet"}).status_code == 200
    with running([("one", path)], strict=True) as found:
        assert found.post(CHAT, {**asked, "model": "claude-sonnet"}).status_code == 404
        assert found.post(CHAT, {**asked, "model": "One"}).status_code == 200
        assert found.post(CHAT, asked).status_code == 200


def test_a_name_is_that_of_who_is_served_by_it(tmp_path: Path) -> None:
    """Whatever the files of others are called, and call themselves."""
    (tmp_path / "a").mkdir()
    one = small_model(tmp_path / "a").rename(tmp_path / "a" / "two.gguf")
    two = small_model(tmp_path, seed=1)
    with running([("one", one), ("two", two), ("random llama Q4_0", two)]) as found:
        itself = found.llm.name  # that of the first, which is loaded
        for name, meant in [
            ("one", "one"),
            ("two", "two"),
            (itself, itself),
            ("Two:latest", "two"),
        ]:
            assert found.service.models.find(name).name == meant
        assert found.service.models.find("two.gguf").path == one


# -- conversations --------------------------------------------------------------------------------


def test_a_conversation_is_tidied() -> None:
    call = {"id": "call_a-strange-one", "function": {"name": "f", "arguments": "{}"}}
    found = conversation(
        [
            {"role": "developer", "content": "a"},
            {"role": "system", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_a-strange-one", "content": "d"},
        ]
    )
    assert found[0] == {"role": "system", "content": "a\n\nb"}
    id = found[2]["tool_calls"][0]["id"]
    assert len(id) == 9 and id.isalnum()
    assert found[3] == {"role": "tool", "tool_call_id": id, "content": "d", "name": "f"}


# -- the command ----------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgeinfer", "serve", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_the_command_serves_until_it_is_interrupted(path: Path) -> None:
    flags = ("--port", "0", "--device", "reference", "-c", "512", "--api-key", "secret")
    program = start(str(path), *flags, "--host", "LOCALHOST")  # however it is called, it is local
    assert program.stderr is not None
    try:
        lines = []
        while "Ctrl-C" not in (line := program.stderr.readline()):
            assert line, lines
            lines.append(line)
        url = line.split("/v1")[0]
        told = "".join([*lines, line])
        for words in ("context 512 tokens", "4 slots", "MiB planned", "1 API key"):
            assert words in told
        assert "secret" not in told
        key = {"authorization": "Bearer secret"}
        body = {"messages": HI, "max_tokens": 2}
        reply = httpx2.post(f"{url}{CHAT}", json=body, headers=key, timeout=120)
        assert reply.json()["model"] == path.stem
        assert httpx2.get(f"{url}/health", headers={"host": "evil.org"}).status_code == 403
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130  # less than a connection is kept for
    finally:
        program.kill()
        program.communicate()


def test_a_file_of_keys_is_read_as_editors_write_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for data in (b"one\n\n two \n", b"\xef\xbb\xbfone\r\ntwo"):
        file.write_bytes(data)
        assert serve._keys_of(str(file)) == ["one", "two"]


def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path) -> None:
    for data in (b"", b" \n", b"\x8d\xff", bytes(serve._MOST_KEYS + 1)):
        (tmp_path / "keys").write_bytes(data)
        with pytest.raises(click.UsageError, match="--api-key-file"):
            serve._keys_of(str(tmp_path / "keys"))
    for name in ("none", "."):
        with pytest.raises(click.UsageError, match="--api-key-file"):
            serve._keys_of(str(tmp_path / name))


def test_a_port_that_is_taken_is_named(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        program = start(str(path), "--port", port, "--device", "reference")
        _, told = program.communicate(timeout=300)
    assert program.returncode == 1 and f"port {port}" in told and "--port N" in told


def test_a_model_that_does_not_load_ends_the_command(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(50))
    program = start(str(broken), "--port", "0", "--device", "reference")
    _, told = program.communicate(timeout=300)
    assert program.returncode == 1 and "broken.gguf" in told.splitlines()[-1]
