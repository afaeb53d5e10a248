"""The public API on tiny random models, and on the real small one where it is present."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import traceback
import typing
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeinfer
from edgeinfer import (
    LLM,
    AsyncLLM,
    ClosedError,
    Completion,
    ContextLengthError,
    DeviceError,
    Done,
    InvalidModelError,
    InvalidRequestError,
    ModelNotFoundError,
    PlanError,
    Progress,
    Stream,
    TemplateError,
)
from edgeinfer.errors import Keyword
from edgeinfer.text.template_engine import MAX_SOURCE

from .models_for_tests import tiny_model
from .waiting import wait_until

SMOLLM = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llm"), n_ctx=512, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, device="reference", slots=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def smollm(data_file: Callable[[str], Path]) -> Iterator[LLM]:
    with LLM(data_file(SMOLLM), n_ctx=1024) as llm:
        yield llm


# -- generating ----------------------------------------------------------------------------------


def test_all_names_are_there() -> None:
    for name in edgeinfer.__all__:
        assert getattr(edgeinfer, name) is not None
    assert dir(edgeinfer) == edgeinfer.__all__
    with pytest.raises(AttributeError, match="nothing_here"):
        getattr(edgeinfer, "nothing_here")  # noqa: B009


def test_completion_is_complete(llm: LLM) -> None:
    answer = llm.generate("hello", max_tokens=6, seed=3)
    assert str(answer) == answer.text
    assert len(answer.token_ids) == answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == 5  # BOS and h + e merged, l, l, o
    assert answer.finish_reason == "length"
    assert answer.seed == 3
    assert answer.model == llm.name
    assert answer.logprobs is None
    assert answer.timings.first_token_s > 0


def test_stream_ends_with_the_same_completion(llm: LLM) -> None:
    events = list(llm.stream("hello", max_tokens=9, seed=3))
    assert events[0].type == "prompt_progress"
    assert isinstance(events[-1], Done)
    completion = events[-1].completion
    assert "".join(event.text for event in events) == completion.text
    assert completion.token_ids == llm.generate("hello", max_tokens=9, seed=3).token_ids


def test_token_ids_are_a_prompt(llm: LLM) -> None:
    ids = llm.tokenize("hello", bos=True)
    options: Any = dict(max_tokens=5, temperature=0)
    assert llm.generate(ids, **options).token_ids == llm.generate("hello", **options).token_ids
    with pytest.raises(InvalidRequestError, match="token ids"):
        llm.generate([1.5], max_tokens=1)  # type: ignore[list-item]


def test_seeds_reproduce_and_are_reported(llm: LLM) -> None:
    first = llm.generate("hello", max_tokens=12, temperature=2.0)
    again = llm.generate("hello", max_tokens=12, temperature=2.0, seed=first.seed)
    assert again.token_ids == first.token_ids
    assert len({llm.generate("hello", max_tokens=1).seed for _ in range(8)}) > 1


def test_stop_strings_cut_the_text(llm: LLM) -> None:
    whole = llm.generate("hello", max_tokens=30, seed=3).text
    stop = whole[8:10]
    answer = llm.generate("hello", max_tokens=30, seed=3, stop=[stop, "never here"])
    assert (answer.text, answer.stop, answer.finish_reason) == (
        whole[: whole.index(stop)],
        stop,
        "stop",
    )
    with pytest.raises(InvalidRequestError, match="stop"):
        llm.generate("hello", stop="")


def test_logprobs(llm: LLM) -> None:
    answer = llm.generate("hello", max_tokens=4, temperature=0, logprobs=2)
    assert answer.logprobs is not None
    for token, id in zip(answer.logprobs, answer.token_ids, strict=True):
        assert token.id == id == token.top[0][0]
        assert token.logprob <= 0


def test_deltas_have_every_token_once(llm: LLM) -> None:
    """Also those whose text is held back, or is no text: half of a character, a stop string."""
    whole = llm.generate("hello", max_tokens=30, seed=3)
    asked: tuple[dict[str, Any], ...] = (
        {"logprobs": 1},
        {"stop": whole.text[8:10]},
        {"stop": whole.text[8:10], "logprobs": 0},
        {"stop_token_ids": [whole.token_ids[5]]},
        {"overflow": "slide", "temperature": 5.0},
    )
    for options in asked:
        given: Any = {"max_tokens": 30, "seed": 3} | options
        stream = llm.stream("hello", **given)
        deltas = [event for event in stream if event.type == "delta"]
        answer = stream.completion
        assert sum((delta.token_ids for delta in deltas), ()) == answer.token_ids
        assert "".join(delta.text for delta in deltas) == answer.text
        for delta in deltas:
            assert (delta.logprobs is not None) == ("logprobs" in options)
            if delta.logprobs is not None:
                assert tuple(each.id for each in delta.logprobs) == delta.token_ids
        if answer.logprobs is not None:
            assert sum((delta.logprobs or () for delta in deltas), ()) == answer.logprobs


def test_what_a_closed_stream_had_shown_are_its_first_tokens(llm: LLM) -> None:
    with llm.stream("hello", max_tokens=30, seed=3) as stream:
        shown = next(event for event in stream if event.type == "delta" and event.token_ids)
    ids = llm.generate("hello", max_tokens=30, seed=3).token_ids
    assert shown.token_ids == ids[: len(shown.token_ids)]


def test_logit_bias_and_dry_reach_the_sampler(llm: LLM) -> None:
    assert llm.generate("hello", max_tokens=3, logit_bias={77: 1e9}).token_ids == (77, 77, 77)
    biased: Any = dict(logit_bias={70: 50.0, 71: 49.0}, temperature=0, max_tokens=12)
    free = llm.generate("hello", **biased)
    dry = llm.generate("hello", dry_multiplier=5.0, dry_allowed_length=1, **biased)
    assert free.token_ids != dry.token_ids


def test_closing_a_stream_cancels(llm: LLM) -> None:
    with llm.stream("hello", max_tokens=400, seed=1) as stream:
        for event in stream:
            if event.type == "delta":
                break
    assert stream.completion.finish_reason == "cancelled"
    assert list(stream) == []
    _wait_until(lambda: llm.runtime.engine.n_running == 0)


def test_what_a_closed_stream_read_is_not_read_again(llm: LLM) -> None:
    prompt = "the same words, read once and then again"
    with llm.stream(prompt, max_tokens=400) as stream:
        for event in stream:
            if event.type == "delta":
                break
    _wait_until(lambda: llm.runtime.engine.n_running == 0)
    usage = llm.generate(prompt, max_tokens=2).usage
    assert usage.cached_tokens == usage.prompt_tokens - 1


def test_dropping_a_stream_cancels(llm: LLM) -> None:
    stream = llm.stream("hello", max_tokens=400)
    next(stream)
    with pytest.raises(ClosedError):
        print(stream.completion)
    del stream
    gc.collect()
    _wait_until(lambda: llm.runtime.engine.n_running == 0)


def test_batch_equals_one_by_one(llm: LLM) -> None:
    prompts = ["one", "two and more", "three"]
    options: Any = dict(max_tokens=10, seed=5)
    alone = [llm.generate(prompt, **options).token_ids for prompt in prompts]
    assert [c.token_ids for c in llm.generate_batch(prompts, **options)] == alone


def test_threads_share_a_model(llm: LLM) -> None:
    expected = llm.generate("hello", max_tokens=10, seed=5).token_ids
    found: list[Completion] = []

    def work() -> None:
        found.append(llm.generate("hello", max_tokens=10, seed=5))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c.token_ids for c in found] == [expected] * 6


def test_slide_runs_past_the_context(path: Path) -> None:
    with LLM(path, device="reference", n_ctx=128) as llm:
        answer = llm.generate("hello", max_tokens=640, overflow="slide", logit_bias={257: -1e9})
        assert answer.usage.completion_tokens == 640
        with pytest.raises(InvalidRequestError, match="overflow"):
            llm.generate("hello", overflow="drop")  # type: ignore[typeddict-item]


def test_without_max_tokens_the_context_is_the_end(path: Path) -> None:
    with LLM(path, device="reference", n_ctx=64) as llm:
        answer = llm.generate("hello", logit_bias={257: -1e9})
        assert answer.finish_reason == "length"
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 64
        with pytest.raises(ContextLengthError):
            llm.generate("x" * 100)


@pytest.mark.parametrize("n_ctx", [1, 2, 31, 33, 64, 100, 127, 128, 130, 159, 160])
def test_the_context_bounds_prompt_and_answer(path: Path, n_ctx: int) -> None:
    """Also where it is no multiple of a page; one that slides sees no more than that at once."""
    with LLM(path, n_ctx=n_ctx, threads=1) as llm:
        endless: Any = dict(logit_bias={257: -1e9}, temperature=0)
        for n in range(1, n_ctx, max(1, n_ctx // 7)):
            for asked in (None, n_ctx, 3 * n_ctx):
                usage = llm.generate([70] * n, max_tokens=asked, **endless).usage
                assert usage.prompt_tokens + usage.completion_tokens == n_ctx
        for n in (n_ctx, n_ctx + 1):
            with pytest.raises(ContextLengthError, match=f"{n} tokens, the context holds {n_ctx}"):
                llm.generate([70] * n)
        read = llm.generate([70] * n_ctx, max_tokens=0)
        assert (read.usage.prompt_tokens, read.usage.completion_tokens) == (n_ctx, 0)
        for n in (n_ctx + 1, n_ctx + 9):
            with pytest.raises(ContextLengthError, match=f"{n} tokens, the context holds {n_ctx}"):
                llm.generate([70] * n, max_tokens=0)
        assert len(llm.logits([70] * n_ctx)) == n_ctx
        if n_ctx < 128:
            with pytest.raises(InvalidRequestError, match="too short to slide"):
                llm.generate([70], overflow="slide")
            return
        for overflow in ("slide", "drop-turns"):
            stream = llm.stream([70], overflow=overflow, max_tokens=2 * n_ctx, **endless)  # type: ignore[arg-type]
            assert stream.run().usage.completion_tokens == 2 * n_ctx
            (ring,) = stream._generation.layout.rings
            assert 32 * (ring.n_pinned + ring.n_visible + 1) <= n_ctx


# -- chat ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", ["error", "drop-turns"])
def test_what_can_not_fit_is_refused_before_it_is_read_or_copied(llm: LLM, overflow: Any) -> None:
    text, ids = "some words " * 500_000, range(10**9)
    begun = time.thread_time()
    for ask in (
        lambda: llm.generate(text, overflow=overflow),
        lambda: llm.generate("x" * 10_000_000, overflow=overflow),
        lambda: llm.generate(ids, overflow=overflow),
        lambda: llm.generate(np.broadcast_to(np.int32(1), (10**11,)), overflow=overflow),  # type: ignore[arg-type]
        lambda: llm.chat(text, overflow=overflow),
        lambda: llm.logits(ids, last=1),
        lambda: llm.logits([1], batch_with=[ids]),
    ):
        with pytest.raises(ContextLengthError) as caught:
            ask()
        assert caught.value.n_tokens > caught.value.n_ctx == llm.n_ctx
    for ask in (
        lambda: llm.generate(ids, overflow="slide"),
        lambda: llm.detokenize(ids),
        lambda: llm.generate("a", stop_token_ids=ids),
        lambda: llm.generate(_Lying(), overflow=overflow),  # type: ignore[arg-type]
        lambda: llm.detokenize(_Lying()),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidRequestError):
            ask()
    assert time.thread_time() - begun < 6  # before: the memory of the machine, or minutes


class _Lying:
    """A sequence that has more than it says."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return 1


def test_a_switch_is_a_boolean(llm: LLM) -> None:
    for ask in (
        lambda: llm.tokenize("a", bos="no"),  # type: ignore[arg-type]
        lambda: llm.tokenize("a", special=1),  # type: ignore[arg-type]
        lambda: llm.detokenize([1], special="yes"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidRequestError, match="it must be True or False"):
            ask()
    assert llm.tokenize("a", bos=np.True_, special=np.False_) == llm.tokenize("a", bos=True)


@pytest.mark.parametrize("wrong", [3, None, b"x", "", "a\0b", "\ud800", ["x"], np.array("x")])
def test_a_path_is_a_path(llm: LLM, wrong: Any) -> None:
    for use in (
        lambda: llm.save_session(wrong, [1, 2, 3]),
        lambda: llm.load_session(wrong),
        lambda: edgeinfer.Recording.read(wrong),
    ):
        with pytest.raises(InvalidRequestError, match="path is .*; it must be a path"):
            use()


@pytest.mark.parametrize("wrong", [np.array(3), np.array([1, 2]), np.array("auto")])
def test_arrays_are_no_chats(llm: LLM, wrong: Any) -> None:
    """NumPy's are iterable by type alone where they have no dimension, and equal to nothing."""
    for name in ("tools", "tool_choice"):
        with pytest.raises(InvalidRequestError, match="tool"):
            llm.chat("hi", max_tokens=1, **{name: wrong})
    with pytest.raises(InvalidRequestError, match="message"):
        llm.chat(wrong, max_tokens=1)


def test_what_is_of_another_model_or_none_is_refused(llm: LLM, path: Path, tmp_path: Path) -> None:
    with LLM(path, device="reference") as other, llm.stream("x", max_tokens=1) as stream:
        other.generate("xy", max_tokens=1)  # it has the first tokens in its cache, too
        stream.run()
        with pytest.raises(InvalidRequestError, match="not one of this model"):
            edgeinfer.Recording.of(other, stream)
        with pytest.raises(InvalidRequestError, match="not one of this model") as caught:
            other.save_session(tmp_path / "talk", stream)
        assert caught.value.param == "of" and not [*tmp_path.iterdir()]
    with pytest.raises(InvalidRequestError, match="n_ctx is given with a model that is open"):
        AsyncLLM(llm, n_ctx=64)
    with llm.stream("x", max_tokens=2, seed=1) as stream:
        with pytest.raises(InvalidRequestError, match="callback is None"):
            stream.notify(None)  # type: ignore[arg-type]
        assert len(stream.run().token_ids) == 2


def test_chat_continues_from_the_turn_before(path: Path) -> None:
    with LLM(path, device="reference") as llm:
        ask: Any = dict(max_tokens=5, logit_bias={i: -1e9 for i in range(320) if not 97 <= i < 123})
        first = llm.chat("hello", **ask)
        turns: Any = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "more"},
        ]
        second = llm.chat(turns, **ask)
        assert second.usage.cached_tokens >= first.usage.prompt_tokens
    with LLM(path, device="reference") as llm:
        again = llm.chat(turns, **ask, seed=second.seed)
        assert again.usage.cached_tokens == 0
        assert again.token_ids == second.token_ids


def test_chat_slides_with_its_system_message_pinned(path: Path) -> None:
    with LLM(path, device="reference", n_ctx=256) as llm:
        turns: Any = [
            {"role": "system", "content": "be brief " * 4},
            {"role": "user", "content": "hello"},
        ]
        stream = llm.stream_chat(turns, overflow="slide", max_tokens=300, logit_bias={257: -1e9})
        assert stream.run().usage.completion_tokens == 300
        assert stream._generation.layout.rings[0].n_pinned == 2


def test_a_system_text_stays_whole_or_nothing_slides(path: Path) -> None:
    """Of one longer than a quarter of the context the rest had been forgotten without a word."""
    endless: Any = dict(max_tokens=300, logit_bias={257: -1e9}, seed=1)
    with LLM(path, device="reference", n_ctx=256) as llm:

        def asked(n: int, **given: Any) -> Stream:
            turns: Any = [{"role": "system", "content": "x" * n}, {"role": "user", "content": "hi"}]
            return llm.stream_chat(turns, **endless | given)

        for overflow in ("slide", "drop-turns"):
            long = asked(130, overflow=overflow)
            assert long.run().usage.completion_tokens == 300
            assert 32 * long._generation.layout.rings[0].n_pinned >= 130
        too_long = asked(180, overflow="drop-turns").run()
        assert too_long.finish_reason == "length"
        assert too_long.usage.prompt_tokens + too_long.usage.completion_tokens == 256
        with pytest.raises(InvalidRequestError, match="has room for 160 of them") as caught:
            asked(180, overflow="slide")
        assert Keyword("n_keep", 160) in caught.value.advice
        forgets = asked(180, overflow="slide", n_keep=160)
        assert forgets.run().usage.completion_tokens == 300
        assert forgets._generation.layout.rings[0].n_pinned == 5


def test_chat_batch(llm: LLM) -> None:
    answers = llm.chat_batch(["one", "two"], max_tokens=4, seed=1)
    assert [answer.usage.completion_tokens for answer in answers] == [4, 4]


# -- tokens and logits ---------------------------------------------------------------------------


def test_tokenize_and_back(llm: LLM) -> None:
    ids = llm.tokenize("in the air ünd", bos=True)
    assert ids[0] == 256
    assert llm.detokenize(ids) == "in the air ünd"
    assert llm.detokenize(ids, special=True).startswith("<|bos|>")
    assert llm.tokenize("<|eos|>", special=True) == [257]
    assert 257 not in llm.tokenize("<|eos|>")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_logits_are_the_same_bits_however_they_are_computed(tmp_path: Path, arch: str) -> None:
    """Contract 1: chunks, company and threads change nothing."""
    path = tiny_model(tmp_path, arch=arch, quant="Q4_K", n_ctx=512)
    rng = np.random.default_rng(0)
    ids, *others = (rng.integers(0, 256, n).tolist() for n in (200, 64, 3, 150))
    with LLM(path, threads=1, slots=2) as llm:
        expected = llm.logits(ids)
        for chunk in (1, 7, 64):
            assert np.array_equal(llm.logits(ids, prefill_chunk=chunk), expected)
        assert np.array_equal(llm.logits(ids, last=5), expected[-5:])
    with LLM(path, threads=2, slots=2) as llm:
        assert np.array_equal(llm.logits(ids), expected)
        for chunk in (1, 33, None):
            beside = llm.logits(ids, prefill_chunk=chunk, batch_with=others)
            assert np.array_equal(beside, expected)


def test_logits_beyond_memory_are_a_plan_error(llm: LLM, monkeypatch: Any) -> None:
    monkeypatch.setattr("edgeinfer.platform.available_memory", lambda: 1000)
    with pytest.raises(PlanError, match="last"):
        llm.logits([1, 2, 3])
    with pytest.raises(PlanError, match="last"):
        llm.logits([1, 2, 3], last=2)


def test_logits_of_nothing_and_of_more_than_there_is(llm: LLM) -> None:
    """What is wrong is told, not what it would take."""
    for last in (4, 2**63 - 1):
        with pytest.raises(InvalidRequestError, match="need 1 to 3") as caught:
            llm.logits([1, 2, 3], last=last)
        assert caught.value.param == "last"
    for last in (None, 1):
        with pytest.raises(InvalidRequestError, match="token_ids has no tokens"):
            llm.logits([], last=last)


def test_ids_of_no_token_are_refused_by_the_name_of_their_keyword(
    path: Path, tmp_path: Path
) -> None:
    with LLM(path, n_ctx=64, threads=1, residuals=[0], pooling="mean") as llm:
        for ids in ([], [llm.n_vocab], [5, -1], [2**40]):
            calls: dict[str, list[Any]] = {
                "prompt": [lambda ids=ids: llm.generate(ids)],
                "token_ids": [
                    lambda ids=ids: llm.logits(ids),
                    lambda ids=ids: llm.residuals(ids, 0),
                    lambda ids=ids: llm.attention(ids, 0),
                ],
                "batch_with": [lambda ids=ids: llm.logits([5], batch_with=[[6], ids])],
                "texts": [lambda ids=ids: llm.embed(["x", ids])],
                "of": [lambda ids=ids: llm.save_session(tmp_path / "s", ids)],
            }
            for param, asked in calls.items():
                for ask in asked:
                    with pytest.raises(InvalidRequestError, match="no tokens|outside the") as error:
                        ask()
                    assert error.value.param == param


@pytest.mark.parametrize("n_ctx", [64, 128])
def test_what_is_too_long_is_told_what_can_be_done(path: Path, n_ctx: int) -> None:
    """To slide is advised who has a keyword for it, in contexts that are long enough."""
    long = [70] * (n_ctx + 1)
    with LLM(path, n_ctx=n_ctx, threads=1, residuals=[0]) as llm:
        asked: list[tuple[bool, Any]] = [
            (n_ctx >= 128, lambda: llm.generate(long)),
            (n_ctx >= 128, lambda: llm.generate("x" * 9 * n_ctx)),
            (n_ctx >= 128, lambda: llm.generate("x" * 900_000)),
            (n_ctx >= 128, lambda: llm.chat("x" * 9 * n_ctx)),
            (False, lambda: llm.logits(long)),
            (False, lambda: llm.logits([1], batch_with=[long])),
            (False, lambda: llm.residuals(long, 0)),
            (False, lambda: llm.attention(long, 0)),
        ]
        for can_slide, ask in asked:
            with pytest.raises(ContextLengthError) as caught:
                ask()
            assert (Keyword("overflow", "slide") in caught.value.advice) == can_slide
        if n_ctx >= 128:
            assert llm.generate(long, overflow="slide", max_tokens=2).usage.prompt_tokens > n_ctx


# -- errors --------------------------------------------------------------------------------------


def _failing_uses(llm: LLM, path: Path, file: Path) -> dict[str, Callable[[], object]]:
    """What raises an error of another thread's."""
    program = llm.runtime.program

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    def polled() -> None:
        stream = llm.stream("a", on_step=fail)
        while True:
            stream.poll()

    def broken(use: Callable[[], object]) -> Callable[[], None]:
        def used() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(program, "submit", fail)
                use()

        return used

    def saved() -> None:
        read = program.read_pages
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program, "read_pages", lambda g, p: fail() if p else read(g, p))
            llm.save_session(file, [5] * 40)

    return {
        "stream": lambda: list(llm.stream("a", on_step=fail)),
        "generate": lambda: llm.generate("a", on_step=fail),
        "batch": lambda: llm.generate_batch(["a", "b"], on_step=fail),
        "poll": polled,
        "logits": broken(lambda: llm.logits([1, 2])),
        "residuals": broken(lambda: llm.residuals([1, 2], 0)),
        "embed": broken(lambda: llm.embed(["a", "b"])),
        "session": saved,
        "load": lambda: LLM(path, memory=1),
        "chat": lambda: llm.chat("a"),
    }


def test_an_error_of_another_thread_keeps_nothing_of_who_catches_it(tmp_path: Path) -> None:
    """No stream, and no array, once its function has ended: not until garbage is collected."""
    path = tiny_model(tmp_path, n_ctx=64)  # without a template for chats
    with LLM(path, threads=1, pooling="mean", residuals=[0]) as llm:
        llm.generate([5] * 40, max_tokens=1)
        gc.collect()
        gc.disable()
        try:
            for name, use in _failing_uses(llm, path, tmp_path / "s").items():
                caught = [_caught(use) for _ in range(3)]
                # The thread that told it may be about to forget it.
                wait_until(lambda c=caught: [local() for local, _ in c] == [None] * 3, name)
                # Nor does it have those of who caught it before.
                assert caught[0][1] == caught[2][1], name
        finally:
            gc.enable()


def _caught(use: Callable[[], object]) -> tuple[weakref.ref[Any], int]:
    """Something that was there, and how many frames the error went through."""
    local = np.zeros(1)
    try:
        use()
    except Exception as error:
        return weakref.ref(local), len(traceback.extract_tb(error.__traceback__))
    raise AssertionError("no error")


# -- loading and closing -------------------------------------------------------------------------


def test_what_is_shown_of_an_object_is_one_line_that_says_what_it_is(path: Path) -> None:
    with LLM(path, device="reference") as llm:
        stream, model = llm.stream("a", max_tokens=3, seed=1), AsyncLLM(llm)
        assert re.fullmatch(r"<LLM '.+' Q4_0.*: context 512, reference>", repr(llm))
        assert repr(model) == f"<AsyncLLM of {llm!r}>"
        assert repr(AsyncLLM("x\n.gguf")) == "<AsyncLLM of 'x\\n.gguf', not loaded yet>"
        assert "tokens, running>" in repr(stream)
        stream.run()
        assert repr(stream).endswith(": 3 tokens, length>")
        assert repr(stream) in repr(edgeinfer.AsyncStream(stream))
    assert repr(llm).endswith(": closed>")
    assert "not be loaded" in repr(LLM.__new__(LLM))


def test_what_is_open_can_not_be_copied_and_what_is_done_can(llm: LLM) -> None:
    stream = llm.stream("a", max_tokens=1)
    bound = [AsyncLLM(llm), AsyncLLM("x.gguf"), stream, edgeinfer.AsyncStream(stream)]
    for each in (llm, *bound, llm.runtime, llm.runtime.model, llm.runtime.model.file):
        for copied in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="can('t)? be copied or pickled"):
                copied(each)
    for each in (*bound, llm.runtime):
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            copy.copy(each)
    completion = stream.run()
    assert pickle.loads(pickle.dumps(completion)) == copy.deepcopy(completion) == completion
    assert pickle.loads(pickle.dumps(llm.plan)) == llm.plan


def test_every_public_annotation_can_be_read() -> None:
    for name in edgeinfer.__all__:
        public = getattr(edgeinfer, name)
        members = vars(public).values() if inspect.isclass(public) else ()
        for each in (public, *members):
            each = getattr(each, "fget", None) or getattr(each, "__func__", each)
            if inspect.isclass(each) or inspect.isfunction(each):
                typing.get_type_hints(each)
    assert typing.get_type_hints(LLM.stream)["return"] is edgeinfer.Stream


def test_closed_is_closed(path: Path) -> None:
    llm = LLM(path, device="reference")
    stream = llm.stream("hello", max_tokens=400, logit_bias={257: -1e9})  # without an end
    llm.close()
    llm.close()
    with pytest.raises(ClosedError):
        list(stream)
    for use in (lambda: llm.generate("x"), lambda: llm.tokenize("x"), lambda: llm.logits([1])):
        with pytest.raises(ClosedError):
            use()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"n_ctx": 0}, InvalidRequestError),
        ({"threads": 0}, InvalidRequestError),
        ({"slots": 0}, InvalidRequestError),
        ({"memory": "lots"}, InvalidRequestError),
        ({"kv_type": "q8"}, InvalidRequestError),
        ({"kv_type": ("f16", "q5_0")}, InvalidRequestError),
        ({"gpu_layers": 3}, DeviceError),
        ({"device": "cuda:0"}, DeviceError),
        ({"device": "tpu"}, DeviceError),
        ({"memory": "1M"}, PlanError),
        ({"chat_template": "no such"}, InvalidRequestError),
        ({"pre": "no such"}, edgeinfer.EdgeInferError),
    ],
)
def test_bad_options(path: Path, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        with LLM(path, **{"device": "reference", **options}) as llm:
            llm.chat("hello", max_tokens=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chat_template": "/nope.jinja"}, "no chat template '/nope.jinja': neither a file"),
        ({"chat_template": "FILE:{{ x"}, "chat template .*bad.jinja.* line 1: "),
        ({"chat_template": "FILE:{% for m in messages %}\n{{ m"}, "chat template .* line 2: "),
        ({"chat_template": "FILE:" + "x" * (MAX_SOURCE + 1)}, "more source"),
        ({"pre": "gpt-3"}, "unknown pre-tokenizer 'gpt-3'"),
        ({"pre": ""}, "unknown pre-tokenizer ''"),
    ],
)
def test_what_the_text_needs_is_looked_for_before_weights_are_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, says: str
) -> None:
    name, is_file, text = options.get("chat_template", "").partition("FILE:")
    if is_file:
        (tmp_path / "bad.jinja").write_text(text)
        options = {"chat_template": str(tmp_path / "bad.jinja")}
    monkeypatch.setattr("edgeinfer.runtime._planned", None)
    with pytest.raises(edgeinfer.EdgeInferError, match=says):
        LLM(path, device="reference", **options)


def test_a_template_that_fails_on_some_chats_alone_is_taken(path: Path, tmp_path: Path) -> None:
    """It is compiled while a model is loaded, and not run: what it needs is not known."""
    file = tmp_path / "chat.jinja"
    source = "{{ raise_exception('no text') if SAID != 'hi' }}{{ SAID }}"
    file.write_text(source.replace("SAID", "messages[0].content"))
    with LLM(path, device="reference", chat_template=str(file)) as llm:
        file.unlink()
        with pytest.raises(TemplateError, match="no text"):
            llm.chat("hello", max_tokens=1)
        assert llm.chat("hi", max_tokens=1, seed=1).token_ids


def test_unknown_keywords_name_the_nearest(path: Path, llm: LLM) -> None:
    with pytest.raises(TypeError, match="n_ctx"):
        LLM(path, n_ctxs=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temperature"):
        llm.generate("x", temperatur=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_tokens"):
        llm.chat("x", max_token=1)  # type: ignore[call-arg]


def test_bad_sampling_values_are_errors(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="top_p"):
        llm.generate("x", top_p=7)
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        llm.generate("x", logit_bias={99999: 1.0})


def test_a_bias_that_leaves_no_token_is_its_senders_error(llm: LLM) -> None:
    banned = dict.fromkeys(range(llm.runtime.tokenizer.n_vocab), -math.inf)
    with pytest.raises(InvalidRequestError, match="ban fewer tokens") as caught:
        llm.generate("x", logit_bias=banned)
    assert caught.value.param == "logit_bias"
    assert llm.generate("x", max_tokens=1, logit_bias=banned | {77: 0.0}).token_ids == (77,)


def test_context_is_lowered_when_memory_is_short(path: Path) -> None:
    with LLM(path, device="reference") as llm:
        least = llm.plan.total_bytes - llm.plan.rows["KV cache"]
    with LLM(path, device="reference", memory=least + 2**18) as llm:
        assert llm.n_ctx < 512 or llm.plan.fits
    with pytest.raises(PlanError, match="would fit") as error:
        LLM(path, device="reference", n_ctx=2**20, memory="200M")
    assert error.value.fits is not None
    assert error.value.needed > error.value.available  # type: ignore[operator]


def test_paths(path: Path, tmp_path: Path) -> None:
    with LLM(path.parent, device="reference") as llm:
        assert llm.n_ctx == 512
    with pytest.raises(ModelNotFoundError, match="no file"):
        LLM(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFoundError, match="none"):
        LLM(tmp_path)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InvalidModelError):
        LLM(broken, device="reference")


def test_progress_reaches_the_end(path: Path) -> None:
    seen: list[Progress] = []
    with LLM(path, progress=seen.append):
        pass
    weights = [event for event in seen if event.stage == "weights"]
    assert weights
    assert weights[-1].done == weights[-1].total


def test_an_interrupted_load_is_closed_when_it_is_done(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeinfer import runtime

    closed, close, wait = threading.Event(), runtime.Runtime.close, runtime.Later.wait

    def interrupted(later: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        wait(later)

    def close_and_tell(opened: runtime.Runtime) -> None:
        close(opened)
        closed.set()

    monkeypatch.setattr(runtime.Later, "wait", interrupted)
    monkeypatch.setattr(runtime.Runtime, "close", close_and_tell)
    with pytest.raises(KeyboardInterrupt):
        LLM(path, device="reference")
    assert closed.wait(120)


def test_an_interrupted_close_closes_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a long step to end may lose patience."""
    llm = LLM(path, n_ctx=64, threads=1)
    engine, file = llm.runtime.engine, llm.runtime.model.file

    def interrupted(timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.close()
    assert all(part._bytes._file.is_closed for part in file._parts)
    engine._thread.join(120)
    assert not engine._thread.is_alive() and engine.has_ended


def test_a_dropped_model_ends_its_thread(path: Path) -> None:
    llm = LLM(path, device="reference")
    thread = llm.runtime.engine._thread
    del llm
    gc.collect()
    thread.join(120)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_is_told(path: Path) -> None:
    code = f"""
import os
from edgeinfer import LLM, ClosedError
llm = LLM({str(path)!r}, device="reference")
pid = os.fork()
if pid == 0:
    try:
        llm.generate("x", max_tokens=1)
    except ClosedError as error:
        os._exit(0 if "fork" in str(error) else 3)
    os._exit(4)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print(len(llm.generate("x", max_tokens=2, logit_bias={{257: -1e9}}).token_ids))
"""
    assert _python(code).stdout.strip() == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_no_lock_of_another_thread_is_waited_for_in_a_forked_child(path: Path) -> None:
    """Nobody is there to release it: streams say so, and what was being loaded is loaded again."""
    code = f"""
import asyncio, os, signal, sys, threading
from edgeinfer import LLM, AsyncLLM, ClosedError
llm = LLM({str(path)!r}, device="reference")
stream, later = llm.stream("x", max_tokens=200), AsyncLLM({str(path)!r}, device="reference")
held = threading.Event()
def hold():
    with stream._lock, later._opening.own:
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
def told(use):
    try:
        use()
    except ClosedError as error:
        return "fork" in str(error)
pid = os.fork()
if pid == 0:
    signal.alarm(120)
    uses = (lambda: next(stream), stream.poll, stream.run, lambda: stream.notify(print))
    is_told = all([told(use) for use in uses])
    stream.close()
    answer = asyncio.run(later.generate("x", max_tokens=2, logit_bias={{257: -1e9}}))
    os._exit(0 if is_told and len(answer.token_ids) == 2 else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
sys.stdout.flush()
os._exit(0)
"""
    assert _python(code).stdout.strip() == "0"


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "import os, signal"])
def test_exit_never_hangs(path: Path, device: str, ending: str) -> None:
    code = f"""
from edgeinfer import LLM
llm = LLM({str(path)!r}, device={device!r})
stream = llm.stream("hello", max_tokens=500, logit_bias={{257: -1e9}})
next(stream)
{ending}
"""
    assert _python(code).returncode == 0


@pytest.mark.parametrize(
    "use",
    ["llm.save_session({file!r}, stream)", "llm.generate('y', max_tokens=1)", "llm.embed('y')"],
)
def test_what_threads_do_at_exit_is_no_error(path: Path, tmp_path: Path, use: str) -> None:
    """Daemons end with the interpreter: a traceback of theirs would be all that a user sees."""
    code = f"""
import threading, time
from edgeinfer import LLM
llm = LLM({str(path)!r}, device="reference", pooling="mean")
stream = llm.stream("x", max_tokens=2)
stream.run()
began = threading.Event()
def work():
    while True:
        {use.format(file=str(tmp_path / "one.session"))}
        began.set()
threading.Thread(target=work, daemon=True).start()
began.wait()
"""
    done = _python(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_that_outlives_all_modules_says_that_it_is_closed(path: Path) -> None:
    """Where nothing can be imported any more: an error's own words had raised another there."""
    code = f"""
import builtins
from edgeinfer import LLM
class Late:
    def __init__(self, llm):
        self.llm = llm
    def __del__(self):
        llm = self.llm
        for use in (llm.generate, llm.chat, llm.tokenize, llm.embed, lambda x: llm.logits([1])):
            try:
                use("x")
            except BaseException as error:
                print(type(error).__name__, error, flush=True)
        llm.close()
        print(llm)
late = Late(LLM({str(path)!r}, device="reference", pooling="mean"))
builtins.kept = late
del late
"""
    done = _python(code)
    assert (done.returncode, done.stderr) == (0, "")
    *told, shown = done.stdout.splitlines()
    assert told == ["ClosedError the model was closed"] * 5 and "LLM" in shown


def test_an_exit_waits_once_for_a_callback(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the engine itself; the model's own end, which comes after it, had waited again."""
    began, gate = threading.Event(), threading.Event()

    def wait(step: object) -> None:
        began.set()
        gate.wait(120)

    llm = LLM(path, device="reference")
    stream, engine, waits = llm.stream("x", max_tokens=2, on_step=wait), llm.runtime.engine, []
    assert began.wait(120)
    monkeypatch.setattr(engine._thread, "join", waits.append)
    engine.close(timeout=2.0, is_exit=True)
    llm.close()
    assert waits == [2.0]
    gate.set()
    assert stream.prompt_ids


def test_import_is_light() -> None:
    code = """
import sys, edgeinfer
slow = {"numpy", "numba", "cupy", "textual", "tokenizers", "huggingface_hub", "jinja2"}
print(sorted(slow & set(sys.modules)))
"""
    assert _python(code).stdout.strip() == "[]"


# -- asyncio -------------------------------------------------------------------------------------


def test_async(path: Path) -> None:
    async def work() -> tuple[Completion, str, str]:
        async with AsyncLLM(path, device="reference") as llm:
            whole = await llm.chat("hello", max_tokens=5, seed=1)
            parts = []
            async for event in await llm.stream_chat("hello", max_tokens=5, seed=1):
                parts.append(event.text)
            stream = await llm.stream("hello", max_tokens=400)
            async with stream:
                async for _ in stream:
                    break
            return whole, "".join(parts), stream.completion.finish_reason

    whole, parts, reason = asyncio.run(work())
    assert parts == whole.text
    assert reason == "cancelled"


# -- the real small model ------------------------------------------------------------------------


def test_smollm_answers(smollm: LLM) -> None:
    answer = smollm.chat("What is gravity?", max_tokens=24, temperature=0)
    assert answer.text.startswith("Gravity is a fundamental concept in physics that describes")
    raw = smollm.generate("Once upon a time", max_tokens=16, temperature=0)
    assert raw.text.startswith(", the city of Nova Haven was a thriving")


def test_smollm_logits_are_near_the_truth(smollm: LLM, data_file: Callable[[str], Path]) -> None:
    with np.load(data_file("golden/smollm2-text1.npz")) as golden:
        ids, top_ids = golden["ids"].tolist(), golden["top_ids"]
        logits = smollm.logits(ids)
        agree = logits.argmax(axis=1) == top_ids[:, 0]
    assert agree.mean() >= 0.955


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )


def _wait_until(condition: Callable[[], bool]) -> None:
    wait_until(condition, "what the engine comes to")
