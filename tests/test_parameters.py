"""Arguments of every type and size: refused by name where they enter, or used; never a fault."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer import ANSWER, LLM, LOAD, InvalidRequestError, LoadOptions, Sampling, config, plan
from edgeinfer.cli.options import LOAD_NAMES, SAMPLING_NAMES
from edgeinfer.errors import (
    ContextLengthError,
    EdgeInferError,
    InvalidModelError,
    PlanError,
    TemplateError,
    UnsupportedModelError,
    another,
)
from edgeinfer.parameters import SAMPLING, Parameter, parse_memory
from edgeinfer.sampling.params import SamplingParams

from .models_for_tests import tiny_model

N_CTX = 128


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("parameters"), n_ctx=N_CTX, chat_template="{{ 1 }}")


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, threads=1) as llm:
        yield llm


def _is_unharmed(llm: LLM) -> bool:
    return llm.generate("abcd" * 9, temperature=0, max_tokens=9).usage.completion_tokens == 9


class Odd:
    """No number, though it looks like one; its repr fails."""

    def __index__(self) -> int:
        return 5

    def __float__(self) -> float:
        return 5.0

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    async def later(self, *_: object) -> None:
        pass


async def later(*_: object) -> None:
    """Called, it does nothing yet."""


class Later:
    """It can be called, too."""

    async def __call__(self, *_: object) -> None:
        pass


def made_one_by_one(*_: object) -> Iterator[None]:
    yield


WRONG_INTEGERS = [
    60.0, 1.5, "5", b"5", True, False, np.bool_(True), math.nan, math.inf, 2**70, -(2**70),
    10**5000, [5], (5,), {5}, {5: 5}, 5j, Odd(), object, np.float64(5), np.array([5]), range(5),
]  # fmt: skip
WRONG_NUMBERS = [
    "0.5", b"1", True, np.bool_(False), math.nan, math.inf, -math.inf, np.float32("nan"), 10**400,
    [0.5], {0.5}, 0.5j, Odd(), np.array([0.5]), np.array(0.5),
]  # fmt: skip


def _wrong(parameter: Parameter) -> list[Any]:
    if parameter.kind in (int, float):
        wrong = list(WRONG_INTEGERS if parameter.kind is int else WRONG_NUMBERS)
        wrong += [
            edge for limit, step in ((parameter.least, -1), (parameter.most, 1))
            if math.isfinite(limit) for edge in (limit + step,) if edge != limit
        ]  # fmt: skip
        return wrong
    if parameter.kind is bool:
        return [1, 0, "yes", "", b"", 1.0, [], [True], Odd()]
    return {
        "stop": [5, 1.5, "", b"x", ["a", ""], ["a", 5], [["a"]], {"a": 1}, True, iter("ab"), Odd()],
        "stop_token_ids": [5, "1", b"1", [1.0], [True], ["1"], [-1], [2**70], [[1]], {1: 2}, Odd()],
        "overflow": ["drop", "", "ERROR", 1, b"error", True, ["slide"], {"slide"}, Odd()],
        "dry_sequence_breakers": ["abc", 5, [""], [5], b"abc", {"a": 1}, iter("ab"), Odd()],
        "logit_bias": [
            5, "5", [5], [(5, 1.0)], {"5": 1.0}, {5: "1"}, {5.0: 1.0}, {True: 1.0}, {-1: 1.0},
            {2**40: 1.0}, {320: 1.0}, {5: math.nan}, {5: True}, {5: None}, {5: 10**400}, Odd(),
        ],
        "memory": [
            True, math.nan, math.inf, -1, 0, 0.5, 10**400, "", "lots", "-1G", b"1G", [1], Odd(),
            "0", "0%", "0.5", "150%", "-5%", "%", "G", "80%B", "1_0G", "٢G", "2GıB", "nan", "infG",
            "2GiBiB", "2PB", "1e30", "0x10", "2,5G", "9" * 5000,
        ],
        "gpu_layers": [
            "5x", "", "AUTO", "-2", 1.5, -2, 2**70, "9" * 5000, True, [1], b"auto", Odd(),
        ],
        "kv_type": [
            5, "q8", "F16", "", ("f16",), ("f16", "q8"), ["f16"] * 3, ["f16", 5], b"f16", True,
            Odd(),
        ],
        "numerics": [5, "", "Fast", "mma", b"fast", ["fast"], True, Odd()],
        "device": [5, b"cpu", ["cpu"], True, Odd()],
        "pre": [5, b"x", ["x"], True, Odd()],
        "chat_template": [5, b"x", ["x"], True, Odd()],
        "pooling": [5, "", "cls", "Mean", b"mean", ["mean"], True, Odd()],
        "progress": [5, "x", True, [print], object(), later, made_one_by_one, partial(later)],
        "schema": [5, 1.5, b"{}", ["x"], (), print, 5j, "", "[1]", False, {"not": {}}, Path, Odd()],
        "grammar": [5, b"start: a", ["x"], True, "", "nothing", {"a": 1}, Odd()],
        "regex": [5, b"a", ["a"], True, "(", "(?=a)", Odd()],
        "on_step": [
            5, "x", True, [print], object(), later, made_one_by_one, Odd().later, Later(),
            partial(later), partial(partial(later, 1), 2), partial(Later()), partial(Odd().later),
        ],
        "residuals": [5, "1", b"1", [1.0], [True], ["1"], [-1], [2**70], [[1]], {1: 2}, Odd()],
        "watch": [
            5, "logits", b"logits", [], ["nothing"], ["logits", -1], [1.0], [True], [None],
            {"logits": 1}, [["logits"]], Odd(), range(10**9),
        ],
    }[parameter.name]  # fmt: skip


def test_no_keyword_is_missing_from_the_table() -> None:
    assert set(LOAD) == set(LoadOptions.__annotations__)
    assert set(ANSWER) == set(Sampling.__annotations__)
    assert set(LOAD_NAMES) | {"download", "progress", "naive", "residuals"} == set(LOAD)
    assert set(SAMPLING_NAMES) < set(ANSWER)
    assert set(SAMPLING) | {"dry_breaker_tokens"} == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("parameter", ANSWER.values(), ids=list(ANSWER))
def test_a_wrong_value_of_an_answer_is_refused_by_name(llm: LLM, parameter: Parameter) -> None:
    for value in _wrong(parameter):
        asked: Any = {"temperature": 0, "max_tokens": 3, parameter.name: value}
        calls: list[Callable[[], Any]] = [
            lambda asked=asked: llm.generate("abcd" * 4, **asked),
            lambda asked=asked: llm.stream_chat("abcd", **asked),
            lambda asked=asked: llm.generate_batch(["abcd"], **asked),
        ]
        for ask in calls:
            with pytest.raises(InvalidRequestError, match=parameter.name) as caught:
                ask()
            assert caught.value.param == parameter.name
            assert len(str(caught.value)) < 400
    assert _is_unharmed(llm)


def test_tools_without_end_are_refused_by_the_first(llm: LLM) -> None:
    for tools in (itertools.count(), range(10**9)):
        with pytest.raises(InvalidRequestError, match="a tool is not an object"):
            llm.stream_chat("x", tools=tools)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [5, "ab", ["a"], {5: 1}, {"messages": []}, {"x": range(10**9)}, {"x": [range(10**9)]}]
)
def test_wrong_template_args_are_refused_by_name(llm: LLM, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.stream_chat("x", template_args=value)
    assert caught.value.param == "template_args"


@pytest.mark.parametrize("parameter", LOAD.values(), ids=list(LOAD))
def test_a_wrong_value_of_loading_is_refused_by_name(path: Path, parameter: Parameter) -> None:
    for value in _wrong(parameter):
        options: Any = {"device": "reference", parameter.name: value}
        for load in (LLM, plan):
            with pytest.raises(InvalidRequestError, match=parameter.name) as caught:
                load(path, **options)
            assert caught.value.param == parameter.name


@pytest.mark.parametrize(
    ("spelt", "n_bytes"),
    [
        ("2G", 2 << 30), ("2g", 2 << 30), ("2GB", 2 << 30), ("2 GiB", 2 << 30), (" 2gib ", 2 << 30),
        ("1.5M", 3 << 19), ("512K", 512 << 10), ("1T", 1 << 40), ("1e9", 10**9), ("5B", 5),
        (10**9, 10**9), (1e9, 10**9), (np.int64(7), 7), ("80%", 800), (" 80 % ", 800),
        ("100%", 1000), ("0.5%", 5),
    ],
    ids=str,
)  # fmt: skip
def test_memory_is_spelt_as_people_do(spelt: Any, n_bytes: int) -> None:
    assert parse_memory(LOAD["memory"].check(spelt), 1000) == n_bytes


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16, np.intp])
def test_numbers_of_numpy_are_welcome(llm: LLM, path: Path, kind: Any) -> None:
    asked: Any = dict(temperature=0.5, top_k=5, top_p=1, seed=7, max_tokens=9, logprobs=2)
    expected = llm.generate([5, 6, 7], logit_bias={70: 2.0}, **asked)
    given: Any = {name: kind(n) if type(n) is int else n for name, n in asked.items()}
    given |= {"temperature": np.float32(0.5), "logit_bias": {kind(70): np.float16(2)}}
    for prompt in (np.array([5, 6, 7], kind), [kind(5), 6, kind(7)], (5, 6, 7), range(5, 8)):
        answer = llm.generate(prompt, **given)  # type: ignore[arg-type]
        assert (answer.token_ids, answer.logprobs) == (expected.token_ids, expected.logprobs)
    logits = llm.logits(np.array([5, 6], kind), last=kind(1), prefill_chunk=kind(1))  # type: ignore[arg-type]
    assert np.array_equal(logits, llm.logits([5, 6], last=1))
    with LLM(path, n_ctx=kind(64), threads=kind(1), slots=kind(1), memory=np.float64(2e9)) as other:
        assert other.n_ctx == 64


WRONG_PROMPTS = [
    None, 5, 1.5, b"abc", bytearray(b"abc"), memoryview(b"abc"), {1, 2}, frozenset({1}), {1: 2},
    iter([1, 2]), (id for id in [1, 2]), [[1, 2]], [1.0], [True], ["a"], [None], [-1], [320],
    [2**70], [10**5000], [], (), np.array([[1, 2]]), np.array([1.0]), np.array(5), np.array(["a"]),
    np.array([True]), Odd(), [Odd()], object, True,
]  # fmt: skip


def test_a_prompt_that_is_none_is_refused(llm: LLM) -> None:
    for prompt in WRONG_PROMPTS:
        for ask in (
            llm.generate,
            llm.stream,
            lambda each, **s: llm.generate_batch([each], **s),
        ):
            with pytest.raises(InvalidRequestError, match=r"prompt|token id") as caught:
                ask(prompt, max_tokens=1)  # type: ignore[operator]
            assert caught.value.param == "prompt"
    for prompts in ("abc", b"abc", None, 5, {"abc": 1}):
        with pytest.raises(InvalidRequestError, match="prompts") as caught:
            llm.generate_batch(prompts)  # type: ignore[arg-type]
    assert _is_unharmed(llm)


def test_texts_and_ids_elsewhere(llm: LLM) -> None:
    for text in (None, 5, b"abc", ["abc"]):
        with pytest.raises(InvalidRequestError, match="text"):
            llm.tokenize(text)  # type: ignore[arg-type]
    for ids in (None, 5, "abc", b"abc", {1}, [1.5], [True], ["a"], [320], [-1]):
        for ask in (llm.logits, llm.detokenize):
            with pytest.raises(InvalidRequestError):
                ask(ids)  # type: ignore[operator]
        with pytest.raises(InvalidRequestError):
            llm.logits([1], batch_with=[ids])  # type: ignore[list-item]
    for others in (5, "abc", b"abc", [5], [[]]):
        with pytest.raises(InvalidRequestError):
            llm.logits([1], batch_with=others)  # type: ignore[arg-type]
    for name in ("last", "prefill_chunk"):
        for value in [*WRONG_INTEGERS, 0, -1]:
            with pytest.raises(InvalidRequestError, match=name):
                llm.logits([1, 2], **{name: value})
    with pytest.raises(InvalidRequestError, match="last"):
        llm.logits([1, 2], last=3)
    assert _is_unharmed(llm)


@pytest.mark.parametrize("model", [None, 5, b"model.gguf", ["x"], True])
def test_a_model_that_is_no_path_is_refused(model: Any) -> None:
    with pytest.raises(InvalidRequestError, match="model"):
        LLM(model)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.binary(max_size=3) | st.complex_numbers() | st.fractions() | st.decimals()
    | st.integers(-128, 127).map(np.int8) | st.floats(width=16).map(np.float16),
    lambda x: st.lists(x, max_size=3) | st.tuples(x) | st.dictionaries(
        st.integers(-1, 330) | st.text(max_size=2), x, max_size=3
    ),
)  # fmt: skip


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from([*ANSWER, "prompt"]), ANYTHING, min_size=1, max_size=3))
def test_whatever_is_given_is_used_or_refused(llm: LLM, given: dict[str, Any]) -> None:
    prompt = given.pop("prompt", "abcd" * 9)
    most = given.get("max_tokens", 3)
    given["max_tokens"] = min(most, 5) if type(most) is int else most
    try:
        answer = llm.generate(prompt, **given)
        assert answer.finish_reason
    except EdgeInferError as error:
        assert isinstance(error, InvalidRequestError) or "no number" in str(error), error
    assert llm.runtime.engine._thread.is_alive()


def test_lists_of_lists_may_be_arrays(llm: LLM) -> None:
    expected = llm.logits([5, 6, 7])
    found = llm.logits(np.array([5, 6, 7]), batch_with=np.array([[8, 9], [5, 5]]))
    assert np.array_equal(found, expected)
    with pytest.raises(InvalidRequestError, match="batch_with"):
        llm.logits([5], batch_with=np.array(5))  # type: ignore[arg-type]


def test_a_breaker_that_no_encoding_takes(llm: LLM) -> None:
    given: Sampling = {"dry_multiplier": 1.0, "temperature": 0, "max_tokens": 5}
    assert llm.generate("ab", dry_sequence_breakers=("\ud800",), **given).token_ids


ERRORS = [
    ContextLengthError("long", n_tokens=9, n_ctx=8),
    InvalidModelError("bad", path="x.gguf", field="f", offset=3),
    PlanError("big", needed=9, available=8),
    TemplateError("wrong", line=3),
    UnsupportedModelError("new", architecture="a", missing=("b",)),
    InvalidRequestError("odd", param="p"),
]


class Prefixed(Exception):
    """Made of what it has kept it would be another one."""

    def __init__(self, text: str) -> None:
        super().__init__(f"wrong: {text}")


@pytest.mark.parametrize(
    "error",
    [*ERRORS, OSError(2, "no", "x"), KeyError("k"), UnicodeDecodeError("utf-8", b"x", 0, 1, "no")],
    ids=lambda error: type(error).__name__,
)
def test_another_error_is_like_the_first(error: Exception) -> None:
    error.__cause__ = ValueError("before")
    found = another(error)
    assert type(found) is type(error) and found is not error
    assert (str(found), found.args) == (str(error), error.args)
    assert vars(found) == vars(error) and getattr(found, "errno", 0) == getattr(error, "errno", 0)
    assert found.__cause__ is error.__cause__
    odd = Prefixed("a")
    assert another(odd) is odd


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_come_through_between_processes(error: EdgeInferError) -> None:
    """A pool of processes waits for ever for an error that can't be unpickled."""
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("text", "n"),
    [("3", 3), *[(wrong, None) for wrong in ("", "0", "-1", "1_0", "٣", "9" * 5000)]],
)
def test_threads_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, n: int | None
) -> None:
    monkeypatch.setenv(config.THREADS, text)
    assert config.threads() == n
