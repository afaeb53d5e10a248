"""Waiting for what other threads do, with an end: a test that waits in vain says for what.

And holding up an engine's thread, where a test is not to depend on which of two is faster.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeinfer import LLM

_SECONDS = 120.0  # of a slow, shared machine: what comes at once there costs no test any time


def wait_until(is_so: Callable[[], object], what: str, seconds: float = _SECONDS) -> None:
    """AssertionError that names `what` has not come, where it does not in time."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"{what} has not come in {seconds:g} s"
        time.sleep(0.001)


@contextmanager
def halting(llm: LLM, n_steps: int = 5) -> Iterator[None]:
    """Inside, the engine makes so many steps and no more: no longer answer ends by itself.

    What is cancelled meanwhile ends when the block is left.
    """
    runner, goes_on, left = llm.runtime.engine._runner, threading.Event(), iter(range(n_steps))
    run = runner.run

    def run_some(parts: Any) -> None:
        if next(left, None) is None:
            goes_on.wait()
        run(parts)

    runner.run = run_some  # type: ignore[method-assign]
    try:
        yield
    finally:
        goes_on.set()
        del runner.run  # type: ignore[method-assign]
