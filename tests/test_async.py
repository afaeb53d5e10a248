"""An event loop beside the model: what takes long runs elsewhere, in order, and can be given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, AsyncLLM, ClosedError, EdgeInferError, InvalidRequestError
from edgeinfer.engine.hooks import Step

from .models_for_tests import tiny_model
from .waiting import wait_until

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
LONG = "some words of a book, again and again " * 12_000  # 450 kB, half a second of tokens
SLIDING: Any = {"overflow": "slide", "max_tokens": 1, "seed": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("async"), n_ctx=256, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, device="reference") as llm:
        yield llm


class NoExecutor(ThreadPoolExecutor):
    def submit(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the loop's executor is for others")


def is_working() -> bool:
    """Whether a thread works for a loop."""
    return any(thread.name == "edgeinfer-text" for thread in threading.enumerate())


def wait_for_threads() -> None:
    wait_until(lambda: not is_working(), "the end of what threads do")


@contextmanager
def held_up() -> Iterator[Callable[[], None]]:
    """Inside, what is asked for stays on its way to the engine until the call that is yielded."""
    goes_on, stream = threading.Event(), LLM.stream

    def wait(self: LLM, *given: Any, **more: Any) -> Any:
        goes_on.wait()
        return stream(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM, "stream", wait)
        try:
            yield goes_on.set
        finally:
            goes_on.set()


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_long_prompt_does_not_stop_the_loop(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, is_chat: bool
) -> None:
    name = "stream_chat" if is_chat else "stream"
    begin, has_turned = getattr(LLM, name), threading.Event()

    def begin_later(self: LLM, *given: Any, **more: Any) -> Any:
        assert has_turned.wait(120), "the loop waits for this"
        return begin(self, *given, **more)

    async def work() -> None:
        task = asyncio.create_task(getattr(AsyncLLM(llm), name)(LONG, **SLIDING))
        for _ in range(3):
            await asyncio.sleep(0.002)
        has_turned.set()
        await (await task).close()

    monkeypatch.setattr(LLM, name, begin_later)
    asyncio.run(work())


def test_work_is_begun_in_order_without_the_loops_executor(path: Path) -> None:
    begun: list[str] = []

    async def work() -> None:
        asyncio.get_running_loop().set_default_executor(NoExecutor())
        async with AsyncLLM(path, device="reference") as model:
            assert model._llm is not None
            made = model._llm.runtime.engine.generation

            def noted(request: Any) -> Any:
                begun.append(len(request.ids))
                return made(request)

            model._llm.runtime.engine.generation = noted  # type: ignore[method-assign]
            texts = ["x" * 50, "y", LONG, "zz", "www"]
            tasks = [asyncio.create_task(model.stream(text, **SLIDING)) for text in texts]
            for stream in await asyncio.gather(*tasks):
                await stream.close()

    asyncio.run(work())
    assert len(begun) == 5 and begun[0] > begun[1] < begun[2] > begun[3] < begun[4]
    wait_for_threads()


def test_errors_come_to_who_asked_and_to_nobody_else(llm: LLM) -> None:
    async def work() -> None:
        model = AsyncLLM(llm)
        results = await asyncio.gather(
            model.generate("a", **SLIDING),
            model.generate("a", temperature="hot"),  # type: ignore[arg-type]
            model.generate([999_999]),
            model.chat([{"role": "user", "content": 5}]),  # type: ignore[typeddict-item]
            model.generate("a", **SLIDING),
            return_exceptions=True,
        )
        kinds = [isinstance(each, InvalidRequestError) for each in results]
        assert kinds == [False, True, True, True, False]

    asyncio.run(work())


class Ends(list[int]):
    def __len__(self) -> int:
        raise StopIteration


def test_what_no_future_takes_is_told_all_the_same(llm: LLM) -> None:
    async def work() -> None:
        with pytest.raises(EdgeInferError, match="cut short by StopIteration"):
            await asyncio.wait_for(AsyncLLM(llm).generate(Ends([1, 2])), 120)

    asyncio.run(work())


def test_what_is_cancelled_is_given_up_at_once(llm: LLM) -> None:
    async def work() -> None:
        model = AsyncLLM(llm)
        with held_up():
            first = asyncio.create_task(model.stream(LONG, **SLIDING))
            second = asyncio.create_task(model.stream("never", **SLIDING))
            await asyncio.sleep(0.05)
            for task in (first, second):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert is_working(), "whoever cancels does not wait for the thread"
        answer = await model.generate("still answers", **SLIDING)
        assert answer.usage.completion_tokens == 1
        # The stream that nobody took was closed: it holds no place.
        is_idle = partial(wait_until, lambda: not llm.runtime.engine.n_running, "an idle engine")
        await asyncio.to_thread(is_idle)

    asyncio.run(work())


def test_closing_does_not_wait_for_what_waits(path: Path) -> None:
    async def work() -> None:
        model = AsyncLLM(path, device="reference")
        await model.open()
        with held_up() as go_on:
            tasks = [asyncio.create_task(model.stream(LONG, **SLIDING)) for _ in range(3)]
            await asyncio.sleep(0.05)
            await model.close()
            assert is_working()
            go_on()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, ClosedError) for each in results), results

    asyncio.run(work())


def test_a_loop_that_ends_leaves_nothing_behind(llm: LLM) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(AsyncLLM(llm).stream(LONG, **SLIDING))
    loop.run_until_complete(asyncio.sleep(0.05))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    wait_for_threads()
    wait_until(lambda: not llm.runtime.engine.n_running, "the end of its step")


@pytest.mark.parametrize("what", ["generate", "embed"])
def test_a_callback_can_not_wait_in_a_loop_of_its_own_either(path: Path, what: str) -> None:
    """It would wait for itself, and all others with it."""

    async def ask(llm: LLM) -> None:
        face = AsyncLLM(llm)
        await (face.generate("x", max_tokens=2) if what == "generate" else face.embed("x"))

    def look(step: Step) -> None:
        with pytest.raises(InvalidRequestError, match="a callback can't wait"):
            asyncio.run(ask(llm))
        looked.append(step.position)

    looked: list[int] = []
    with LLM(path, device="reference", pooling="mean") as llm:
        llm.generate("y", max_tokens=2, seed=1, on_step=look)
        assert looked and llm.generate("y", max_tokens=2, seed=1).token_ids
