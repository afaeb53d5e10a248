"""Streams of servers, however they spell events and wherever their bytes are cut."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.errors import EdgeInferError
from edgeinfer.load.answer_stream import AnswerStream
from edgeinfer.remote.address import read_address
from edgeinfer.remote.answer import Collected
from edgeinfer.remote.frames import frames
from edgeinfer.remote.packing import unpacked

from .fake_api import delta, fake_api, reply, stream
from .test_remote import opened

HERE = read_address("http://here", None)


def cut(data: bytes, at: list[int]) -> Iterator[bytes]:
    places = sorted({min(place, len(data)) for place in at} | {0, len(data)})
    return (data[a:b] for a, b in zip(places, places[1:], strict=False))


def said(chunks: Iterator[bytes], *, is_stream: bool = True) -> tuple[str, str, str]:
    told = Collected(HERE, "m", 0, lambda text: 0)
    deltas = list(told.events(chunks, is_stream=is_stream))
    found = "".join(each.reasoning for each in deltas), "".join(each.text for each in deltas)
    whole = told.completion(is_whole=True)
    assert found == (whole.reasoning, whole.text)
    "".join(found).encode()
    return *found, told.reason


EVENTS: list[dict[str, Any]] = [
    delta(role="assistant", content=""),
    delta(reasoning_content="Hm é"),
    delta(content="\U0001f600 one\r\n"),
    delta(content="two"),
    delta("length"),
]
ENDS = ["\n", "\r\n", "\r"]
BETWEEN = ["", ": ping", "event: message", "id: 1", "retry: 5", "data", "other: x", ": {}"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(ENDS),
    st.lists(st.sampled_from(BETWEEN), max_size=12),
    st.booleans(),
    st.sampled_from(["data: ", "data:"]),
    st.sampled_from([None, 1]),
    st.sampled_from(["", "data: [DONE]", "data:[DONE]\n", "data: [DONE]\n\n", "\n\n"]),
    st.lists(st.integers(0, 900), max_size=60),
    st.sampled_from(["", "gzip", "deflate"]),
)
def test_however_events_are_spelled(
    end: str, between: list[str], has_mark: bool, field: str, indent: Any, last: str,
    at: list[int], packing: str,
) -> None:  # fmt: skip
    lines = ["\ufeff" if has_mark else ""]
    for i, each in enumerate(EVENTS):
        lines[-1] += field + f"\n{field}".join(json.dumps(each, indent=indent).split("\n"))
        lines += ["", *([between[i], ""] if i < len(between) else []), ""]
        if i == len(EVENTS) - 1:
            lines[-1] = last
    data = "\n".join(lines).replace("\n", end).encode()
    if packing:
        data = gzip.compress(data) if packing == "gzip" else zlib.compress(data)
    found = said(unpacked(cut(data, at), packing))
    assert found == ("Hm é", "\U0001f600 one\r\ntwo", "length")
    load = AnswerStream()
    for chunk in unpacked(cut(data, at), packing):
        load.take(0.0, 200, chunk)
    load.finish()
    assert (load.text, len(load.times)) == ("\U0001f600 one\r\ntwo", 3)


@pytest.mark.parametrize("name", ["content", "reasoning_content"])
def test_characters_that_a_server_cuts_in_half(name: str) -> None:
    halves = ["a\ud83d", "\ude00b\ud83d", "", "\ude00", "\ude00", "c", "\ud83d"]
    data = [f"data: {json.dumps(delta(**{name: half}))}\n\n".encode() for half in halves]
    whole = "a\U0001f600b\U0001f600\ufffdc\ufffd"
    found = said(iter([*data, b"data: [DONE]\n\n"]))
    assert found == (("", whole, "stop") if name == "content" else (whole, "", "stop"))


def test_what_a_reply_is_shows_in_how_it_begins() -> None:
    """Types are wrong now and then: proxies that know one alone, servers that can't stream."""
    answer = {"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}]}
    whole = b"\n " + json.dumps(answer).encode()
    events = b"".join(f"data: {json.dumps(each)}\n\n".encode() for each in EVENTS[2:])
    for at in ([], [1, 2, 3, 4]):
        assert said(cut(whole, at), is_stream=True)[1] == "hi"
        assert said(cut(b"\n: ping\n\n" + events, at), is_stream=False)[2] == "length"


@pytest.mark.parametrize(
    ("encoding", "body", "why"),
    [
        ("br", b"x", "compressed by br"),
        ("gzip", b"no gzip at all", "can't be read"),
        ("gzip", gzip.compress(b"data: {}\n\n", mtime=0)[:-9], "no end"),
        ("gzip", gzip.compress(b"data: " + b"x" * (9 << 20)), "more than 8 MiB"),
    ],
)
def test_what_can_not_be_unpacked_is_told(encoding: str, body: bytes, why: str) -> None:
    with fake_api() as api:
        packed = gzip.compress(json.dumps({"data": [{"id": "m"}]}).encode())
        api.models = reply(packed, content_encoding="gzip")
        api.answers = [reply(body, kind="text/event-stream", content_encoding=encoding)]
        with pytest.raises(EdgeInferError, match=why):
            list(opened(api).stream_chat("hello"))


def test_what_keeps_a_connection_is_no_event() -> None:
    data = [b"data:\n\n", b"data: \n\n", b": \n\n", b'data: {"a": 1}\n\n', b'data: {"b": 2']
    assert list(frames(iter(data), HERE)) == [{"a": 1}]
    load = AnswerStream()
    for each in stream(b"\xef\xbb\xbf", *data[:3], *EVENTS, b"data: [DONE]\n\n")[1:]:
        load.take(0.0, 200, each)
    load.finish()
    assert load.text == "\U0001f600 one\r\ntwo"
