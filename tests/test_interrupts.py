"""An interrupt at any place of what begins, waits for or ends something: nothing is left behind."""

from __future__ import annotations

import ast
import itertools
import sys
import threading
from collections.abc import Callable
from functools import cache
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from edgeinfer import LLM

from .models_for_tests import tiny_model
from .waiting import wait_until

IDS = [5] * 40
ENDLESS: Any = dict(overflow="slide", logit_bias={257: -1e9}, seed=1)
# Whose lines run while something has begun that nobody may have yet; a signal may interrupt those
# of the library, too.
CALLING = (
    "edgeinfer/engine/", "edgeinfer/llm.py", "edgeinfer/stream.py", "edgeinfer/embedding.py",
    "edgeinfer/watching.py", "platform/files.py", "/threading.py", "/contextlib.py", "/tempfile.py",
)  # fmt: skip
LOADING = ("edgeinfer/llm.py", "edgeinfer/runtime.py", "edgeinfer/later.py", "engine/engine.py")


def is_interrupted(use: Callable[[], object], n: int, files: tuple[str, ...]) -> bool:
    """Call `use`, and raise KeyboardInterrupt at the n-th call, line or return in these files.

    False where there are fewer.
    """
    left = n

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not _is_watched(frame, files):
            return None
        if not _is_safe(frame, event):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt  # which ends tracing, too
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        use()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@cache
def _blocks(file: str) -> frozenset[int]:
    """The lines on which `with` and `try` stand."""
    nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    return frozenset(node.lineno for node in nodes if isinstance(node, (ast.With, ast.Try)))


def _is_safe(frame: FrameType, event: str) -> bool:
    """Whether no signal is handled here: where blocks begin and end, and a generator yields."""
    if event == "line":
        return frame.f_lineno in _blocks(frame.f_code.co_filename)
    return event == "exception" or event == "return" and bool(frame.f_code.co_flags & CO_GENERATOR)


def _is_watched(frame: FrameType, files: tuple[str, ...]) -> bool:
    if not any(part in frame.f_code.co_filename for part in files):
        return False
    each: FrameType | None = frame
    while each is not None:
        if each.f_code.co_name == "__del__":  # nobody catches what is raised there
            return False
        each = each.f_back
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("interrupts"), n_layers=1, n_ctx=256)


def holds_nothing(llm: LLM) -> bool:
    store, scheduler = llm.runtime.engine._store, llm.runtime.engine._scheduler
    kinds = enumerate(store._kinds)
    held = [pool.n_pages - pool.n_free - store.index.n_idle(kind) for kind, pool in kinds]
    return not (any(held) or store.has_guests or scheduler._begun or scheduler.waiting)


def look(llm: LLM, n: int) -> None:
    """In a thread of its own: a lock that was left taken would stop this one."""

    def wait() -> None:
        engine = llm.runtime.engine
        wait_until(lambda: engine.between_steps(lambda: holds_nothing(llm)), "nothing held", 100)
        found.append(True)

    found: list[bool] = []
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(120)
    assert found, f"place {n} leaves something behind, or a lock taken"


@pytest.mark.parametrize(
    "name", ["stream", "generate", "logits", "residuals", "embed", "save", "load"]
)
def test_an_interrupt_of_a_call_leaves_nothing_held(path: Path, name: str, tmp_path: Path) -> None:
    with LLM(path, device="reference", n_ctx=128, pooling="mean", residuals=[0]) as llm:
        file = tmp_path / "talk.session"
        llm.generate(IDS, max_tokens=1)
        llm.save_session(file, IDS)
        uses: dict[str, Callable[[], object]] = {
            "stream": lambda: llm.stream(IDS, **ENDLESS),
            "generate": lambda: llm.generate(IDS, max_tokens=2),
            "logits": lambda: llm.logits(IDS),
            "residuals": lambda: llm.residuals(IDS, 0),
            "embed": lambda: llm.embed(["a text", "two"]),
            "save": lambda: llm.save_session(file, IDS),
            "load": lambda: llm.load_session(file),
        }
        step = 3 if name in ("generate", "embed") else 1  # what takes long
        for n in itertools.count(1, step):
            is_over = not is_interrupted(uses[name], n, CALLING)
            look(llm, n)
            assert list(tmp_path.iterdir()) == [file], f"place {n} leaves a file"
            if is_over:
                break
        assert n > 50
        assert len(llm.generate(IDS, max_tokens=2, **ENDLESS).token_ids) == 2


def _threads() -> set[threading.Thread]:
    names = "edgeinfer-load", "edgeinfer-engine"
    return {thread for thread in threading.enumerate() if thread.name in names}


def test_an_interrupt_of_a_load_or_its_end_leaves_no_model_open(path: Path) -> None:
    def use() -> None:
        LLM(path, device="reference", n_ctx=64).close()

    others = _threads()  # of models that other tests have open
    for n in itertools.count(1):
        is_over = not is_interrupted(use, n, LOADING)
        wait_until(lambda: _threads() <= others, f"the end of what was begun at place {n}")
        if is_over:
            break
    assert n > 50
