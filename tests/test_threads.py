"""Threads that the system does not give: what can do without does, the rest says what it lacks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, AsyncLLM, platform
from edgeinfer.errors import DeviceError, InvalidRequestError, TemplateError
from edgeinfer.kernels.cpu import builders
from edgeinfer.kernels.cpu.targets import Target

from .models_for_tests import tiny_model
from .refused_threads import few_threads, without_threads


def test_what_is_done_when_idle_needs_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests had failed for want of the thread that tunes between them."""
    path = tiny_model(tmp_path)
    monkeypatch.setattr("edgeinfer.kernels.cpu.tune.read", lambda path, known: None)
    with LLM(path, device="cpu", threads=2) as llm:
        with without_threads("edgeinfer-idle", monkeypatch):
            assert llm.generate("x", max_tokens=2).token_ids
            program: Any = llm.runtime.program
            assert program._idle._thread is None
        assert llm.generate("x", max_tokens=2).token_ids
        assert program._idle._thread is not None or program._idle.is_done


def test_a_thread_that_text_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(tmp_path, chat_template="{{ messages[0].content }}")

    async def ask(face: AsyncLLM) -> int:
        return len((await face.chat("x", max_tokens=2)).token_ids)

    with LLM(path, device="reference") as llm:
        for name, error in (("Thread-", TemplateError), ("edgeinfer-text", DeviceError)):
            face = AsyncLLM(llm)  # without a thread that has answered and not yet ended
            with without_threads(name, monkeypatch), pytest.raises(error, match="ulimit -u"):
                asyncio.run(ask(face))
            assert asyncio.run(ask(face)) == 2
        with without_threads("edgeinfer-deep", monkeypatch):
            with pytest.raises(InvalidRequestError, match="^regex can't be read: no room"):
                llm.generate("x", regex="a+b")


@pytest.mark.parametrize("n_given", [0, 1, 2])
def test_work_is_done_by_as_many_threads_as_there_are(
    monkeypatch: pytest.MonkeyPatch, n_given: int
) -> None:
    threads = set[str]()

    def work(n: int) -> int:
        threads.add(threading.current_thread().name)
        return 10 // n

    with few_threads(n_given, monkeypatch):
        assert list(platform.mapped(work, [1, 2, 5], 3)) == [10, 5, 2]
    assert len(threads) <= max(1, n_given)
    assert ("MainThread" in threads) == (n_given == 0)
    with few_threads(n_given, monkeypatch):
        found = platform.mapped(work, [1, 0, 2, 5], 3)
        assert next(found) == 10
        with pytest.raises(ZeroDivisionError):
            next(found)
        assert list(platform.mapped(work, [], 3)) == []


@pytest.mark.parametrize("n_given", [0, 1])
def test_kernels_are_built_by_as_many_threads_as_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_given: int
) -> None:
    start, n_asked = threading.Thread.start, 0

    def refuse(self: threading.Thread) -> None:
        nonlocal n_asked
        n_asked += self._target is builders._feed  # type: ignore[attr-defined]
        if n_asked > n_given:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(builders, "n_builders", lambda n, memory: 2)
    names = ["norm", "read"]
    if n_given:
        built = builders.build_objects(None, names, Target.host(), None)
        assert sorted(built) == names and all(built.values())
    else:
        with pytest.raises(DeviceError, match="takes a thread, and none"):
            builders.build_objects(None, names, Target.host(), None)


def test_what_an_interpreter_that_ends_refuses_is_said(tmp_path: Path) -> None:
    """The modules that drive a GPU import one that can't be imported then."""
    path = tiny_model(tmp_path)
    code = f"""
import atexit, threading
def late():
    from edgeinfer import LLM
    try:
        LLM({str(path)!r}, device="shim")
    except BaseException as error:
        print(type(error).__name__, error)
atexit.register(late)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith("DeviceError") and "before the interpreter exits" in done.stdout
