"""Readers of every kind: slow, absent, interrupted, several at once, in threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import (
    LLM,
    AsyncLLM,
    AsyncStream,
    BusyError,
    ClosedError,
    Completion,
    Done,
    EdgeInferError,
    InvalidRequestError,
)
from edgeinfer.engine.generation import MOST_UNREAD, Generation
from edgeinfer.engine.speculation import MAX_ROWS
from edgeinfer.stream import MOST_OPEN, Stream

from .models_for_tests import tiny_model
from .waiting import halting, wait_until

N_CTX = 512
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
ENDLESS: Any = dict(logit_bias={257: -1e9}, seed=1)  # without the token that ends an answer
SLIDING: Any = dict(overflow="slide", **ENDLESS)

needs_signals = pytest.mark.skipif(
    not hasattr(signal, "pthread_kill"), reason="no signals to threads on this system"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("stream"), n_ctx=N_CTX, chat_template=TEMPLATE)


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    """One slot: whatever runs at its full length leaves no room beside it."""
    with LLM(path, n_ctx=N_CTX) as llm:
        yield llm


def _wait_until(condition: Callable[[], bool]) -> None:
    wait_until(condition, "what the engine comes to")


def _wait_paused(llm: LLM) -> None:
    """Nothing is computed any more, though nothing has ended."""
    engine = llm.runtime.engine
    _wait_until(lambda: bool(engine._scheduler.paused) and not engine._scheduler.running)
    engine.between_steps(lambda: None)  # and its last events are delivered


def _gate(llm: LLM) -> threading.Event:
    """Until it is set nothing new is begun."""
    scheduler, gate = llm.runtime.engine._scheduler, threading.Event()
    admit = scheduler.admit
    scheduler.admit = lambda: gate.wait() and admit()  # type: ignore[method-assign, assignment]
    return gate


def _wait_ended(llm: LLM) -> None:
    scheduler = llm.runtime.engine._scheduler
    _wait_until(lambda: not (scheduler.waiting or scheduler.running or scheduler.paused))
    assert pages_held(llm) == 0


def _n_unread(stream: Stream) -> int:
    return stream._generation.events._events.qsize()


def _read(stream: Stream, n_tokens: int) -> tuple[int, ...]:
    """The first tokens of an answer."""
    while len(stream._ids) < n_tokens:
        next(stream)
    return tuple(stream._ids[:n_tokens])


def pages_held(llm: LLM) -> int:
    """Pages of running and paused generations; ended ones give theirs up when asked."""
    engine = llm.runtime.engine
    return engine.pools[0].n_pages - engine.pools[0].n_free - engine._store.index.n_idle(0)


# -- back-pressure -------------------------------------------------------------------------------


def test_an_unread_stream_pauses_and_goes_on_where_it_was(llm: LLM) -> None:
    n = 2 * N_CTX
    alone = llm.generate("hello", max_tokens=n, **SLIDING).token_ids
    stream = llm.stream("hello", **SLIDING)
    _wait_paused(llm)
    n_ahead = _n_unread(stream)
    assert MOST_UNREAD <= n_ahead < MOST_UNREAD + MAX_ROWS
    time.sleep(0.05)
    assert _n_unread(stream) == n_ahead
    assert _read(stream, n) == alone
    stream.close()


@pytest.mark.parametrize("n_logprobs", [1, 20, 128])
def test_what_is_unread_with_logprobs_takes_no_more_than_without(llm: LLM, n_logprobs: int) -> None:
    """256 tokens with the likeliest 128 of each take 3.5 MB, of each client that has stalled."""
    asked: Any = dict(SLIDING, logprobs=n_logprobs, max_tokens=600, seed=4)
    alone = llm.generate("hello", **asked)
    with llm.stream("hello", **asked) as stream:
        _wait_paused(llm)
        n_bytes = _n_unread(stream) * (160 + 107 * n_logprobs)
        assert n_bytes < 512 << 10 and _n_unread(stream) >= min(8, MOST_UNREAD)
        found = stream.run()
    assert (found.token_ids, found.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        dict(overflow="slide"),
        dict(temperature=0.0),
        dict(mirostat=2, temperature=1.5),
        dict(repeat_penalty=1.3, dry_multiplier=1.0, speculation=False),
    ],
    ids=str,
)
def test_a_paused_stream_gives_way_and_then_yields_the_same_tokens(llm: LLM, sampling: Any) -> None:
    """Its pages go to whoever needs them; what it holds of its cache is computed again."""
    options: Any = {**ENDLESS, **sampling, "max_tokens": 450}
    alone = llm.generate("hello", **options)
    stream = llm.stream("hello", **options)
    for other in ("one", "another"):
        assert llm.generate(other, max_tokens=480, **ENDLESS).usage.completion_tokens == 480
    assert len(llm.logits([1] * N_CTX, last=1)) == 1
    again = stream.run()
    assert (again.token_ids, again.text) == (alone.token_ids, alone.text)
    assert pages_held(llm) == 0


def test_a_stream_that_has_slid_far_gives_way_too(llm: LLM) -> None:
    n = 4 * N_CTX
    alone = llm.generate("hello", max_tokens=n, **SLIDING).token_ids
    stream = llm.stream("hello", max_tokens=n, **SLIDING)
    _read(stream, 3 * N_CTX)
    llm.generate("other", max_tokens=500, **ENDLESS)
    assert stream.run().token_ids == alone


def test_streams_read_by_turns_share_one_slot(llm: LLM) -> None:
    options: Any = dict(max_tokens=480, **ENDLESS)
    prompts = ["one", "two", "three"]
    alone = [llm.generate(prompt, **options).token_ids for prompt in prompts]
    streams = [llm.stream(prompt, **options) for prompt in prompts]
    for _ in range(400):
        for stream in streams:
            next(stream, None)
    assert [stream.run().token_ids for stream in streams] == alone


def test_a_batch_is_read_side_by_side(path: Path) -> None:
    with LLM(path, n_ctx=N_CTX, slots=3) as llm:
        prompts = ["one", "two and more", "three"]
        options: Any = dict(max_tokens=MOST_UNREAD + 200, **ENDLESS)
        alone = [llm.generate(prompt, **options).token_ids for prompt in prompts]
        paused: list[int] = []
        engine = llm.runtime.engine
        run = engine._runner.run

        def counted(parts: Any) -> None:
            paused.append(len(engine._scheduler.paused))
            run(parts)

        engine._runner.run = counted  # type: ignore[method-assign]
        assert [c.token_ids for c in llm.generate_batch(prompts, **options)] == alone
        assert max(paused) == 0
        with pytest.raises(InvalidRequestError):
            llm.generate_batch(["one", []], **options)
        _wait_until(lambda: pages_held(llm) == 0)


def test_a_prompt_is_read_to_its_end_without_a_reader(path: Path) -> None:
    with LLM(path, n_ctx=N_CTX, device="reference") as llm:
        engine = llm.runtime.engine
        engine._scheduler.limits = engine.limits._replace(max_rows=1)
        stream = llm.stream([1] * 400, max_tokens=100, **ENDLESS)
        _wait_paused(llm)
        assert _n_unread(stream) >= 400
        assert stream.run().usage.completion_tokens == 100


def test_closing_the_model_ends_what_is_paused(llm: LLM) -> None:
    stream = llm.stream("hello", **SLIDING)
    _wait_paused(llm)
    llm.close()
    with pytest.raises(ClosedError):
        list(stream)


def test_each_reader_has_an_error_of_its_own(llm: LLM) -> None:
    """What all raise would hold the frames of all, and tell each of where the others were."""
    streams = [llm.stream("hello", **SLIDING) for _ in range(3)]
    llm.close()
    errors = []
    for stream in streams:
        with pytest.raises(ClosedError, match="the model was closed") as caught:
            stream.run()
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 3 and all(each.found for each in errors)
    assert len({len(traceback.extract_tb(each.__traceback__)) for each in errors}) == 1


def test_a_batch_of_any_size(llm: LLM) -> None:
    answers = llm.generate_batch(([n % 250] for n in range(2 * MOST_OPEN + 5)), max_tokens=1)
    assert len(answers) == 2 * MOST_OPEN + 5
    assert llm.generate_batch([]) == []


def test_a_batch_waits_where_no_more_may(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is refused only where others fill the queue."""
    prompts = [[n % 250] * 60 for n in range(30)]
    alone = [llm.generate(prompt, max_tokens=2, seed=1).token_ids for prompt in prompts]
    monkeypatch.setattr("edgeinfer.engine.engine.WAITING_BYTES", 8_000)
    engine, n_refused, n_begun = llm.runtime.engine, 0, 0
    begin, halted = engine.begin, contextlib.ExitStack()

    def counted(generation: Generation) -> None:
        nonlocal n_begun, n_refused
        n_begun += 1
        if n_begun == len(prompts):
            halted.close()
        try:
            begin(generation)
        except BusyError:
            n_refused += 1
            halted.close()
            raise

    monkeypatch.setattr(engine, "begin", counted)
    with halted:
        halted.enter_context(halting(llm, 0))  # until one is refused
        found = llm.generate_batch(prompts, max_tokens=2, seed=1)
    assert [each.token_ids for each in found] == alone
    assert 0 < n_refused <= len(prompts)  # tried again only once one has ended
    monkeypatch.setattr("edgeinfer.engine.engine.WAITING_BYTES", 0)
    unread = llm.stream("hello", **SLIDING)
    _wait_paused(llm)
    with pytest.raises(BusyError, match="wait already"):
        llm.generate_batch(prompts, max_tokens=2)
    unread.close()


def test_stop_strings_count_as_what_waits(llm: LLM) -> None:
    """A body of 1 MB may hold 100,000 of them, which take 11."""
    with llm.stream("hello", **SLIDING):
        _wait_paused(llm)
        with pytest.raises(BusyError, match="wait already") as caught:
            llm.generate("x", max_tokens=1, stop=[f"<{i}>" for i in range(100_000)])
        assert (caught.value.n_bytes or 0) > 11_000_000
        assert llm.generate("x", max_tokens=1, stop=["<1>"]).usage.completion_tokens == 1


# -- readers that go away ------------------------------------------------------------------------


def test_a_stream_left_in_a_variable_stops(llm: LLM) -> None:
    stream = llm.stream("hello", **SLIDING)
    for event in stream:
        if event.text:
            break
    _wait_paused(llm)
    stream.close()
    _wait_until(lambda: pages_held(llm) == 0)
    assert stream.completion.finish_reason == "cancelled"


@needs_signals
@pytest.mark.parametrize("method", ["stream", "generate", "chat", "generate_batch"])
def test_an_interrupt_cancels_what_was_waited_for(llm: LLM, method: str) -> None:
    """With its traceback kept, as notebooks do: the stream is never dropped."""
    kept: list[BaseException] = []
    main = threading.main_thread().ident
    assert main is not None
    engine = llm.runtime.engine

    def shoot() -> None:
        try:
            wait_until(lambda: engine.n_running, "an answer")
            time.sleep(0.1)  # what has come is read, and it waits
        finally:
            signal.pthread_kill(main, signal.SIGINT)

    shooter = threading.Thread(target=shoot)
    if method == "stream":
        stream = llm.stream("hello", **SLIDING)
        read: Callable[[], Any] = partial(all, (event is not None for event in stream))
    else:
        prompt = ["one", "two"] if method == "generate_batch" else "hello"
        read = partial(getattr(llm, method), prompt, **SLIDING)
    with halting(llm):
        try:
            shooter.start()
            read()
        except KeyboardInterrupt as error:
            kept.append(error)
        shooter.join()
    assert kept
    _wait_until(lambda: pages_held(llm) == 0)
    assert llm.generate("next", max_tokens=3, **ENDLESS).usage.completion_tokens == 3


def test_an_interrupted_stream_has_what_came_before(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream("hello", **SLIDING)
    tokens = _read(stream, 5)

    def interrupted(generation: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(stream._generation), "__next__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.token_ids[:5] == tokens
    assert list(stream) == []


def test_an_interrupted_poll_loses_no_event_unseen(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt between an event's coming and its being shown: the answer ends there."""
    stream = llm.stream("hello", **SLIDING)
    tokens, take = _read(stream, 5), Stream._take

    def interrupted(self: Stream, event: Any) -> None:
        monkeypatch.setattr(Stream, "_take", take)
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        while True:
            stream.poll()
    with pytest.raises(StopIteration):
        stream.poll()
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.token_ids[:5] == tokens
    whole = llm.generate("hello", **SLIDING | {"max_tokens": len(stream.completion.token_ids)})
    assert stream.completion.token_ids == whole.token_ids


@needs_signals
def test_a_signal_handler_may_close_the_stream_being_read(llm: LLM) -> None:
    stream = llm.stream("hello", **SLIDING)
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, lambda *_: stream.close())
    try:
        timer = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        for _ in stream:
            pass
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stream.completion.finish_reason == "cancelled"


def test_a_stream_may_be_closed_while_another_thread_reads_it(llm: LLM) -> None:
    for n in range(20):
        stream, seen = llm.stream("hello", **SLIDING), []
        thread = threading.Thread(target=lambda s=stream, seen=seen: seen.extend(s))
        thread.start()
        time.sleep(n * 0.0005)
        stream.close()
        thread.join(120)
        assert not thread.is_alive()
        assert sum(isinstance(event, Done) for event in seen) <= 1
        shown = "".join(event.text for event in seen)
        assert stream.completion.text.startswith(shown[:-8])
    _wait_until(lambda: pages_held(llm) == 0)


# -- one reader at a time ------------------------------------------------------------------------


def test_a_second_reader_is_refused_and_harms_nobody(llm: LLM) -> None:
    alone = llm.generate("hello", max_tokens=2000, **SLIDING).token_ids
    gate = _gate(llm)  # until one is refused the other waits
    stream = llm.stream("hello", max_tokens=2000, **SLIDING)
    refused: list[Exception] = []
    done = threading.Event()

    def read_too() -> None:
        while not done.is_set() and not refused:
            try:
                next(stream)
            except InvalidRequestError as error:
                refused.append(error)
                gate.set()
            except StopIteration:
                return

    thread = threading.Thread(target=read_too)
    thread.start()
    while not refused:
        try:
            next(stream)
        except InvalidRequestError:
            done.set()
            gate.set()
            break
    thread.join(120)
    assert stream.run().token_ids == alone


@pytest.mark.parametrize("way", ["run", "async"])
def test_a_second_reader_that_wants_the_whole_harms_nobody(llm: LLM, way: str) -> None:
    gate, begun = _gate(llm), threading.Event()
    stream, found = llm.stream("hello", max_tokens=40, **ENDLESS), []

    def read() -> None:
        for event in stream:
            found.append(event)
            begun.set()

    thread = threading.Thread(target=read)
    thread.start()  # it waits for what does not come yet
    try:
        _wait_until(lambda: stream._reader == thread.ident)
        with pytest.raises(InvalidRequestError, match="one reader") as caught:
            stream.run() if way == "run" else asyncio.run(AsyncStream(stream).run())
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    finally:
        gate.set()
    thread.join(120)
    assert isinstance(found[-1], Done) and stream.completion.usage.completion_tokens == 40


def test_readers_may_follow_one_another(llm: LLM) -> None:
    stream = llm.stream("hello", max_tokens=60, **ENDLESS)
    _read(stream, 20)
    thread = threading.Thread(target=_read, args=(stream, 40))
    thread.start()
    thread.join()
    assert stream.run().usage.completion_tokens == 60


# -- event loops ---------------------------------------------------------------------------------


def test_a_thousand_async_streams_take_no_threads(path: Path) -> None:
    async def read(stream: AsyncStream) -> tuple[int, ...]:
        nonlocal n_threads
        async for _ in stream:
            n_threads = max(n_threads, threading.active_count())
        return stream.completion.token_ids

    async def read_all(llm: LLM) -> list[tuple[int, ...]]:
        streams = [
            await AsyncLLM(llm).stream([i % 250], max_tokens=3, **ENDLESS) for i in range(1000)
        ]
        return await asyncio.gather(*map(read, streams))

    with LLM(path, n_ctx=N_CTX, slots=16) as llm:
        n_before = n_threads = threading.active_count()
        found = asyncio.run(read_all(llm))
        assert n_threads < n_before + 16  # idle work has a few of its own
        for i in (0, 123, 249):
            alone = llm.generate([i], max_tokens=3, **ENDLESS).token_ids
            assert set(found[i::250]) == {alone}
        assert pages_held(llm) == 0


def test_an_unread_async_stream_pauses_and_other_tasks_run(llm: LLM) -> None:
    alone = llm.generate("hello", max_tokens=900, **SLIDING).token_ids

    async def work() -> tuple[int, ...]:
        stream = await AsyncLLM(llm).stream("hello", max_tokens=900, **SLIDING)
        while not llm.runtime.engine._scheduler.paused:
            await asyncio.sleep(0.002)
        n_turns = 0

        async def count() -> None:
            nonlocal n_turns
            while True:
                await asyncio.sleep(0)
                n_turns += 1

        other = asyncio.create_task(count())
        answer = await stream.run()
        other.cancel()
        assert n_turns > 800  # also while events were there already
        return answer.token_ids

    assert asyncio.run(work()) == alone


@pytest.mark.parametrize("way", ["cancel", "timeout", "close", "drop"])
def test_an_async_reader_that_goes_away_cancels(llm: LLM, way: str) -> None:
    async def work() -> None:
        stream = await AsyncLLM(llm).stream("hello", **SLIDING)
        reading = asyncio.create_task(stream.run())
        await asyncio.sleep(0.02)
        if way == "close":
            await stream.close()
            assert (await reading).finish_reason == "cancelled"
        elif way == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(reading, 0.01)
        else:
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        if way == "drop":
            stream = await AsyncLLM(llm).stream("hello", **SLIDING)
            await stream.__anext__()
            del stream, reading
            gc.collect()

    asyncio.run(work())
    _wait_until(lambda: pages_held(llm) == 0)


def test_a_stream_goes_on_in_another_loop(llm: LLM) -> None:
    alone = llm.generate("hello", max_tokens=600, **SLIDING).token_ids
    streams: list[AsyncStream] = []

    async def begin(n: int) -> None:
        streams.append(await AsyncLLM(llm).stream("hello", max_tokens=600, **SLIDING))
        for _ in range(n):
            await streams[-1].__anext__()

    asyncio.run(begin(9))
    assert asyncio.run(streams[0].run()).token_ids == alone  # in a second loop


def test_a_loop_that_is_closed_under_its_reader(llm: LLM) -> None:
    gate = _gate(llm)
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(AsyncLLM(llm).stream("hello", **SLIDING))
    task = loop.create_task(stream.run())
    loop.run_until_complete(asyncio.sleep(0.02))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    gate.set()
    _wait_ended(llm)
    assert llm.generate("next", max_tokens=3, **ENDLESS).usage.completion_tokens == 3


def test_an_async_reader_is_told_that_the_model_was_closed(llm: LLM) -> None:
    async def work() -> None:
        stream = await AsyncLLM(llm).stream("hello", **SLIDING)
        reading = asyncio.create_task(stream.run())
        await asyncio.sleep(0.01)
        llm.close()
        with pytest.raises(ClosedError):
            await reading

    asyncio.run(work())


def test_two_tasks_on_one_stream(llm: LLM) -> None:
    async def work() -> tuple[Completion, BaseException]:
        stream = await AsyncLLM(llm).stream("hello", max_tokens=100, **ENDLESS)
        first, second = await asyncio.gather(stream.run(), anext_of(stream), return_exceptions=True)
        assert isinstance(first, Completion)
        assert isinstance(second, BaseException)
        return first, second

    async def anext_of(stream: AsyncStream) -> Any:
        return await stream.__anext__()

    answer, error = asyncio.run(work())
    assert isinstance(error, InvalidRequestError)
    assert answer.finish_reason == "length"


def test_a_callback_that_fails_ends_its_own_answer_only(llm: LLM) -> None:
    def broken() -> None:
        raise SystemExit("a bug of the reader's")

    gate = _gate(llm)
    stream = llm.stream("hello", **SLIDING)
    stream.notify(broken)
    gate.set()
    _wait_ended(llm)
    with pytest.raises(EdgeInferError, match="a bug of the reader's"):
        stream.run()
    assert llm.generate("next", max_tokens=3, **ENDLESS).usage.completion_tokens == 3


# -- everything at once --------------------------------------------------------------------------


class Readers:
    """Random answers, each read by someone of random habits, and compared with its solo run."""

    KINDS = ("fast", "slow", "bursts", "abandon", "drop", "close", "cancel", "task", "broken")

    def __init__(self, llm: LLM, seed: int) -> None:
        self.llm, self.rng = llm, random.Random(seed)
        self.alone: dict[int, tuple[int, ...]] = {}
        self.wrong: list[str] = []
        self.kept: list[Stream] = []
        self.lock = threading.Lock()

    def options(self, i: int) -> Any:
        """Request number `i`, the same each time."""
        rng = random.Random(i)
        more: list[Any] = [{}, SLIDING, dict(mirostat=2), dict(speculation=False)]
        options = {**ENDLESS, "temperature": rng.choice((0.0, 1.0, 2.0)), **rng.choice(more)}
        n_prompt = rng.choice((1, 5, 40, 120))
        options["max_tokens"] = rng.choice((1, 7, 60, 300, 380))
        return [rng.randrange(250) for _ in range(n_prompt)], options

    def solo(self, n: int) -> None:
        for i in range(n):
            prompt, options = self.options(i)
            self.alone[i] = self.llm.generate(prompt, **options).token_ids

    def serve(self, n: int, seed: int) -> None:
        """Open and read `n` answers, one after the other."""
        rng = random.Random(seed)
        for _ in range(n):
            i, kind = rng.randrange(len(self.alone)), rng.choice(self.KINDS)
            prompt, options = self.options(i)
            try:
                found = getattr(self, kind)(self.llm.stream(prompt, **options), rng)
            except BaseException as error:
                self.wrong.append(f"{kind} of {i}: {error!r}")
                continue
            expected = self.alone[i]
            if found is not None and (found != expected[: len(found)]):
                self.wrong.append(f"{kind} of {i}: other tokens")
            if kind in ("fast", "slow", "bursts", "task") and len(found) != len(expected):
                self.wrong.append(f"{kind} of {i}: {len(found)} of {len(expected)} tokens")

    def fast(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        texts = [event.text for event in stream]
        assert "".join(texts) == stream.completion.text
        return stream.completion.token_ids

    def slow(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        for n, _ in enumerate(stream):
            if n % 40 == 0:
                time.sleep(0.002)
        return stream.completion.token_ids

    def bursts(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        time.sleep(rng.random() * 0.1)
        return self.fast(stream, rng)

    def abandon(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        self._some(stream, rng)
        self.kept.append(stream)
        return tuple(stream._ids)

    def drop(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        self._some(stream, rng)
        return tuple(stream._ids)

    def close(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        timer = threading.Timer(rng.random() * 0.02, stream.close)
        timer.start()
        for _ in stream:
            pass
        timer.join()
        return stream.completion.token_ids

    def cancel(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        async def work() -> None:
            task = asyncio.create_task(AsyncStream(stream).run())
            await asyncio.sleep(rng.random() * 0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(work())
        return tuple(stream._ids)

    def task(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        return asyncio.run(AsyncStream(stream).run()).token_ids

    def broken(self, stream: Stream, rng: random.Random) -> tuple[int, ...]:
        self._some(stream, rng)
        if rng.random() < 0.5:
            raised = threading.Event()

            def fail() -> None:
                raised.set()
                raise OSError

            with contextlib.suppress(OSError, StopIteration):
                while stream.poll() is not None:
                    pass
                stream.notify(fail)
                assert raised.wait(120)
        stream.close()
        return stream.completion.token_ids

    def _some(self, stream: Stream, rng: random.Random) -> None:
        for _ in range(rng.choice((0, 1, 30, 200))):
            if next(stream, None) is None:
                return


def _serve(path: Path, seed: int, n_threads: int, n_each: int, n_requests: int) -> None:
    with LLM(path, n_ctx=N_CTX, slots=2) as llm:
        readers = Readers(llm, seed)
        readers.solo(n_requests)
        threads = [
            threading.Thread(target=readers.serve, args=(n_each, seed + n))
            for n in range(n_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive(), "a reader hangs"
        assert readers.wrong == []
        for stream in readers.kept:
            stream.close()
        gc.collect()
        engine = llm.runtime.engine
        _wait_until(lambda: pages_held(llm) == 0)
        assert not (
            engine._scheduler.running or engine._scheduler.paused or engine._scheduler.waiting
        )


def test_readers_of_all_kinds_at_once(path: Path) -> None:
    _serve(path, seed=1, n_threads=6, n_each=8, n_requests=10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_many_readers_of_all_kinds(path: Path, seed: int) -> None:
    _serve(path, seed, n_threads=12, n_each=25, n_requests=20)


# -- stop tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("speculation", [True, False])
def test_stop_token_ids_end_an_answer_wherever_they_come(llm: LLM, speculation: bool) -> None:
    options: Any = dict(max_tokens=60, speculation=speculation, **ENDLESS)
    whole = llm.generate("hello", **options)
    for stop in (whole.token_ids[20], np.int32(whole.token_ids[33])):
        answer = llm.generate("hello", stop_token_ids=[stop, 319], **options)
        at = whole.token_ids.index(stop)
        assert answer.token_ids == whole.token_ids[:at]
        assert (answer.finish_reason, answer.stop) == ("stop", stop)
        assert whole.text.startswith(answer.text)


@pytest.mark.parametrize("ids", [[-1], [320], [1.5], ["1"], "1", 5, [True], [None], [2**70]])
def test_stop_token_ids_that_are_none_are_refused(llm: LLM, ids: Any) -> None:
    with pytest.raises(InvalidRequestError, match="stop_token_ids"):
        llm.generate("hello", max_tokens=1, stop_token_ids=ids)


@pytest.mark.parametrize("ids", [None, [], (), {70}, np.array([70, 71])], ids=repr)
def test_stop_token_ids_of_any_kind(llm: LLM, ids: Any) -> None:
    assert llm.generate("hello", max_tokens=2, stop_token_ids=ids, **ENDLESS).finish_reason


def test_logprobs_spell_hidden_tokens(llm: LLM) -> None:
    answer = llm.generate("hello", max_tokens=2, logit_bias={256: 1e9}, logprobs=1)
    assert answer.logprobs is not None
    assert answer.text == ""
    assert [token.text for token in answer.logprobs] == ["<|bos|>"] * 2
    stopped = llm.generate("hello", max_tokens=2, logit_bias={256: 1e9}, stop="<|bos|>")
    assert (stopped.stop, stopped.usage.completion_tokens) == ("<|bos|>", 1)
    ended = llm.generate("hello", max_tokens=2, logit_bias={257: 1e9}, stop="<|eos|>")
    assert (ended.stop, ended.finish_reason) == ("<|eos|>", "stop")


@pytest.mark.parametrize("is_step", [False, True])
def test_a_callback_that_waits_is_refused(llm: LLM, is_step: bool, tmp_path: Path) -> None:
    """It runs where answers are made: all of them would wait for ever.

    Nor may it have pages copied: those of a step that runs are read meanwhile.
    """
    llm.generate([5] * 40, max_tokens=1)
    llm.save_session(tmp_path / "saved", [5] * 40)
    gate = _gate(llm)  # what has come already is told of here, where waiting is allowed
    stream, refused, done = llm.stream("ab", **ENDLESS), [], threading.Event()

    def wait() -> None:
        for waiting in (
            lambda: llm.generate("ab", max_tokens=3),
            lambda: llm.logits([5]),
            lambda: llm.save_session(tmp_path / "other", [5] * 40),
            lambda: llm.load_session(tmp_path / "saved"),
        ):
            try:
                waiting()
            except InvalidRequestError as error:
                refused.append(str(error))
        done.set()

    if is_step:
        gate.set()
        llm.generate("cd", max_tokens=1, on_step=lambda step: wait())
    else:
        stream.notify(wait)
        gate.set()
        assert done.wait(120)
    stream.close()
    assert len(refused) == 4 and all("callback can't wait" in each for each in refused)
    assert not (tmp_path / "other").exists()
    assert llm.generate("ab", max_tokens=3, temperature=0).usage.prompt_tokens


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_runs_has_no_copies(llm: LLM, copied: Callable[[Any], Any]) -> None:
    stream = llm.stream("ab" * 9, temperature=0, max_tokens=9, logit_bias={257: -1e9})
    for thing in (stream, llm):
        with pytest.raises(TypeError, match="can't be copied"):
            copied(thing)
    gc.collect()
    assert len(stream.run().token_ids) == 9


def test_a_model_that_is_opened_twice_at_once_is_loaded_once(path: Path) -> None:
    async def open_all() -> None:
        model = AsyncLLM(path, device="reference")
        first, *others = await asyncio.gather(*(model.open() for _ in range(4)))
        assert all(other is first for other in others)
        opening = asyncio.create_task(AsyncLLM.open(late := AsyncLLM(path, device="reference")))
        await asyncio.sleep(0)
        await late.close()
        with pytest.raises(ClosedError):
            (await opening).tokenize("a")
        await (never := AsyncLLM(path, device="reference")).close()
        with pytest.raises(ClosedError):
            await never.open()
        await model.close()
        with pytest.raises(ClosedError):
            first.tokenize("a")

    asyncio.run(open_all())
