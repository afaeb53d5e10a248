"""Waiting for what other threads do, with an end: a test that waits in vain says for what."""

from __future__ import annotations

import time
from collections.abc import Callable

_SECONDS = 30.0  # of a slow, shared machine


def wait_until(is_so: Callable[[], object], what: str, seconds: float = _SECONDS) -> None:
    """AssertionError that names `what` has not come, where it does not in time."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"{what} has not come in {seconds:g} s"
        time.sleep(0.001)
