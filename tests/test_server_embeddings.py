"""Vectors over HTTP, through the clients of OpenAI and Ollama."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import ollama
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from edgeinfer.server import service
from edgeinfer.server.token_ids import check_origin

from .models_for_tests import tiny_model
from .server_for_tests import LOAD, Running, running
from .waiting import wait_until

DIM, EOS = 64, 257
TEXTS = ["a few words", "x", "another text, of more words than the first one has. " * 2]
KEYS = {"qwen3.pooling_type": 3, "tokenizer.ggml.add_eos_token": True}
FOREIGN = [9906, 11, 1917]  # of a vocabulary of 100,000
LONG = "words and more words. " * 100


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tiny_model(tmp_path_factory.mktemp("embedder"), arch="qwen3", metadata=KEYS)
    with running([("embedder", path)], load={**LOAD, "n_ctx": 256, "device": "cpu"}) as found:
        yield found


@pytest.fixture(scope="module")
def client(embedder: Running) -> Iterator[openai.OpenAI]:
    url = f"{embedder.url}/v1"
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        yield client


# -- OpenAI's ------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_library(embedder: Running, client: openai.OpenAI) -> None:
    llm = embedder.llm
    expected = llm.embed(TEXTS)
    lists = [[*llm.tokenize(text, bos=True), EOS] for text in TEXTS]
    inputs: list[Any] = [TEXTS, lists, [TEXTS[0], lists[1], TEXTS[2]]]
    for given in inputs:
        found = client.embeddings.create(model="m", input=given)  # in base64
        assert [each.index for each in found.data] == [0, 1, 2]
        np.testing.assert_array_equal(np.array([e.embedding for e in found.data]), expected)
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, lists))
    for one in (TEXTS[0], lists[0]):
        found = client.embeddings.create(model="m", input=one, encoding_format="float")
        np.testing.assert_array_equal(np.float32(found.data[0].embedding), expected[0])
    short = client.embeddings.create(model="m", input=TEXTS, dimensions=7)
    np.testing.assert_array_equal(
        np.array([each.embedding for each in short.data]), llm.embed(TEXTS, dimensions=7)
    )


def test_replies_are_of_the_declared_type(embedder: Running) -> None:
    for path in ("/v1/embeddings", "/embeddings"):
        reply = embedder.post(path, {"model": "m", "input": "x"})
        CreateEmbeddingResponse.model_validate(reply.json(), strict=True)
        assert reply.json()["model"] == "embedder"
    body = {"model": "m", "input": "x", "encoding_format": "base64"}
    (only,) = embedder.post("/v1/embeddings", body).json()["data"]
    assert len(base64.b64decode(only["embedding"])) == 4 * DIM


@pytest.mark.parametrize(
    ("body", "param", "found"),
    [
        ({}, "input", "input is None"),
        ({"input": ""}, None, ""),
        ({"input": []}, "input", "token ids"),
        ({"input": [[]]}, "input", "input is"),
        ({"input": ["x"] * 2049}, "input", "at most 2048"),
        ({"input": ["x", 5]}, "input", "token ids"),
        ({"input": [1.5]}, "input", "token ids"),
        ({"input": [True]}, "input", "token ids"),
        ({"input": {"text": "x"}}, "input", "token ids"),
        ({"input": LONG}, "input", "context_length_exceeded: "),
        ({"input": FOREIGN}, "input", "check_embedding_ctx_length=False"),
        ({"input": [[-1]]}, "input", "check_embedding_ctx_length=False"),
        ({"input": [[116, 104, 101]]}, "input", "tokenizer"),
        ({"input": [[119, 111, 259, 258, 258, 116, 104, 101] * 3]}, "input", "tokenizer"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format", "'float', 'base64'"),
        ({"input": "x", "dimensions": 0}, "dimensions", "dimensions is 0"),
        ({"input": "x", "dimensions": 65}, "dimensions", "have 64"),
        ({"input": "x", "dimensions": True}, "dimensions", "dimensions is True"),
        ({"input": "x", "truncate": "yes"}, "truncate", "true or false"),
    ],
)
def test_what_can_not_be_is_refused(
    embedder: Running, body: Any, param: str | None, found: str
) -> None:
    reply = embedder.post("/v1/embeddings", {"model": "m", **body})
    if param is None:  # the tokens that begin and end a text are enough
        assert reply.status_code == 200
        return
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and found in error["message"]


def test_every_part_of_the_models_own_tokens_is_taken(embedder: Running) -> None:
    """Also one that begins inside a character, or spells a control token."""
    tokenizer = embedder.llm.runtime.tokenizer
    ids = tokenizer.encode("the others in the 水 said <|eos|> and then 🙂 the end", bos=True)
    parts = [ids[i:j] for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)]
    check_origin(tokenizer, parts)
    check_origin(tokenizer, [tokenizer.encode("<|eos|> the end", parse_special=True)])


def test_ids_that_do_not_fit_are_not_looked_at(
    embedder: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(service, "check_origin", lambda _, texts: looked.extend(map(len, texts)))
    for truncate, status in ((False, 400), (True, 200)):
        body = {"input": [[5] * 9000, "a text of more letters"], "truncate": truncate}
        assert embedder.post("/v1/embeddings", body).status_code == status
    assert looked == [embedder.llm.n_ctx, 22] * 2


def test_a_text_is_cut_only_where_that_is_asked(embedder: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="exceeds the context window") as caught:
        client.embeddings.create(model="m", input=LONG)
    assert caught.value.code == "context_length_exceeded"
    found = client.embeddings.create(model="m", input=LONG, extra_body={"truncate": True})
    expected = embedder.llm.embed(LONG, truncate=True)
    np.testing.assert_array_equal(np.array([found.data[0].embedding]), expected)
    assert found.usage.prompt_tokens == 256


def test_a_model_without_pooling_says_what_to_start_with(server: Running) -> None:
    reply = server.post("/v1/embeddings", {"model": "m", "input": "x"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert "--pooling mean" in error["message"] and "--pooling last" in error["message"]
    assert "--pooling mean" in server.post("/api/embed", {"input": "x"}).json()["error"]


def test_clients_at_once_and_beside_answers_have_the_same(
    embedder: Running, client: openai.OpenAI
) -> None:
    expected, found = embedder.llm.embed(TEXTS), []

    def ask(i: int) -> None:
        given = client.embeddings.create(model="m", input=TEXTS)
        found.append([each.embedding for each in given.data])

    stream = client.completions.create(model="m", prompt="words", max_tokens=200, stream=True)
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for _ in stream:
        pass
    assert len(found) == 12
    for each in found:
        np.testing.assert_array_equal(np.array(each), expected)
    metrics = embedder.http.get("/metrics").text
    assert 'edgeinfer_prompt_tokens_total{model_name="embedder"}' in metrics


def test_who_has_gone_keeps_nothing_busy(embedder: Running) -> None:
    body = json.dumps({"model": "m", "input": ["words and more words. " * 8] * 2000}).encode()
    with pytest.raises(httpx2.TimeoutException):
        embedder.http.post("/v1/embeddings", content=body, timeout=0.5)
    scheduler = embedder.llm.runtime.engine._scheduler
    wait_until(lambda: not (embedder.service.is_busy or scheduler.has_work), "its end")


def test_the_end_of_the_server_cuts_short_with_an_error(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, arch="qwen3", metadata=KEYS)
    load = {**LOAD, "n_ctx": 256, "device": "cpu"}
    replies = []
    with running([("m", path)], load=load, grace_seconds=0.1) as served:  # type: ignore[arg-type]
        body = {"model": "m", "input": ["words and more words. " * 8] * 2000}
        thread = threading.Thread(
            target=lambda: replies.append(served.post("/v1/embeddings", body))
        )
        thread.start()
        engine = served.llm.runtime.engine
        wait_until(lambda: engine._scheduler.jobs or replies, "a text that is read")
        served.server.stop()
        thread.join(120)
    assert replies[0].status_code == 503 and "stopping" in replies[0].json()["error"]["message"]


# -- Ollama's ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ollama_client(embedder: Running) -> Iterator[ollama.Client]:
    with ollama.Client(host=embedder.url) as client:
        yield client


def test_ollama(embedder: Running, ollama_client: ollama.Client) -> None:
    client = ollama_client
    expected = embedder.llm.embed(TEXTS)
    found = client.embed(model="embedder", input=TEXTS)
    np.testing.assert_array_equal(np.float32(found.embeddings), expected)
    lists = [[*embedder.llm.tokenize(text, bos=True), EOS] for text in TEXTS]
    assert found.prompt_eval_count == sum(map(len, lists)) and (found.total_duration or 0) > 0
    one = client.embed(model="embedder", input=TEXTS[0], dimensions=9, options={"num_ctx": 64})
    np.testing.assert_array_equal(
        np.float32(one.embeddings), embedder.llm.embed(TEXTS[:1], dimensions=9)
    )
    old = client.embeddings(model="embedder", prompt=TEXTS[0])
    np.testing.assert_array_equal(np.float32(old.embedding), expected[0])
    cut = np.float32(client.embed(model="embedder", input=LONG).embeddings)
    np.testing.assert_array_equal(cut, embedder.llm.embed(LONG, truncate=True))
    with pytest.raises(ollama.ResponseError, match="context_length_exceeded"):
        client.embed(model="embedder", input=LONG, truncate=False)
    assert client.embed(model="embedder", input=[]).embeddings == []
    assert embedder.post("/api/embed", {"model": "embedder"}).json()["embeddings"] == []
    assert embedder.post("/api/embeddings", {"model": "embedder"}).json() == {"embedding": []}
    assert "embedding" in (client.show("embedder").capabilities or [])
    assert embedder.http.get("/props").json()["chat_template"] == ""
    for bad in (5, [5], {"x": 1}):
        reply = embedder.post("/api/embed", {"input": bad})
        assert (reply.status_code, list(reply.json())) == (400, ["error"])


@pytest.mark.parametrize(
    ("path", "field"), [("/api/embed", "input"), ("/api/embeddings", "prompt")]
)
@pytest.mark.parametrize("text", ["words", ""])
def test_a_model_stays_as_long_as_it_was_told_to(
    embedder: Running, path: str, field: str, text: str
) -> None:
    def expiry() -> list[str]:
        return [each["expires_at"][:4] for each in embedder.http.get("/api/ps").json()["models"]]

    body = {"model": "embedder", field: text}
    assert embedder.post(path, {**body, "keep_alive": "1h"}).status_code == 200
    assert expiry() not in ([], ["2099"])
    assert embedder.post(path, {**body, "keep_alive": -1}).status_code == 200
    assert expiry() == ["2099"]
    assert embedder.post(path, {**body, "keep_alive": 0}).status_code == 200
    wait_until(lambda: not expiry(), "the end of the model")
    assert embedder.post(path, body).status_code == 200 and expiry() == ["2099"]
