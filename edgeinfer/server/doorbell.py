"""How engines' threads wake up whoever reads answers in the event loop: all of a step at once.

The loop's own way takes three system calls and two turns of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgeinfer import platform


class Doorbell:
    """Calls from other threads, made in the loop in the order of `ring`, equal ones once."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._is_rung = False
        self._wakeup = platform.Wakeup.or_none()
        self._n_listening = 0

    @contextmanager
    def listening(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Inside, `ring` costs least. Only in `loop`, always the same one."""
        if not self._n_listening and self._wakeup is not None:
            try:
                loop.add_reader(self._wakeup, self._hear)
            except NotImplementedError:  # that of Windows
                self._wakeup = None
        self._n_listening += 1
        try:
            yield
        finally:
            self._n_listening -= 1
            if not self._n_listening and self._wakeup is not None:
                loop.remove_reader(self._wakeup)

    def ring(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have `loop` make a call soon; RuntimeError once it is closed."""
        self._calls.append(call)
        if self._is_rung:
            return
        self._is_rung = True
        # What is rung while nobody listens any more is heard once somebody does.
        if self._n_listening and self._wakeup is not None and not loop.is_closed():
            self._wakeup.ring()
            return
        try:
            loop.call_soon_threadsafe(self._answer)
        except RuntimeError:
            self._is_rung = False
            raise

    def _hear(self) -> None:
        assert self._wakeup is not None
        self._wakeup.clear()
        self._answer()

    def _answer(self) -> None:
        # NOTE: before the calls, or one that comes behind them would be heard by nobody.
        self._is_rung = False
        calls: dict[Callable[[], None], None] = {}
        while self._calls:
            calls[self._calls.popleft()] = None
        for call in calls:
            call()
