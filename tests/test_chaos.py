"""Requests of every kind from many threads at once: each answer is what it would be alone."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import LLM, ClosedError, Completion, ContextLengthError, InvalidRequestError

from .models_for_tests import tiny_model

N_CTX = 150  # no multiple of a page
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
WORDS = ["the ", "in ", "hello", "air ", "é", "字", "\n", "<|eos|>", "x" * 20, "0123", "🙂"]
WRONG: list[dict[str, Any]] = [
    {"max_tokens": 1.5}, {"max_tokens": True}, {"stop": 5}, {"seed": -1}, {"top_k": 2**70},
    {"temperature": float("nan")}, {"overflow": "drop"}, {"logit_bias": {"5": 1}},
    {"logprobs": 1000}, {"stop_token_ids": [999]}, {"speculation": "yes"}, {"prompt": [1, 2.5]},
    {"prompt": None}, {"prompt": [5] * (N_CTX + 1), "overflow": "error"}, {"typo": 1},
]  # fmt: skip


class Chaos:
    """Threads that ask one model, and what a second one answered to the same alone."""

    def __init__(self, llm: LLM, alone: LLM, n_kinds: int, seed: int) -> None:
        self.llm, self.seed = llm, seed
        rng = random.Random(seed)
        self.asked = [_request(rng) for _ in range(n_kinds)]
        self.expected = [_ask(alone, asked).run() for asked in self.asked]
        self.ids = [rng.choices(range(256), k=rng.randint(1, 90)) for _ in range(8)]
        self.logits = [alone.logits(ids) for ids in self.ids]
        self.wrong: list[str] = []
        self.n_whole = self.n_refused = self.n_partial = 0

    def run(self, n_threads: int, n_requests: int) -> None:
        threads = [
            threading.Thread(target=self._serve, args=(i, n_requests // n_threads))
            for i in range(n_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3000)
            assert not thread.is_alive(), "a request hangs"
        assert self.wrong == []

    def _serve(self, index: int, n: int) -> None:
        rng = random.Random(f"{self.seed}-{index}")
        for _ in range(n):
            try:
                self._one(rng)
            except BaseException as error:
                self.wrong.append(f"{error!r}")
                raise

    def _one(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.asked))
        asked, expected = self.asked[which], self.expected[which]
        kind = rng.choices(
            ["whole", "batch", "close", "drop", "cancel", "wrong", "logits"],
            [50, 5, 10, 8, 8, 14, 5],
        )[0]
        if kind == "whole":
            self._compare(_ask(self.llm, asked).run(), expected)
        elif kind == "batch":
            others = [each for each in self.asked[:5] if "prompt" in each]
            for each in others:
                same = {name: value for name, value in each.items() if name != "prompt"}
                (found,) = self.llm.generate_batch([each["prompt"]], **same)
                self._compare(found, self.expected[self.asked.index(each)])
        elif kind == "wrong":
            self._refuse(asked | rng.choice(WRONG))
        elif kind == "logits":
            i = rng.randrange(len(self.ids))
            chunk = rng.choice([None, 1, 7, 64])
            if not np.array_equal(
                self.llm.logits(self.ids[i], prefill_chunk=chunk), self.logits[i]
            ):
                self.wrong.append("logits differ")
        else:
            self._leave(asked, expected, kind, rng.randrange(12))

    def _compare(self, found: Completion, expected: Completion) -> None:
        self.n_whole += 1
        for name in ("text", "reasoning", "token_ids", "finish_reason", "stop", "logprobs", "seed"):
            if getattr(found, name) != getattr(expected, name):
                self.wrong.append(f"{name}: {found} is not {expected}")

    def _refuse(self, asked: dict[str, Any]) -> None:
        self.n_refused += 1
        if "typo" in asked:
            error: type[Exception] = TypeError
        elif "error" == asked.get("overflow") and len(asked.get("prompt") or "") > N_CTX:
            error = ContextLengthError
        else:
            error = InvalidRequestError
        with pytest.raises(error):
            _ask(self.llm, asked)

    def _leave(self, asked: dict[str, Any], expected: Completion, kind: str, n: int) -> None:
        """Read a few events and go away."""
        self.n_partial += 1
        stream = _ask(self.llm, asked)
        for _ in range(n):
            next(stream, None)
        if kind == "drop":
            del stream
            return
        if kind == "cancel":
            stream._generation.cancel(keep_cache=bool(n % 2))
            found = stream.run()
        else:
            stream.close()
            found = stream.completion
        if found.token_ids != expected.token_ids[: len(found.token_ids)]:
            self.wrong.append(f"{kind}: {found} does not begin {expected}")


def _request(rng: random.Random) -> dict[str, Any]:
    text = "".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    overflow = rng.choice(["error", "error", "slide", "drop-turns"])
    asked: dict[str, Any] = {
        "max_tokens": rng.choice([1, 2, 5, 20, 60, 400 if overflow == "slide" else None]),
        "overflow": overflow,
        "seed": rng.randrange(2**40),
        "temperature": rng.choice([0, 0.0, 0.7, np.float32(1.5)]),
        "speculation": rng.choice([True, False, None]),
    }
    if overflow != "error" and asked["max_tokens"] is None:
        asked["max_tokens"] = 200
    extra: list[dict[str, Any]] = [
        {}, {"stop": rng.choice(["e", "th", ["zz", "a"]])}, {"logprobs": rng.randrange(4)},
        {"repeat_penalty": 1.3, "repeat_last_n": -1}, {"mirostat": rng.choice([1, 2])},
        {"dry_multiplier": 1.0, "dry_allowed_length": 1}, {"top_k": np.int64(3), "min_p": 0},
        {"logit_bias": {rng.randrange(256): 5.0, 257: -100.0}}, {"xtc_probability": 0.5},
        {"stop_token_ids": [rng.randrange(256)]},
    ]  # fmt: skip
    asked |= rng.choice(extra) | rng.choice(extra)
    if overflow == "drop-turns" or rng.random() < 0.2:
        turns = rng.randint(1, 5)
        asked["messages"] = [
            {"role": "assistant" if i % 2 else "user", "content": text[: 40 // turns]}
            for i in range(turns)
        ]
        asked["messages"] = asked["messages"][: turns - 1 + turns % 2]
    else:
        asked["prompt"] = text if rng.random() < 0.7 else [rng.randrange(320) for _ in text[:90]]
    return asked


def _ask(llm: LLM, asked: dict[str, Any]) -> Any:
    given = dict(asked)
    if "prompt" in given:
        given.pop("messages", None)
        return llm.stream(given.pop("prompt"), **given)
    return llm.stream_chat(given.pop("messages"), **given)


def _all_pages_are_free(llm: LLM) -> None:
    gc.collect()
    scheduler, pool = llm.runtime.engine._scheduler, llm.runtime.engine.pools[0]
    deadline = time.perf_counter() + 120
    while scheduler.running or scheduler.paused or scheduler.waiting or scheduler.jobs:
        assert time.perf_counter() < deadline
        time.sleep(0.01)
    scheduler.store.index.clear()
    assert pool.n_free == pool.n_pages


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def path(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tiny_model(
        tmp_path_factory.mktemp("chaos"), arch=request.param, n_ctx=512, chat_template=TEMPLATE,
        quant="Q4_0" if request.param == "llama" else "Q8_0",
    )  # fmt: skip


def _chaos(path: Path, n_kinds: int, n_threads: int, n_requests: int) -> Chaos:
    with LLM(path, n_ctx=N_CTX, threads=1) as alone, LLM(path, n_ctx=N_CTX, slots=3) as llm:
        chaos = Chaos(llm, alone, n_kinds, seed=len(path.name))
        chaos.run(n_threads, n_requests)
        _all_pages_are_free(llm)
        chaos.run(1, 4)
        streams = [_ask(llm, asked) for asked in chaos.asked[:20]]
        llm.close()
        for stream in streams:
            try:
                stream.run()
            except ClosedError:
                pass
    return chaos


def test_every_answer_equals_its_solo_run(path: Path) -> None:
    chaos = _chaos(path, 30, 8, 160)
    assert chaos.n_whole and chaos.n_refused and chaos.n_partial


@pytest.mark.slow
def test_five_thousand_requests(path: Path) -> None:
    chaos = _chaos(path, 400, 16, 5008)
    print(f"{chaos.n_whole} whole, {chaos.n_partial} left, {chaos.n_refused} refused")
