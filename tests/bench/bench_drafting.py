"""How much faster a model's own block makes decoding, were each guess right with some chance.

    python -m tests.bench.bench_drafting MODEL --chance 0.8 --rounds 6

MODEL is a file with such a block: `make_model --arch qwen35 --drafts` writes a random one.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from edgeinfer import LLM
from edgeinfer.engine import drafter

IDS = list(range(20, 36))
SPEC: Any = dict(max_tokens=64, temperature=0.0, logit_bias={257: -1e9})


def hold(chance: float, truth: list[int]) -> None:
    """Have the block say what comes next, or another token; it takes the time that it takes."""
    run, draw = drafter.Drafter._run, random.Random(1)

    def knowing(self: Any, followers: Any, wanted: Any, n: int, *, goes_on: bool) -> Any:
        guesses, hidden = run(self, followers, wanted, n, goes_on=goes_on)
        for k, of_place in enumerate(guesses):
            for i, each in enumerate(wanted):
                place = drafter._end(each) + k - len(IDS)
                token = truth[place] if place < len(truth) else 0
                of_place[i] = token if draw.random() < chance else token ^ 1
        return guesses, hidden

    drafter.Drafter._run = knowing  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--chance", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with LLM(given.model, n_ctx=512, threads=given.threads, drafts=True) as llm:
        truth = llm.generate(IDS, speculation=False, **SPEC).token_ids
        hold(given.chance, list(truth))
        rates, held, tried = list[tuple[float, float]](), 0, 0
        for _ in range(given.rounds):
            answers = [llm.generate(IDS, speculation=on, **SPEC) for on in (False, True)]
            assert all(answer.token_ids == truth for answer in answers)
            used = llm.runtime.engine._runner.drafter
            assert used is not None and not used.has_failed
            held += answers[1].timings.accepted_tokens
            tried += answers[1].timings.proposed_tokens
            plain, drafted = (answer.timings.decode_tok_s for answer in answers)
            rates.append((plain, drafted))
    plain, drafted = (statistics.median(each) for each in zip(*rates, strict=True))
    ratio = statistics.median(b / a for a, b in rates)
    print(
        f"{plain:.1f} tok/s plain, {drafted:.1f} with guesses: {ratio:.2f}x; {held} of {tried} held"
    )


if __name__ == "__main__":
    main()
