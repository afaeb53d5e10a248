"""KServe's protocol: what models are, tensors in JSON and as bytes, text in events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.server.errors import ApiError
from edgeinfer.server.fields import Fields
from edgeinfer.server.tensors import Output, read_body, read_texts, write

from .models_for_tests import tiny_model
from .server_for_tests import LOAD, Running, running

DIM = 64
LENGTH = "inference-header-content-length"
SPEC = {"max_tokens": 6, "seed": 1}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Text and embeddings, of a model with a name of several parts."""
    path = tiny_model(tmp_path_factory.mktemp("kserve"))
    load: Any = {**LOAD, "n_ctx": 256, "device": "cpu", "pooling": "mean"}
    with running([("org/tiny", path)], load=load, strict=True) as found:
        yield found


def input_of(texts: list[str], **more: Any) -> dict[str, Any]:
    return {
        "name": "text_input", "datatype": "BYTES", "shape": [len(texts)], "data": texts, **more
    }  # fmt: skip


def as_bytes(texts: list[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(len(data).to_bytes(4, "little") + data for data in encoded)


def post_binary(served: Running, body: Any, behind: bytes, length: Any = None) -> httpx2.Response:
    text = json.dumps(body).encode()
    headers = {LENGTH: str(len(text) if length is None else length)}
    url = "/v2/models/org/tiny/infer"
    return served.http.post(url, content=text + behind, headers=headers)


def outputs_of(reply: httpx2.Response) -> dict[str, Any]:
    """By name, read as the protocol says."""
    length = int(reply.headers.get(LENGTH, len(reply.content)))
    behind, found = reply.content[length:], {}
    for each in json.loads(reply.content[:length])["outputs"]:
        data = each.get("data")
        if data is None:
            size = each["parameters"]["binary_data_size"]
            data, behind = behind[:size], behind[size:]
            if each["datatype"] == "FP32":
                data = np.frombuffer(data, "<f4")
            else:
                data = read_texts(
                    [Fields({**each, "name": "x", "shape": each["shape"]})], data, "x"
                )
        kind = np.float32 if each["datatype"] == "FP32" else object  # or a last NUL would be lost
        found[each["name"]] = np.array(data, kind).reshape(each["shape"])
    assert behind == b""
    return found


# -- what there is -------------------------------------------------------------------------------


def test_health_and_what_models_are(both: Running) -> None:
    get = both.http.get
    assert get("/v2").json()["name"] == "edgeinfer"
    assert "binary_tensor_data" in get("/v2/").json()["extensions"]
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").status_code == 200
    for base in ("/v2/models/org/tiny", "/v2/models/org%2Ftiny/versions/1"):
        assert get(f"{base}/ready").json() == {"name": "org/tiny", "ready": True}
        told = get(base).json()
        assert (told["name"], told["versions"]) == ("org/tiny", ["1"])
        assert told["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": [-1]}]
        assert told["outputs"] == [
            {"name": "text_output", "datatype": "BYTES", "shape": [-1]},
            {"name": "embedding", "datatype": "FP32", "shape": [-1, DIM]},
        ]
        config = get(f"{base}/config").json()
        assert (config["name"], config["max_batch_size"]) == ("org/tiny", 0)
        assert [each["data_type"] for each in config["output"]] == ["TYPE_STRING", "TYPE_FP32"]


def test_a_model_without_pooling_has_text_alone(server: Running) -> None:
    told = server.http.get("/v2/models/tiny").json()
    assert [each["name"] for each in told["outputs"]] == ["text_output"]
    body = {"inputs": [input_of(["x"])], "outputs": [{"name": "embedding"}]}
    reply = server.post("/v2/models/tiny/infer", body)
    assert reply.status_code == 400 and "'text_output'" in reply.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("GET", "/v2/models/org/tiny/versions/2", 404),
        ("GET", "/v2/models/org/tiny/versions/2/ready", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/org/tiny/versions/2/generate", 404),
        ("GET", "/v2/models/org/tiny/infer", 405),
        ("GET", "/v2/models/org/tiny/versions/1/generate_stream", 405),
        ("POST", "/v2/models/org/tiny", 405),
        ("POST", "/v2/health/live", 405),
        ("GET", "/v2/nothing", 404),
    ],
)
def test_what_is_not_there(both: Running, method: str, path: str, status: int) -> None:
    reply = both.http.request(method, path, json={} if method == "POST" else None)
    assert reply.status_code == status
    assert list(reply.json()) == ["error"] and isinstance(reply.json()["error"], str)


def test_only_health_is_open_without_a_key(tmp_path: Path) -> None:
    with running([("tiny", tiny_model(tmp_path))], load=LOAD, api_keys=("k",)) as served:
        assert served.http.get("/v2/health/ready").status_code == 200
        reply = served.http.get("/v2/models/tiny")
        assert (reply.status_code, list(reply.json())) == (401, ["error"])


# -- infer ---------------------------------------------------------------------------------------


def test_json_and_bytes_are_the_same_tensors(both: Running) -> None:
    texts = ["some words", "ä 水\0\n", ""]
    answers = [both.llm.generate(text, **SPEC).text for text in texts]  # type: ignore[arg-type]
    vectors = both.llm.embed(texts)
    bare = input_of(texts)
    del bare["data"]
    data = as_bytes(texts)
    binary = {**bare, "parameters": {"binary_data_size": len(data)}}
    for is_binary in (False, True):
        parameters = {**SPEC, "binary_data_output": is_binary, "sequence_id": 7}
        body: Any = {"id": "7", "inputs": [input_of(texts)], "parameters": parameters}
        for reply in (
            both.post("/v2/models/org/tiny/versions/1/infer", body),
            post_binary(both, body | {"inputs": [binary]}, data),
        ):
            assert reply.status_code == 200, reply.text
            assert (LENGTH in reply.headers) == is_binary
            found = outputs_of(reply)
            assert list(found) == ["text_output", "embedding"]
            assert found["text_output"].tolist() == answers
            np.testing.assert_array_equal(np.float32(found["embedding"]), vectors)
            assert json.loads(reply.content[: int(reply.headers.get(LENGTH, 1 << 30))])["id"] == "7"
    for name, is_binary in (("embedding", True), ("text_output", False)):
        wanted = [{"name": name, "parameters": {"binary_data": is_binary}}]
        reply = both.post(
            "/v2/models/org/tiny/infer",
            {"inputs": [bare | {"data": [[*texts]]}], "outputs": wanted, "parameters": SPEC},
        )
        assert list(outputs_of(reply)) == [name] and (LENGTH in reply.headers) == is_binary


def test_no_text_is_no_answer(both: Running) -> None:
    found = outputs_of(both.post("/v2/models/org/tiny/infer", {"inputs": [input_of([])]}))
    assert found["text_output"].shape == (0,) and found["embedding"].shape == (0, DIM)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"inputs": []}, "inputs has no 'text_input'"),
    ({"inputs": {}}, "inputs is {}"),
    ({"inputs": [input_of(["x"]), input_of(["x"])]}, "inputs[1].name"),
    ({"inputs": [input_of(["x"], name="y")]}, "inputs[0].name is 'y'"),
    ({"inputs": [input_of(["x"], datatype="FP32")]}, "inputs[0].datatype is 'FP32'"),
    ({"inputs": [input_of(["x"], datatype=None)]}, "datatype"),
    ({"inputs": [input_of(["x"], datatype=5)]}, "datatype is 5"),
    ({"inputs": [input_of(["x"], shape=None)]}, "shape is None"),
    ({"inputs": [input_of(["x"], shape=[])]}, "shape is []"),
    ({"inputs": [input_of(["x"], shape=[2])]}, "of 1 elements"),
    ({"inputs": [input_of(["x"], shape=[-1])]}, "shape is [-1]"),
    ({"inputs": [input_of(["x", "y"], shape=[-1, -2])]}, "shape is [-1, -2]"),
    ({"inputs": [input_of(["x"], shape=[1.0])]}, "shape is [1.0]"),
    ({"inputs": [input_of(["x"], shape=[True])]}, "shape is [True]"),
    ({"inputs": [input_of(["x"], shape=[1] * 9)]}, "shape is"),
    ({"inputs": [input_of(["x"], shape=[2**40, 2**40])]}, "shape is"),
    ({"inputs": [input_of(["x"], shape="1")]}, "shape is '1'"),
    ({"inputs": [input_of(["x"], data="x")]}, "data is 'x'"),
    ({"inputs": [input_of(["x"], data=[5])]}, "data is [5]"),
    ({"inputs": [input_of(["x"], data=[["x"], None])]}, "data is"),
    ({"inputs": [input_of(["x"], data=None)]}, "data is None"),
    ({"inputs": [input_of(["x"], parameters={"binary_data_size": 5})]}, "binary_data_size is 5"),
    ({"inputs": [input_of(["x"], parameters={"binary_data_size": 0})]}, "both"),
    ({"inputs": [input_of(["x"], parameters=5)]}, "parameters is 5"),
    ({"inputs": [input_of(["x"])], "outputs": [{"name": "y"}]}, "outputs[0].name"),
    ({"inputs": [input_of(["x"])], "outputs": [{"name": "embedding"}] * 2}, "outputs[1].name"),
    (
        {
            "inputs": [input_of(["x"])],
            "outputs": [{"name": "text_output", "parameters": {"classification": 2}}],
        },
        "classification is 2",
    ),
    (
        {"inputs": [input_of(["x"])], "parameters": {"max_tokens": -1}},
        "parameters.max_tokens is -1",
    ),
    ({"inputs": [input_of(["x"])], "parameters": {"temperature": "hot"}}, "temperature is 'hot'"),
    ({"inputs": [input_of(["x"])], "parameters": {"binary_data_output": 1}}, "binary_data_output"),
    ({"inputs": [input_of(["x"])], "id": 5}, "id is 5"),
    ({"inputs": [input_of(["words " * 400])]}, "prompt is too long"),
    ({"inputs": [input_of(["x"] * 200)], "outputs": [{"name": "text_output"}]}, "at most 128"),
]


@pytest.mark.parametrize(("body", "found"), WRONG)
def test_what_can_not_be_is_refused(both: Running, body: Any, found: str) -> None:
    reply = both.post("/v2/models/org/tiny/infer", body)
    assert reply.status_code == 400, reply.text
    assert list(reply.json()) == ["error"] and found in reply.json()["error"]


@pytest.mark.parametrize("length", ["-1", "1e3", "x", "", "999999", "99999999999999999999", "²"])
def test_a_length_that_can_not_be(both: Running, length: str) -> None:
    headers = {LENGTH: length.encode()}
    reply = both.http.post("/v2/models/org/tiny/infer", content=b"{}", headers=headers)
    assert reply.status_code == 400 and LENGTH in reply.json()["error"]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, str | None, list[str], bool]:
    """A body, its header, the texts that went into it, and whether anything was changed."""
    texts = draw(st.lists(st.text(max_size=6), max_size=4))
    behind = as_bytes(texts)
    given: dict[str, Any] = {
        "name": "text_input", "datatype": "BYTES", "shape": [len(texts)],
        "parameters": {"binary_data_size": len(behind)},
    }  # fmt: skip
    odd = st.sampled_from([None, -1, 0, 1, 2.5, 2**31, 2**64, "4", [], {}, True, "INT32", [[1]]])
    kind = draw(st.sampled_from(["none", "shape", "datatype", "name", "size", "length", "bytes"]))
    head = None
    if kind == "size":
        given["parameters"]["binary_data_size"] = draw(odd | st.integers(-9, 99))
    elif kind in given:
        given[kind] = draw(odd | st.lists(st.integers(-3, 5) | odd, max_size=4))
    text = json.dumps({"inputs": [given]}).encode()
    if kind == "bytes":
        at = draw(st.integers(0, max(0, len(behind) - 1)))
        behind = draw(
            st.sampled_from([behind[:at], behind[:at] + b"\xff" + behind[at + 1 :], behind + b"x"])
        )
    if kind == "length":
        head = draw(st.integers(-5, 300).map(str) | st.text(max_size=4))
    return text + behind, str(len(text)) if head is None else head, texts, kind == "none"


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_a_damaged_body_is_a_refusal_or_whole(
    case: tuple[bytes, str | None, list[str], bool],
) -> None:
    """Never another error, and never a text that the client did not send whole."""
    body, length, texts, is_whole = case
    try:
        fields, behind = read_body(body, length)
        found = read_texts(fields.objects("inputs"), behind, "text_input")
    except ApiError as error:
        assert not is_whole and error.status == 400
        return
    if is_whole:
        assert found == texts
    assert all(isinstance(text, str) for text in found) and len(found) <= len(body)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.none() | st.integers(0, 80).map(str))
def test_no_bytes_break_the_reader(body: bytes, length: str | None) -> None:
    try:
        fields, behind = read_body(body, length)
        read_texts(fields.objects("inputs"), behind, "text_input")
    except ApiError as error:
        assert error.status == 400


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=9), max_size=5), st.booleans(), st.booleans())
def test_what_is_written_is_what_is_read(texts: list[str], first: bool, second: bool) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    outputs = [Output("a", texts, first), Output("b", rows, second), Output("c", texts, second)]
    response = write({"id": "x"}, outputs)
    found = outputs_of(
        httpx2.Response(200, headers=dict(response.headers), content=bytes(response.body))
    )
    assert found["a"].tolist() == found["c"].tolist() == texts
    np.testing.assert_array_equal(np.float32(found["b"]), rows)


# -- generate ------------------------------------------------------------------------------------


def frames_of(reply: httpx2.Response) -> list[Any]:
    lines = [line for line in reply.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines]


@pytest.mark.parametrize("where", ["parameters", "beside"])
def test_text_whole_and_in_events_is_the_same(both: Running, where: str) -> None:
    expected = both.llm.generate("some words", **SPEC).text  # type: ignore[arg-type]
    more: Any = {"parameters": SPEC} if where == "parameters" else {**SPEC, "stop_words": ""}
    base = "/v2/models/org/tiny/versions/1"
    for text in ("some words", ["some words"]):
        body = {"text_input": text, "id": "9", **more}
        whole = both.post(f"{base}/generate", body).json()
        assert whole == {
            "model_name": "org/tiny", "model_version": "1", "id": "9", "text_output": expected
        }  # fmt: skip
        reply = both.post(f"{base}/generate_stream", body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        frames = frames_of(reply)
        assert "".join(each["text_output"] for each in frames) == expected
        assert {each["id"] for each in frames} == {"9"}


def test_an_answer_without_text_and_one_that_fails(server: Running) -> None:
    path = "/v2/models/tiny/generate_stream"
    with server.replying(""):
        assert [each["text_output"] for each in frames_of(server.post(path, {"text_input": "x"}))]
    with server.replying("some", error=ValueError("it broke")):
        *before, last = frames_of(server.post(path, {"text_input": "x"}))
        assert list(last) == ["error"] and "".join(e["text_output"] for e in before) == "some"
        reply = server.post("/v2/models/tiny/generate", {"text_input": "x"})
        assert reply.status_code == 500 and list(reply.json()) == ["error"]
    for body in (
        {},
        {"text_input": 5},
        {"text_input": ["a", "b"]},
        {"text_input": "x", "seed": 1.5},
        {"text_input": "x", "id": 5},
    ):
        for end in ("generate", "generate_stream"):
            reply = server.post(f"/v2/models/tiny/{end}", body)
            assert reply.status_code == 400 and list(reply.json()) == ["error"]
    server.wait_until_idle()  # nothing is begun of what is refused


# -- Triton's client -----------------------------------------------------------------------------

SCRIPT = """
import asyncio, json, sys
import numpy as np
import tritonclient.http as http
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

ADDRESS, MODEL = sys.argv[1], "org/tiny"
PARAMETERS = {"max_tokens": 6, "seed": 1}

def inputs_of(library, is_binary):
    given = library.InferInput("text_input", [2], "BYTES")
    given.set_data_from_numpy(np.array([b"some words", "ä 水".encode()], object), is_binary)
    return [given]

def outputs_of(library, is_binary):
    names = ("text_output", "embedding")
    return [library.InferRequestedOutput(name, binary_data=is_binary) for name in names]

def shown(result):
    texts = [each if isinstance(each, str) else each.decode()
             for each in result.as_numpy("text_output").tolist()]
    return texts, result.as_numpy("embedding").tolist()

client = http.InferenceServerClient(ADDRESS)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(MODEL)
assert client.get_server_metadata()["name"] == "edgeinfer"
assert client.get_model_metadata(MODEL, "1")["inputs"][0]["name"] == "text_input"
assert client.get_model_config(MODEL)["input"][0]["data_type"] == "TYPE_STRING"
asked = {"model_name": MODEL, "parameters": PARAMETERS}
found = [
    shown(client.infer(inputs=inputs_of(http, a), outputs=outputs_of(http, b), **asked))
    for a in (False, True) for b in (False, True)
]
asked["inputs"] = inputs_of(http, True)
found.append(shown(client.infer(model_version="1", **asked)))
found.append(shown(client.async_infer(**asked).get_result()))
for name, wrong in (("nothing", "not found"), (MODEL, "max_tokens is -1; it must be")):
    try:
        client.infer(name, inputs_of(http, True), parameters={"max_tokens": -1})
        raise SystemExit("no error")
    except InferenceServerException as error:
        assert wrong in str(error), error

async def together():
    async with aio.InferenceServerClient(ADDRESS) as client:
        asked = [client.infer(MODEL, inputs_of(aio, True), outputs=outputs_of(aio, True),
                              parameters=PARAMETERS) for _ in range(8)]
        found.extend(shown(each) for each in await asyncio.gather(*asked))

async def streamed():
    import aiohttp
    texts = []
    async with aiohttp.ClientSession() as session:
        body = {"text_input": "some words", **PARAMETERS}
        url = f"http://{ADDRESS}/v2/models/{MODEL}/generate_stream"
        async with session.post(url, json=body) as reply:
            async for line in reply.content:
                if line.startswith(b"data: "):
                    texts.append(json.loads(line[6:])["text_output"])
    assert "".join(texts) == found[0][0][0] and len(texts) > 1, texts

asyncio.run(together())
asyncio.run(streamed())
assert all(each == found[0] for each in found), found
print(json.dumps(found[0]))
"""


@pytest.mark.slow
@pytest.mark.network
def test_tritons_client(both: Running, tmp_path: Path) -> None:
    """EDGEINFER_TEST_TRITON names a Python that has it."""
    python = os.environ.get("EDGEINFER_TEST_TRITON")
    if python is None:
        venv.create(tmp_path / "venv", with_pip=True)
        folder = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
        python = str(folder / "python")
        install = [python, "-m", "pip", "install", "-q", "tritonclient[http]", "aiohttp"]
        subprocess.run(install, check=True, timeout=1200)
    script = tmp_path / "talk.py"
    script.write_text(SCRIPT, encoding="utf-8")
    address = both.url.removeprefix("http://")
    done = subprocess.run([python, script, address], capture_output=True, text=True, timeout=120)
    print(done.stderr[-3000:], file=sys.stderr)
    texts, vectors = json.loads(done.stdout)
    given = ["some words", "ä 水"]
    assert texts == [both.llm.generate(text, **SPEC).text for text in given]  # type: ignore
    np.testing.assert_array_equal(np.float32(vectors), both.llm.embed(given))
