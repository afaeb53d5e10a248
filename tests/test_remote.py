"""Answers of servers: what a client makes of good ones, of bad ones, and of none."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeinfer.cli.main import main
from edgeinfer.errors import EdgeInferError, InvalidRequestError
from edgeinfer.remote.address import read_address
from edgeinfer.remote.frames import frames
from edgeinfer.remote.model import RemoteModel
from edgeinfer.remote.refusals import broken
from edgeinfer.remote.server import Server

from .fake_api import DONE, FakeApi, delta, fake_api, frame, reply, reset, stream, until_read
from .waiting import wait_until

KEY = "sk-secret-0123456789"
SAYS_HI = stream(delta(content="Hi "), delta(content="there"), delta("stop"), DONE)


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with fake_api() as found:
        yield found


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDGEINFER_API_KEY", "OPENAI_API_KEY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def opened(api: FakeApi, key: str | None = None) -> RemoteModel:
    return Server(read_address(api.url, key)).open()


def ask(api: FakeApi, *answers: Any, key: str | None = None, **sampling: Any) -> Any:
    """The events of an answer, and its completion."""
    api.answers = list(answers)
    stream = opened(api, key).stream_chat("hello", **sampling)
    return list(stream), stream.completion


def failing(api: FakeApi, *answers: Any, key: str | None = None) -> tuple[str, str]:
    """What an answer says before it fails, and why it does."""
    api.answers, text = list(answers), ""
    with pytest.raises(EdgeInferError) as caught:
        for event in opened(api, key).stream_chat("hello"):
            text += event.text
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    return text, str(caught.value)


# -- addresses and keys --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "path", "place"),
    [
        ("http://127.0.0.1:8080", "/v1/models", "127.0.0.1:8080"),
        ("localhost:8080/", "/v1/models", "localhost:8080"),
        ("https://api.example.com/v1/", "/v1/models", "api.example.com"),
        ("https://example.com/api/v1/chat/completions", "/api/v1/models", "example.com"),
        ("http://[::1]:80/v1", "/v1/models", "[::1]:80"),
    ],
)
def test_a_url_is_taken_as_people_have_it(given: str, path: str, place: str) -> None:
    address = read_address(given, None)
    assert (address.path("/models"), address.place) == (path, place)
    assert address.root("/props") == path.replace("/v1/models", "/props")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("example.com", "begins with no http"),
        ("ftp://example.com", "begins with no http"),
        ("http://", "and a host"),
        ("http://a:99999/v1", "Port out of range"),
        ("http://me:pa55word@a/v1", "EDGEINFER_API_KEY"),
        ("http://a/v1?key=1", "a \\? or"),
        ("http://a/\x1b[2J", "no URL"),
        ("", "no URL"),
    ],
)
def test_what_is_no_url_is_refused(given: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why) as caught:
        read_address(given, None)
    assert "pa55word" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_key_goes_where_nobody_can_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert read_address("https://a", None).key == KEY
    assert read_address("http://localhost", None).key == KEY
    assert read_address("http://192.0.2.1", None).key is None
    assert read_address("http://192.0.2.1", "mine").key == "mine"
    monkeypatch.setenv("EDGEINFER_API_KEY", "ours")
    assert read_address("http://192.0.2.1", None).key == "ours"
    assert KEY not in repr(read_address("https://a", KEY))
    for bad in ("a b", "a\nb: c", "schlüssel"):
        with pytest.raises(InvalidRequestError, match="no header can hold") as caught:
            read_address("https://a", bad)
        assert bad not in str(caught.value)


def test_a_key_that_is_missing_or_wrong(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api.models = reply({"error": {"message": f"bad key {KEY}"}}, "401 Unauthorized")
    with pytest.raises(EdgeInferError, match=r"asks for an API key .*set EDGEINFER_API_KEY"):
        opened(api)
    with pytest.raises(EdgeInferError, match=r"not take this API key .*bad key \[the key\]"):
        opened(api, KEY)
    assert f"Authorization: Bearer {KEY}" in api.requests[-1][0]


# -- what is told --------------------------------------------------------------------------------


def test_an_answer_has_what_was_told_and_no_more(api: FakeApi) -> None:
    events, answer = ask(api, SAYS_HI)
    assert [event.text for event in events] == ["Hi ", "there", ""]
    assert (answer.text, answer.finish_reason) == ("Hi there", "stop")
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == 0
    assert answer.timings.decode_tok_s == 0 and answer.timings.first_token_s > 0
    model = opened(api)
    assert (model.n_ctx, model.n_ctx_train, model.plan, model.recommended) == (None, None, None, {})
    assert api.bodies()[0]["stream_options"] == {"include_usage": True}
    assert "return_progress" not in api.bodies()[0] and "temperature" not in api.bodies()[0]


def test_counts_and_rates_are_the_servers(api: FakeApi) -> None:
    usage = {
        "prompt_tokens": 30, "completion_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 20},
    }  # fmt: skip
    timings = {"predicted_per_second": 41.5, "prompt_per_second": 900, "draft_n": 4}
    last = {"choices": [], "usage": usage, "timings": timings}
    _, answer = ask(api, stream(delta(content="x"), delta("length"), last, DONE, is_chunked=True))
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (30, 20)
    assert answer.usage.completion_tokens == 12 and answer.finish_reason == "length"
    assert answer.timings.decode_tok_s == 41.5 and answer.timings.proposed_tokens == 4


@pytest.mark.parametrize(
    "told",
    [
        {"reasoning_content": "so", "reasoning": "so"},
        {"reasoning": "so"},
        {"thinking": "so"},
        {"content": "<think>so</think>"},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}]},
    ],
)
def test_reasoning_is_found_by_every_name(api: FakeApi, told: dict[str, Any]) -> None:
    _, answer = ask(api, stream(delta(**told), delta(content="yes"), delta("stop"), DONE))
    assert (answer.reasoning, answer.text) == ("so", "yes")


def test_a_context_length_is_found_by_every_name(api: FakeApi) -> None:
    for entry in (
        {"max_model_len": 512}, {"context_length": 512}, {"meta": {"n_ctx": 512, "n_ctx_train": 9}},
    ):  # fmt: skip
        api.models = reply({"data": [{"id": "m", **entry}]})
        assert opened(api).n_ctx == 512
    api.models = reply([{"id": "m"}])  # as some have it
    settings = {"n_ctx": 1024, "params": {"temperature": 0.699999988, "top_k": 40, "seed": 1}}
    api.others = reply({"default_generation_settings": settings})
    model = opened(api)
    assert (model.n_ctx, model.recommended) == (1024, {"temperature": 0.7, "top_k": 40})
    assert api.heads("/props?model=m")


def test_malformed_facts_are_not_told(api: FakeApi) -> None:
    usage = {"prompt_tokens": "many", "completion_tokens": -1, "prompt_tokens_details": [3]}
    odd = {"choices": [{"delta": None, "logprobs": {"content": [{"token": 3}, 4]}}]}
    bad = [{"choices": "none"}, {"choices": [None]}, odd, {"usage": usage}, {"timings": 3}, {}]
    _, answer = ask(api, stream(*bad, delta(content="a\ud800b"), delta("stop"), DONE))
    assert (answer.text, answer.usage.prompt_tokens) == ("a\ufffdb", 0)
    rows = [None, 3, {"id": 4}, {"id": "x" * 9999}, "plain", {"id": "m", "max_model_len": True}]
    api.models = reply({"data": rows})
    server = Server(read_address(api.url, None))
    assert server.open("m").n_ctx is None
    assert [each.id for each in server.offered] == ["plain", "m"]


def test_probabilities_come_by_the_texts_of_tokens(api: FakeApi) -> None:
    row = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -0.9}]}
    told = {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [row]}}]}
    api.answers = [stream(told, delta("stop"), DONE)]
    model = opened(api)
    answer = list(model.stream_chat("x", logprobs=1))[-1].completion  # type: ignore[union-attr]
    assert answer.logprobs is not None
    ((id, p),) = answer.logprobs[0].top
    assert (model.detokenize([id]), p, answer.logprobs[0].text) == ("b", -0.9, "a")
    assert api.bodies()[0]["top_logprobs"] == 1


def test_a_server_that_cannot_stream(api: FakeApi) -> None:
    whole = {"choices": [{"message": {"content": "all of it"}, "finish_reason": "stop"}]}
    assert ask(api, reply(whole))[1].text == "all of it"


def test_a_request_is_made_anew_as_the_server_wants_it(api: FakeApi) -> None:
    wants = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    first = reply({"error": {"message": wants}}, "400 Bad Request")
    second = reply({"detail": [{"loc": ["stream_options"], "msg": "extra"}]}, "422 Unprocessable")
    _, answer = ask(api, first, second, SAYS_HI, max_tokens=5)
    assert answer.text == "Hi there"
    last = api.bodies()[-1]
    assert last["max_completion_tokens"] == 5
    assert "max_tokens" not in last and "stream_options" not in last


def test_what_an_answer_must_be_is_sent_by_the_names_that_servers_know(api: FakeApi) -> None:
    ask(api, SAYS_HI, schema='{"type": "object"}', stop=("a", "b"), repeat_penalty=1.1, seed=None)
    sent = api.bodies()[-1]
    assert sent["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert sent["stop"] == ["a", "b"] and sent["repetition_penalty"] == 1.1
    assert "seed" not in sent and "schema" not in sent


def test_old_turns_go_where_there_is_no_room(api: FakeApi) -> None:
    said = {"message": "too long", "code": "context_length_exceeded", "n_prompt_tokens": 900}
    too_long = reply({"error": {**said, "n_ctx": 500}}, "400 Bad Request")
    api.answers = [too_long, SAYS_HI]
    turns: list[Any] = [{"role": "system", "content": "brief"}]
    for i in range(6):
        turns += [{"role": "user", "content": f"{i} " * 50}]
        turns += [{"role": "assistant", "content": "yes " * 50}]
    turns.append({"role": "user", "content": "last"})
    model = opened(api)
    stream = model.stream_chat(turns, overflow="drop-turns")
    assert list(stream)[-1].completion.text == "Hi there"  # type: ignore[union-attr]
    sent = api.bodies()[-1]["messages"]
    assert sent[0]["role"] == "system" and sent[-1]["content"] == "last"
    assert 0 < stream.dropped_turns == (len(turns) - len(sent)) / 2
    api.answers = [too_long]
    with pytest.raises(EdgeInferError, match="900 tokens to read, and the context at .* holds 500"):
        list(model.stream_chat("one long text", overflow="drop-turns"))
    with pytest.raises(InvalidRequestError, match="slide"):
        model.stream_chat("x", overflow="slide")


# -- what goes wrong -----------------------------------------------------------------------------


def error(status: str, message: str, **more: str) -> bytes:
    return reply({"error": {"message": message}}, status, **more)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (error("404 Not Found", "The model `m` does not exist"), "no model m .*; it lists it all"),
        (reply(b"<h1>Not Found</h1>", "404 Not Found"), r"has no /v1 \(HTTP 404\); check the URL"),
        (error("404 Not Found", "nothing here"), "check the URL's path"),
        (error("403 Forbidden", "not from there"), r"refuses \(HTTP 403: not from there"),
        (error("403 Forbidden", "no such key"), "does not take this API key .*no such key"),
        (error("429 Too Many", "slow down", retry_after="20"), "slow down.*try again in 20 s"),
        (error("503 Unavailable", "Loading model"), "is not ready .*Loading model.*later"),
        (error("500 Oops", "it \x1b[2Jbroke\nhere"), r"failed \(HTTP 500: it broke here\)"),
        (reply(b"<html>proxy", "502 Bad", kind="text/html"), r"failed \(HTTP 502\)"),
        (reply(b"[" * 9999, "400 Bad"), "refuses"),
        (reply(b"", "302 Found", location="http://192.0.2.9/x"), "sends on to http://192.0.2.9/x"),
        (reply(b"<html>hi</html>", kind="text/html"), "does not answer as OpenAI's API does"),
        (reply({"hello": 1}), "does not answer as OpenAI's API does"),
        (b"SSH-2.0-OpenSSH\r\n", "does not answer in HTTP .*https://"),
        (b"", "closed the connection without an answer; does it run, and without TLS"),
        (f"{KEY}\r\n\r\n".encode(), "does not answer in HTTP"),
        (reply(f"<p>{KEY}</p>".encode(), kind="text/html"), r"'<p>\[the key\]</p>'"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n", "does not answer in HTTP"),
    ],
)
def test_a_reply_that_is_no_answer_is_told_in_a_line(api: FakeApi, answer: Any, why: str) -> None:
    import re

    text, told = failing(api, answer, key=KEY)
    assert text == "" and re.search(why, told), told


def test_a_reply_that_only_drips_is_not_waited_for(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its bytes comes in time."""
    monkeypatch.setattr("edgeinfer.remote.model._WAIT_SECONDS", 0.4)
    drips = [part for i in range(30) for part in (f"x-{i}: y\r\n".encode(), 0.05)]
    text, told = failing(api, [b"HTTP/1.1 200 OK\r\n", *drips, *SAYS_HI[1:]])
    assert text == "" and "does not answer in time" in told


@pytest.mark.parametrize("life", [b": ping\n\n", {"choices": []}, delta(content="")])
def test_signs_of_life_are_no_answer(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, life: Any
) -> None:
    """They keep whoever waits for long, and not for ever; what comes of an answer begins anew."""
    clock = [100.0]

    def tick(connection: socket.socket) -> None:
        until_read(connection)
        clock.append(clock[-1] + 0.05)

    times = SimpleNamespace(monotonic=lambda: clock[-1])
    monkeypatch.setattr("edgeinfer.remote.model.time", times)
    monkeypatch.setattr("edgeinfer.remote.model._LIFE_SECONDS", 0.6)
    some = [life, tick] * 7
    parts = stream(*some, delta(content="so "), *some, delta(content="far"), *some * 8)
    text, told = failing(api, parts)
    assert text == "so far" and "signs of life for 0 minutes" in told and api.place in told


def test_who_waits_is_told_for_whom(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = f"waiting for {api.place} to answer; Ctrl-C stops\n"

    def is_told(connection: socket.socket) -> None:
        said: Any = sys.stderr  # of pytest's
        wait_until(lambda: waiting in said.getvalue(), "a word of who is waited for")

    for answer, seconds, n in ([is_told, *SAYS_HI], 0.1, 1), (SAYS_HI, 600.0, 0):
        monkeypatch.setattr("edgeinfer.cli.console._SILENT_SECONDS", seconds)
        api.answers = [answer]
        with pytest.raises(SystemExit) as exit:
            main(["run", "--url", api.url, "-p", "hello"])
        said = capsys.readouterr()
        assert (exit.value.code, said.out) == (0, "Hi there\n") and said.err.count(waiting) == n


HALF = frame(delta(content="lost"))[:-20]


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(
    ("rest", "why"),
    [
        ([{"error": {"message": f"boom {KEY}"}}], r"with an error: boom \[the key\]"),
        ([{"error": "boom"}], "with an error: boom"),
        ([{"object": "error", "message": "boom"}], "with an error: boom"),
        ([delta("content_filter")], "cut the answer off"),
        ([HALF], "broke off before the end"),
        ([b"data: {not json}\n\n"], "does not answer as OpenAI's API does"),
        ([b"data: [1]\n\n"], "does not answer as OpenAI's API does"),
        ([], "broke off before the end"),
        ([reset], "broke off before the end"),
        ([b"data: " + b"x" * (9 << 20)], "an event of more than 8 MiB"),
        ([b"data: x\n" * (5 << 20)], "an event of more than 8 MiB"),
    ],
)  # fmt: skip
def test_what_came_before_the_fault_is_kept(
    api: FakeApi, rest: list[Any], why: str, is_chunked: bool
) -> None:
    import re

    parts = stream(delta(content="so far"), *rest, is_chunked=is_chunked)
    text, told = failing(api, parts, key=KEY)
    assert text == "so far" and re.search(why, told), told


@pytest.mark.parametrize("rest", [[], [DONE], [reset], [HALF]])
def test_an_answer_that_has_ended_is_whole_whatever_follows(api: FakeApi, rest: list[Any]) -> None:
    assert ask(api, stream(delta(content="all"), delta("stop"), *rest))[1].text == "all"


def test_a_mark_of_the_end_is_an_end_without_a_reason(api: FakeApi) -> None:
    assert ask(api, stream(delta(content="all"), DONE))[1].text == "all"


def test_there_is_no_connection(api: FakeApi) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        port = taken.getsockname()[1]
        with pytest.raises(EdgeInferError, match="nothing listens at 127"):
            Server(read_address(f"http://127.0.0.1:{port}", None)).open()
    with pytest.raises(EdgeInferError, match="can't be the name of a host"):
        Server(read_address(f"http://{'a' * 70}.example", None)).open()
    address = read_address("https://a.example", None)
    for fault, why in (
        (socket.gaierror(-2, "unknown"), "no address is known for a.example"),
        (TimeoutError(), "does not answer in time"),
        (OSError(113, "No route to host"), "No route to host"),
        (ssl.SSLError(1, "WRONG_VERSION_NUMBER"), "would http:// be right"),
    ):
        assert why in str(broken(fault, address, has_begun=False))


def test_tls_is_spoken_with_who_has_a_trusted_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    try:
        subprocess.run(
            [*command.split(), "subjectAltName=DNS:localhost", "-keyout", "key", "-out", "cert"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl, which makes the certificate, is missing")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with fake_api(wrap=lambda plain: context.wrap_socket(plain, server_side=True)) as api:
        url = api.url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(EdgeInferError, match=r"certificate .*not trusted.*SSL_CERT_FILE"):
            Server(read_address(url, KEY)).open()
        assert api.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
        api.answers = [SAYS_HI]
        model = Server(read_address(url, KEY)).open()
        assert list(model.stream_chat("x"))[-1].completion.text == "Hi there"  # type: ignore
        api.answers = [stream(delta(content="x"), 600.0)]
        answer = model.stream_chat("x")
        next(answer)
        assert_ends_when_closed(answer)


def assert_ends_when_closed(answer: Any) -> None:
    """Within a moment, though another thread waits for more of it."""
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend(answer))
    reader.start()
    time.sleep(0.1)
    answer.close()
    reader.join(120)
    assert not reader.is_alive() and seen == []
    assert answer.completion.finish_reason == "cancelled"


def test_closing_ends_the_connection_at_once(api: FakeApi) -> None:
    api.answers = [stream(delta(content="x"), *[frame(delta(content="y")), 0.02] * 5000)]
    answer = opened(api).stream_chat("x")
    next(answer)
    answer.close()
    assert answer.completion.text == "x"
    wait_until(lambda: api.has_lost_clients, "the end of the connection")
    api.answers = [[600.0]]  # it has not begun to answer
    assert_ends_when_closed(opened(api).stream_chat("x"))
    never = opened(api).stream_chat("x")
    never.close()
    assert list(never) == []


def test_a_redirect_is_not_followed(api: FakeApi) -> None:
    with fake_api() as other:
        api.models = reply(b"", "307 Moved", location=other.url + "/v1/models")
        with pytest.raises(EdgeInferError, match="give that URL"):
            opened(api, KEY)
        assert other.requests == []


def test_the_environments_proxy_is_asked(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", api.url.replace("//", "//me:p%40ss@"))
    assert Server(read_address("http://far.example/v1", None)).open().name == "m at far.example"
    head = api.requests[0][0]
    assert head.startswith("GET http://far.example/v1/models HTTP/1.1\r\nHost: far.example\r\n")
    assert "Proxy-Authorization: Basic bWU6cEBzcw==" in head
    monkeypatch.setenv("https_proxy", api.url)
    with pytest.raises(EdgeInferError, match=r"no connection to far.example \(Tunnel .* 404"):
        Server(read_address("https://far.example/v1", KEY)).open()
    assert api.requests[-1][0].startswith("CONNECT far.example:443")
    assert KEY not in str(api.requests)
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(EdgeInferError, match="proxy .* is of kind socks5, http is supported"):
        Server(read_address("http://far.example", None)).open()
    assert opened(api).name.startswith("m at 127")  # nobody else is asked about this machine


def test_events_are_the_same_however_they_are_cut() -> None:
    events = [{"a": "ä\n"}, {"b": 1}, {"c": "€" * 3}]
    whole = b": hello\r\n\r\n" + b"".join(map(frame, events)).replace(b"\n", b"\r\n")
    whole += b"event: x\ndata:" + json.dumps({"d": 4}, indent=1).replace("\n", "\ndata: ").encode()
    whole += b"\n\n" + DONE + b"data: never\n\n"
    wanted = [*events, {"d": 4}, None]
    for n in (1, 2, 3, 7, 50, len(whole)):
        cut = [whole[i : i + n] for i in range(0, len(whole), n)]
        assert list(frames(cut, read_address("http://here", None))) == wanted


def test_a_chat_without_a_server_imports_none_of_this() -> None:
    code = (
        "import sys, edgeinfer.cli.chat, edgeinfer.cli.run;"
        "print([m for m in sys.modules if m.startswith('edgeinfer.remote')"
        " or m in ('ssl', 'http.client', 'urllib.request')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
