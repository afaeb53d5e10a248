"""Clients that are refused while they send: they read why, and are not heard for ever."""

from __future__ import annotations

import select
import time

import pytest

from edgeinfer.server import connections

from .server_for_tests import Running
from .test_server_security import connected, first_line, get, length, post
from .waiting import wait_until

MIB = 1 << 20
REFUSED = {
    "too long": (post(b"", length(64 * MIB), b"connection: close"), b" 413 "),
    "no length": (post(b"", b"content-length: -5"), b" 400 "),
    "two hosts": (get(b"host: localhost", b"host: evil.org"), b" 400 "),
    "a stranger": (
        post(b"", length(MIB), b"origin: https://evil.org", b"connection: close"),
        b" 403 ",
    ),
}


@pytest.mark.parametrize(("sent", "status"), REFUSED.values(), ids=REFUSED)
def test_who_is_refused_while_it_sends_reads_why(
    server: Running, sent: bytes, status: bytes
) -> None:
    """A socket that is closed at once answers what comes with a reset, which takes the reply."""
    with connected(server) as connection:
        connection.sendall(sent)
        select.select([connection], [], [], 120)  # the reply is there, unread
        for _ in range(3):
            connection.sendall(b" " * 1000)
            time.sleep(0.02)
        assert status in first_line(connection)
        while connection.recv(1 << 16):
            pass


def test_who_sends_on_for_ever_is_cut(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LEAVE_SECONDS", 0.2)
    sent, _ = REFUSED["no length"]
    with connected(server) as connection, pytest.raises(ConnectionError):
        connection.sendall(sent)
        while True:
            connection.sendall(b" " * 1000)
            time.sleep(0.01)
    wait_until(lambda: not server.service.is_busy, "the end of the request")
