"""Bytes that are nearly HTTP, at random: each connection ends, with replies that are whole."""

from __future__ import annotations

import json
import logging
import random
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from .server_for_tests import Running, running_small

N_CONNECTIONS = 4
SECONDS = 120  # that anything may take, however busy the machine is
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
STREAMED = BODY[:-1] + b', "stream": true}'
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = [
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://localhost/health HTTP/1.0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\nOrigin: http://localhost\r\n\r\n",
    *(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in (BODY, STREAMED)),
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
]
PARTS = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\0", b"\xff", b"HTTP/1.1", b"0", b"-1", b"http://",
    b"%00", b"//", b"@", b"[", b"]", b"Content-Length: 5\r\n", b"Expect: 100-continue\r\n",
    b"Connection: close\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"zz\r\n",
]  # fmt: skip
STATUSES = (100, 200, 204, 400, 403, 404, 405, 413, 415, 431, 501)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_small(tmp_path_factory.mktemp("bytes")) as found:
        yield found


def sent(rng: random.Random) -> bytes:
    """A few requests, changed in a few places."""
    data = b"".join(rng.choices(WHOLE, k=rng.choice([1, 1, 2, 3])))
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(5)
        if kind < 2:
            data = data[:at] + rng.choice(PARTS) + data[at:]
        elif kind < 4:
            data = data[:at] + rng.randbytes(kind - 2) + data[at + rng.randrange(1, 20) :]
        else:
            data = data[:at]
    return data


def exchange(port: int, rng: random.Random) -> bytes:
    """All that comes back, b"" where the connection is reset; it is left in one way or another."""
    data, came = sent(rng), b""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        try:
            for part in (data[:40], data[40:]) if rng.random() < 0.3 else (data,):
                connection.sendall(part)
            if rng.random() < 0.1:
                return b""
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                came += part
        except TimeoutError:
            raise
        except OSError:  # a reset shows in many ways
            return b""
    return came


@pytest.mark.parametrize("n", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_whatever_bytes_come_the_connection_ends(
    served: Running, caplog: pytest.LogCaptureFixture, n: int
) -> None:
    wrong: list[str] = []

    def exchange_all(first: int) -> None:
        for seed in range(first, n, N_CONNECTIONS):
            try:
                came = exchange(int(served.url.rpartition(":")[2]), random.Random(seed))
            except TimeoutError as error:
                wrong.append(f"seed {seed}: {error!r}")
                continue
            found = [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3}) ", came)]
            if not set(found) <= set(STATUSES):
                wrong.append(f"seed {seed}: {found}")

    threads = [threading.Thread(target=exchange_all, args=(i,)) for i in range(N_CONNECTIONS)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        served.wait_until_idle()
    assert wrong == [] and caplog.text == ""
    assert served.http.get("/health").json() == {"status": "ok"}
