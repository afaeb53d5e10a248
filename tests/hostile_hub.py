"""What a hub, or a proxy before it, may answer in place of a file: by a random number each.

Knows nothing of who asks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

LOCATIONS = (
    f"http://{'a' * 70}/x", "http:///x", "//[::1", "http://127.0.0.1:99999/x", "\x00",
    "http://127.0.0.1:abc/x", "http://127.0.0.1:1/x", "#", "file:///etc/passwd",
)  # fmt: skip
STATUSES = (199, 201, 204, 206, 300, 304, 401, 403, 404, 416, 429, 500, 503, 599, 999)
FIRST_LINES = ("HTTP/1.1 abc", "garbage", "", "HTTP/9.9 200 OK", "HTTP/1.1")
JUNK: tuple[Any, ...] = (
    None, [], {}, 5, "x", -1, 1e300, True, "../x.gguf", [None], {"a": 1}, "x" * 9000, 2**70,
    "\ud800", "0" * 64,
)  # fmt: skip


def facts(rng: random.Random, sound: dict[str, Any]) -> bytes:
    """What is told of a repository, with one thing that is another."""
    told = json.loads(json.dumps(sound))
    first = told["siblings"][0]
    parts = rng.choice(((told, list(told)), (first, list(first)), (first["lfs"], ["size"])))
    parts[0][rng.choice(parts[1])] = rng.choice(JUNK)
    data = json.dumps(told).encode()
    return rng.choice((data, data, data, b"", b"<html>", data[:20], b"\xff", b"[" * 9000))


def file_reply(rng: random.Random, data: bytes, asked: str | None) -> bytes:
    """A reply to who asks for a file, or for `asked`, a range of it."""
    first, _, last = (asked or "").removeprefix("bytes=").partition("-")
    start, end = int(first or 0), int(last or len(data) - 1)
    status, body, headers = 200, data[start : end + 1], dict[str, object]()
    if asked:
        status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(data)}"
    match rng.randrange(7):
        case 0:
            status, body = rng.choice((301, 302, 307, 308)), b""
            headers["Location"] = rng.choice(LOCATIONS)
        case 1:
            status = rng.choice(STATUSES)
        case 2 if asked:
            headers["Content-Range"] = rng.choice(
                (f"bytes 0-{end}/{len(data)}", "", "bytes */5", "bytes x-y/z", "items 0-1/2",
                 f"bytes {start}-{end}/7", f"bytes {'9' * 40}-1/2")
            )  # fmt: skip
        case 3:
            body += bytes(rng.choice((1, 100, 100_000)))
        case 4:
            body = body[: rng.randrange(len(body) + 1)]
    headers["Content-Length"] = len(body)
    match rng.randrange(8):
        case 0:
            headers["Content-Length"] = rng.choice((len(body) + 10, -1, "x", "9" * 30, "", 0))
        case 1:
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            body = rng.choice(
                (b"zz\r\n", b"5\r\nab", b"-5\r\nabcde\r\n", b"%s\r\n" % (b"f" * 18),
                 b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            )  # fmt: skip
        case 2:
            headers["X" * rng.choice((5, 70_000))] = "1"
    line = f"HTTP/1.1 {status} X" if rng.randrange(12) else rng.choice(FIRST_LINES)
    head = [line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    reply = "\r\n".join(head).encode() + body
    return reply if rng.randrange(12) else reply[: rng.randrange(len(reply) + 1)]


def answering(
    rng: random.Random, data: bytes, sound: dict[str, Any]
) -> Callable[[object, BaseHTTPRequestHandler], None]:
    """Answers in place of `fake_hub._answer`; what is told of the repository is mostly sound."""

    def answer(_: object, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        if "/resolve/" in request.path:
            request.wfile.write(file_reply(rng, data, request.headers.get("Range")))
            return
        told = json.dumps(sound).encode() if rng.randrange(5) else facts(rng, sound)
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(told)}\r\n\r\n"
        request.wfile.write(head.encode() + told)

    return answer
