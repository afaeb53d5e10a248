"""A fault anywhere in a step ends its own request at most: raised at every call that steps make."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import edgeinfer
from edgeinfer.backend import Program
from edgeinfer.batch import Batch, StepLimits
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.sequence import Finished, Request, Token
from edgeinfer.errors import EdgeInferError
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.model import Model
from edgeinfer.sampling.params import SamplingParams

from .models_for_tests import tiny_model
from .native import cache_root

# Where Python itself calls, to close a generator, it can only report what is raised.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
N_CTX, VOCAB = 256, 320
LIMITS = StepLimits(n_pages={0: 24}, max_rows=64, max_outputs=32, max_sequences=4, n_threads=1)
OURS = str(Path(edgeinfer.__file__).parent)
LOCK = type(threading.Lock())
LIKELY = {70: 60.0, 71: 60.0, 72: 60.0}  # few tokens: guesses come true now and then


class Fault(Exception):
    """What is raised where nobody expects it."""


class Injector:
    """A program whose n-th step, when submitted, sets a trap for the calls that follow.

    `kinds` are the profiler's events at which to raise, the `at`-th of them.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.disarm()

    def disarm(self) -> None:
        self.step, self.at, self.kinds, self.error = -1, -1, ("call",), Fault
        self.n_steps = self.n_calls = 0
        self.where = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def submit(self, batch: Batch) -> Any:
        if self.n_steps == self.step:
            sys.setprofile(self._look)
        elif self.n_steps == self.step + 2:
            sys.setprofile(None)
        self.n_steps += 1
        return self._program.submit(batch)

    def close(self) -> None:
        self._program.close()

    def _look(self, frame: FrameType, kind: str, argument: Any) -> None:
        if kind not in self.kinds or not frame.f_code.co_filename.startswith(OURS):
            return
        if isinstance(getattr(argument, "__self__", None), LOCK):
            return  # Python gives no way to hold a lock safely against this
        self.n_calls += 1
        if self.n_calls == self.at:
            sys.setprofile(None)
            self.where = f"{frame.f_code.co_qualname if sys.version_info > (3, 11) else ''} {kind}"
            raise self.error


@pytest.fixture(scope="module")
def injector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injector]:
    with GGUFFile.open(tiny_model(tmp_path_factory.mktemp("faults"))) as file:
        segment = Model.load(file).graph.segment()
        injector = Injector(CpuBackend(cache_root()).compile(segment, LIMITS))
        yield injector
        injector.close()


class NotClosed:
    """A program that outlives its engine."""

    def __init__(self, program: Any) -> None:
        self.submit, self.copy_pages = program.submit, program.copy_pages

    def close(self) -> None:
        pass


@pytest.fixture
def engine(injector: Injector) -> Iterator[Engine]:
    injector.disarm()
    engine = Engine(NotClosed(injector), LIMITS, N_CTX, VOCAB)
    yield engine
    engine.close()
    assert not engine._thread.is_alive()


def _requests() -> list[Request]:
    """Of every kind that steps treat differently; some end in the steps that are watched."""

    def params(**given: Any) -> SamplingParams:
        return SamplingParams(seed=3, logit_bias=LIKELY, **given)

    return [
        Request(ids=(256, 70, 71, 72) * 3, params=params(), max_tokens=14, speculation=True),
        Request(
            ids=(256, 9, 8, 7), params=params(repeat_penalty=1.2, logprobs=2), max_tokens=3,
        ),
        Request(ids=(256, *range(90)), params=params(mirostat=2), max_tokens=5),
        Request(ids=(5, 6), params=params(temperature=0.0), max_tokens=9, overflow="slide"),
    ]  # fmt: skip


def _answer(events: Any) -> tuple[list[tuple[Any, ...]], str]:
    tokens, reason = [], ""
    for event in events:
        if isinstance(event, Token):
            tokens.append((event.id, event.logprob, event.top))
        elif isinstance(event, Finished):
            reason = f"error: {event.error!r}" if event.error else event.reason
    return tokens, reason


def _all_pages_are_free(engine: Engine) -> bool:
    scheduler = engine._scheduler
    idle = scheduler.store.index.n_idle(0)
    begun = (scheduler.running, scheduler.paused, scheduler.waiting, scheduler.jobs)
    return not any(begun) and engine.pools[0].n_free + idle == engine.pools[0].n_pages


@pytest.fixture(scope="module")
def alone(injector: Injector) -> list[Any]:
    injector.disarm()
    engine = Engine(NotClosed(injector), LIMITS, N_CTX, VOCAB)
    found = [_answer(engine.submit(request)) for request in _requests()]
    engine.close()
    assert [reason for _, reason in found] == ["length"] * 4
    return found


def _serve_with_a_fault(engine: Engine, injector: Injector, alone: list[Any], at: int) -> int:
    """Submit everything at once, raise at the `at`-th call of two steps; how many failed."""
    start = threading.Event()
    # The engine's thread waits, so that all arrive before its first step.
    engine._scheduler.drop_cancelled, dropped = (  # type: ignore[method-assign]
        lambda: start.wait() and dropped(),  # type: ignore[func-returns-value]
        engine._scheduler.drop_cancelled,
    )
    injector.n_steps = injector.n_calls = 0
    injector.at = at
    generations = [engine.submit(request) for request in _requests()]
    start.set()
    found = [_answer(generation) for generation in generations]
    engine._scheduler.drop_cancelled = dropped  # type: ignore[method-assign]
    failed = [(a, b) for a, b in zip(found, alone, strict=True) if a != b]
    for (tokens, reason), (expected, _) in failed:
        assert reason.startswith("error"), f"{injector.where}: {tokens} is not {expected}"
        assert tokens == expected[: len(tokens)]
    assert len(failed) <= 1, f"{injector.where} ended {len(failed)} requests"
    assert _answer(engine.submit(_requests()[1])) == alone[1], injector.where
    assert _all_pages_are_free(engine), injector.where
    return len(failed)


def _calls_of_steps(
    engine: Engine, injector: Injector, alone: list[Any], step: int, kinds: tuple[str, ...]
) -> int:
    injector.step, injector.kinds = step, kinds
    assert _serve_with_a_fault(engine, injector, alone, -1) == 0
    return injector.n_calls


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_fault_at_any_call_ends_one_request_at_most(
    engine: Engine, injector: Injector, alone: list[Any], step: int
) -> None:
    n = _calls_of_steps(engine, injector, alone, step, ("call",))
    assert n > 50
    for at in range(1 + step, n + 1, 5):
        _serve_with_a_fault(engine, injector, alone, at)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("call",), ("c_call",), ("return",), ("c_return",)], ids=str)
@pytest.mark.parametrize("step", range(8))
def test_a_fault_at_every_call_and_return(
    engine: Engine, injector: Injector, alone: list[Any], step: int, kinds: tuple[str, ...]
) -> None:
    n = _calls_of_steps(engine, injector, alone, step, kinds)
    n_failed = [_serve_with_a_fault(engine, injector, alone, at) for at in range(1, n + 1)]
    print(f"step {step}, {kinds}: {n} faults, {sum(n_failed)} requests ended")


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit, StopIteration])
def test_errors_of_every_kind_are_told_as_such(
    engine: Engine, injector: Injector, alone: list[Any], error: type[BaseException]
) -> None:
    n = _calls_of_steps(engine, injector, alone, 1, ("call",))
    injector.error = error
    n_failed = [_serve_with_a_fault(engine, injector, alone, at) for at in range(1, n + 1, 17)]
    assert sum(n_failed)


# -- faults that stay ----------------------------------------------------------------------------

BROKEN = [
    "edgeinfer.engine.generation.Generation.guess",
    "edgeinfer.engine.generation.Generation.emit",
    "edgeinfer.engine.speculation.Speculator.learn",
    "edgeinfer.engine.speculation.Lookup.find",
    "edgeinfer.engine.cache.SequenceCache.grow",
    "edgeinfer.engine.cache.SequenceCache.missing",
    "edgeinfer.engine.cache.SequenceCache.advance",
    "edgeinfer.engine.cache.SequenceCache.step_limit",
    "edgeinfer.engine.sequence.Rows.history",
    "edgeinfer.engine.step.build_batch",
    "edgeinfer.sampling.params.SampleTable.set_row",
]


@pytest.mark.parametrize("name", BROKEN)
def test_a_request_that_breaks_what_steps_call_ends_alone(
    engine: Engine, alone: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every call that is about one request fails, as a bug that its data meets would."""
    victim = Request(
        ids=(256, *[33, 34] * 9), max_tokens=20, speculation=True,
        params=SamplingParams(seed=1, logit_bias=LIKELY, repeat_penalty=1.1),
        overflow="slide", n_pinned=40,
    )  # fmt: skip
    parts = name.split(".")
    owner: Any = sys.modules[".".join(parts[:3])]
    if len(parts) > 4:
        owner = getattr(owner, parts[3])
    original = getattr(owner, parts[-1])

    def broken(*args: Any, **kwargs: Any) -> Any:
        if any(_is_about(each, victim) for each in (*args, *kwargs.values())):
            raise AssertionError(f"{name} has a bug")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, parts[-1], broken)
    generations = [engine.submit(request) for request in (victim, *_requests()[:2])]
    assert [_answer(each) for each in generations[1:]] == alone[:2]
    if not name.endswith("emit"):  # it has no other way to hear of it
        assert "has a bug" in _answer(generations[0])[1]
    monkeypatch.undo()
    assert _answer(engine.submit(_requests()[1])) == alone[1]
    assert _all_pages_are_free(engine)


def _is_about(value: Any, victim: Request) -> bool:
    """Whether a value is the victim's generation or something of it; its layout is its own."""
    if isinstance(value, list):
        return any(_is_about(each, victim) for each in value if not isinstance(each, int))
    sequence = getattr(value, "sequence", None)
    layout = getattr(sequence.cache if sequence else value, "layout", None)
    if layout is not None:
        return bool(layout.rings[0].n_pinned == 2)
    tokens = getattr(value, "_tokens", ())
    return value is victim.params or tuple(tokens[: len(victim.ids)]) == victim.ids


def test_a_fault_outside_of_requests_that_stays_is_told_to_everyone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine._scheduler, "admit", broken)
    generation = engine.submit(_requests()[0])
    assert "a bug" in _answer(generation)[1]
    with pytest.raises(EdgeInferError, match="a bug"):
        engine.submit(_requests()[0])
