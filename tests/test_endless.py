"""An answer of 100,000 tokens in a context of 2,048: the same memory and the same speed."""

from __future__ import annotations

import statistics
from array import array
from itertools import pairwise
from pathlib import Path

import pytest

from edgeinfer import LLM, platform
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
