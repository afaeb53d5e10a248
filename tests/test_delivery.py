"""When events are handed over: at once, but for what can wait for one quick step more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from edgeinfer import LLM
from edgeinfer.engine import delivery
from edgeinfer.engine.delivery import Delivery
from edgeinfer.engine.event_queue import EventQueue
from edgeinfer.engine.sequence import Finished, Request, Token
from edgeinfer.sampling.params import SamplingParams
from edgeinfer.server.wire import TextFrame, event

from .models_for_tests import tiny_model
from .waiting import halting, wait_until

QUICK = 0.001


class Reader:
    """Takes events where they are delivered."""

    def __init__(self) -> None:
        self.events: EventQueue[int] = EventQueue(256, lambda: None)

    def take(self, event: int) -> None:
        self.events.put(event)

    def break_off(self, error: BaseException) -> None:
        raise error

    def read(self) -> list[int]:
        return list(iter(self.events.poll, None))  # type: ignore[arg-type]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine does meanwhile, it is quick."""
    monkeypatch.setattr(delivery, "_MOST_WAIT", 60.0)


def test_what_can_wait_waits_once(patient: None) -> None:
    sender, reader = Delivery(), Reader()
    for i in range(6):
        sender.put(reader, i, can_wait=True)
        sender.send(QUICK)
        # The first comes at once: nobody was woken lately.
        assert reader.read() == ([0], [], [1, 2], [], [3, 4], [])[i]
    sender.close(1)
    assert reader.read() == [5]


def test_the_end_comes_though_a_callback_fails_and_nothing_behind_what_was_lost(llm: LLM) -> None:
    """Tokens that were found in one step are on their way together."""
    engine = llm.runtime.engine
    ids = llm.tokenize("ab")
    generation = engine.submit(Request(ids=tuple(ids), params=SamplingParams(), max_tokens=4))
    assert isinstance([*generation][-1], Finished)  # it runs no more
    put, lost = generation.events.put, [True]

    def fails_once(found: Any) -> None:
        if lost:
            raise ValueError(lost.pop())
        put(found)

    generation.events.put = fails_once  # type: ignore[method-assign]
    sender = Delivery()
    for each in (Token(1, 0.0), Token(2, 0.0), Finished("length", 0.0)):
        sender.put(generation, each)
    sender.send()
    (end,) = iter(generation.events.poll, None)
    assert isinstance(end, Finished)
    assert (end.reason, type(end.error)) == ("error", ValueError)
    lost.append(True)
    sender.put(generation, Finished("length", 0.0))
    sender.send()
    assert isinstance(generation.events.poll(), Finished)


@pytest.mark.parametrize("next_in", [61.0, math.inf])
def test_nothing_waits_for_what_takes_long(patient: None, next_in: float) -> None:
    sender, reader = Delivery(), Reader()
    for i in range(4):
        sender.put(reader, i, can_wait=True)
        sender.send(next_in)
        assert reader.read() == [i]


def test_what_is_due_takes_along_what_waits(patient: None) -> None:
    sender, one, other = Delivery(), Reader(), Reader()
    sender.put(one, 0)
    sender.send(QUICK)
    sender.put(one, 1, can_wait=True)
    sender.put(other, 2)
    sender.send(QUICK)
    assert (one.read(), other.read()) == ([0, 1], [2])


def test_who_was_not_woken_lately_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, reader = Delivery(), Reader()
    monkeypatch.setattr(delivery, "_MOST_WAIT", 1e-9)
    for i in range(3):
        sender.put(reader, i, can_wait=True)
        sender.send(0.0)
        assert reader.read() == [i]


# -- in an engine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tiny_model(tmp_path_factory.mktemp("delivery"), n_ctx=512)
    with LLM(path, device="reference", slots=2) as llm:
        yield llm


ENDLESS: Any = {"logit_bias": {257: -1e9}, "temperature": 0.0, "speculation": False}


def test_a_token_waits_for_one_step_at_most(llm: LLM, patient: None) -> None:
    engine: Any = llm.runtime.engine
    seen, submit = list[tuple[int, int]](), engine._runner.program.submit
    begun: list[Any] = []

    def noted(batch: Any) -> Any:
        if begun and begun[0].sequence is not None:
            seen.append((begun[0].sequence.n_generated, n_delivered()))
        return submit(batch)

    def n_delivered() -> int:
        return begun[0].events._events.qsize()

    engine._runner.program.submit = noted
    try:
        with halting(llm, 0):  # all of its steps are seen
            stream = llm.stream("ab", max_tokens=60, **ENDLESS)
            begun.append(stream._generation)
        wait_until(lambda: not engine._scheduler.has_work, "the whole answer")
        engine.between_steps(lambda: None)
    finally:
        del engine._runner.program.submit
    n_others = n_delivered() - 60  # of the prompt, and the end
    # Before a step the last token is still to be sent, and maybe the one before it.
    lags = [made - (came - n_others + 1) for made, came in seen if made > 2]
    assert len(lags) > 40 and set(lags) == {1, 2}
    assert len(stream.run().token_ids) == 60


def test_an_errand_holds_up_no_token(llm: LLM, patient: None) -> None:
    engine: Any = llm.runtime.engine
    stream = llm.stream("ab", max_tokens=300, **ENDLESS)
    n_read = 0
    for _ in range(20):
        generation = stream._generation

        def waiting() -> int:
            return len(engine.delivery._events)

        assert engine.between_steps(waiting) == 0
        n_read += generation.events._events.qsize() > 0
    assert n_read
    assert len(stream.run().token_ids) == 300


@pytest.mark.parametrize("text", ["", "a", 'q"\\\n', "\x85\u2028\u2029", "ä😀", "</script>\x00"])
def test_a_frame_of_text_is_the_frame(text: str) -> None:
    def frame(text: str) -> bytes:
        return event({"id": "x", "delta": {"content": text}, "index": 0}, "name")

    assert TextFrame(frame).of(text) == frame(text)
