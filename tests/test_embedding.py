"""The library inside other programs: threads, several models, forks, exits, and others' loops.

Each program is a process of its own, as it would be written by who embeds this.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM

from .models_for_tests import tiny_model
from .waiting import halting, wait_until

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
ENDLESS: Any = dict(logit_bias={257: -1e9}, temperature=0.7)  # without the token that ends it
HEAD = """
import asyncio, os, signal, sys, threading, time
from edgeinfer import LLM, AsyncLLM, ClosedError
PATH, SPEC = sys.argv[1], dict(logit_bias={257: -1e9}, temperature=0.7, seed=3)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("embedding"), n_ctx=512, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("another")
    return tiny_model(folder, n_ctx=512, seed=5, arch="qwen3", quant="Q8_0")


def run(code: str, *arguments: object, seconds: float = 300) -> str:
    """What a program prints; it has to end by itself, with nothing on stderr."""
    source = HEAD + textwrap.dedent(code)
    command = [sys.executable, "-c", source, *map(str, arguments)]
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def needs(module: str) -> pytest.MarkDecorator:
    try:
        is_here = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor what it is a part of
        is_here = False
    return pytest.mark.skipif(not is_here, reason=f"{module} is not installed")


# -- threads -------------------------------------------------------------------------------------


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that all begin at once."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def work(i: int) -> None:
        start.wait(120)
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)  # kernels are built where none are kept
        assert not thread.is_alive()
    return results


def test_threads_that_call_one_model_share_its_steps(path: Path) -> None:
    n_threads, n_tokens = 8, 24
    asked: list[Any] = [
        dict(prompt=f"caller {i} asks", seed=i, max_tokens=n_tokens, **ENDLESS)
        for i in range(n_threads)
    ]
    with LLM(path, n_ctx=512, slots=n_threads) as llm:
        alone = [llm.generate(**each).token_ids for each in asked]
        program, n_steps = llm.runtime.program, 0
        submit = program.submit

        def counted(batch: Any) -> Any:
            nonlocal n_steps
            n_steps += 1
            return submit(batch)

        program.submit = counted  # type: ignore[method-assign]
        engine, halted = llm.runtime.engine, ExitStack()
        halted.enter_context(halting(llm, 0))  # until all have called

        def let_go() -> None:
            with halted:
                scheduler = engine._scheduler
                wait_until(
                    lambda: len((*scheduler.waiting, *scheduler.running)) == n_threads,
                    "all callers",
                )

        calls: list[Any] = [lambda each=each: llm.generate(**each) for each in asked]
        *together, _ = in_threads([*calls, let_go])
        assert [answer.token_ids for answer in together] == alone
        assert n_steps < n_threads * n_tokens / 2


def test_a_model_is_unloaded_while_another_answers(path: Path, other: Path) -> None:
    """Both run on one team of threads; neither notices what the other does."""
    spec: Any = dict(max_tokens=300, seed=3, **ENDLESS)
    with LLM(path, n_ctx=512, threads=2) as first:
        expected = first.generate("hello", **spec).token_ids
        answers: list[Any] = []
        with first.stream("hello", **spec) as stream:
            for i, event in enumerate(stream):
                if i % 100 == 50:
                    with LLM(other, n_ctx=128, threads=1 + i % 2) as second:
                        running = second.stream("hello", max_tokens=90, seed=1, **ENDLESS)
                        next(running)
                        answers.append(second.generate("hey", max_tokens=4, seed=1).token_ids)
                if event.type == "done":
                    assert event.completion.token_ids == expected
    assert len(answers) >= 2 and len(set(answers)) == 1


def test_models_open_and_close_in_threads(path: Path, other: Path) -> None:
    def use(model: Path) -> tuple[int, ...]:
        with LLM(model, n_ctx=128) as llm:
            return llm.generate("hello", max_tokens=5, seed=3).token_ids

    found = in_threads([lambda model=model: use(model) for model in (path, other) * 3])
    assert len(set(found[::2])) == len(set(found[1::2])) == 1


# -- interrupts, exits and forks -----------------------------------------------------------------

INTERRUPTED = """
import random
rng, ids, file = random.Random(8), [5] * 60, sys.argv[2]
SPEC["max_tokens"] = 60
llm = LLM(PATH, n_ctx=200, threads=2, residuals=[1], pooling="mean")
engine, caller = llm.runtime.engine, threading.main_thread().ident
llm.generate(ids, **SPEC)
llm.save_session(file, ids)
uses = [
    lambda: llm.generate([rng.randrange(250)] * 50, **SPEC),
    lambda: list(llm.stream(ids, **SPEC)),
    lambda: llm.generate(ids, on_step=lambda step: None, **SPEC),
    lambda: llm.generate_batch([[i] * 40 for i in range(9)], **SPEC),
    lambda: llm.embed(["words " * 8] * 30),
    lambda: llm.logits(ids),
    lambda: llm.attention(ids, 1),
    lambda: llm.save_session(file, ids),
    lambda: llm.load_session(file),
]

def holds_nothing():
    store, scheduler = engine._store, engine._scheduler
    held = [p.n_pages - p.n_free - store.index.n_idle(i) for i, p in enumerate(store._kinds)]
    return not (any(held) or store.has_guests or scheduler._begun or scheduler.waiting)

def shoot(at):
    while time.perf_counter() < at:
        time.sleep(0)
    signal.pthread_kill(caller, signal.SIGINT)

def interrupt(*_):
    if is_armed:
        is_armed.clear()
        raise KeyboardInterrupt

is_armed = []
signal.signal(signal.SIGINT, interrupt)
for i in range(240):
    use = uses[i % len(uses)]
    shooter = threading.Thread(target=shoot, args=[time.perf_counter() + rng.random() ** 3 / 20])
    shooter.start()
    try:
        is_armed.append(True)
        try:
            use()
        except Exception as error:  # a session of what was given up
            assert "nothing of these tokens" in str(error) or "leaves no room" in str(error), error
        is_armed.clear()
    except KeyboardInterrupt:
        pass
    shooter.join()
    end = time.monotonic() + 120
    while not engine.between_steps(holds_nothing):
        assert time.monotonic() < end, f"use {i % len(uses)} still holds something"
        time.sleep(0.001)
print(len(llm.generate(ids, **SPEC).token_ids))
llm.close()
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads")
def test_an_interrupt_at_any_place_leaves_nothing_held(path: Path, tmp_path: Path) -> None:
    """A program may go on after it, as notebooks do."""
    command = [sys.executable, "-c", HEAD + INTERRUPTED, path, tmp_path / "session"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr


EXITS = {
    "a thread waits for an answer": """
        llm = LLM(PATH)
        waits = threading.Thread(target=lambda: llm.generate("x", **SPEC, overflow="slide"))
        waits.daemon = True
        waits.start()
        time.sleep(0.2)
        """,
    "two models, one in a cycle": """
        one, two = LLM(PATH), LLM(PATH, device="law")
        one.self = one
        next(one.stream("x", **SPEC)), next(two.stream("x", **SPEC))
        """,
    "a loop is left with a task": """
        async def main():
            llm = AsyncLLM(PATH)
            stream = await llm.stream("x", **SPEC)
            global task
            task = asyncio.ensure_future(stream.__anext__())
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
        """,
    "a stream outlives its model's name": """
        stream = LLM(PATH).stream("x", **SPEC)
        next(stream)
        """,
    "closed in a handler of the exit": """
        import atexit
        llm = LLM(PATH)
        atexit.register(llm.close)
        next(llm.stream("x", **SPEC))
        """,
}


@pytest.mark.parametrize("code", EXITS.values(), ids=list(EXITS))
def test_a_program_ends_whatever_runs(path: Path, code: str) -> None:
    assert run(code + "\n        print('end', flush=True)", path) == "end\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_of_a_fork_is_told_and_can_load_its_own(path: Path) -> None:
    """Of all that the parent has open nothing runs in it, and nothing of it hangs or is freed."""
    code = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks
        llm = LLM(PATH)
        # More than is made ahead of a reader: what the child has of it is not the end.
        whole = llm.generate("x", max_tokens=300, **SPEC).token_ids
        stream, asynchronous = llm.stream("x", max_tokens=300, **SPEC), AsyncLLM(llm)
        next(stream)
        pid = os.fork()
        if pid == 0:
            told = 0
            for use in (
                lambda: llm.generate("x", max_tokens=1),
                lambda: llm.stream_chat("x"),
                lambda: llm.logits([1]),
                lambda: llm.tokenize("x"),
                lambda: [each for each in stream],
                lambda: asyncio.run(asynchronous.generate("x", max_tokens=1)),
            ):
                try:
                    use()
                except ClosedError as error:
                    told += "fork" in str(error)
            stream.close()
            llm.close()
            own = LLM(PATH)
            same = own.generate("x", max_tokens=300, **SPEC).token_ids == whole
            print(told, same, flush=True)
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, stream.run().token_ids == whole)
        """
    assert run(code, path) == "6 True\n0 True\n"


# -- loops of other people -----------------------------------------------------------------------


def test_a_call_inside_a_running_loop(path: Path) -> None:
    """As in a notebook: cells are run by a loop, plain calls and awaits in turn."""
    code = """
        async def cells():
            llm = LLM(PATH)
            first = llm.generate("x", max_tokens=9, **SPEC).token_ids
            second = (await AsyncLLM(llm).generate("x", max_tokens=9, **SPEC)).token_ids
            third = [e.text for e in llm.stream("x", max_tokens=9, **SPEC)]
            async with AsyncLLM(llm) as again:
                both = await asyncio.gather(*(again.chat("x", max_tokens=9, **SPEC) for _ in "ab"))
            print(first == second, len(third) > 1, both[0].token_ids == both[1].token_ids)
        asyncio.run(cells())
        """
    assert run(code, path) == "True True True\n"


def test_a_textual_app(path: Path) -> None:
    """Answers come in a coroutine of the app, whose loop goes on meanwhile."""
    code = """
        from textual.app import App
        from textual.widgets import Static

        class Chat(App):
            ticks, text = 0, ""

            def compose(self):
                yield Static(id="answer")

            def on_mount(self):
                self.set_interval(0.005, self.tick)
                self.run_worker(self.answer())

            def tick(self):
                self.ticks += 1

            async def answer(self):
                async with AsyncLLM(PATH) as llm:
                    async for event in await llm.stream("x", max_tokens=200, **SPEC):
                        self.text += event.text
                        self.query_one("#answer", Static).update(self.text)
                    self.whole = (await llm.generate("x", max_tokens=200, **SPEC)).text
                self.exit()

        app = Chat()
        app.run(headless=True)
        print(app.text == app.whole != "", app.ticks > 3)
        """
    assert run(code, path) == "True True\n"


@needs("PySide6.QtCore")
def test_a_qt_loop(path: Path) -> None:
    """A signal from the engine's thread is a slot's call in Qt's: nobody blocks, nobody polls."""
    code = """
        from PySide6.QtCore import QCoreApplication, QObject, QTimer, Signal, Slot

        class Answer(QObject):
            came = Signal()

            def __init__(self, stream):
                super().__init__()
                self.stream, self.text = stream, ""
                self.came.connect(self.read)
                stream.notify(self.came.emit)

            @Slot()
            def read(self):
                assert threading.current_thread() is threading.main_thread()
                try:
                    while (event := self.stream.poll()) is not None:
                        self.text += event.text
                except StopIteration:
                    app.quit()
                else:
                    self.stream.notify(self.came.emit)

        app, ticks = QCoreApplication([]), []
        timer = QTimer()
        timer.timeout.connect(lambda: ticks.append(1))
        timer.start(1)
        llm = LLM(PATH)
        answer = Answer(llm.stream("x", max_tokens=200, **SPEC))
        app.exec()
        print(answer.text == llm.generate("x", max_tokens=200, **SPEC).text != "", len(ticks) > 3)
        """
    assert run(code, path) == "True True\n"


@needs("PySide6.QtAsyncio")
def test_qts_own_asyncio(path: Path) -> None:
    code = """
        from PySide6 import QtAsyncio
        from PySide6.QtCore import QCoreApplication

        app = QCoreApplication([])

        async def main():
            async with AsyncLLM(PATH) as llm:
                text = ""
                async for event in await llm.stream("x", max_tokens=50, **SPEC):
                    text += event.text
                print(text == (await llm.generate("x", max_tokens=50, **SPEC)).text != "")

        QtAsyncio.run(main(), keep_running=False, handle_sigint=False)
        """
    assert run(code, path) == "True\n"
