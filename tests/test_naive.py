"""Models that are loaded to be compared with: one answer at a time, nothing of earlier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM
from edgeinfer.stream import Stream

from .models_for_tests import tiny_model
from .server_for_tests import LOAD, running, small_model

PROMPT = [5 + i % 50 for i in range(70)]


@pytest.mark.parametrize("arch", ["llama", "qwen35"])
def test_nothing_is_reused_and_the_tokens_are_the_same(tmp_path: Path, arch: str) -> None:
    path = tiny_model(tmp_path, arch=arch, n_layers=4)
    answers = []
    for naive in (False, True):
        with LLM(path, n_ctx=128, device="cpu", slots=2, naive=naive) as llm:
            for _ in range(2):
                answers.append(llm.generate(PROMPT, max_tokens=20, seed=3))
    assert len({answer.token_ids for answer in answers}) == 1
    cached = [answer.usage.cached_tokens for answer in answers]
    assert cached[1] > 30 and [cached[0], *cached[2:]] == [0, 0, 0]


def test_one_request_is_answered_at_a_time_in_the_order_of_arrival(tmp_path: Path) -> None:
    path = tiny_model(tmp_path)
    with LLM(path, n_ctx=128, device="cpu", slots=4, naive=True) as llm:
        order, n_running = list[int](), set[int]()

        def stream(i: int) -> Stream:
            def note(step: Any) -> None:
                order.append(i)
                n_running.add(llm.runtime.engine.n_running)

            return llm.stream([7, 8 + i], max_tokens=9, logit_bias={2: -1e9}, on_step=note)

        for each in [stream(i) for i in range(4)]:
            each.run()
        assert order == sorted(order) and set(order) == {0, 1, 2, 3} and n_running == {1}
        store = llm.runtime.engine._store
        assert [pool.n_free for pool in store.pools] == store.n_pages


def test_a_server_can_be_naive(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hello " * 30}], "max_tokens": 3}
    with running([("tiny", small_model(tmp_path))], load={**LOAD, "naive": True}) as server:
        usages = [server.post("/v1/chat/completions", body).json()["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 0]
