"""`edgeinfer load`: what it asks when, what it counts, and servers that fail it in every manner."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from click.testing import CliRunner

from edgeinfer.cli.main import commands
from edgeinfer.errors import EdgeInferError, InvalidRequestError
from edgeinfer.load import answer_stream, generator
from edgeinfer.load.answer_stream import AnswerStream, StreamError
from edgeinfer.load.generator import RUNNING, Generator, Measured, Record, Settings, find_model
from edgeinfer.load.http_client import Client, ConnectionLost
from edgeinfer.load.summary import percentiles, summary
from edgeinfer.load.traffic import (
    Conversation,
    Shape,
    Texts,
    Turn,
    read_traffic,
    repeated,
    synthetic,
    write_traffic,
)
from edgeinfer.platform import EnergyMeter
from edgeinfer.remote.address import read_address
from edgeinfer.remote.model import RemoteModel

from .server_for_tests import Running

# -- traffic --------------------------------------------------------------------------------------


def test_a_seed_makes_the_same_traffic_and_a_file_keeps_it(tmp_path: Path) -> None:
    made = list(islice(synthetic(Shape(), 7), 400))
    assert made == list(islice(synthetic(Shape(), 7), 400))
    assert made != list(islice(synthetic(Shape(), 8), 400))
    turns = [turn for each in made for turn in each.turns]
    assert {len(each.turns) for each in made} == {1, 2, 3, 4, 5, 6}
    assert {each.system for each in made} == {0, 1, 2, 3}
    assert all(20 <= turn.user <= 200 and 30 <= turn.answer <= 300 for turn in turns)
    assert all(turn.think == (5.0 if i else 0.0) for e in made for i, turn in enumerate(e.turns))
    assert 0.9 < made[-1].at / 400 < 1.1  # one in a unit of time
    median = sorted(turn.answer for turn in turns)[len(turns) // 2]
    assert 85 < median < 105  # the geometric mean of the limits: 95
    write_traffic(tmp_path / "t.jsonl", made)
    assert read_traffic(tmp_path / "t.jsonl") == made
    twice = list(islice(repeated(made), 800))
    assert twice[400].turns == made[0].turns and twice[400].at > twice[399].at


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no conversation in"),
        ("{}", "line 1 of .* is no conversation"),
        ("\n[1]", "line 2 of"),
        ('{"at": 1, "turns": []}', "no turns"),
        ('{"at": 1, "turns": [[-1, 2]]}', "below 0"),
        ('{"at": 1, "turns": [[1.5, 2]]}', "no conversation"),
        ('{"at": -1, "turns": [[1, 2]]}', "a time below 0"),
        ('{"at": 5, "turns": [[1, 2]]}\n{"at": 4, "turns": [[1, 2]]}', "line 2 of .* before that"),
        ("\x00\xff", "no conversation"),
    ],
)
def test_a_file_that_is_no_traffic_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidRequestError, match=says):
        read_traffic(path)


def test_traffic_is_read_before_a_server_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "find_model", None)
    (tmp_path / "t.jsonl").write_text("{}")
    asked = ["load", "http://127.0.0.1:1", "--traffic", str(tmp_path / "t.jsonl")]
    with pytest.raises(InvalidRequestError, match="line 1 of"):
        commands.main(asked, standalone_mode=False)


def test_texts_have_lengths_and_keys() -> None:
    texts = Texts(2.0)
    assert len(texts.words(100, "a").split()) == 50
    assert texts.words(100, "a") == texts.words(100, "a") != texts.words(100, "b")
    assert texts.words(0, "a")


# -- replies --------------------------------------------------------------------------------------


def frames(*texts: str, usage: bool = True, done: bool = True) -> bytes:
    chunks: list[Any] = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}] if done else []
    details = {"cached_tokens": 3}
    told = {"prompt_tokens": 9, "completion_tokens": len(texts), "prompt_tokens_details": details}
    chunks += [{"choices": [], "usage": told}] if usage else []
    body = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks)
    return b": ping\r\n\r\n" + body + (b"data: [DONE]\n\n" if done else b"")


def test_any_cut_of_a_stream_gives_the_same_answer() -> None:
    whole = frames("ä", "b c", "😀")
    for size in (1, 2, 3, 7, 64, len(whole)):
        stream = AnswerStream()
        for i in range(0, len(whole), size):
            stream.take(float(i), 200, whole[i : i + size])
        stream.finish()
        assert (stream.text, len(stream.times), stream.n_cached) == ("äb c😀", 3, 3)
        assert stream.usage is not None and stream.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"data: {\n\n", "malformed stream"),
        (b"data: []\n\n", "malformed stream"),
        (b'data: {"choices": 5}\n\n', "malformed stream"),
        (b'{"choices": []}\n', "malformed stream"),
        (b"data: \xff\n\n", "malformed stream"),
        (b'data: {"error": {"message": "no"}}\n\n', "error in the stream"),
        (frames("a", done=False), "cut short"),
        (b"", "cut short"),
    ],
)
def test_a_stream_that_is_none(body: bytes, kind: str) -> None:
    stream = AnswerStream()
    with pytest.raises(StreamError) as caught:
        stream.take(0.0, 200, body)
        stream.finish()
    assert caught.value.kind == kind


# -- servers --------------------------------------------------------------------------------------

Script = Callable[[int, asyncio.StreamWriter], Any]  # the number of the request, where to reply


async def turns() -> None:
    """Several of the loop's, in which connections are made and closed."""
    for _ in range(10):
        await asyncio.sleep(0)


@contextmanager
def scripted(
    script: Script, listed: bytes | None = None, heads: list[bytes] | None = None
) -> Iterator[str]:
    """A server that replies as it is told, and has a list of models; its URL."""
    listed = reply(b'{"data": [{"id": "m"}]}') if listed is None else listed
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: list[str] = []
    counted = iter(range(10**6))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                fields = {name.lower(): value for name, value in fields.items()}
                await reader.readexactly(int(fields[b"content-length"]))
                if heads is not None:
                    heads.append(head)
                if b"/models" in head:
                    writer.write(listed)
                else:
                    await script(next(counted), writer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        found.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        started.set()
        await stop.wait()
        for each in server.sockets:  # a server that is closed forgets what it has just accepted
            loop.remove_reader(each.fileno())
        await turns()
        server.close()
        talks = asyncio.all_tasks() - {asyncio.current_task()}
        for talking in talks:
            talking.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        await turns()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(120)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(120)
        loop.close()


def reply(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


def client_of(url: str, key: str = "") -> Client:
    return Client(read_address(url, key))


def first_model(url: str, key: str = "") -> str:
    async def run() -> str:
        client = client_of(url, key)
        try:
            return await find_model(client)
        finally:
            client.close()
            await turns()

    return asyncio.run(run())


def measured(url: str, n: int = 6, gap: float = 0.02, **more: Any) -> Measured:
    """What a run of `n` conversations of one turn comes to, one after each gap."""
    asked = [Conversation(i * gap, [Turn(5, 3)]) for i in range(n)]
    settings = Settings(**{"model": "m", "seconds": 5.0, "drain": 5.0, **more})

    async def run() -> Measured:
        generator = Generator(client_of(url), settings, asked, Texts())
        await generator.run()
        return generator.measured

    return asyncio.run(run())


def test_answers_are_timed_and_connections_kept() -> None:
    writers = set()

    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in (frames("a", usage=False, done=False), frames("b")):
            writer.write(b"%x\r\n" % len(part) + part + b"\r\n")
            await asyncio.sleep(0.02)
        writer.write(b"0\r\n\r\n")

    with scripted(script) as url:
        found = measured(url, n_users=1)
    told = summary(found)
    assert [each.failure for each in found.records] == [""] * 6 and len(writers) == 1
    assert told["answered"] == 6 and told["cached_share"] == 3 / 9
    assert told["prompt_tokens"] == 9 and told["answer_tokens"] == 1
    first, whole = told["first_token_s"], told["end_to_end_s"]
    assert 0 < first["p50"] < whole["p50"] and 0.01 < told["gap_s"]["p50"] < 1
    assert 0 < told["client"]["cpu_share"] < 1


def test_time_counts_from_when_a_request_was_due() -> None:
    """A server that answers one at a time: who closed the loop would see 0.1 s each."""
    turn = asyncio.Lock()

    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        async with turn:
            await asyncio.sleep(0.1)
            writer.write(reply(frames("a")))

    for guard in (100, 1):
        with scripted(script) as url:
            found = measured(url, gap=0.0, most_in_flight=guard)
        took = sorted(each.ended - each.due for each in found.records)
        assert took[-1] > 0.5
        assert found.n_held == (0 if guard == 100 else 5)
        turn = asyncio.Lock()


STREAMED = reply(frames("a", done=False), more="content-type: text/event-stream\r\n")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "closed the connection without an answer; does it run, and without TLS"),
        (b"SSH-2.0-x\r\n\r\n", "does not answer in HTTP .*would https:// be right"),
        (STREAMED[:-9], "broke off before the end"),
    ],
)
def test_what_is_lost_is_told_as_run_tells_it(data: bytes, says: str) -> None:
    """Of the list of models, of a first request and of those that are measured."""

    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        await _write(writer, data, ends=True)

    with scripted(script) as url:
        (said,) = summary(measured(url, 2))["messages"].values()
        assert re.search(says, said)
        with pytest.raises(EdgeInferError, match=f"first request: connection lost: .*{says}"):
            commands.main(["load", url, "--model", "m"], standalone_mode=False)
        remote = RemoteModel(read_address(url, None), "m").stream_chat("hi")
        with pytest.raises(EdgeInferError, match=says):
            list(remote)


def test_a_server_that_asks_for_patience_is_given_it() -> None:
    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        status = ("429 Too Many Requests", "503 Unavailable")[i % 2]
        is_refused = i < 2
        writer.write(reply(b"{}", status, "retry-after: 0.2\r\n") if is_refused else
                     reply(frames("a")))  # fmt: skip

    with scripted(script) as url:
        (record,) = measured(url, 1).records
        assert (record.failure, record.n_retried) == ("", 2) and record.ended - record.due > 0.4
    busy = b"busy\x1b[31m\n" + b"x" * 999
    with scripted(lambda i, writer: _write(writer, reply(busy, "503 Unavailable"))) as url:
        told = summary(measured(url, 3, n_retries=0))
        said = told["messages"]["HTTP 503"]
        assert told["failed"] == {"HTTP 503": 3} and said.startswith("busy")
        assert said.isprintable() and len(said) <= 300
        assert told["end_to_end_s"] is None and told["answered"] == 0


async def _write(writer: asyncio.StreamWriter, data: bytes, *, ends: bool = False) -> None:
    writer.write(data)
    if ends:
        writer.close()
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("data", "ends", "kind"),
    [
        (reply(b"no", "500 Oops"), False, "HTTP 500"),
        (reply(b"data: {\n\n"), False, "malformed stream"),
        (reply(frames("a", done=False)), False, "cut short"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\ndata: {}\n\n", True, "connection lost"),
        (b"", True, "connection lost"),
        (b"SSH-2.0-x\r\n\r\n", True, "connection lost"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n", False, "deadline"),
    ],
)
def test_failures_are_counted_by_kind(data: bytes, ends: bool, kind: str) -> None:
    """Of four requests two fail, and the others are answered beside them."""

    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        if i % 2:  # each on a connection of its own: an old one that is lost is replaced
            writer.write(reply(frames("a"), more="connection: close\r\n"))
        else:
            await _write(writer, data, ends=ends)

    with scripted(script) as url:
        told = summary(measured(url, 4, gap=0.1, deadline=2.0))
    assert told["failed"] == {kind: 2} and told["answered"] == 2
    assert told["end_to_end_s"]["max"] > (2.0 if kind == "deadline" else 0)


def test_what_the_system_waited_for_is_no_deadline_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that does not come about: to asyncio that is a timeout like any other."""

    async def connect(client: Client) -> Any:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr(Client, "_connect", connect)
    told = summary(measured("http://127.0.0.1:9", 1))
    assert told["failed"] == {"no connection": 1}
    assert "whole answer" not in told["messages"]["no connection"]


@pytest.mark.parametrize(
    ("told", "n"), [("5", 5), ("5.0", 5), ("null", 0), ("-5", None), ("1e30", None), ("5.5", None)]
)
def test_counts_are_counts_however_they_are_spelled(told: str, n: int | None) -> None:
    stream = AnswerStream()
    usage = f'{{"prompt_tokens": {told}, "completion_tokens": 1}}'
    event = b'data: {"usage": %s, "choices": [{"finish_reason": "stop"}]}\n\n' % usage.encode()
    if n is None:
        with pytest.raises(StreamError, match="prompt_tokens"):
            stream.take(0.0, 200, event)
        return
    stream.take(0.0, 200, event)
    stream.finish()
    assert stream.usage is not None and (stream.usage.prompt_tokens or 0) == n


def test_an_answer_without_an_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_stream, "_MOST_TEXT", 100)
    stream, event = AnswerStream(), b'data: {"choices": [{"delta": {"content": "a word"}}]}\n\n'
    with pytest.raises(StreamError, match="no end"):
        for _ in range(100):
            stream.take(0.0, 200, event)
    assert len(stream.text) < 200


def test_a_server_that_dies_in_a_run() -> None:
    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(frames("a"), more="connection: close\r\n"))
        writer.close()
        if i == 8:
            died.set()

    died = threading.Event()
    asked = [Conversation(i * 0.02, [Turn(5, 3)]) for i in range(40)]

    async def run(url: str) -> Measured:
        settings = Settings(model="m", seconds=5.0)
        generator = Generator(client_of(url), settings, asked, Texts())
        await generator.run()
        return generator.measured

    def live() -> None:
        with scripted(script) as url:
            urls.put(url)
            died.wait(120)

    urls: SimpleQueue[str] = SimpleQueue()
    server = threading.Thread(target=live)
    server.start()
    told = summary(asyncio.run(run(urls.get(timeout=120))))
    server.join()
    assert told["answered"] > 3 and told["failed"]["connection refused"] > 3
    assert told["answered"] + sum(told["failed"].values()) == 40


def test_what_the_end_cuts_off_counts_with_its_time() -> None:
    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        if i < 2:
            writer.write(reply(frames("a")))
        # else nothing, ever

    with scripted(script) as url:
        found = measured(url, 4, seconds=1.0, drain=1.0)
    told = summary(found)
    assert told["still_running"] == 2 and told["answered"] == 2 and not told["failed"]
    assert [each.failure for each in found.records] == ["", "", RUNNING, RUNNING]
    assert told["end_to_end_s"]["p99"] > 1.5


def test_conversations_that_had_begun_go_on() -> None:
    """Of three turns, one that began before the run has the first two behind it."""
    asked = [Conversation(0.0, [Turn(5, 3), Turn(6, 3, 1.0), Turn(7, 3, 1.1)])] * 2
    asked += [Conversation(0.1, [Turn(5, 3)])]  # it was all over before
    settings = Settings(model="m", seconds=2.0, head_start=6.0)
    messages = []

    class Listening(Generator):
        async def _ask(self, record: Record, said: list[dict[str, str]], turn: Turn) -> None:
            messages.append(([each["role"] for each in said], turn.user, record.due))

    async def run() -> Measured:
        generator = Listening(client_of("http://h:1"), settings, asked, Texts())
        await generator.run()
        return generator.measured

    found = asyncio.run(run())
    roles = ["user", "assistant"] * 2 + ["user"]
    assert [each[:2] for each in messages] == [(roles, 7)] * 2
    assert [each[2] - found.begun for each in messages] == pytest.approx([0.1] * 2)


@pytest.mark.parametrize("shares", [True, False])
def test_what_is_not_shared_is_not_shared_by_runs_of_other_seeds(shares: bool) -> None:
    """A server would have it still."""
    asked = [Conversation(0.0, [Turn(5, 3)], system=i % 2, system_tokens=9) for i in range(4)]
    texts = []

    class Listening(Generator):
        async def _ask(self, record: Record, said: list[dict[str, str]], turn: Turn) -> None:
            texts.append(said[0]["content"])

    async def run(seed: int) -> None:
        settings = Settings(model="m", seconds=5.0, shares_prompts=shares, seed=seed)
        await Listening(client_of("http://h:1"), settings, asked, Texts()).run()

    for seed in (1, 2):
        asyncio.run(run(seed))
    assert len(texts) == 8 and len(set(texts)) == (2 if shares else 8)


def test_users_without_pauses_close_the_loop() -> None:
    n_open, most = 0, 0

    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        nonlocal n_open, most
        n_open += 1
        most = max(most, n_open)
        await asyncio.sleep(0.02)
        n_open -= 1
        writer.write(reply(frames("a", "b")))

    with scripted(script) as url:
        found = measured(url, 10**4, n_users=4, seconds=1.0)
    told = summary(found)
    assert most == 4 and told["users"] == 4 and told["answered"] > 2 * 4
    assert told["answer_tok_s"] == pytest.approx(2 * told["answered_per_s"], rel=0.2)
    # What the end cuts off has begun a moment ago: it says nothing of how long answers take.
    done = [each.ended - each.due for each in found.records if not each.failure]
    assert told["still_running"] <= 4 and told["end_to_end_s"]["max"] == max(done)


def test_a_connection_that_was_closed_while_idle_is_replaced() -> None:
    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(frames("a")))
        await writer.drain()
        asyncio.get_running_loop().call_later(0.05, writer.close)

    with scripted(script) as url:
        assert summary(measured(url, 4, gap=0.15))["answered"] == 4


def test_a_reply_that_was_begun_is_not_asked_for_twice() -> None:
    asked = []

    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        asked.append(i)
        if i % 2 == 0:
            writer.write(reply(frames("a")))
        else:
            await _write(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", ends=True)

    async def run(url: str) -> None:
        client = client_of(url)
        try:
            for _ in range(2):
                await client.request("POST", "/x", b"", lambda at, status, data: None)
        finally:
            client.close()
            await turns()

    with scripted(script) as url, pytest.raises(ConnectionLost):
        asyncio.run(run(url))
    assert asked == [0, 1]


# -- figures --------------------------------------------------------------------------------------


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentiles([]) is None
    found = percentiles([float(i) for i in range(1, 101)])
    assert found is not None
    assert [found[name] for name in ("p50", "p90", "p95", "p99", "max")] == [50, 90, 95, 99, 100]
    assert percentiles([3.0]) == {
        "p50": 3, "p90": 3, "p95": 3, "p99": 3, "mean": 3, "max": 3,
    }  # fmt: skip


def test_only_what_comes_after_the_warmup_counts() -> None:
    def record(due: float, *times: float) -> Record:
        return Record(due, due, times[-1], array("d", times), 10, len(times), failure="")

    found = Measured(Settings(model="m", seconds=10.0, warmup=4.0), begun=100.0, ended=120.0)
    found.records = [record(101, 103, 105), record(106, 107, 108), record(109, 109.5, 111)]
    told = summary(found)
    assert told["requests"] == told["answered"] == 2 and told["seconds"] == 6
    assert told["answer_tok_s"] == 4 / 6  # those at 105, 107, 108 and 109.5
    assert told["answered_per_s"] == 2 / 6  # those that ended at 105 and 108


def test_energy_is_read_where_it_is_told(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path / "nothing").joules == {}
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    board = tmp_path / "sys/class/hwmon/hwmon3"
    for folder in (zone, board):
        folder.mkdir(parents=True)
    files = {
        zone / "name": "package-0", zone / "energy_uj": "5000000",
        zone / "max_energy_range_uj": "9000000", board / "name": "ina3221",
        board / "in1_label": "VDD_IN", board / "in1_input": "5000", board / "curr1_input": "2000",
        board / "in2_label": "VDD_CPU", board / "in2_input": "5000", board / "curr2_input": "1000",
    }  # fmt: skip
    for path, text in files.items():
        path.write_text(f"{text}\n")
    meter = EnergyMeter(tmp_path)
    ours = [name for name in meter.sources if not name.startswith("GPU")]
    assert ours == ["RAPL package-0", "board VDD_IN"]
    meter.sample()
    begun = time.monotonic()
    (zone / "energy_uj").write_text("8000000")
    meter.sample()
    (zone / "energy_uj").write_text("1000000")  # it has begun anew at its limit
    time.sleep(0.05)
    meter.sample()
    assert meter.joules["RAPL package-0"] == pytest.approx(5.0)
    assert 0 < meter.joules["board VDD_IN"] <= 10 * (time.monotonic() - begun) + 1
    (zone / "energy_uj").unlink()
    meter.sample()  # what can't be read any more counts no more
    assert meter.joules["RAPL package-0"] == pytest.approx(5.0)


# -- the command ----------------------------------------------------------------------------------

SMALL = ["--system-tokens", "20", "--user-tokens", "5-9", "--answer-tokens", "4-8", "--think", "0"]


def test_the_command_measures_our_server(server: Running) -> None:
    flags = ["--rate", "4", "--rate", "8", "--seconds", "0.8", "--ignore-eos", *SMALL]
    done = CliRunner().invoke(commands, ["load", server.url, "--json", *flags])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    slow, fast = told["runs"]
    assert slow["answered"] == slow["requests"] > 0 and fast["answered"] == fast["requests"] > 0
    assert not slow["failed"] and 4 <= slow["answer_tokens"] <= 8 and 0 <= slow["cached_share"] < 1
    table = CliRunner().invoke(commands, ["load", server.url, *flags[2:]])
    assert (
        table.exit_code == 0 and "answer p50" in table.stdout and "of a processor" in table.stdout
    )
    server.wait_until_idle()


def test_answers_may_be_told_not_to_end(server: Running) -> None:
    body: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "seed": 1}
    for path, more in (("chat/completions", body), ("completions", {**body, "prompt": "x"})):
        told = server.post(f"/v1/{path}", {**more, "ignore_eos": True, "temperature": 2.0}).json()
        assert told["choices"][0]["finish_reason"] == "length"
    bad = server.post("/v1/chat/completions", {**body, "ignore_eos": "yes"})
    assert bad.status_code == 400 and "ignore_eos" in bad.json()["error"]["message"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rate", "1", "--users", "2"], "give one"),
        (["--warmup", "60"], "nothing would count"),
        (["--turns", "x"], "is no range"),
        (["--turns", "5-2"], "falls"),
        (["--turns", "9" * 5000], "is no range"),
        (["--model", "\udcff"], "not Unicode"),
        (["--body", r'{"a": "\ud800"}'], "not Unicode"),
        (["--turns", "0-2"], "below 1"),
        (["--body", "[1]"], "JSON object"),
        (["--body", "{"], "no JSON"),
        (["--body", '{"a":' + "[" * 100_000], "no JSON"),
        (["--write-traffic", "t", "--rate", "1e6", "--seconds", "1e6"], "too many to write"),
        (["--rate", "0"], "rate"),
        (["--traffic", "nowhere"], "nowhere"),
    ],
)
def test_flags_that_can_not_be(flags: list[str], says: str) -> None:
    done = CliRunner().invoke(commands, ["load", "http://127.0.0.1:1", *flags])
    assert done.exit_code == 2 and says in done.output


def test_no_server_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(commands, ["load", "http://127.0.0.1:1"])
    assert done.exit_code == 1
    assert str(done.exception).startswith("nothing listens at 127.0.0.1:1; start the server")
    path = tmp_path / "t.jsonl"
    done = CliRunner().invoke(commands, ["load", "h", "--write-traffic", str(path), "--rate", "2"])
    assert done.exit_code == 0 and len(read_traffic(path)) == round(2 / 3.5 * 60)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "no URL of a server"),
        ("ftp://h", "no http://"),
        ("http://h:x", "Port could not"),
        ("http://h/?q", "a ? or a #"),
        ("http://h/a b", "characters that no URL has"),
        ("http://me:secret@h", "the URL holds a password"),
        ("http://" + "a" * 70 + ".b", "can't be the name of a host"),
    ],
)
def test_a_url_that_can_not_be_is_one_line(url: str, says: str) -> None:
    done = CliRunner().invoke(commands, ["load", url])
    told = str(done.exception)
    assert done.exit_code == 1 and isinstance(done.exception, EdgeInferError)
    assert says in told and "\n" not in told and "secret" not in told


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (
            "401 Unauthorized",
            "does not take this API key .*asked with \\[the key\\].*EDGEINFER_API_KEY",
        ),
        ("302 Found", "sends on to http://other/, which is not followed; give that URL"),
    ],
)
def test_a_server_that_refuses_the_list_says_why(status: str, says: str) -> None:
    async def body(i: int, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("nothing else is asked")

    listed = reply(b'{"error": "asked with s3cret-key"}', status, "location: http://other/\r\n")
    with scripted(body, listed) as url, pytest.raises(EdgeInferError, match=says) as caught:
        first_model(url, "s3cret-key")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"data": []}', b'{"data": {"0": 1}}', b'{"data": [7]}', b"\xff",
     b'{"data": [{"id": "m"}], "more": "' + b"x" * (9 << 20) + b'"}'],
)  # fmt: skip
def test_a_list_that_is_none_names_no_model(body: bytes) -> None:
    with scripted(lambda i, writer: None, reply(body)) as url:
        assert first_model(url) == ""


def test_a_list_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_LIST_SECONDS", 0.1)
    listed = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"
    with scripted(lambda i, writer: None, listed) as url:
        with pytest.raises(EdgeInferError, match="does not answer in time"):
            first_model(url)


def test_tls_where_http_was_meant_is_one_line(server: Running) -> None:
    with pytest.raises(EdgeInferError, match="does not speak TLS .*would http:// be right"):
        first_model(server.url.replace("http", "https"))


def test_the_key_is_the_flag_s_or_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"key s3cret-key is \x1b[31mbad", "403 Forbidden"))

    monkeypatch.setenv("EDGEINFER_API_KEY", "s3cret-key")
    with scripted(script, heads=sent) as url:
        done = CliRunner().invoke(commands, ["load", url])
        CliRunner().invoke(commands, ["load", url, "--api-key", "another-key"])
    assert b"authorization: Bearer s3cret-key" in sent[0].lower().replace(b"bearer", b"Bearer")
    assert b"another-key" in sent[-1]
    told = str(done.exception)
    assert "gave no answer to a first request: HTTP 403: key [the key] is bad" in told
    assert "s3cret" not in told and "\x1b" not in told


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (reply(b'{"error": {"message": "no \\u001b[31mkey"}}', "401 No"), "HTTP 401: no key$"),
        (reply(b"<html><h1>Not Found</h1>", "404 Not Found"), "request: HTTP 404$"),
        (reply(b"busy", "429 Slow", more="retry-after: 9\r\n"), "in 2 s after HTTP 429: busy$"),
        (reply(b'data: {"error": {"message": "out of it"}}\n\n'), "in the stream: out of it$"),
        (reply(b"<html>"), "malformed stream: the reply is no stream of events$"),
    ],
)
def test_a_first_request_that_fails_is_told_in_words(data: bytes, why: str) -> None:
    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    with scripted(script) as url:
        flags = ["load", url, "--model", "m", "--deadline", "2", "--json"]
        done = CliRunner().invoke(commands, flags)
    assert done.stdout == "" and re.search(why, str(done.exception)), done.exception


def test_talks_that_have_ended_are_not_kept() -> None:
    """But those that failed are: the run raises what ended them."""
    asked = [Conversation(i * 1e-4, [Turn(5, 3)]) for i in range(300)]
    most = 0

    class Quick(Generator):
        async def _talk(self, i: int, conversation: Conversation, due: float) -> None:
            nonlocal most
            most = max(most, len(talks))
            if i == 100:
                raise ZeroDivisionError

    talks: set[asyncio.Task[None]] = set()

    async def run() -> None:
        quick = Quick(client_of("http://h:1"), Settings(model="m"), asked, Texts())
        quick._end = time.perf_counter() + 60
        quick.measured.begun = time.perf_counter()
        await quick._let_come(talks)
        await turns()

    asyncio.run(run())
    assert most < 200 and [type(each.exception()) for each in talks] == [ZeroDivisionError]


def test_a_plot_is_drawn_or_asked_for(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "p.svg"
    flags = ["--seconds", "1", "--rate", "5", *SMALL, "--plot", str(path)]
    done = CliRunner().invoke(commands, ["load", server.url, *flags])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert done.exit_code == 1 and "edgeinfer[plot]" in str(done.exception)
    else:
        assert done.exit_code == 0 and path.read_text().startswith("<?xml")
        done = CliRunner().invoke(commands, ["load", server.url, "--plot", str(tmp_path / "p.txt")])
        assert done.exit_code == 1 and "no name of a picture" in str(done.exception)


@pytest.mark.skipif(sys.platform == "win32", reason="no process there gets an interrupt alone")
def test_an_interrupt_shows_what_was_measured() -> None:
    n_answered = threading.Semaphore(0)

    async def script(i: int, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(frames("a")))
        n_answered.release()

    with scripted(script) as url:
        command = [sys.executable, "-m", "edgeinfer", "load", url, "--rate", "40", "--think", "0"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        for _ in range(12):
            assert n_answered.acquire(timeout=300)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped" in err
    assert "answer p50" in out and "of a processor" in out


def test_the_committed_traffic_is_what_the_headline_says() -> None:
    asked = read_traffic(Path(__file__).parent / "bench" / "headline.jsonl")
    assert asked == list(islice(synthetic(Shape(), 16), 200))
