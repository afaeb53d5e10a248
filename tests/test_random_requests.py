"""Random requests on an engine with too few pages: each answer is what it is alone.

Readers come and go, are slow or raise, steps fail, and pages, state slots and places are short.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from edgeinfer.batch import PAGE, Batch, Outputs, StepLimits, StepRequest
from edgeinfer.engine import generation as generations
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.generation import Generation
from edgeinfer.engine.scheduler import Scheduler
from edgeinfer.engine.sequence import Finished, Request, Token
from edgeinfer.engine.step_costs import StepCosts
from edgeinfer.graph import Segment
from edgeinfer.sampling.params import SamplingParams

from .backends import backend
from .test_prefix_reuse import check_all_is_given_back

N_CTX, VOCAB, MAX_ROWS = 160, 40, 48
UNREAD = 24  # events until a generation waits for its reader
KINDS = ["full", "windows", "hybrid"]
HABITS = {"read": 55, "slow": 8, "cancel": 16, "raise": 3, "logits": 8, "close": 10}


class StepFault(Exception):
    """What a step of a failing program raises."""


class Failing:
    """A program of whose steps some fail, before or after they have run."""

    def __init__(self, program: Any, share: float, seed: int) -> None:
        self._program, self._share, self._rng = program, share, random.Random(seed)
        self.n_failed = 0
        self.most = 0  # sequences in a step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def submit(self, batch: Batch) -> Any:
        self.most = max(self.most, len(batch.tables))
        chance = self._rng.random()
        if chance < self._share / 2:
            self._fail()
        ticket = self._program.submit(batch)
        return _FailingTicket(self, ticket) if chance > 1 - self._share / 2 else ticket

    def _fail(self) -> None:
        self.n_failed += 1
        raise StepFault("of a test")


class _FailingTicket:
    def __init__(self, owner: Failing, ticket: Any) -> None:
        self._owner, self._ticket, self.abort = owner, ticket, ticket.abort
        self._has_failed = False

    def wait(self) -> Outputs:
        outputs: Outputs = self._ticket.wait()
        if not self._has_failed:
            self._has_failed = True
            self._owner._fail()
        return outputs


class Storm:
    """Clients in threads, who ask for some of a number of answers that are known."""

    def __init__(self, engine: Engine, alone: Engine, n_kinds: int, seed: int) -> None:
        rng = random.Random(seed)
        self.engine, self.seed = engine, seed
        self.has_room = engine.pools[0].n_pages * PAGE >= 2 * N_CTX  # for two lists of logits
        self.asked = [_REPEATING]
        for _ in range(n_kinds - 1):
            self.asked.append(_request(rng, self.asked))
        self.ids = [_text(rng, rng.randint(1, 150)) for _ in range(6)]
        self.answers, self.logits = [], []
        for asked in self.asked:  # nothing of one serves the next
            self.answers.append(_read(alone.submit(asked)))
            alone.between_steps(alone._store.index.clear)
        for ids in self.ids:
            self.logits.append(alone.logits(ids))
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, n_threads: int, n_requests: int) -> None:
        share = -(-n_requests // n_threads)
        first = itertools.cycle(HABITS)  # each has its turn, however few requests there are
        threads = [
            threading.Thread(
                target=self._serve, args=(random.Random(f"{self.seed}-{i}"), share, next(first))
            )
            for i in range(n_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
            assert not thread.is_alive(), f"a request hangs; {self.done}, {self.wrong}"
        assert not self.wrong, self.wrong[0]  # else it is cut short

    def _serve(self, rng: random.Random, n: int, first: str) -> None:
        for i in range(n):
            habit = rng.choices([*HABITS], [*HABITS.values()])[0] if i else first
            try:
                if habit == "logits":
                    self._check_logits(rng)
                else:
                    self._check_answer(rng, habit, rng.randrange(len(self.asked)) if i else 0)
            except BaseException as error:
                self.wrong.append(f"{habit}: {error!r}")
                raise

    def _check_logits(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.ids))
        others = rng.sample(self.ids, rng.randrange(2)) if self.has_room else []
        try:
            found = self.engine.logits(self.ids[which], None, rng.choice((None, 1, 7)), others)
        except StepFault:
            self.done["failed"] += 1
            return
        self.done["logits"] += 1
        if not np.array_equal(found, self.logits[which]):
            self.wrong.append(f"logits of {len(self.ids[which])} tokens")

    def _check_answer(self, rng: random.Random, habit: str, which: int) -> None:
        generation = self.engine.submit(self.asked[which])
        found = _live(generation, habit, rng)
        expected, reason = self.answers[which], found[-1]
        self.done[reason] += 1
        self.done["guessed"] += generation.n_accepted
        is_whole = found == expected
        may_be_less = reason in ("cancelled", "StepFault", "ReaderFault")
        if not is_whole and not (may_be_less and found[:-1] == expected[: len(found) - 1]):
            pairs = enumerate(itertools.zip_longest(found, expected))
            n = next(i for i, (one, other) in pairs if one != other)
            self.wrong.append(
                f"{habit}: {found[n:]} is not {expected[n:]}, from the {n}. on; "
                f"{generation.n_accepted} guesses held; {self.asked[which]}"
            )


class ReaderFault(Exception):
    """What the callback of a failing reader raises."""


def _live(generation: Generation, habit: str, rng: random.Random) -> list[Any]:
    """Read as the habit is; what has been seen, and how it ended."""
    # A long answer can't have come to its end yet, however quick: it waits for who has read so few.
    n = rng.randrange(8 if habit in ("cancel", "close") else 40)
    if habit == "raise":
        for _ in range(n):
            generation.events.poll()
        raised = threading.Event()

        def fail() -> None:
            raised.set()
            raise ReaderFault

        with suppress(ReaderFault):  # where an event is there already
            generation.events.notify(fail)
        assert raised.wait(120)
    seen: list[Any] = []
    for i, event in enumerate(generation):
        if habit == "slow" and i % 16 == 5:
            time.sleep(0.01)
        if habit in ("cancel", "close") and i == n:
            generation.cancel(keep_cache=habit == "close")
        if isinstance(event, Token):
            seen.append((event.id, event.logprob, event.top))
        elif isinstance(event, Finished):
            seen.append(event.reason if event.error is None else type(event.error).__name__)
    return seen


def _read(generation: Generation) -> list[Any]:
    return _live(generation, "read", random.Random(0))


# Guesses of its tokens come true, and it is long enough that who cancels it is in time.
_REPEATING = Request(
    ids=(*range(20), 3, 3),
    params=SamplingParams(temperature=0.0, seed=0, logit_bias={3: 99.0}),
    max_tokens=60,
    speculation=True,
)


def _request(rng: random.Random, before: list[Request]) -> Request:
    stem = (
        list(rng.choice(before).ids[: rng.randrange(150)]) if before and rng.random() < 0.5 else []
    )
    ids = (stem + _text(rng, rng.randint(1, 70)) + [3, 4, 5] * rng.randrange(6))[: N_CTX - 10]
    overflow = rng.choice(("error", "error", "slide"))
    most = rng.choice((1, 9, 40, 40, 260 if overflow == "slide" else None))
    more: dict[str, Any] = rng.choice((
        {}, {}, {"logprobs": 2}, {"mirostat": 2}, {"repeat_penalty": 1.2, "repeat_last_n": -1},
        {"logit_bias": {3: 9.0, 4: 9.0}}, {"dry_multiplier": 1.0, "dry_allowed_length": 1},
    ))  # fmt: skip
    temperature = rng.choice((0.0, 0.8, 1.5))
    return Request(
        ids=tuple(ids),
        params=SamplingParams(temperature=temperature, seed=rng.randrange(2**64), **more),
        max_tokens=most,
        overflow=overflow,  # type: ignore[arg-type]
        stop_ids=frozenset([rng.randrange(VOCAB)]) if rng.random() < 0.3 else frozenset(),
        n_pinned=rng.choice((0, 5, 40)),
        speculation=rng.random() < 0.5,
        priority=rng.choice((0, 0, 0, 1, -5)),
        borders=(len(ids) // 2,),
        n_stable=rng.choice((0, len(ids) // 3)),
    )


def _text(rng: random.Random, n: int) -> list[int]:
    return rng.choices(range(VOCAB), k=n)


@contextmanager
def opened(
    model: Segment, device: str, slots: int, n_sequences: int, share: float = 0.0, seed: int = 0
) -> Iterator[tuple[Engine, Failing]]:
    n_states = 3 * n_sequences if model.states else 0
    request = StepRequest(N_CTX, slots, 2, n_states=n_states)
    limits = StepLimits.of(request, VOCAB, model.groups, MAX_ROWS)
    limits = limits._replace(max_outputs=MAX_ROWS, max_sequences=n_sequences)
    program = Failing(backend(device).compile(model, limits), share, seed)
    engine = Engine(program, limits, N_CTX, model.output.dim)  # type: ignore[arg-type]
    try:
        yield engine, program
    finally:
        engine.close()


def _storm(
    model: Segment,
    device: str,
    n_kinds: int,
    n_requests: int,
    seed: int,
    slots: int = 2,
    share: float = 0.02,
) -> Counter[str]:
    """What came of the requests; a `share` of the steps fail."""
    with (
        opened(model, device, 2, 2) as (alone, _),
        opened(model, device, slots, 6, share, seed) as (engine, program),
    ):
        storm = Storm(engine, alone, n_kinds, seed)
        storm.run(8, n_requests)
        deadline = time.perf_counter() + 120
        while engine._scheduler.has_work:
            assert time.perf_counter() < deadline
            time.sleep(0.01)
        engine.between_steps(lambda: check_all_is_given_back(engine))
        assert program.n_failed and (program.most > 1 or slots == 1)
        return storm.done


@pytest.fixture
def gave_way(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Who gave way, and who was paused; guesses are made however busy the machine is."""
    monkeypatch.setattr(generations, "MOST_UNREAD", UNREAD)
    monkeypatch.setattr(StepCosts, "of", lambda *_: 1.0)
    found: list[Any] = []
    give_way = Scheduler._give_way
    monkeypatch.setattr(
        Scheduler, "_give_way", lambda self, work: (found.append(work), give_way(self, work))[1]
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_they_are_alone(
    models: dict[str, Segment], kind: str, gave_way: list[Any]
) -> None:
    done = _storm(models[kind], "cpu", 24, 66, seed=KINDS.index(kind))
    assert gave_way
    check_happened(done, "length", "cancelled", "logits", "guessed")


@pytest.mark.parametrize("kind", ["full", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_answers_on_a_gpu_are_what_they_are_alone(
    models: dict[str, Segment], kind: str, gave_way: list[Any]
) -> None:
    check_happened(_storm(models[kind], "shim", 4, 10, seed=7, share=0.1), "length", "guessed")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "shim", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 3])
def test_a_thousand_answers(
    models: dict[str, Segment], kind: str, device: str, slots: int, gave_way: list[Any]
) -> None:
    n = 1000 if device == "cpu" else 200
    done = _storm(models[kind], device, n // 10, n, seed=n + slots, slots=slots)
    print(f"{device}, {kind}, {slots} slots: {dict(done)}, {len(gave_way)} gave way")
    assert gave_way
    check_happened(done, "length", "cancelled", "logits", "guessed", "StepFault", "ReaderFault")


def check_happened(done: Counter[str], *what: str) -> None:
    assert all(done[each] for each in what), (what, done)
