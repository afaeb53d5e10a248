"""Guessed tokens: found as said, checked where it pays, and never seen in an answer."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from edgeinfer.batch import StepLimits
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.sequence import Finished, Prefilled, Request, Token
from edgeinfer.engine.speculation import (
    MAX_ROWS,
    Acceptance,
    Evidence,
    Lookup,
    Speculator,
    best_drafts,
)
from edgeinfer.engine.step_costs import StepCosts
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.model import Model
from edgeinfer.sampling.params import SamplingParams

from .models_for_tests import tiny_model
from .native import cache_root
from .waiting import wait_until

N_CTX = 128
VOCAB = 320
# Few tokens with near chances: matches are frequent and half of them fail.
COINS = {token: 60.0 for token in (70, 71, 72)}


# -- guessing ------------------------------------------------------------------------------------


def longest(tokens: list[int]) -> int:
    """The longest match of the end with an earlier place, found the slow way."""
    lengths = [0]
    for end in range(len(tokens) - 1):
        n = 0
        while n <= end and tokens[end - n] == tokens[-1 - n]:
            n += 1
        lengths.append(n)
    return min(16, max(lengths))


def test_the_longest_match_is_found_and_followed() -> None:
    dice = random.Random(1)
    tokens = [dice.randrange(12) for _ in range(40)]
    lookup = Lookup(tokens)
    for _ in range(400):
        is_copy = dice.random() < 0.9
        tokens.append(tokens[len(tokens) * 2 // 3] if is_copy else dice.randrange(12))
        lookup.push()
        evidence, guesses = lookup.find(5)
        length = evidence - Evidence.PAIR + 2
        assert length <= max(2, longest(tokens))
        if length >= 2:
            end = tokens[-length:]
            places = [i for i in range(length, len(tokens)) if tokens[i - length : i] == end]
            assert any((tokens * 2)[i : i + 1] == guesses[:1] for i in places)
            assert len(guesses) == 5


def test_built_at_once_or_token_by_token_is_the_same() -> None:
    dice = random.Random(2)
    tokens = [dice.randrange(5) for _ in range(200)]
    growing: list[int] = tokens[:1]
    lookup = Lookup(growing)
    for token in tokens[1:]:
        growing.append(token)
        lookup.push()
    assert lookup.find(7) == Lookup(tokens).find(7)


def test_repetition_is_guessed_beyond_its_end() -> None:
    assert Lookup([9, 1, 2, 1, 2, 1]).find(6) == (Evidence.PAIR + 1, [2, 1, 2, 1, 2, 1])
    assert Lookup([5, 5, 5, 5]).find(4) == (Evidence.PAIR + 1, [5, 5, 5, 5])


def test_one_token_is_followed_as_it_mostly_was() -> None:
    assert Lookup([1, 2, 3, 1]).find(3) == (Evidence.ONCE, [2, 3, 1])
    assert Lookup([1, 2, 3, 1, 2, 4, 1]).find(1) == (Evidence.OFTEN, [2])
    assert Lookup([1, 2, 3, 1, 4, 5, 1]).find(1) == (Evidence.DISPUTED, [4])
    often = [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 6, 7, 1]
    assert Lookup(often).find(1) == (Evidence.OFTEN, [2])
    assert Lookup([1]).find(3) == Lookup([1, 2, 3]).find(3) == (Evidence.NONE, [])


def test_after_a_match_has_ended_one_token_counts_as_replaced() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 1, 2]
    lookup = Lookup(tokens)
    assert lookup.find(2) == (Evidence.PAIR, [3, 4])
    tokens.append(9)
    lookup.push()
    assert lookup.find(3) == (Evidence.REPLACED, [4, 5, 6])
    tokens.append(8)
    lookup.push()
    assert lookup.find(3) == (Evidence.NONE, [])


def test_tokens_of_one_bucket_are_kept_apart() -> None:
    assert Lookup([1, 2, 3, 1 + (1 << 14)]).find(1) == (Evidence.NONE, [])
    assert Lookup([1, 2, 1 + (1 << 14), 3, 1]).find(1) == (Evidence.NONE, [])


def test_a_token_takes_constant_time() -> None:
    tokens = [7] * 20_000  # every place matches every other
    lookup = Lookup(tokens)
    begun = time.thread_time()
    for _ in range(1000):
        tokens.append(7)
        lookup.push()
    assert time.thread_time() - begun < 1.0


# -- deciding ------------------------------------------------------------------------------------


def costs(*seconds: float) -> StepCosts:
    made = StepCosts()
    for _ in range(200):
        for n, each in enumerate(seconds, 1):
            made.measure(n, each)
    return made


def test_a_free_row_is_always_taken_and_a_dear_one_never() -> None:
    flat, steep = costs(*[1.0] * 8), costs(*range(1, 9))
    chances = [0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1]
    assert best_drafts([chances], flat, 8) == [7]
    assert best_drafts([chances], steep, 8) == [0]
    assert best_drafts([chances, []], flat, 4) == [2, 0]
    assert best_drafts([[0.5, 0.1], [0.9, 0.8]], flat, 5) == [1, 2]


def test_unmeasured_steps_lie_between_measured_ones() -> None:
    made = costs(1.0)
    assert 1.0 < made.of(2) < made.of(8) < 3.0
    made = StepCosts()
    for _ in range(60):
        made.measure(1, 1.0)
        made.measure(5, 3.0)
    assert made.of(5) / made.of(1) == pytest.approx(3.0, rel=0.1)
    assert made.of(1) < made.of(3) < made.of(5) < made.of(8)


def test_until_it_is_measured_a_row_costs_what_the_machine_says() -> None:
    chances = [0.5, 0.3, 0.2, 0.1]
    for row_cost, n_drafts in ((0.02, 4), (0.17, 2), (1.0, 0)):
        made = StepCosts(row_cost)
        assert made.of(5) == pytest.approx(made.of(1) * (1 + 4 * row_cost))
        assert best_drafts([chances], made, 8) == [n_drafts]


def test_a_slower_machine_changes_no_ratio() -> None:
    made = costs(1.0, 1.1, 1.5)
    for _ in range(40):
        made.measure(1, 2.0)
    assert made.of(3) / made.of(1) == pytest.approx(1.5, rel=0.1)
    assert made.of(3) == pytest.approx(3.0, rel=0.1)


def test_a_first_step_that_took_long_forbids_its_number_of_rows_for_a_short_time() -> None:
    """As it may on a busy machine: guesses that pay are tried again, and soon."""
    chances, rest = [0.7, 0.6], costs(1.0, 1.1)
    assert best_drafts([chances], rest, 8) == [2]
    rest.measure(3, 2.0)
    assert best_drafts([chances], rest, 8) == [1]
    for _ in range(64):
        rest.measure(1, 1.0)
        rest.measure(2, 1.1)
    assert best_drafts([chances], rest, 8) == [2]


def test_one_slow_step_changes_little_and_is_forgotten() -> None:
    made = costs(1.0, 1.1)
    made.measure(2, 100.0)
    assert made.of(2) / made.of(1) < 1.5
    for _ in range(300):
        made.measure(1, 1.0)
    assert made.of(2) == pytest.approx(made.of(1), rel=0.3)


def test_wrong_guesses_end_within_a_few_tokens_and_right_ones_begin_again() -> None:
    usual, acceptance = costs(1.0, 1.2, 1.3, 1.5, 1.6, 1.7, 1.8, 1.9), Acceptance()
    assert best_drafts([acceptance.chances(Evidence.PAIR, 7)], usual, 8) != [0]
    n_wrong = 0
    while best_drafts([acceptance.chances(Evidence.PAIR, 7)], usual, 8) != [0]:
        acceptance.count(Evidence.PAIR, False)
        n_wrong += 1
    assert n_wrong <= 8
    for _ in range(20):
        acceptance.count(Evidence.PAIR, True)
    assert best_drafts([acceptance.chances(Evidence.PAIR, 7)], usual, 8) != [0]


def test_chances_fall_and_longer_matches_are_better() -> None:
    chances = [Acceptance().chances(evidence, 7) for evidence in range(1, Evidence.PAIR + 15)]
    assert all(each == sorted(each, reverse=True) for each in chances)
    matches = [each[0] for each in chances[Evidence.PAIR - 1 :]]
    assert matches == sorted(matches)


def test_guesses_that_no_step_checked_are_learnt_from() -> None:
    tokens = [1, 2, 3, 4] * 2
    speculator = Speculator(tokens, Acceptance.of_all())
    before = speculator.guess(1)[1]
    for i in range(8):
        tokens.append(1 + i % 4)
        speculator.learn(1)
    assert speculator.guess(1)[0] == [1]
    assert speculator.guess(1)[1] > before


def n_checked(rng: random.Random, of_all: Acceptance) -> int:
    """Guesses that an answer of tokens by chance, of few kinds, has checked."""
    usual, tokens = costs(1.0, 1.2, 1.3, 1.5, 1.6, 1.7, 1.8, 1.9), rng.choices(range(8), k=200)
    speculator, n = Speculator(tokens, of_all), 0
    for _ in range(16):
        n += sum(best_drafts([speculator.guess(7)[1]], usual, 8))
        tokens.append(rng.randrange(8))
        speculator.learn(1)
    return n


def test_an_answer_begins_with_what_guesses_of_others_have_shown() -> None:
    rng, of_all = random.Random(5), Acceptance.of_all()
    alone = sum(n_checked(rng, Acceptance.of_all()) for _ in range(20))
    for _ in range(10):
        n_checked(rng, of_all)
    assert sum(n_checked(rng, of_all) for _ in range(20)) < alone / 10
    expected = of_all.expected()
    for _ in range(60):
        of_all.count(Evidence.PAIR, True)
    assert (
        of_all.expected().chances(Evidence.PAIR, 1)[0] > 2 * expected.chances(Evidence.PAIR, 1)[0]
    )


# -- answers are the same ------------------------------------------------------------------------


class Free(StepCosts):
    """More rows cost nothing: every guess is checked."""

    def of(self, n_rows: int) -> float:
        return 1.0


class Program:
    """Counts the rows of every step."""

    def __init__(self, program: Any) -> None:
        self.program, self.rows = program, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def submit(self, batch: Any) -> Any:
        self.rows.append(batch.n_rows)
        return self.program.submit(batch)

    def close(self) -> None:
        self.program.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    limits = StepLimits(
        n_pages={0: 4 * N_CTX // 32}, max_rows=64, max_outputs=32, max_sequences=4, n_threads=2
    )
    with GGUFFile.open(tiny_model(tmp_path_factory.mktemp("speculation"))) as file:
        segment = Model.load(file).graph.segment()
        program = Program(CpuBackend(cache_root()).compile(segment, limits))
        engine = Engine(program, limits, N_CTX, VOCAB, Free())
        yield engine
        engine.close()


def _request(*ids: int, **changes: Any) -> Request:
    params = SamplingParams(temperature=0.0, seed=1)
    given = {"ids": ids or (256, 70, 71, 72, 70, 71), "params": params, "max_tokens": 60}
    return Request(**{**given, **changes})


def _events(engine: Engine, request: Request, speculation: bool) -> tuple[list[Any], int]:
    """What an answer shows, without its times; and how many guesses came true."""
    changed = Request(**{**_fields(request), "speculation": speculation})
    generation = engine.submit(changed)
    shown = [_shown(event) for event in generation if not isinstance(event, Prefilled)]
    assert generation.n_accepted <= generation.n_proposed
    return shown, generation.n_accepted


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__dataclass_fields__}


def _shown(event: Any) -> tuple[Any, ...]:
    if isinstance(event, Token):
        return event.id, event.logprob, event.top
    assert isinstance(event, Finished)
    return event.reason, event.stop_id, event.error


SAMPLED = {
    "coins": dict(temperature=1.0, logit_bias=COINS),
    "penalties": dict(
        temperature=0.7, logit_bias=COINS, repeat_penalty=1.3, presence_penalty=0.4,
        frequency_penalty=0.1, repeat_last_n=20,
    ),
    "all history": dict(temperature=0.9, logit_bias=COINS, repeat_penalty=1.1, repeat_last_n=-1),
    "dry": dict(
        temperature=0.9, logit_bias=COINS, dry_multiplier=0.8, dry_allowed_length=1,
        dry_penalty_last_n=-1, dry_breaker_tokens=((72,),),
    ),
    "xtc": dict(temperature=1.2, logit_bias=COINS, xtc_probability=0.5, xtc_threshold=0.1),
    "greedy": dict(temperature=0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_and_logprobs_are_the_same(engine: Engine, name: str, seed: int) -> None:
    params = SamplingParams(seed=seed, logprobs=3, **SAMPLED[name])  # type: ignore[arg-type]
    request = _request(params=params)
    plain, none = _events(engine, request, False)
    guessed, accepted = _events(engine, request, True)
    assert guessed == plain
    assert none == 0 < accepted


def test_steps_hold_up_to_eight_rows(engine: Engine) -> None:
    engine._runner.program.rows.clear()  # type: ignore[attr-defined]
    _events(engine, _request(256, *[70, 71, 72] * 8), True)
    rows = engine._runner.program.rows[1:]  # type: ignore[attr-defined]
    assert max(rows) == MAX_ROWS
    assert len(rows) < 60


@pytest.mark.parametrize("n", range(1, 12))
def test_max_tokens_inside_the_guesses(engine: Engine, n: int) -> None:
    params = SamplingParams(seed=4, logit_bias=COINS)
    request = _request(*[70, 71, 72] * 6, params=params, max_tokens=n)
    plain, _ = _events(engine, request, False)
    assert _events(engine, request, True)[0] == plain
    assert len(plain) == n + 1


@pytest.mark.parametrize("which", range(0, 24, 3))
def test_a_stop_token_inside_the_guesses(engine: Engine, which: int) -> None:
    params = SamplingParams(seed=5, logit_bias={**COINS, 73: 59.0})
    request = _request(*[70, 71, 72, 73] * 4, params=params)
    tokens = [token for token, *_ in _events(engine, request, False)[0][:-1]]
    ended = Request(**{**_fields(request), "stop_ids": frozenset([tokens[which]])})
    plain, _ = _events(engine, ended, False)
    assert _events(engine, ended, True)[0] == plain
    assert plain[-1][0] == "stop"


def test_the_end_of_the_context(engine: Engine) -> None:
    request = _request(*[70, 71, 72] * 30, max_tokens=None)
    plain, _ = _events(engine, request, False)
    guessed, accepted = _events(engine, request, True)
    assert guessed == plain
    assert len(plain) - 1 == N_CTX - 90
    assert accepted


@pytest.mark.parametrize("n_prompt", [20, 63, 96])
def test_a_context_that_slides(engine: Engine, n_prompt: int) -> None:
    params = SamplingParams(seed=6, logit_bias=COINS)
    ids = ([256, 70, 71, 72] * 40)[:n_prompt]
    request = _request(*ids, params=params, max_tokens=3 * N_CTX, overflow="slide", n_pinned=4)
    plain, _ = _events(engine, request, False)
    guessed, accepted = _events(engine, request, True)
    assert guessed == plain
    assert accepted > N_CTX // 4


def test_several_sequences_at_once(engine: Engine) -> None:
    requests = [
        _request(256, *[70, 71, 72] * n, params=SamplingParams(seed=n, logit_bias=COINS))
        for n in (1, 5, 9)
    ]
    requests.append(_request(256, *[7, 8, 9] * 4))
    plain = [_events(engine, request, False)[0] for request in requests]
    together = [
        engine.submit(Request(**{**_fields(request), "speculation": n != 1}))
        for n, request in enumerate(requests)
    ]
    shown = [[_shown(e) for e in each if not isinstance(e, Prefilled)] for each in together]
    assert shown == plain
    assert [each.n_accepted > 0 for each in together] == [True, False, True, True]


def test_mirostat_is_not_guessed(engine: Engine) -> None:
    params = SamplingParams(seed=1, mirostat=2, logit_bias=COINS)
    plain, _ = _events(engine, _request(params=params), False)
    assert _events(engine, _request(params=params), True) == (plain, 0)


def test_a_prompt_of_one_token(engine: Engine) -> None:
    plain, _ = _events(engine, _request(70), False)
    assert _events(engine, _request(70), True)[0] == plain


# -- the cache holds no guess --------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 64, 6))
def test_what_is_kept_is_what_was_generated(engine: Engine, n: int) -> None:
    params = SamplingParams(seed=n, logit_bias=COINS)
    request = _request(256, 9, n, *[70, 71, 72] * 5, params=params, max_tokens=n)
    answer = [token for token, *_ in _events(engine, request, True)[0][:-1]]
    n_kept = len(request.ids) + len(answer) - 1
    assert engine._store.index.n_idle(0) >= -(-n_kept // 32)
    follow = _request(*request.ids, *answer, 71, 70, 5, max_tokens=8)
    events = list(engine.submit(follow))
    assert isinstance(events[0], Prefilled)
    assert events[0].cached == n_kept
    after = [_shown(event) for event in events if not isinstance(event, Prefilled)]
    engine._store.index.clear()
    assert _events(engine, follow, False)[0] == after


def test_cancelling_frees_every_page(engine: Engine) -> None:
    engine._store.index.clear()
    for n in (1, 7, 20):
        generation = engine.submit(
            _request(256, *[70, 71, 72] * 9, max_tokens=None, speculation=True)
        )
        for _ in range(n):
            next(generation)
        generation.cancel()
        list(generation)
        wait_until(lambda: not engine.n_running, "the end of what runs")
        engine._store.index.clear()  # of one that had ended before
        assert engine.pools[0].n_free == engine.pools[0].n_pages
