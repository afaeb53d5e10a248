"""How much faster a model's own block makes decoding, were each guess right with some chance.

    python -m tests.bench.bench_drafting MODEL --chance 0.8 --rounds 6

MODEL is a file with such a block: `make_model --arch qwen35 --drafts` writes a random one. Of its
answers any token is as likely as another, while the first 65,536 make up most of a text (97 to 99 %
of English and of Python in the vocabularies of 152,000 and 200,000 that were tried, 75 to 86 % of
other European languages, 41 to 81 % of Chinese): `--listed` says which part they are taken to be.
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from edgeinfer import LLM
from edgeinfer.engine import drafter, drafting
from edgeinfer.engine.drafting import Drafting

IDS = list(range(20, 36))
SPEC: Any = dict(max_tokens=64, temperature=0.0, logit_bias={257: -1e9})


def hold(chance: float, listed: float, truth: list[int]) -> None:
    """Have the block say what comes next, or another token; it takes the time that it takes."""
    run, chances, draw = drafter.Drafter._run, Drafting.chances, random.Random(1)
    drafting.SHORTLIST = 1 << 31  # each guess tells of the block and of the list in one

    def of_both(self: Drafting, *, is_short: bool) -> list[float]:
        return chances(self, is_short=False)

    def knowing(
        self: Any, followers: Any, wanted: Any, n: int, n_logits: int, *, goes_on: bool
    ) -> Any:
        guesses, hidden = run(self, followers, wanted, n, n_logits, goes_on=goes_on)
        for k, of_place in enumerate(guesses):
            for i, each in enumerate(wanted):
                place = drafter._end(each) + k - len(IDS)
                token = truth[place] if place < len(truth) else 0
                holds = draw.random() < chance * (listed if n_logits else 1.0)
                of_place[i] = token if holds else token ^ 1
        return guesses, hidden

    drafter.Drafter._run = knowing  # type: ignore[method-assign]
    Drafting.chances = of_both  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--chance", type=float, default=0.8)
    parser.add_argument("--listed", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with LLM(given.model, n_ctx=512, threads=given.threads, drafts=True) as llm:
        truth = llm.generate(IDS, speculation=False, **SPEC).token_ids
        hold(given.chance, given.listed, list(truth))
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
