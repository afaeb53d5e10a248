"""Guesses of a model's own block change the time that an answer takes, and no token of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer import LLM, InvalidRequestError
from edgeinfer.engine import drafter
from edgeinfer.engine import drafting as drafting_module
from edgeinfer.engine.drafting import MOST, Drafting
from edgeinfer.engine.step_costs import StepCosts

from .backends import backend
from .models_for_tests import tiny_model

SPEC: Any = dict(max_tokens=70, logit_bias={257: -1e9}, seed=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid model whose last block guesses; of its seven layers the fourth has attention."""
    folder = tmp_path_factory.mktemp("drafting")
    return tiny_model(folder, arch="qwen35", n_layers=8, drafts=True, n_ctx=512)


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[LLM]:
    with LLM(path, n_ctx=256, slots=3) as llm:
        yield llm


@pytest.fixture(scope="module")
def drafting(path: Path) -> Iterator[LLM]:
    with LLM(path, n_ctx=256, slots=3, drafts=True) as llm:
        yield llm


def is_well(llm: LLM) -> bool:
    drafter = llm.runtime.engine._runner.drafter
    return drafter is not None and not drafter.has_failed


PROMPTS: list[Any] = ["hello", "x" * 150, list(range(20, 120)), [5]]
WAYS: list[dict[str, Any]] = [
    dict(temperature=0.0), dict(temperature=0.9), dict(temperature=0.7, repeat_penalty=1.2),
    dict(temperature=0.8, logprobs=2), dict(overflow="slide", max_tokens=300, temperature=0.5),
]  # fmt: skip


def always(monkeypatch: pytest.MonkeyPatch, chance: float) -> None:
    """Guesses are taken to hold with this chance, and rows of steps to cost nothing."""
    monkeypatch.setattr(StepCosts, "of", lambda *_: 1.0)
    monkeypatch.setattr(Drafting, "chances", lambda *_, **__: [chance**k for k in range(1, 5)])


@pytest.mark.parametrize("chance", [None, 0.999])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_token_changes(
    plain: LLM, drafting: LLM, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], chance: Any
) -> None:
    if chance is not None:
        always(monkeypatch, chance)
    for prompt in PROMPTS:
        expected = plain.generate(prompt, speculation=False, **SPEC | way)
        found = drafting.generate(prompt, **SPEC | way)
        assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
    assert is_well(drafting)


def test_answers_beside_each_other(
    plain: LLM, drafting: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, 0.999)
    prompts = [f"one of {i} prompts, each with its end" * (1 + i % 3) for i in range(6)]
    expected = plain.generate_batch(prompts, temperature=0.8, **SPEC)
    found = drafting.generate_batch(prompts, temperature=0.8, **SPEC)
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    assert is_well(drafting)
    assert sum(a.timings.proposed_tokens for a in found) > 100


def test_what_does_not_hold_is_given_up() -> None:
    state = Drafting()
    for at in range(40):
        state.at, state.tokens = at, [7, 7]
        state.learn([*[1] * at, 1])
    assert state.chances(is_short=False)[0] < 0.1 and state.guess(5, 9) == ([], [])
    state.at, state.tokens = 5, [1, 2, 3]
    assert state.guess(5, 2)[0] == [1, 2] and state.guess(6, 2) == ([], [])
    for at in range(60):
        state.at, state.tokens = at, [1] * MOST
        state.learn([1] * (at + MOST))
    assert state.chances(is_short=False)[-1] > 0.7


def test_a_token_that_is_not_listed_tells_nothing_of_the_block() -> None:
    n = drafting_module.SHORTLIST
    state = Drafting(is_short=True)
    before = state.chances(is_short=False)
    for at in range(40):
        state.at, state.tokens = at, [7, 7]
        state.learn([*[1] * at, n])
    assert state.chances(is_short=False) == before
    assert state.chances(is_short=True)[1] == pytest.approx(state.listed**2 * before[1])
    for at in range(40):
        state.at, state.tokens, state.is_short = at, [7, 7], False
        state.learn([*[1] * at, n])
    assert state.chances(is_short=False)[0] < 0.1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=400), st.randoms(use_true_random=False))
def test_how_much_is_listed_is_counted_once_a_token(listed: list[bool], rng: Any) -> None:
    """However many tokens a step yields; a long prompt counts by its end."""
    ids = [0 if each else drafting_module.SHORTLIST for each in listed]
    one, several, end = Drafting(), Drafting(), 0
    for one.at in range(len(ids)):
        one.learn(ids[: one.at + 1])
    while end < len(ids):
        several.at, end = end, min(len(ids), end + rng.randint(1, 9))
        several.learn(ids[:end])
    assert several.listed == one.listed
    whole = Drafting()
    whole.learn(ids)
    assert whole.listed == pytest.approx(one.listed, abs=0.02)
    share = sum(listed[-200:]) / len(listed[-200:])
    assert len(ids) < 300 or abs(whole.listed - share) < 0.5


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_token_changes_by_a_shortlist(
    plain: LLM, path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    """Guesses are picked from it, some tokens lie outside."""
    monkeypatch.setattr(drafter, "SHORTLIST", 100)
    monkeypatch.setattr(drafting_module, "SHORTLIST", 100)
    always(monkeypatch, 0.999)
    ways, guess = list[bool](), drafter.Drafter._run

    def watching(self: Any, followers: Any, wanted: Any, n: int, n_logits: int, **how: Any) -> Any:
        found = guess(self, followers, wanted, n, n_logits, **how)
        if wanted:
            ways.append(bool(n_logits))
            assert not n_logits or max(sum(found[0], [])) < 100
        return found

    monkeypatch.setattr(drafter.Drafter, "_run", watching)
    with LLM(path, n_ctx=256, slots=3, drafts=True) as llm:
        for prompt in PROMPTS:
            expected = plain.generate(prompt, speculation=False, **SPEC | way)
            found = llm.generate(prompt, **SPEC | way)
            assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
        assert is_well(llm) and max(expected.token_ids) >= 100
    assert any(ways)


def test_answers_learn_from_those_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once guesses don't hold, a new answer tries few; now and then one tries anew."""
    run, tried = drafter.Drafter._run, list[int]()

    def counting(self: Any, followers: Any, wanted: Any, *how: int, goes_on: bool) -> Any:
        tried[-1] += len(wanted)
        return run(self, followers, wanted, *how, goes_on=goes_on)

    monkeypatch.setattr(drafter.Drafter, "_run", counting)
    monkeypatch.setattr(StepCosts, "of", lambda self, n: 1.0 + 0.2 * (n - 1))
    monkeypatch.setattr(drafter, "_RETRY", 8)
    with LLM(path, n_ctx=512, drafts=True) as llm:
        for i in range(16):
            tried.append(0)
            llm.generate([20, i], **SPEC | dict(temperature=1.0, max_tokens=60, seed=i))
        assert is_well(llm)
    assert tried[0] and tried[7]  # the eighth begins as if nothing were known
    assert not any(tried[2:7]) and not any(tried[9:15])


def test_a_file_without_a_block_says_so(tmp_path: Path, path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="holds none") as caught:
        LLM(tiny_model(tmp_path), drafts=True)
    assert caught.value.param == "drafts"


def test_what_the_block_starts_from_is_no_layer_of_the_model(path: Path, drafting: LLM) -> None:
    """It lies behind the last one; what is advised for another can be done."""
    n_layers = drafting.runtime.model.hparams.n_layers
    with pytest.raises(InvalidRequestError, match="what enters the head"):
        drafting.residuals([5], n_layers + 1)
    with pytest.raises(InvalidRequestError, match=r"with residuals=\[\]; .* residuals=\[2\]"):
        drafting.generate("x", on_step=print, watch=[2])


# Where the layers run: the last of them may have no cache that the block shares pages with.
PLACES: list[dict[str, Any]] = [
    dict(device="law"), dict(device="shim"), dict(device="shim", gpu_layers=1),
    dict(device="shim:0,shim:1"),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_machine_guesses(
    path: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch, place: dict[str, Any]
) -> None:
    """The same tokens, and the guesses that the CPU's block makes, of all or the first tokens."""

    def choose(_: object, states: list[Drafting]) -> tuple[int, bool]:
        return 2 * bool(states), bool(states) and states[0].at % 2 == 0

    always(monkeypatch, 0.999)
    monkeypatch.setattr(drafter, "SHORTLIST", 100)
    monkeypatch.setattr(drafter.Drafter, "_choose", choose)
    backend(place["device"])
    rows = [list[Any](), list[Any]()]
    spec = SPEC | dict(max_tokens=12, speculation=True)  # by itself the law does not
    for found, options in zip(rows, (dict(device="cpu"), place), strict=True):
        with LLM(path, n_ctx=96, slots=2, threads=1, drafts=True, **options) as llm:
            with monkeypatch.context() as patch:
                keep_guesses(patch, found)
                for prompt in ([5], "hello"):
                    found.append(llm.generate(prompt, temperature=0.0, **spec).token_ids)
            # Which rows of these share a step hangs on the clock.
            several = llm.generate_batch(["a b", "x" * 40], temperature=0.9, **spec)
            found += [answer.token_ids for answer in several]
            assert is_well(llm) and sum(each.timings.proposed_tokens for each in several) > 5
            if options == dict(device="shim"):
                free, total = llm.runtime.program._device.memory()  # type: ignore[attr-defined]
                assert total - free == llm.plan.pools[1].total_bytes
    assert rows[0] == rows[1]
    expected = plain.generate("hello", temperature=0.0, **spec)
    assert expected.token_ids in rows[0]


def keep_guesses(monkeypatch: pytest.MonkeyPatch, guesses: list[Any]) -> None:
    """What the block makes of every step that it follows."""
    guess = drafter.Drafter._guess

    def kept(self: Any, followers: Any) -> None:
        guess(self, followers)
        guesses.append([list(each.work.drafting.tokens) for each in followers])

    monkeypatch.setattr(drafter.Drafter, "_guess", kept)


def test_who_guesses_right_is_believed(
    plain: LLM, drafting: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the block says what comes, steps yield several tokens."""
    spec: Any = SPEC | dict(temperature=0.0)
    ids = list(range(20, 60))
    answer = plain.generate(ids, speculation=False, **spec)
    known, run = (*ids, *answer.token_ids, 0), drafter.Drafter._run

    def knowing(self: Any, followers: Any, wanted: Any, *how: int, goes_on: bool) -> Any:
        _, hidden = run(self, followers, wanted, *how, goes_on=goes_on)
        return [[known[min(drafter._end(each), len(known) - 1)] for each in wanted]], hidden

    monkeypatch.setattr(drafter.Drafter, "_run", knowing)
    always(monkeypatch, 0.999)
    found = drafting.generate(ids, **spec)
    assert found.token_ids == answer.token_ids and is_well(drafting)
    assert found.timings.accepted_tokens > 10
    assert found.timings.accepted_tokens > 0.7 * found.timings.proposed_tokens
