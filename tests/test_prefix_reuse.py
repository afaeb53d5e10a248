"""What prompts have in common is computed once, and the answers are what they would be alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from edgeinfer.batch import Batch, StepLimits, StepRequest
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.generation import Generation
from edgeinfer.engine.sequence import Prefilled, Request, Token
from edgeinfer.graph import Segment
from edgeinfer.sampling.params import SamplingParams

from .test_graphs import backend

N_CTX, VOCAB, MAX_ROWS = 640, 40, 64
KINDS = ["full", "windows", "hybrid"]


class Counted:
    """A program that counts rows, and runs no step while its gate is shut."""

    def __init__(self, program: Any) -> None:
        self.program, self.n_rows, self.most_pages = program, 0, 0
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def submit(self, batch: Batch) -> Any:
        self.gate.wait()
        self.n_rows += batch.n_rows
        held = {int(page) for table in batch.tables for page in table[0].pages if page >= 0}
        self.most_pages = max(self.most_pages, len(held))
        return self.program.submit(batch)


@contextmanager
def opened(
    model: Segment, slots: int = 4, n_sequences: int = 16, n_states: int = 60, n_ctx: int = N_CTX
) -> Iterator[Any]:
    request = StepRequest(n_ctx, slots, 2, n_states=n_states if model.states else 0)
    limits = StepLimits.of(request, VOCAB, model.groups, MAX_ROWS)
    limits = limits._replace(max_outputs=MAX_ROWS, max_sequences=n_sequences)
    program = Counted(backend().compile(model, limits))
    engine = Engine(program, limits, n_ctx, model.output.dim)
    try:
        yield engine, program
    finally:
        program.gate.set()
        engine.close()


def ask(ids: list[int], n: int = 8, **fields: Any) -> Request:
    params = SamplingParams(temperature=0.0, seed=1)
    return Request(**{"ids": tuple(ids), "params": params, "max_tokens": n, **fields})


def told(generation: Generation) -> tuple[list[int], int, str]:
    """The answer, how much of the prompt was cached, and why no more."""
    events = list(generation)
    assert getattr(events[-1], "error", None) is None, events[-1]
    ids = [event.id for event in events if isinstance(event, Token)]
    read = [event for event in events if isinstance(event, Prefilled)]
    return (ids, read[-1].cached, read[-1].miss) if read else (ids, 0, "")


def text(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=n)


def check_all_is_given_back(engine: Engine) -> None:
    store = engine._store
    for kind, pool in enumerate(store._kinds):
        assert pool.n_free + store.index.n_idle(kind) == pool.n_pages
    store.index.clear()
    assert all(pool.n_free == pool.n_pages for pool in store._kinds)


def check_alone(model: Segment, request: Request, answer: list[int]) -> None:
    with opened(model, slots=1, n_sequences=1) as (engine, _):
        assert told(engine.submit(request))[:2] == (answer, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_computes_what_is_new(models: dict[str, Segment], kind: str) -> None:
    """Also where its template leaves out what the first answer began with."""
    user, ask_for = text(1, 300), [5, 6, 7]
    with opened(models[kind]) as (engine, program):
        first, cached, miss = told(engine.submit(ask(user + ask_for, 90, borders=(300,))))
        assert (cached, miss) == (0, "new")
        whole = user + ask_for + first[:-1] + text(2, 30)
        n_before = program.n_rows
        second = told(engine.submit(ask(whole, borders=(300, 300 + 92))))
        assert second[1:] == (392, "new")
        assert program.n_rows - n_before <= 30 + 8
        shorter = user + ask_for[:1] + first[40:-1] + text(2, 30)
        third = told(engine.submit(ask(shorter, borders=(300,))))
        assert third[1] == (300 if kind == "hybrid" else 301)
        again = told(engine.submit(ask(user + ask_for, 90)))
        assert again == (first, 302, "")
        check_all_is_given_back(engine)
    check_alone(models[kind], ask(whole), second[0])
    check_alone(models[kind], ask(shorter), third[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_many_share_is_computed_and_stored_once(
    models: dict[str, Segment], kind: str
) -> None:
    system = text(3, 205)
    asked = [ask(system + [i] + text(10 + i, 20 + i), 5, borders=(len(system),)) for i in range(16)]
    with opened(models[kind], slots=5) as (engine, program):
        program.gate.clear()
        together = [engine.submit(each) for each in asked]
        program.gate.set()
        found = [told(each) for each in together]
        n_own = sum(len(each.ids) - len(system) + 4 for each in asked)
        # Nobody waits for the few tokens in whose page they part.
        assert program.n_rows <= len(system) + n_own + 205 % 32
        assert [cached for _, cached, _ in found][2:] == [len(system)] * 14
        assert program.most_pages <= 205 // 32 + 16 * 3
        check_all_is_given_back(engine)
    check_alone(models[kind], asked[7], found[7][0])


@pytest.mark.parametrize("kind", KINDS)
def test_who_waits_for_one_that_is_cancelled_reads_on_alone(
    models: dict[str, Segment], kind: str
) -> None:
    system = text(4, 400)
    with opened(models[kind]) as (engine, program):
        program.gate.clear()
        first = engine.submit(ask(system + [1] * 9))
        second = engine.submit(ask(system + [2] * 9))
        end = time.monotonic() + 120
        while not program.n_rows:
            assert time.monotonic() < end, "no row was read"
            first.cancel()
            program.gate.set()
        assert list(first)[-1].reason == "cancelled"  # type: ignore[union-attr]
        answer = told(second)[0]
        check_all_is_given_back(engine)
    check_alone(models[kind], ask(system + [2] * 9), answer)


@pytest.mark.parametrize("kind", KINDS)
def test_families_of_prompts_answer_as_each_would_alone(
    models: dict[str, Segment], kind: str
) -> None:
    """Forks of forks, some guessed ahead, some cancelled, in less memory than all would take."""
    rng, asked = random.Random(kind), []
    for i in range(24):
        stem = list(rng.choice(asked).ids)[: rng.randrange(1, 300)] if asked and i % 5 else []
        ids = (stem + text(i, rng.randrange(1, 120)) + [3, 4] * rng.randrange(9))[: N_CTX - 60]
        borders = tuple(sorted(rng.sample(range(len(ids) + 1), k=min(3, len(ids)))))
        asked.append(
            ask(
                ids, rng.randrange(1, 50), borders=borders, speculation=rng.random() < 0.5,
                overflow=rng.choice(["error", "error", "slide"]), n_stable=rng.choice([0, 0, 20]),
            )
        )  # fmt: skip
    with opened(models[kind], slots=1, n_sequences=1, n_states=16) as (engine, _):
        alone = []
        for each in asked:
            alone.append(told(engine.submit(each))[0])
            engine._store.index.clear()
    with opened(models[kind], slots=2, n_sequences=4, n_states=13) as (engine, _):
        together = [engine.submit(each) for each in asked * 2]
        for generation in together[5::7]:
            next(generation)
            generation.cancel(keep_cache=rng.random() < 0.5)
        found = [told(each) for each in together]
        assert sum(cached for _, cached, _ in found) > 300
        check_all_is_given_back(engine)
    for i, (answer, _, _) in enumerate(found):
        expected = alone[i % len(asked)]
        assert answer == (expected[: len(answer)] if i % 7 == 5 else expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_slid_serves_only_what_slides_alike(models: dict[str, Segment], kind: str) -> None:
    """Also what goes on behind it; and before anything slid all serve all."""
    asked = [
        ask(text(50, 70) + text(i, 20), 250, overflow="slide", n_pinned=n_pinned)
        for i in (0, 1)
        for n_pinned in (0, 33, 64)
    ] + [ask(text(50, 70) + text(2, 30), 59)]
    with opened(models[kind], slots=1, n_sequences=1, n_ctx=160) as (engine, _):
        first = [told(engine.submit(each)) for each in asked]
        engine._store.index.clear()
        asked += [
            ask([*each.ids, *answer[:n], *text(8, 9)], 99, overflow="slide", n_pinned=each.n_pinned)
            for each, (answer, _, _) in zip(asked, first, strict=True)
            for n in (50, 200, 249)
        ]
        alone = []
        for each in asked:
            alone.append(told(engine.submit(each))[0])
            engine._store.index.clear()
    assert [answer for answer, _, _ in first] == alone[: len(first)]
    with opened(models[kind], slots=16, n_sequences=4, n_ctx=160) as (engine, _):
        together = [engine.submit(each) for each in asked]
        found = [told(each) for each in together]
        assert [answer for answer, _, _ in found] == alone
        assert sum(cached > 300 for _, cached, _ in found) >= 6  # behind what has slid
        check_all_is_given_back(engine)


def test_a_miss_says_why(models: dict[str, Segment]) -> None:
    ids = text(5, 500)
    with opened(models["full"], slots=2) as (engine, _):
        assert told(engine.submit(ask(ids)))[1:] == (0, "new")
        assert told(engine.submit(ask(ids)))[1:] == (499, "")
        # A header that changes costs what follows it.
        assert told(engine.submit(ask(ids[:70] + [9, 9, 9] + ids[73:])))[1:] == (70, "new")
        assert told(engine.submit(ask(ids, overflow="slide")))[1:] == (499, "")
        for i in range(4):  # what was gone on with lately stays
            told(engine.submit(ask(text(6 + i, 500))))
            assert told(engine.submit(ask(ids)))[1:] == (499, "")
        cached, miss = told(engine.submit(ask(text(6, 500))))[1:]
        assert cached < 499 and miss == "evicted"
    with opened(models["windows"], slots=1) as (engine, _):
        told(engine.submit(ask(ids)))
        assert told(engine.submit(ask(ids[:200] + [9])))[1:] == (0, "window")
    with opened(models["hybrid"], slots=1) as (engine, _):
        told(engine.submit(ask(ids, borders=(100,))))
        assert told(engine.submit(ask(ids[:200] + [9])))[1:] == (100, "state")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stable_beginning_goes_last(models: dict[str, Segment], kind: str) -> None:
    system = text(7, 100)
    with opened(models[kind], slots=2, n_states=9) as (engine, _):
        told(engine.submit(ask(system + text(8, 50), n_stable=100)))
        for i in range(8):
            told(engine.submit(ask(text(20 + i, 500), 100, borders=(100, 200))))
        assert told(engine.submit(ask(system + text(9, 50))))[1] == 100
