"""How much faster a model's own block makes decoding, were each guess right with some chance.

    python -m tests.bench.bench_drafting MODEL --chance 0.8 --rounds 6

MODEL is a file with such a block: `make_model --arch qwen35 --drafts` writes a random one. Answers
without guesses and with them take turns, and one without ends it: a round's ratio is of its answer
with guesses and of both beside it without, so that a machine that gets slower or faster counts for
both. The ratios of the two without say what noise there is: an effect lies outside of their
quartiles.

Of a random model's answers any token is as likely as another, while the first 65,536 make up most
of a text (`TUNING.md`): `--listed` says which part they are taken to be.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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


class Round(NamedTuple):
    """Tokens a second of an answer with guesses, and of those without before and behind it."""

    before: float
    drafted: float
    behind: float

    @property
    def plain(self) -> float:
        """As if both without were one answer."""
        return 2 / (1 / self.before + 1 / self.behind)

    @property
    def ratio(self) -> float:
        return self.drafted / self.plain

    @property
    def noise(self) -> float:
        return self.behind / self.before


def told(rounds: Sequence[Round]) -> Iterator[str]:
    """A line for each round, then the medians, and the quartiles of what they are medians of."""
    for i, each in enumerate(rounds, 1):
        yield (
            f"round {i}: {each.plain:.1f} tok/s plain, {each.drafted:.1f} with guesses: "
            f"{each.ratio:.3f}x; plain behind plain {each.noise:.3f}x"
        )
    plain = statistics.median(each.plain for each in rounds)
    drafted = statistics.median(each.drafted for each in rounds)
    low, ratio, high = quartiles([each.ratio for each in rounds])
    least, _, most = quartiles([each.noise for each in rounds])
    yield (
        f"{plain:.1f} tok/s plain, {drafted:.1f} with guesses: {ratio:.2f}x "
        f"({low:.3f} to {high:.3f}; plain behind plain {least:.3f} to {most:.3f})"
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--chance", type=float, default=0.8)
    parser.add_argument("--listed", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: one at least")
    held, tried = 0, 0
    with LLM(given.model, n_ctx=512, threads=given.threads, drafts=True) as llm:
        truth = llm.generate(IDS, speculation=False, **SPEC).token_ids
        hold(given.chance, given.listed, list(truth))

        def rate(*, guesses: bool) -> float:
            nonlocal held, tried
            answer = llm.generate(IDS, speculation=guesses, **SPEC)
            assert answer.token_ids == truth
            used = llm.runtime.engine._runner.drafter
            assert used is not None and not used.has_failed
            held += answer.timings.accepted_tokens
            tried += answer.timings.proposed_tokens
            return answer.timings.decode_tok_s

        rate(guesses=True)  # warms up, as the one that was the truth
        held = tried = 0
        plain, drafted = [rate(guesses=False)], list[float]()
        for _ in range(given.rounds):
            drafted.append(rate(guesses=True))
            plain.append(rate(guesses=False))
    rounds = [Round(*each) for each in zip(plain, drafted, plain[1:], strict=False)]
    print("\n".join(told(rounds)) + f"; {held} of {tried} held")


if __name__ == "__main__":
    main()
