"""A server that answers with the bytes that a test gives it, however wrong they are."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .waiting import wait_until

_ESTABLISHED = "01"  # as /proc has it
Wrap = Callable[[socket.socket], socket.socket]
MODELS = {"object": "list", "data": [{"id": "m", "object": "model"}]}


def reply(
    body: Any, status: str = "200 OK", *, kind: str = "application/json", **more: str
) -> bytes:
    """A whole HTTP reply; further headers by their names with _ for -."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content_type": kind, "content_length": str(len(data)), **more}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + data


def stream(*parts: Any, is_chunked: bool = False) -> list[Any]:
    """The parts of a streamed reply: dicts are events, bytes are sent as they are."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n" if is_chunked else b"\r\n"
    bodies = [frame(each) if isinstance(each, dict) else each for each in parts]
    if is_chunked:
        bodies = [_chunk(each) if isinstance(each, bytes) else each for each in bodies]
    return [head, *bodies]


def frame(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


def delta(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


DONE = b"data: [DONE]\n\n"


def until_read(connection: socket.socket) -> None:
    """Until who asked has taken all that was sent, or gone; where nobody tells, for a moment."""
    ours, theirs = connection.getsockname()[1], connection.getpeername()[1]

    def is_read() -> bool:
        waiting = 0
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            here, there, state, queues = line.split()[1:5]
            ports = {int(each.partition(":")[2], 16) for each in (here, there)}
            is_open = ports == {ours, theirs} and state == _ESTABLISHED
            waiting += is_open and queues != "00000000:00000000"
        return not waiting

    if sys.platform == "linux":
        wait_until(is_read, "a reader")
    else:
        time.sleep(0.05)


def reset(connection: socket.socket) -> None:
    """As a process ends that is killed; what waits then is lost, so nothing does."""
    until_read(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class FakeApi:
    """Replies by path; what was asked is in `requests`, as head and body."""

    def __init__(self, port: int, wrap: Wrap) -> None:
        self.wrap = wrap
        self.url = f"http://127.0.0.1:{port}"
        self.place = f"127.0.0.1:{port}"
        self.requests: list[tuple[str, Any]] = []
        self.has_lost_clients = False  # some have gone away
        self.models: Any = reply(MODELS)
        self.answers: list[Any] = []  # by turns, the last one again and again
        self.others = reply({"error": {"message": "no such path"}}, "404 Not Found")

    def heads(self, path: str) -> list[str]:
        return [head for head, _ in self.requests if f" {path}" in head.split("\r\n")[0]]

    def bodies(self) -> list[Any]:
        return [body for _, body in self.requests if body is not None]

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), self.wrap(connection) as connection:
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := connection.recv(65536)):
                    return
                data += more
            head, _, rest = data.partition(b"\r\n\r\n")
            n_bytes = int(_header(head, "content-length") or "0")
            while len(rest) < n_bytes:
                if not (more := connection.recv(65536)):
                    return
                rest += more
            self.requests.append((head.decode(), json.loads(rest) if rest else None))
            self._answer(connection, head.split()[1].decode())

    def _answer(self, connection: socket.socket, path: str) -> None:
        parts: Any = self.others
        if path.endswith("/models"):
            parts = self.models
        elif path.endswith("/chat/completions"):
            parts = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        try:
            for part in parts if isinstance(parts, list) else [parts]:
                if isinstance(part, float):
                    time.sleep(part)
                elif callable(part):
                    part(connection)
                else:
                    connection.sendall(part)
        except OSError:
            self.has_lost_clients = True


def _header(head: bytes, name: str) -> str:
    for line in head.decode().split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return ""


def _plain(connection: socket.socket) -> socket.socket:
    return connection


@contextmanager
def fake_api(wrap: Wrap = _plain) -> Iterator[FakeApi]:
    """One that listens; `wrap` makes another kind of every connection, such as TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = FakeApi(listener.getsockname()[1], wrap)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=found._serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield found
        listener.shutdown(socket.SHUT_RDWR)
