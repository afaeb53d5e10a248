"""What hostile clients send, byte by byte: each is refused or cut off, and none hurts another."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from edgeinfer import platform
from edgeinfer.server import connections, run, wire
from edgeinfer.server.errors import ApiError
from edgeinfer.server.gate import _host_name

from .server_for_tests import LOAD, Running, read_reply, running, small_model
from .waiting import halting, wait_until

CHAT = "/v1/chat/completions"
BODY = b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":1}'
CHUNKED = b"transfer-encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
MIB = 1 << 20


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """As the command serves at a loopback address."""
    path = small_model(tmp_path_factory.mktemp("security"))
    limits: Any = {"hosts": (), "most_body": MIB, "most_bodies": 2}
    with running([("tiny", path)], load=dict(LOAD, n_ctx=1024), **limits) as found:
        yield found


def connected(found: Running) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(found.url.rpartition(":")[2])))
    connection.settimeout(120)
    return connection


def first_line(connection: socket.socket) -> bytes:
    """Of the next reply, however its bytes come; what there is of it where the connection ends."""
    data = b""
    while b"\r\n" not in data and (part := connection.recv(1 << 16)):
        data += part
    return data.split(b"\r\n", 1)[0]


def replies(found: Running, sent: bytes, *, ends: bool = True) -> list[tuple[int, bytes]]:
    """Statuses and bodies of all replies until the connection is closed; `ends` closes it."""
    with connected(found) as connection:
        connection.sendall(sent)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        data = b""
        while part := connection.recv(1 << 16):
            data += part
    parts = [part.split(b"\r\n\r\n", 1) for part in data.split(b"HTTP/1.1 ")[1:]]
    return [(int(head[:3]), body) for head, body in parts]


def post(body: bytes, *headers: bytes) -> bytes:
    lines = (b"POST /v1/chat/completions HTTP/1.1", b"host: localhost", *headers)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(*headers: bytes, target: bytes = b"/health") -> bytes:
    return b"\r\n".join((b"GET %s HTTP/1.1" % target, *headers)) + b"\r\n\r\n"


def length(n: int) -> bytes:
    return b"content-length: %d" % n


# -- where a request ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        post(BODY, length(len(BODY)), length(5)),
        post(BODY, b"content-length: -5"),
        post(BODY, b"content-length: +61"),
        post(BODY, b"content-length : 61"),
        post(BODY, b"content-length: 0x3d"),
        post(CHUNKS, length(5), CHUNKED),
        post(CHUNKS, length(len(BODY)), CHUNKED),
        post(BODY, length(len(BODY)), b"transfer-encoding: identity"),
        post(CHUNKS, b"transfer-encoding: gzip, chunked"),
        post(CHUNKS, b"transfer-encoding: xchunked"),
        post(CHUNKS, CHUNKED, CHUNKED),
        post(b"zz\r\n" + BODY, CHUNKED),
        post(b"-1\r\n" + BODY, CHUNKED),
        get(b"host: localhost", b"host: evil.org"),
        get(b"host: localhost", b"x: a\0b"),
        get(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),  # TLS
    ],
)
def test_a_request_that_others_may_read_otherwise(local: Running, sent: bytes) -> None:
    """One refusal and no more: what follows on the connection is never a request."""
    ((status, body),) = replies(local, sent + get(b"host: localhost"))
    error = json.loads(body)["error"]
    assert status in (400, 501) and error["message"] and "bytearray" not in error["message"]


def test_what_follows_a_body_is_a_request_of_its_own(local: Running) -> None:
    """It passes the gate as any other does."""
    next_one = get(b"host: evil.org", b"connection: close", target=b"/metrics")
    found = replies(local, post(BODY + next_one, length(len(BODY))), ends=False)
    assert [status for status, _ in found] == [200, 403]
    found = replies(local, post(CHUNKS + next_one, CHUNKED), ends=False)
    assert [status for status, _ in found] == [200, 403]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (get(b"host: localhost", target=b"http://localhost:8080/health"), 200),
        (get(b"host: localhost", target=b"HTTP://[::1]/v1/models"), 200),
        (get(b"host: localhost", target=b"http://127.0.0.1?x=http://evil.org"), 200),
        (get(b"host: localhost", target=b"http://evil.org/health"), 403),
        (get(b"host: localhost", target=b"http://localhost@evil.org/health"), 403),
        (get(b"host: localhost", target=b"/http://evil.org/health"), 404),
        (get(b"host: evil.org", target=b"http://localhost/health"), 403),
        (get(b"host: localhost", target=b"/%zz%ff"), 404),
        (get(b"host: localhost", target=b"/v1/../etc/passwd"), 404),
        (get(b"host: localhost", target=b"//etc/passwd"), 404),
        (b"CONNECT evil.org:80 HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
        (b"TRACE /health HTTP/1.1\r\nhost: localhost\r\n\r\n", 405),
        (get(b"host: localhost", b"upgrade: websocket", b"connection: upgrade"), 200),
        (get(b"host: localhost", b"origin: http://["), 403),
        (get(b"host: localhost", b"origin: \xff"), 403),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),  # no browser sends it
    ],
)
def test_odd_requests(local: Running, sent: bytes, status: int) -> None:
    assert [each for each, _ in replies(local, sent)] == [status]


def test_headers_have_an_end(local: Running) -> None:
    with connected(local) as connection:
        data = b""
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
            for _ in range(1000):
                connection.sendall(b"x: " + b"a" * 1000 + b"\r\n")
            data = first_line(connection)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert not data or b" 431 " in data


# -- which names are this machine's ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:80", 200), ("localhost.", 200), ("localhost.:80", 200),
        ("127.0.0.1", 200), ("127.1.2.3:9", 200), ("[::1]", 200), ("[::1]:80", 200), ("", 200),
        ("[0:0:0:0:0:0:0:1]", 200), ("app.localhost", 200),
        ("evil.org", 403), ("evil.org:80", 403), ("localhost.evil.org", 403), ("10.0.0.1", 403),
        ("127.0.0.1.nip.io", 403), ("localhost@evil.org", 403), ("localhost:80@evil.org", 403),
        ("evil.org#localhost", 403), ("::1", 200), ("[::1", 403), ("evil.org]localhost", 403),
        ("x[localhost]", 403), ("[::2]", 403), ("2130706433", 403), ("0.0.0.0", 403),
        ("localhost evil.org", 403), ("localhost,evil.org", 403), ("evillocalhost", 403),
    ],
)  # fmt: skip
def test_names_of_this_machine(local: Running, host: str, status: int) -> None:
    assert [each for each, _ in replies(local, get(b"host: " + host.encode()))] == [status]


def test_a_host_is_read_whole_or_not_at_all() -> None:
    for odd in ("a:b:c", "a:80:90", "[::1]x", "a b", "[a", "a]:1"):
        assert _host_name(odd) == odd  # with what no name has in it


def test_a_name_that_was_pointed_here_reads_nothing(local: Running) -> None:
    """The page of a name that now means this machine: it is of its own origin, so only the name
    tells."""
    headers = {"host": "rebound.evil.org:80", "sec-fetch-site": "same-origin"}
    for path in ("/v1/models", "/api/ps", "/metrics", "/props"):
        reply = local.http.get(path, headers=headers)
        assert reply.status_code == 403 and "tiny" not in reply.text
    assert local.http.post(CHAT, content=BODY, headers=headers).status_code == 403


def test_a_strangers_page_gets_no_preflight(local: Running) -> None:
    asked = {"origin": "https://evil.org", "access-control-request-method": "POST",
             "access-control-request-headers": "content-type"}  # fmt: skip
    reply = local.http.request("OPTIONS", CHAT, headers=asked)
    assert reply.status_code == 403
    assert not any(name.startswith("access-control-allow") for name in reply.headers)
    # A form needs no preflight, but says where it comes from.
    form = {"origin": "https://evil.org", "content-type": "text/plain"}
    assert local.http.post(CHAT, content=BODY, headers=form).status_code == 403
    assert local.http.post(CHAT, content=BODY, headers=form | {"origin": "null"}).status_code == 403


# -- bodies ---------------------------------------------------------------------------------------


def nested(n: int, name: str) -> bytes:
    head = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1,"%s":' % name.encode()
    return head + b'{"a":' * n + b"1" + b"}" * n + b"}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"temperature":NaN}', 400), (b'{"temperature":Infinity}', 400),
        (b'{"temperature":1e999}', 400), (b'{"seed":' + b"9" * 5000 + b"}", 400),
        (b"\xef\xbb\xbf" + BODY, 400), (BODY + BODY, 400), (b'{"a":"\\ud800"}', 400),
        (b'{"messages":[],' + BODY[1:], 200),  # of two that have one name the last counts
        (nested(900, "ignored"), 200), (nested(100_000, "ignored"), 400),
        (nested(200, "chat_template_kwargs"), 400), (nested(900, "metadata"), 200),
        (BODY[:-1] + b',"stop":[' + b'"x",' * 9999 + b'"x"]}', 400),
        (b'{"model":"' + b"m" * 9999 + b'",' + BODY[1:], 404),
        (b'{"model":"../../etc/passwd",' + BODY[1:], 200),  # with one model, any name means it
    ],
)  # fmt: skip
def test_bodies(local: Running, body: bytes, status: int) -> None:
    reply = local.http.post(CHAT, content=body)
    assert reply.status_code == status
    assert "error" in reply.json() or status == 200


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "gzip, identity", "x"])
def test_compressed_bodies_are_refused_unread(local: Running, encoding: str) -> None:
    reply = local.http.post(CHAT, content=b"x" * 100, headers={"content-encoding": encoding})
    assert reply.status_code == 415 and "compressed" in reply.json()["error"]["message"]


def test_a_body_that_never_ends_is_cut(local: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_BODY_SECONDS", 0.3)
    for start in (post(b"", length(50)), post(b"5\r\n", CHUNKED)):
        with connected(local) as connection:
            connection.sendall(start)
            connection.sendall(b"{")
            assert b" 408 " in first_line(connection)


def test_bodies_together_have_an_end(local: Running) -> None:
    """Many that are not whole yet take no more than a few of the largest."""
    opened = []
    try:
        for _ in range(3):
            opened.append(connected(local))
            opened[-1].sendall(post(b"", length(MIB)))
            opened[-1].sendall(b" " * (MIB * 9 // 10))
        # Which of them the server read last is not told by which was sent last.
        (refused, *_), *_ = select.select(opened, [], [], 120)
        assert b" 503 " in first_line(refused)
    finally:
        for each in opened:
            each.close()
    deadline = time.monotonic() + 120
    while (status := local.http.post(CHAT, content=BODY).status_code) != 200:
        assert status == 503 and time.monotonic() < deadline
        time.sleep(0.05)
    local.http.post(CHAT, content=b" " * (MIB + 1))
    local.wait_until_idle()


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": {"include_usage": 5}},
        {"stream": True, "return_progress": 5},
        {"keep_alive": "soon", "model": "tiny"},
        {"echo": 5, "prompt": "x"},
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/api/chat"])
def test_a_wrong_field_holds_nothing(local: Running, path: str, fields: Any) -> None:
    """What is refused after the model was found gives it back."""
    body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "max_tokens": 1}
    local.post(path, {**body, **fields, "options": {"num_predict": 1}})
    local.wait_until_idle()
    assert local.service.models.served[0].n_users == 0 and local.service._n_open == 0


@pytest.mark.parametrize("encoding", ["", "Identity", "IDENTITY"])
def test_what_is_not_compressed_is_read(local: Running, encoding: str) -> None:
    reply = local.http.post(CHAT, content=BODY, headers={"content-encoding": encoding})
    assert reply.status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_body_in_another_encoding_is_told(local: Running, encoding: str) -> None:
    reply = local.http.post(CHAT, content=BODY.decode().encode(encoding))
    assert reply.status_code == 400 and "send JSON in UTF-8" in reply.json()["error"]["message"]


# -- readers and logs -----------------------------------------------------------------------------


def test_who_reads_nothing_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer, its reply and its socket, even where the system's buffers are full."""
    monkeypatch.setattr(run, "_KEEP_ALIVE_SECONDS", 0.2)
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.3)
    with running([("tiny", small_model(tmp_path))]) as found:
        large = json.dumps({"input": "x", "max_output_tokens": 1, "instructions": "",
                            "metadata": {"a": "x" * (15 * MIB)}}).encode()  # fmt: skip
        with connected(found) as connection:
            sent = post(large, length(len(large))).replace(b"chat/completions", b"responses", 1)
            open_ones = found.server.server_state.connections
            wait_until(lambda: open_ones, "the connection")
            connection.sendall(sent)
            wait_until(lambda: not open_ones, "the end of the connection")
            found.wait_until_idle()


ENDLESS = BODY.replace(b'"max_tokens":1', b'"max_tokens":900,"logit_bias":{"257":-1000}')


@pytest.mark.parametrize("early", [b"", b"G", get(b"host: localhost"), b"x" * (1 << 10)])
def test_who_goes_is_missed_whatever_came_early(local: Running, early: bytes) -> None:
    """What a client sends before it has its reply is read, or its end would not be seen."""
    finished = local.service.models.served[0].metrics.finished
    before = finished.total()
    with halting(local.llm):
        with connected(local) as connection:
            connection.sendall(post(ENDLESS, length(len(ENDLESS))))
            wait_until(lambda: local.service.answers, "the answer")
            for part in (early[:1], early[1:]):
                connection.sendall(part)
                time.sleep(0.05)
        wait_until(lambda: not local.service.answers, "the end of an answer that nobody reads")
    local.wait_until_idle()
    assert finished.total() == before


def test_more_than_a_little_is_not_read_early(local: Running) -> None:
    """Nor is it lost: it is what follows."""
    with local.replying("x"), connected(local) as connection:
        connection.sendall(post(BODY, length(len(BODY))) * 500)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    local.wait_until_idle()


@pytest.mark.parametrize("target", [b"/none", b"/v1/models"])
def test_a_body_that_breaks_behind_its_reply_is_no_news(
    local: Running, target: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(local) as connection:
        sent = post(b"5\r\nhello", CHUNKED).replace(b"/v1/chat/completions", target, 1)
        connection.sendall(sent)
        assert read_reply(connection).startswith(b"HTTP/1.1 40")
        connection.sendall(b"zz\r\n")
        assert read_reply(connection) == b""
    assert caplog.records == []


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/nowhere", b"/health"])
def test_a_body_that_breaks_has_one_reply(
    local: Running, caplog: pytest.LogCaptureFixture, path: bytes
) -> None:
    """Whatever there would have been to say: nothing is logged of a second one."""
    sent = post(b"zz\r\n", CHUNKED).replace(b"/v1/chat/completions", path)
    for origin in (b"http://localhost", b"https://evil.org"):
        found = replies(local, sent.replace(b"host:", b"origin: " + origin + b"\r\nhost:"))
        ((status, _),) = found
        assert status in (400, 403, 404, 405)  # the head may come by itself
    local.wait_until_idle()
    assert caplog.text == ""


def test_a_log_has_no_words_of_a_prompt(caplog: pytest.LogCaptureFixture) -> None:
    def fail(prompt: str) -> None:
        raise KeyError(prompt)

    with caplog.at_level(logging.DEBUG):
        try:
            fail(" ".join(("my", "secret")))
        except KeyError as error:
            told = ApiError.of(error)
    assert told.status == 500 and "secret" not in told.message
    assert "KeyError" in caplog.text and "my secret" not in caplog.text
    assert "in fail" in caplog.text


def test_nothing_is_logged_of_requests(local: Running, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, logger="edgeinfer"),
        caplog.at_level(logging.INFO, "uvicorn"),
    ):
        assert local.http.post(CHAT, content=BODY).status_code == 200
        assert local.http.post(CHAT, content=b'{"my secret').status_code == 400
    assert "secret" not in caplog.text and "hi" not in [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize("key", ["plain", "schlüssel", "鍵", "voilà", "успех", "\u00c5"])
def test_keys_of_any_letters(tmp_path: Path, key: str) -> None:
    with running([("tiny", small_model(tmp_path))], api_keys=(key,)) as found:
        for right in ({b"authorization": b"Bearer " + key.encode()}, {b"api-key": key.encode()}):
            assert found.http.get("/v1/models", headers=right).status_code == 200
        wrong = found.http.get("/v1/models", headers={b"x-api-key": b"\xff"})
        assert wrong.status_code == 401 and wrong.headers["www-authenticate"] == "Bearer"


# -- clients that send no more --------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_who_sends_no_more_may_still_read(local: Running, streams: bool) -> None:
    """As HTTP allows; netcat does so, and some proxies."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "temperature": 0,
            "stream": streams, "logit_bias": {"257": -1000}}  # fmt: skip
    whole = local.post(CHAT, body).content
    connection = http.client.HTTPConnection("127.0.0.1", int(local.url.rpartition(":")[2]), 30)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, json.dumps(body), {"host": "localhost"})
        connection.sock.shutdown(socket.SHUT_WR)
        reply = connection.getresponse()
        assert reply.status == 200 and without_ids(reply.read()) == without_ids(whole)
    local.wait_until_idle()


def without_ids(reply: bytes) -> list[str]:
    """The texts of a reply, whole or streamed."""
    parts = reply.decode().split("data: ") if reply.startswith(b"data") else [reply.decode()]
    objects = [json.loads(part) for part in parts if part.strip().startswith("{")]
    choices = [choice for each in objects for choice in each["choices"]]
    return [json.dumps(each.get("delta") or each.get("message")) for each in choices]


def test_a_reply_of_a_stated_length_has_no_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it waits in its middle while its reader, who sends no more, is looked for."""
    is_asked = threading.Event()

    class Asking(connections.Connection):
        def _ask(self, again: tuple[float, ...]) -> None:
            super()._ask(again)
            if not again:
                is_asked.set()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"4")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        while not is_asked.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"cd"})

    monkeypatch.setattr(connections, "_ASKED_AGAIN", (0.0, 0.0))
    server = uvicorn.Server(uvicorn.Config(app, http=Asking, lifespan="off", log_config=None))
    with platform.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.settimeout(120)
                connection.sendall(get(b"host: localhost"))
                connection.shutdown(socket.SHUT_WR)
                assert read_reply(connection).partition(b"\r\n\r\n")[2] == b"abcd"
        finally:
            server.should_exit = True
            thread.join(120)


def test_all_that_was_sent_is_answered(local: Running) -> None:
    """Whoever sends no more is told of the end, too."""
    with local.replying("x"):
        found = replies(local, post(BODY, length(len(BODY))) * 5)
    assert [status for status, _ in found if status != 100] == [200] * 5


def test_what_was_not_sent_to_its_end_is_not_waited_for(
    local: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_BODY_SECONDS", 1)
    begun = post(BODY[:20], length(len(BODY)))
    with local.replying("x"):
        found = replies(local, post(BODY, length(len(BODY))) + begun)
    assert [status for status, _ in found if status != 100] == [200]


def test_who_goes_is_missed_within_a_step(local: Running) -> None:
    """However it goes: closed for good is told from closed for sending by what comes back."""
    finished = local.service.models.served[0].metrics.finished
    for streams in (b"", b',"stream":true'):
        before, body = finished.total(), ENDLESS[:-1] + streams + b"}"
        with halting(local.llm), connected(local) as connection:
            connection.sendall(post(body, length(len(body))))
            wait_until(lambda: local.service.answers, "the answer")
        local.wait_until_idle()
        assert finished.total() == before
