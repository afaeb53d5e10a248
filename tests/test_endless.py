"""Far more tokens than the context of 2,048 has: the same memory, speed and quality."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from edgeinfer import LLM, platform
from edgeinfer.bench.perplexity import measure
from edgeinfer.engine.sequence import Finished, Request, Token
from edgeinfer.sampling.params import SamplingParams

from .models_for_tests import tiny_model

N, N_CTX = 100_000, 2048
MOST_GROWTH = 4 << 20  # bytes: the tokens themselves, and the times that are noted here


@pytest.mark.slow
def test_an_answer_without_end_keeps_its_memory_and_its_speed(tmp_path: Path) -> None:
    with LLM(tiny_model(tmp_path), n_ctx=N_CTX, threads=1) as llm:
        request = Request(
            ids=(256, *range(40)), params=SamplingParams(temperature=1.0, seed=1), max_tokens=N,
            overflow="slide", n_pinned=8,
        )  # fmt: skip
        ends, memory, last = array("d"), [], None
        for event in llm.runtime.engine.submit(request):
            last = event
            if isinstance(event, Token):
                ends.append(event.at)
                if len(ends) % 5_000 == 0:
                    memory.append(platform.rss())
        assert isinstance(last, Finished) and last.reason == "length" and len(ends) == N
    seconds = [b - a for a, b in pairwise(ends)]
    early, late = statistics.median(seconds[4_000:5_000]), statistics.median(seconds[-1_000:])
    grown = max(memory[1:-1]) - memory[0]  # at its end the cache takes it in
    print(f"a token took {1e6 * early:.0f} us, then {1e6 * late:.0f} us; {grown >> 10} KiB more")
    assert grown <= MOST_GROWTH
    assert late <= 1.05 * early


def test_a_text_that_is_read_slides_as_an_answer_does(tmp_path: Path) -> None:
    shown: list[Any] = []
    with LLM(tiny_model(tmp_path), n_ctx=128, threads=1) as llm:
        given: dict[str, Any] = dict(overflow="slide", n_keep=1, logit_bias={2: -1e9})
        answer = llm.generate(
            [*range(3, 103)], max_tokens=150, seed=1, watch=("logits",), **given,
            on_step=lambda step: shown.append(step.logits.copy()),
        )  # fmt: skip
        ids = [*range(3, 103), *answer.token_ids]
        read = np.empty((150, llm.runtime.engine.n_vocab), np.float32)

        def take(row: int, logits: Any) -> None:
            read[row : row + len(logits)] = logits

        llm.runtime.engine.each_logits(ids[:-1], take, 99, overflow="slide")
    assert (np.stack(shown) == read).all()


@pytest.mark.slow
def test_a_long_text_is_predicted_as_in_a_fresh_context(data_file: Callable[[str], Path]) -> None:
    """The last quarter of 20,000 tokens of Python's reference manual, which comes with Python."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    model = data_file("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    with LLM(model, n_ctx=N_CTX, threads=2) as llm:
        engine, ids = llm.runtime.engine, llm.tokenize(text)[:20_000]
        slid = measure(engine, ids, None, last=5_000, overflow="slide").ppl
        windows = measure(engine, ids, None, last=5_000).ppl
        runs = [ids[end - N_CTX : end] for end in range(len(ids) - 4_750, len(ids) + 1, 250)]
        # Each token behind at least 1,797 others.
        losses = [
            math.log(measure(engine, run, None, last=250, overflow="slide").ppl) for run in runs
        ]
    full = math.exp(statistics.fmean(losses))
    print(f"{slid:.3f} where it slides, {windows:.3f} in windows, {full:.3f} in full ones")
    assert slid <= 1.1 * min(full, windows)
