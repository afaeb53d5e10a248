"""Every kind of failure in every API, streamed and whole, as the clients' exceptions tell it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import ollama
import openai
import pytest

from edgeinfer.server import service
from edgeinfer.server.frames import Frames

from .server_for_tests import N_CTX, Running, running, small_model
from .waiting import wait_until

KEY = "secret"
LONG = "x" * (N_CTX + 10)
MOST_BODY = 64 << 10
Ask = Callable[["Clients", str, str, bool], object]


class Clients(NamedTuple):
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic
    ollama: ollama.Client

    @classmethod
    def of(cls, server: Running, key: str) -> Clients:
        return cls(
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0),
            anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0),
            ollama.Client(server.url, headers={"authorization": f"Bearer {key}"}),
        )

    def close(self) -> None:
        self.openai.close()
        self.anthropic.close()
        self.ollama._client.close()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = small_model(tmp_path_factory.mktemp("model"))
    with running(
        [("tiny", path)], strict=True, api_keys=(KEY,), most_waiting=8, most_body=MOST_BODY
    ) as found:
        yield found


@pytest.fixture(scope="module")
def clients(strict: Running) -> Iterator[dict[str, Clients]]:
    """By their keys."""
    found = {key: Clients.of(strict, key) for key in (KEY, "wrong")}
    yield found
    for each in found.values():
        each.close()


# -- what is asked ---------------------------------------------------------------------------------


def chat(clients: Clients, model: str, text: str, is_streamed: bool) -> object:
    said: Any = [{"role": "user", "content": text}]
    found: Any = clients.openai.chat.completions.create(
        model=model, messages=said, max_tokens=4, stream=is_streamed
    )
    return list(found) if is_streamed else found


def text(clients: Clients, model: str, text: str, is_streamed: bool) -> object:
    found: Any = clients.openai.completions.create(
        model=model, prompt=text, max_tokens=4, stream=is_streamed
    )
    return list(found) if is_streamed else found


def responses(clients: Clients, model: str, text: str, is_streamed: bool) -> object:
    if not is_streamed:
        return clients.openai.responses.create(model=model, input=text)
    with clients.openai.responses.stream(model=model, input=text) as stream:
        for event in stream:
            if event.type == "response.failed":
                error: Any = event.response.error
                raise openai.APIError(error.message, None, body=None)  # type: ignore[arg-type]
        return stream.get_final_response()


def messages(clients: Clients, model: str, text: str, is_streamed: bool) -> object:
    said: Any = [{"role": "user", "content": text}]
    if not is_streamed:
        return clients.anthropic.messages.create(model=model, max_tokens=4, messages=said)
    with clients.anthropic.messages.stream(model=model, max_tokens=4, messages=said) as stream:
        return stream.get_final_message()


def ollama_chat(clients: Clients, model: str, text: str, is_streamed: bool) -> object:
    said: Any = [{"role": "user", "content": text}]
    found: Any = clients.ollama.chat(model=model, messages=said, stream=is_streamed)
    return list(found) if is_streamed else found


def ollama_text(clients: Clients, model: str, text: str, is_streamed: bool) -> object:
    found: Any = clients.ollama.generate(model=model, prompt=text, stream=is_streamed)
    return list(found) if is_streamed else found


ASKS = (chat, text, responses, messages, ollama_chat, ollama_text)

# -- what fails ------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """A way to fail: HTTP's status, and words that every client's exception has."""

    status: int
    words: str
    model: str = "tiny"
    text: str = "hi"
    key: str = KEY
    inside: Callable[[Running], AbstractContextManager[object]] | None = None


@contextmanager
def loading(server: Running) -> Iterator[None]:
    server.service.models.is_ready = False
    yield
    server.service.models.is_ready = True


@contextmanager
def stopping(server: Running) -> Iterator[None]:
    server.service.is_stopping = True
    yield
    server.service.is_stopping = False


@contextmanager
def full(server: Running) -> Iterator[None]:
    server.service._n_open += 8
    yield
    server.service._n_open -= 8


@contextmanager
def held(server: Running) -> Iterator[None]:
    """No step runs, so that all that comes waits."""
    engine, is_held, gate = server.llm.runtime.engine, threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        gate.wait(600)

    holder = threading.Thread(target=engine.between_steps, args=(hold,))
    holder.start()
    assert is_held.wait(120)
    try:
        yield
    finally:
        gate.set()
        holder.join()


@contextmanager
def crowded(server: Running) -> Iterator[None]:
    """What waits for the engine takes all that it may."""
    with held(server), pytest.MonkeyPatch.context() as patch:
        with server.llm.stream("x", max_tokens=1):
            patch.setattr("edgeinfer.engine.engine.WAITING_BYTES", 0)
            yield


def failing_at_once(server: Running) -> AbstractContextManager[object]:
    return server.replying("", error=RuntimeError("it broke"))


def failing_midway(server: Running) -> AbstractContextManager[object]:
    return server.replying("some text", error=RuntimeError("it broke"))


FAILURES = {
    "too long": Failure(400, "prompt is too long", text=LONG),
    "no such model": Failure(404, "'nobody' not found", model="nobody"),
    "no key": Failure(401, "API key", key="wrong"),
    "too large": Failure(413, "--max-body", text="y" * (MOST_BODY + 1)),
    "loading": Failure(503, "loading", inside=loading),
    "stopping": Failure(503, "stopping", inside=stopping),
    "full": Failure(429, "try again", inside=full),
    "crowded": Failure(429, "wait already; try again later", inside=crowded),
    "a fault at once": Failure(500, "RuntimeError", inside=failing_at_once),
    "a fault midway": Failure(500, "RuntimeError", inside=failing_midway),
}
OPENAI = {
    400: openai.BadRequestError, 401: openai.AuthenticationError, 404: openai.NotFoundError,
    413: openai.APIStatusError, 429: openai.RateLimitError, 500: openai.InternalServerError,
    503: openai.InternalServerError,
}  # fmt: skip
ANTHROPIC = {
    400: anthropic.BadRequestError, 401: anthropic.AuthenticationError,
    404: anthropic.NotFoundError, 413: anthropic.RequestTooLargeError,
    429: anthropic.RateLimitError, 500: anthropic.InternalServerError,
    503: anthropic.APIStatusError,
}  # fmt: skip


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("name", FAILURES)
def test_a_client_is_told(
    strict: Running, clients: dict[str, Clients], name: str, ask: Ask, is_streamed: bool
) -> None:
    failure = FAILURES[name]
    with failure.inside(strict) if failure.inside is not None else nullcontext():
        with pytest.raises(Exception) as caught:
            ask(clients[failure.key], failure.model, failure.text, is_streamed)
    error: Any = caught.value
    assert failure.words in str(error)
    is_late = failure.status == 500 and is_streamed  # the reply had begun
    if isinstance(error, openai.APIError):
        assert is_late or type(error) is OPENAI[failure.status]
    elif isinstance(error, anthropic.APIError):
        assert isinstance(error, anthropic.APIStatusError if is_late else ANTHROPIC[failure.status])
    else:
        assert isinstance(error, ollama.ResponseError)
        assert is_late or error.status_code == failure.status
    strict.wait_until_idle()


def test_what_goes_away_says_when_to_come_back(strict: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    key = {"authorization": f"Bearer {KEY}"}
    for inside in (loading, full):
        with inside(strict):
            reply = strict.post("/v1/chat/completions", body, headers=key)
        assert int(reply.headers["retry-after"]) >= 1
    with failing_at_once(strict):
        reply = strict.post("/v1/chat/completions", body, headers=key)
    assert reply.headers.get("x-should-retry") == "false"


def test_answers_that_never_fit_are_refused_for_good(
    strict: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one request, whoever else waits; who would fit once others have gone may come back."""
    monkeypatch.setattr("edgeinfer.engine.engine.WAITING_BYTES", 20_000)
    key = {"authorization": f"Bearer {KEY}"}
    several: dict[str, dict[str, object]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "n": 9},
        "/v1/completions": {"prompt": ["hi"] * 9},
    }
    for path, asked in several.items():
        body = {"model": "tiny", "max_tokens": 1, **asked}
        with held(strict):
            reply = strict.post(path, body, headers=key)
        assert reply.status_code == 400 and "retry-after" not in reply.headers
        told = reply.json()["error"]
        assert told["type"] == "invalid_request_error"
        assert "of the answers that are asked for take" in told["message"]
        assert "20 KiB" in told["message"] and "ask for fewer answers" in told["message"]
        with held(strict), ExitStack() as others:
            for _ in range(4):
                others.enter_context(strict.llm.stream("x", max_tokens=1))
            few = {**body, "n": 4} if "n" in body else {**body, "prompt": ["hi"] * 4}
            assert strict.post(path, few, headers=key).status_code == 429
        strict.wait_until_idle()
        assert strict.post(path, few, headers=key).status_code == 200


STREAMED: Any = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"}, "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}]},
    "/api/generate": {"prompt": "hi"}, "/v2/models/tiny/generate_stream": {"text_input": "hi"},
}  # fmt: skip


@pytest.mark.parametrize("path", STREAMED)
def test_an_answer_of_which_no_reply_comes_ends(
    strict: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails between the two: it would keep its place for ever."""

    def fail(*_: object) -> None:
        raise ValueError("of a test")

    monkeypatch.setattr(Frames, "__init__", fail)
    body = {"model": "tiny", "max_tokens": 999, "stream": True, **STREAMED[path]}
    assert strict.post(path, body, headers={"x-api-key": KEY}).status_code == 500
    strict.wait_until_idle()
    assert not strict.service.is_busy


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_that_begins_too_late_is_cut_short(
    tmp_path: Path, is_streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt became tokens while the others were ended: it is told so as they are."""
    begun, go_on = threading.Event(), threading.Event()
    begin = service._begin

    async def late(*given: Any) -> Any:
        begun.set()
        await asyncio.to_thread(go_on.wait, 20)
        return await begin(*given)

    monkeypatch.setattr(service, "_begin", late)
    body = {**STREAMED["/v1/chat/completions"], "stream": is_streamed, "ignore_eos": True}
    replies = []
    with running([("tiny", small_model(tmp_path))], grace_seconds=0.1) as found:
        asking = threading.Thread(
            target=lambda: replies.append(found.post("/v1/chat/completions", body))
        )
        asking.start()
        assert begun.wait(120)
        found.server.stop()
        wait_until(found.service._stop.is_set, "the end of the answers")
        go_on.set()
        asking.join(120)
    assert replies[0].status_code == (200 if is_streamed else 503)
    assert "the answer was cut short" in replies[0].text


BROKEN = [b"{", b"[]", b"null", b"\xff", b'{"a":' * 5000, b'{"messages": 1e999}', b'"x"', b"NaN"]
PATHS = {
    "/v1/chat/completions": "error", "/v1/completions": "error", "/v1/responses": "error",
    "/v1/messages": "type", "/api/chat": "error", "/api/generate": "error",
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_no_body_breaks_an_api(strict: Running, path: str, body: bytes) -> None:
    reply = strict.http.post(path, content=body, headers={"x-api-key": KEY})
    assert reply.status_code in (400, 404), reply.text
    assert PATHS[path] in reply.json()
