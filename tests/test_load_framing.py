"""Where the bodies of replies end, for a load: as h11 says, wherever their bytes are cut."""

from __future__ import annotations

from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.load.framing import Body, MalformedBodyError, body_of

CHUNKED = "transfer-encoding: chunked\r\n"
ENDLESS = ""


def head(more: str, status: int = 200) -> bytes:
    return f"HTTP/1.1 {status} OK\r\n{more}\r\n".encode()


def parsed(data: bytes) -> tuple[h11.Connection, Any]:
    """A connection of h11's that was asked by GET, and the head of the reply."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    return connection, connection.next_event()


def as_h11_reads(data: bytes) -> tuple[bytes, bool, bool]:
    """The body, whether it is whole, and whether something came behind it."""
    connection, event = parsed(data)
    assert isinstance(event, h11.Response)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    is_whole = isinstance(event, h11.EndOfMessage)
    return body, is_whole, is_whole and bool(connection.trailing_data[0])


def as_we_read(first: bytes, body: bytes, at: list[int]) -> tuple[bytes, bool, bool]:
    _, event = parsed(first)
    reader: Body = body_of(event)
    places = sorted({min(place, len(body)) for place in at} | {0, len(body)})
    found = reader.push(b"")
    for a, b in zip(places, places[1:], strict=False):
        if reader.is_whole:
            return b"".join(found), True, True
        found += reader.push(body[a:b])
    return b"".join(found), reader.is_whole, reader.has_more


sizes = st.sampled_from(["%x", "%X", "0%x", "%x ", "%x;a=b", "%x;x"])
cuts = st.lists(st.integers(0, 400), max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(sizes, st.binary(min_size=1, max_size=40)), max_size=6),
    st.sampled_from(["0\r\n\r\n", "000\r\nx: y\r\n\r\n", "0;a\r\n\r\n", "0\r\nx: y\r\n", ""]),
    st.sampled_from([b"", b"x", b"HTTP/1.1 200"]),
    cuts,
)  # fmt: skip
def test_chunks_however_they_are_spelled(
    parts: list[tuple[str, bytes]], last: str, behind: bytes, at: list[int]
) -> None:
    body = b"".join((size % len(data)).encode() + b"\r\n" + data + b"\r\n" for size, data in parts)
    body += last.encode() + (behind if last.endswith("\r\n\r\n") else b"")
    first = head(CHUNKED)
    assert as_we_read(first, body, at) == as_h11_reads(first + body)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["content-length: 20\r\n", "content-length: 0\r\n", ""]),
       st.sampled_from([200, 204, 304, 500]), st.binary(max_size=40), cuts)  # fmt: skip
def test_bodies_with_a_length_or_none(more: str, status: int, body: bytes, at: list[int]) -> None:
    first = head(more, status)
    assert as_we_read(first, body, at) == as_h11_reads(first + body)


@pytest.mark.parametrize(
    "body",
    ["x\r\n", "-1\r\n", "+5\r\nabcde\r\n", "0x5\r\n", "1_0\r\n", "\r\n", " 5\r\n", "5\nabcde\r\n",
     "5\r\nabcdef\r\n", "5\r\nabcdeX", "1" * 16 + "\r\n", "5;" + "x" * 5_000],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 3, 100_000])
def test_what_is_no_chunk(body: str, step: int) -> None:
    reader = body_of(parsed(head(CHUNKED))[1])
    with pytest.raises(MalformedBodyError):
        for i in range(0, len(body), step):
            reader.push(body[i : i + step].encode())
        assert not reader.is_whole
