"""The loop: batching, cancellation, failures, and a cache that nothing leaks from."""

from __future__ import annotations

import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edgeinfer.batch import Batch, Outputs, StepLimits
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.generation import Generation
from edgeinfer.engine.plan_rows import WAITING_BYTES
from edgeinfer.engine.sequence import Finished, Prefilled, Request, Token
from edgeinfer.engine.step_costs import StepCosts
from edgeinfer.errors import (
    BusyError,
    ClosedError,
    ContextLengthError,
    InvalidRequestError,
    PlanError,
)
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model
from edgeinfer.sampling.params import SamplingParams
from edgeinfer.sampling.sampler import ReferenceSampler

from .models_for_tests import tiny_model
from .native import cache_root
from .waiting import wait_until

N_CTX = 256
VOCAB = 320


class Programs:
    """A program that can be told to wait, to fail, and that counts its steps."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.gate = threading.Event()
        self.gate.set()
        self.fails: BaseException | None = None
        self.batches: list[tuple[int, int]] = []
        self.n_shutting = 0  # sequences of a step that shuts the gate
        self.n_aborts = 0
        self.is_closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def submit(self, batch: Batch) -> Any:
        if len(batch.tables) == self.n_shutting:
            self.gate.clear()
        self.batches.append((batch.n_rows, len(batch.tables)))
        if self.fails:
            raise self.fails
        return _Ticket(self, self.program.submit(batch))

    def close(self) -> None:
        self.is_closed = True
        self.program.close()


class _Ticket:
    def __init__(self, owner: Programs, ticket: Any) -> None:
        self.owner, self.ticket = owner, ticket
        self.aborted = threading.Event()

    def wait(self) -> Outputs:
        while not self.owner.gate.is_set() and not self.aborted.is_set():
            time.sleep(0.001)
        return self.ticket.wait()

    def abort(self) -> None:
        self.owner.n_aborts += 1
        self.ticket.abort()
        self.aborted.set()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with GGUFFile.open(tiny_model(tmp_path_factory.mktemp("engine"))) as file:
        yield Model.load(file)


@pytest.fixture
def program(model: Model) -> Programs:
    limits = _limits()
    return Programs(ReferenceBackend(ReferenceSampler()).compile(model.graph.segment(), limits))


@pytest.fixture
def engine(program: Programs) -> Iterator[Engine]:
    engine = Engine(program, _limits(), N_CTX, VOCAB)
    yield engine
    program.gate.set()
    engine.close()


def _limits(**changes: int) -> StepLimits:
    sizes = {"n_pages": {0: 2 * N_CTX // 32}, "max_rows": 64, "max_outputs": 16, "max_sequences": 4}
    return StepLimits(**{**sizes, **changes}, n_threads=1)


def _request(*ids: int, **changes: Any) -> Request:
    params = SamplingParams(temperature=0.0, seed=1)
    return Request(**{"ids": ids or (256, 1, 2), "params": params, "max_tokens": 8, **changes})


def _tokens(generation: Generation) -> list[int]:
    return [event.id for event in generation if isinstance(event, Token)]


def _finish(generation: Generation) -> Finished:
    last = list(generation)[-1]
    assert isinstance(last, Finished)
    return last


def _held(engine: Engine, program: Programs, requests: list[Request]) -> list[Generation]:
    """In a step of them all, which waits at the gate."""
    program.gate.clear()
    generations = [engine.submit(request) for request in requests]
    program.n_shutting = len(requests)
    program.gate.set()
    wait_until(lambda: not program.gate.is_set(), "a step of them all")
    program.n_shutting = 0
    return generations


def _program(model: Model, **changes: Any) -> tuple[Programs, StepLimits]:
    """One that has the same bits whoever shares a step."""
    limits = _limits(**changes)
    return Programs(CpuBackend(cache_root()).compile(model.graph.segment(), limits)), limits


def _answer(generation: Generation) -> list[Any]:
    """Its events, but for times and for how the prompt was read."""
    return [
        (event.id, event.logprob, event.top) if isinstance(event, Token) else event.reason
        for event in generation
        if not isinstance(event, Prefilled)
    ]


def _is_all_free(engine: Engine) -> None:
    """Every page is free, or kept for a later prompt."""
    scheduler = engine._scheduler
    assert not (scheduler.running or scheduler.waiting or scheduler.jobs or scheduler.paused)
    for i, pool in enumerate(engine.pools):
        kept = engine._store.index.n_idle(i)
        assert pool.n_free + kept == pool.n_pages


def test_events_come_in_order(engine: Engine) -> None:
    events = list(engine.submit(_request(max_tokens=3)))
    kinds = [type(event) for event in events]
    assert kinds == [Prefilled, Prefilled, Token, Token, Token, Finished]
    assert events[1] == Prefilled(3, 3, 0, events[1].at, "new")
    assert events[-1].reason == "length"  # type: ignore[union-attr]


def test_stop_id_ends_without_being_a_token(engine: Engine) -> None:
    first, second = _tokens(engine.submit(_request(max_tokens=2)))
    generation = engine.submit(_request(stop_ids=frozenset([second])))
    events = list(generation)
    assert [e.id for e in events if isinstance(e, Token)] == [first]
    assert events[-1].reason == "stop"  # type: ignore[union-attr]
    assert events[-1].stop_id == second  # type: ignore[union-attr]


def test_batched_generations_equal_lone_ones(engine: Engine, program: Programs) -> None:
    requests = [_request(256, *range(n, 3 * n), max_tokens=12) for n in (2, 9, 40)]
    alone = [_tokens(engine.submit(request)) for request in requests]
    program.gate.clear()
    together = [engine.submit(request) for request in requests]
    program.gate.set()
    assert [_tokens(generation) for generation in together] == alone
    assert max(n_sequences for _, n_sequences in program.batches) == 3
    assert max(n_rows for n_rows, _ in program.batches) <= 64


def test_a_long_prompt_does_not_starve_others(engine: Engine, program: Programs) -> None:
    short = engine.submit(_request(max_tokens=240))
    next(short)
    long = engine.submit(_request(*[5] * 200, max_tokens=1))
    assert _finish(long).reason == "length"
    assert len(_tokens(short)) == 240
    assert (1, 1) in program.batches


def test_a_prompt_beside_others_takes_as_many_rows_as_the_machine_says(model: Model) -> None:
    program, limits = _program(model, shared_rows=5)
    engine = Engine(program, limits, N_CTX, VOCAB, StepCosts(row_cost=1e-9))
    try:
        program.gate.clear()
        short = engine.submit(_request(max_tokens=240))
        wait_until(lambda: program.batches, "a step that reads its prompt")
        long = engine.submit(_request(*[5] * 200, max_tokens=1))
        program.gate.set()
        assert _finish(long).reason == _finish(short).reason == "length"
        assert max(n_rows for n_rows, n_sequences in program.batches if n_sequences == 2) == 6
    finally:
        engine.close()


def test_more_requests_than_sequences_wait_their_turn(engine: Engine) -> None:
    generations = [engine.submit(_request(256, n, max_tokens=4)) for n in range(11)]
    assert [len(_tokens(generation)) for generation in generations] == [4] * 11


def test_requests_without_an_end_run_side_by_side(engine: Engine, program: Programs) -> None:
    """Two contexts of pages for four answers that may be as long: the last of them give way."""
    program.gate.clear()
    generations = [engine.submit(_request(256, n, max_tokens=None)) for n in range(4)]
    program.gate.set()
    assert [len(_tokens(generation)) for generation in generations] == [N_CTX - 2] * 4
    assert max(n_sequences for _, n_sequences in program.batches) == 4
    _is_all_free(engine)


def test_who_gives_way_has_the_same_answer(model: Model) -> None:
    """Whatever is counted by token goes on where it was: random numbers, penalties, mirostat."""
    choices: tuple[dict[str, Any], ...] = (
        {"temperature": 1.5},
        {"temperature": 1.0, "mirostat": 2},
        {"temperature": 1.0, "repeat_penalty": 1.3, "repeat_last_n": -1, "logprobs": 2},
        {"temperature": 0.0},
    )
    requests = [
        _request(
            256, *range(9 * n), params=SamplingParams(seed=n, **choice), max_tokens=150,
            speculation=n % 2 == 0,
        )
        for n, choice in enumerate(choices)
    ]  # fmt: skip
    program, limits = _program(model, n_pages={0: 9})
    engine = Engine(program, limits, N_CTX, VOCAB)
    try:
        alone = [_answer(engine.submit(request)) for request in requests]
        program.gate.clear()
        together = [engine.submit(request) for request in requests]
        program.gate.set()
        assert [_answer(generation) for generation in together] == alone
        assert max(n_sequences for _, n_sequences in program.batches) == 4
        _is_all_free(engine)
    finally:
        engine.close()


def test_a_larger_priority_runs_first(engine: Engine, program: Programs) -> None:
    """Also where others run already and have every place."""
    usual = _held(engine, program, [_request(256, n, max_tokens=30) for n in range(4)])
    usual += [engine.submit(_request(256, n, max_tokens=30)) for n in range(4, 6)]
    urgent = engine.submit(_request(256, 9, max_tokens=30, priority=3))
    late = engine.submit(_request(256, 7, max_tokens=30, priority=-(2**40)))
    program.gate.set()
    ends = {}
    for name, generation in [("urgent", urgent), ("late", late), *enumerate(usual)]:
        last = _finish(generation)
        assert last.reason == "length"
        ends[name] = last.at
    assert max(ends, key=lambda name: ends[name]) == "late"
    assert ends["urgent"] <= min(ends[n] for n in range(3, 6))  # one of the four gave way


def test_a_priority_is_a_whole_number(engine: Engine) -> None:
    for wrong in (1.0, True, "1", None):
        with pytest.raises(InvalidRequestError, match="priority"):
            engine.submit(_request(priority=wrong))


def test_the_first_gets_on_whatever_comes_after_it(engine: Engine, program: Programs) -> None:
    """What is behind it starts, gives way and starts again; nothing of that holds it up."""
    first = engine.submit(_request(256, 1, max_tokens=250))
    for n in range(60):
        engine.submit(_request(*[n + 2] * 100, max_tokens=100, overflow="slide"))
    assert _finish(first).reason == "length"


def test_logits_give_way_and_are_taken_once(model: Model) -> None:
    program, limits = _program(model, n_pages={0: 9})
    engine = Engine(program, limits, N_CTX, VOCAB)
    try:
        ids = [n % 250 for n in range(180)]
        expected = engine.logits(ids)
        rows: list[int] = []
        found = np.zeros_like(expected)

        def take(row: int, logits: Any) -> None:
            rows.extend(range(row, row + len(logits)))
            found[row : row + len(logits)] = logits

        job = threading.Thread(target=engine.each_logits, args=(ids, take, 0, 3))
        job.start()
        wait_until(lambda: rows, "a first row")
        urgent = engine.submit(_request(256, *range(40), max_tokens=150, priority=1))
        assert _finish(urgent).reason == "length"
        job.join(120)
        assert rows == list(range(180))
        np.testing.assert_array_equal(found, expected)
        _is_all_free(engine)
    finally:
        engine.close()


def test_a_small_request_passes_what_does_not_fit(model: Model) -> None:
    """Of 9 pages, logits of a full context take 8: they wait for others to end."""
    program, limits = _program(model, n_pages={0: 9})
    engine = Engine(program, limits, N_CTX, VOCAB)
    try:
        program.gate.clear()
        running = [engine.submit(_request(256, n, max_tokens=120)) for n in range(2)]
        job = threading.Thread(target=engine.logits, args=([5] * N_CTX,))
        job.start()
        wait_until(lambda: engine._scheduler.waiting, "the job that waits")
        small = engine.submit(_request(256, 4, max_tokens=3))
        program.gate.set()
        first, *others = (_finish(generation) for generation in (small, *running))
        assert first.reason == "length" and first.at < min(each.at for each in others)
        job.join(120)
        assert not job.is_alive()
    finally:
        engine.close()


def test_logits_pass_a_generation_that_has_no_place(engine: Engine, program: Programs) -> None:
    running = _held(engine, program, [_request(256, n, max_tokens=90) for n in range(4)])
    waiting = engine.submit(_request(256, 9, max_tokens=90))
    job = threading.Thread(target=engine.logits, args=([1, 2, 3],))
    job.start()
    wait_until(lambda: len(engine._scheduler.waiting) == 2, "the job that waits")
    program.gate.set()
    job.join(120)
    for generation in (*running, waiting):
        assert _finish(generation).reason == "length"
    at = program.batches.index((3, 1))
    assert program.batches[at - 1][1] == program.batches[at + 1][1] == 4  # none had ended


def test_small_requests_that_keep_coming_do_not_starve_a_large_one(
    engine: Engine, program: Programs
) -> None:
    """It starts once what was there before it leaves room: who came after it gives way."""
    program.gate.clear()
    running = [engine.submit(_request(*[n] * 180, max_tokens=44)) for n in range(2)]
    large = engine.submit(_request(*[9] * 240, max_tokens=None))
    small = [engine.submit(_request(256, 0, max_tokens=3))]
    program.gate.set()
    while large.events.poll() is None:
        assert _finish(small[-1]).reason == "length"
        assert len(small) < 200, "the large request has not begun"
        small.append(engine.submit(_request(256, len(small), max_tokens=3)))
    assert _finish(large).reason == "length"
    for generation in running:
        assert _finish(generation).reason == "length"


def test_the_queue_has_a_bound(
    engine: Engine, program: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bytes, which are what it takes."""
    most = WAITING_BYTES // 8
    monkeypatch.setattr("edgeinfer.engine.engine.WAITING_BYTES", most)
    program.gate.clear()
    waiting = [engine.submit(_request(256, 7, max_tokens=1))]
    wait_until(lambda: engine.n_running, "an answer that runs")
    tracemalloc.start()
    try:
        with pytest.raises(BusyError, match=r"requests of 102\d KiB wait already; try again later"):
            for n in range(most):
                params = SamplingParams(seed=n)
                ids = (256, *range(n % 250))
                waiting.append(engine.submit(Request(ids=ids, params=params, max_tokens=1)))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(waiting) > 300 and 0.8 * most <= held <= most
    with pytest.raises(BusyError):
        engine.logits([1])
    for generation in waiting[4:]:
        generation.cancel()
    program.gate.set()
    assert [_finish(generation).reason for generation in waiting[:4]] == ["length"] * 4
    assert {_finish(generation).reason for generation in waiting[4:]} == {"cancelled"}
    assert _finish(engine.submit(_request())).reason == "length"


@pytest.mark.parametrize("seed", range(3))
def test_what_waits_never_takes_more_than_planned(
    engine: Engine, program: Programs, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whatever waits: prompts, biases, answers that nobody reads. One alone is always taken."""
    most, rng = 100_000, random.Random(seed)
    monkeypatch.setattr("edgeinfer.engine.engine.WAITING_BYTES", most)
    scheduler, taken, n_refused = engine._scheduler, list[Generation](), 0
    for _ in range(300):
        if rng.random() < 0.1:
            program.gate.set() if rng.random() < 0.5 else program.gate.clear()
        elif taken and rng.random() < 0.2:
            taken.pop(rng.randrange(len(taken))).cancel()
        ids = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 200]))]
        bias = dict.fromkeys(range(rng.choice([0, 0, 300])), 1.0)
        request = _request(*ids, params=SamplingParams(seed=1, logit_bias=bias), max_tokens=9)
        try:
            taken.append(engine.submit(request))
        except BusyError as error:  # what waited then may have ended by now
            n_refused += 1
            assert "of 0 " not in str(error)
        # Those that ran may have given way meanwhile: their part is in the row "requests".
        assert scheduler.n_bytes_waiting <= most + 4 * 50_000
    assert n_refused
    program.gate.set()
    assert {_finish(generation).reason for generation in taken} <= {"length"}
    wait_until(lambda: not scheduler.n_bytes_waiting, "the end of what waits")


def test_answers_that_nobody_reads_count(
    engine: Engine, program: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are paused, with their events and all that they go on from."""
    unread = [engine.submit(_request(256, n, max_tokens=None, overflow="slide")) for n in range(3)]
    wait_until(lambda: len(engine._scheduler.paused) == 3, "the third answer's pause")
    held = engine._scheduler.n_bytes_waiting
    assert held > 3 * 40_000 and not any(generation.speculator for generation in unread)
    monkeypatch.setattr("edgeinfer.engine.engine.WAITING_BYTES", held + 100)
    with pytest.raises(BusyError, match="wait already"):
        engine.submit(_request())
    unread[0].cancel()
    assert _finish(unread[0]).reason == "cancelled"
    assert _finish(engine.submit(_request())).reason == "length"


def test_a_prompt_of_any_length_is_taken_where_nobody_waits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeinfer.engine.engine.WAITING_BYTES", 100)
    assert _finish(engine.submit(_request())).reason == "length"
    rows = 0

    def take(row: int, logits: Any) -> None:
        nonlocal rows
        rows += len(logits)

    engine.each_logits([7] * 1000, take, overflow="slide")
    assert rows == 1000


def test_context_end_is_length(engine: Engine) -> None:
    generation = engine.submit(_request(*[7] * (N_CTX - 1), max_tokens=None))
    assert len(_tokens(generation)) == 1
    assert len(_tokens(engine.submit(_request(*[8] * 250, max_tokens=99)))) == 6


def test_too_long_a_prompt_names_both_counts(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match=r"257 tokens.*256") as error:
        engine.submit(_request(*[7] * (N_CTX + 1)))
    assert (error.value.n_tokens, error.value.n_ctx) == (257, 256)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("ids", [(), (-1,), (VOCAB,)])
def test_unusable_prompts_are_refused(engine: Engine, ids: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        engine.submit(Request(ids=ids, params=SamplingParams(seed=1)))


def test_max_tokens_must_be_positive(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        engine.submit(_request(max_tokens=-1))


def test_cancel_in_a_step_acts_at_once_and_frees_pages(engine: Engine, program: Programs) -> None:
    program.gate.clear()
    generation = engine.submit(_request(*[9] * 200))
    next(generation)
    wait_until(lambda: program.batches, "a step")
    generation.cancel()
    assert _finish(generation).reason == "cancelled"  # the gate is shut: else it had no end
    assert program.n_aborts == 1
    assert engine.pools[0].n_free == engine.pools[0].n_pages


@pytest.mark.parametrize("n_cancelled", [1, 2, 3])
def test_a_step_runs_on_while_anybody_wants_its_rows(
    engine: Engine, program: Programs, n_cancelled: int
) -> None:
    requests = [_request(256, n, max_tokens=6) for n in range(4, 7)]
    expected = [_tokens(engine.submit(request)) for request in requests]
    program.gate.clear()
    first = engine.submit(_request(7))  # what comes meanwhile shares the next step
    wait_until(lambda: engine._runner.is_running, "a step that runs")
    generations = [engine.submit(request) for request in requests]
    program.batches.clear()
    first.cancel()
    wait_until(lambda: program.batches and engine._runner.is_running, "another step that runs")
    assert program.batches[-1][1] == 3
    n_before = len(program.batches)
    for generation in generations[:n_cancelled]:
        generation.cancel()
    assert program.n_aborts == 1 + (n_cancelled == 3)
    program.gate.set()
    assert all(_finish(each).reason == "cancelled" for each in generations[:n_cancelled])
    for tokens, generation in zip(expected[n_cancelled:], generations[n_cancelled:], strict=True):
        assert _tokens(generation) == tokens
    if n_cancelled < 3:  # nothing is computed twice
        assert len(program.batches) - n_before <= 5


def test_cancel_while_waiting(engine: Engine, program: Programs) -> None:
    program.gate.clear()
    running = [engine.submit(_request(256, n)) for n in range(4)]
    waiting = engine.submit(_request(256, 200))
    waiting.cancel()
    program.gate.set()
    assert _finish(waiting).reason == "cancelled"
    assert all(_finish(generation).reason == "length" for generation in running)


def test_a_failing_step_fails_its_requests_only(engine: Engine, program: Programs) -> None:
    program.fails = RuntimeError("broken kernel")
    last = _finish(engine.submit(_request()))
    assert last.reason == "error"
    assert isinstance(last.error, RuntimeError)
    program.fails = MemoryError()
    assert isinstance(_finish(engine.submit(_request())).error, PlanError)
    program.fails = None
    assert _finish(engine.submit(_request())).reason == "length"


def test_prefix_of_an_ended_generation_is_not_read_again(engine: Engine) -> None:
    prompt = (256, *range(40, 100))
    answer = _tokens(engine.submit(_request(*prompt)))
    events = list(engine.submit(_request(*prompt, *answer, 11, 12)))
    prefilled = [event for event in events if isinstance(event, Prefilled)]
    assert prefilled[0].cached == len(prompt) + len(answer) - 1
    again = list(engine.submit(_request(*prompt)))
    assert isinstance(again[0], Prefilled)
    assert again[0].cached == len(prompt) - 1  # the last token is computed again
    assert [event.id for event in again if isinstance(event, Token)] == answer


def test_kept_caches_make_room(engine: Engine) -> None:
    for n in range(6):
        assert _finish(engine.submit(_request(*[n] * 250, max_tokens=3))).reason == "length"
    assert engine.pools[0].n_free >= 0


def test_sliding_runs_far_past_the_context_in_the_same_pages(engine: Engine) -> None:
    request = _request(*range(30), overflow="slide", max_tokens=5 * N_CTX, n_pinned=3)
    generation = engine.submit(request)
    most = 0
    for event in generation:
        most = max(most, engine.pools[0].n_pages - engine.pools[0].n_free)
        last = event
    assert isinstance(last, Finished)
    assert last.reason == "length"
    assert most <= N_CTX // 32


def test_sliding_gives_the_same_tokens_beside_others(engine: Engine, program: Programs) -> None:
    request = _request(*range(30), overflow="slide", max_tokens=2 * N_CTX)
    alone = _tokens(engine.submit(request))
    together = engine.submit(request)
    for n in range(3):
        list(engine.submit(_request(*[n + 1] * 70, max_tokens=2)))
    assert _tokens(together) == alone


def test_seeds_reproduce(engine: Engine) -> None:
    params = SamplingParams(temperature=1.5, seed=7)
    first = _tokens(engine.submit(_request(params=params, max_tokens=20)))
    assert _tokens(engine.submit(_request(params=params, max_tokens=20))) == first
    other = SamplingParams(temperature=1.5, seed=8)
    assert _tokens(engine.submit(_request(params=other, max_tokens=20))) != first


def test_logprobs_come_with_tokens(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, seed=1, logprobs=3)
    tokens = [e for e in engine.submit(_request(params=params)) if isinstance(e, Token)]
    for token in tokens:
        assert len(token.top) == 3
        assert token.top[0] == (token.id, token.logprob)


def test_logits_are_those_of_one_pass(engine: Engine) -> None:
    whole = engine.logits(range(50))
    assert whole.shape == (50, VOCAB)
    np.testing.assert_allclose(engine.logits(range(50), last=3), whole[-3:], atol=1e-4)
    beside = engine.logits(range(50), prefill_chunk=7, batch_with=[range(80), [3, 4]])
    np.testing.assert_allclose(beside, whole, atol=1e-4)
    assert engine.pools[0].n_free == engine.pools[0].n_pages


def test_logits_refuse_what_does_not_fit(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="last"):
        engine.logits([1, 2], last=3)
    with pytest.raises(InvalidRequestError, match="prefill_chunk"):
        engine.logits([1, 2], prefill_chunk=0)
    with pytest.raises(InvalidRequestError, match="token lists"):
        engine.logits([1], batch_with=[[1]] * 4)
    with pytest.raises(PlanError, match="slots"):
        engine.logits([1] * N_CTX, batch_with=[[1] * N_CTX, [1] * N_CTX])
    with pytest.raises(ContextLengthError):
        engine.logits([1] * (N_CTX + 1))


def test_logits_fail_alone(engine: Engine, program: Programs) -> None:
    program.fails = RuntimeError("broken kernel")
    with pytest.raises(RuntimeError, match="broken"):
        engine.logits([1, 2, 3])
    program.fails = None
    assert len(engine.logits([1, 2, 3])) == 3


def test_generations_go_on_beside_logits(engine: Engine) -> None:
    generation = engine.submit(_request(max_tokens=40))
    logits = engine.logits(range(100), prefill_chunk=5)
    assert len(logits) == 100
    assert len(_tokens(generation)) == 40


def test_a_bug_in_the_loop_is_told_to_whoever_waits(engine: Engine) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    engine._scheduler.admit = broken  # type: ignore[method-assign]
    generation = engine.submit(_request())
    with pytest.raises(ClosedError, match="a bug"):
        raise _finish(generation).error or AssertionError
    with pytest.raises(ClosedError, match="a bug"):
        engine.submit(_request())


def test_an_interrupted_wait_for_logits_ends_the_job(
    engine: Engine, program: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.gate.clear()

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "check_waiting", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.logits(range(50))
    monkeypatch.undo()
    program.gate.set()
    assert _finish(engine.submit(_request())).reason == "length"
    assert program.n_aborts == 1


def test_close_ends_everything(engine: Engine, program: Programs) -> None:
    program.gate.clear()
    generations = [engine.submit(_request(256, n)) for n in range(6)]
    engine.close(timeout=600)  # the gate is shut: a step that is not broken off has no end
    assert program.is_closed
    for generation in generations:
        assert isinstance(_finish(generation).error, ClosedError)
    with pytest.raises(ClosedError):
        engine.submit(_request())
    with pytest.raises(ClosedError):
        engine.logits([1])
    engine.close()
