"""How engines' threads wake up whoever reads answers in the event loop: all of a step at once.

To wake the loop takes the system some 10 us, more than all else that a token costs to send.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Doorbell:
    """Calls from other threads, made in the loop in the order of `ring`, equal ones once."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._is_rung = False

    def ring(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have `loop`, always the same one, make a call soon; RuntimeError once it is closed."""
        self._calls.append(call)
        if not self._is_rung:
            self._is_rung = True
            try:
                loop.call_soon_threadsafe(self._answer)
            except RuntimeError:
                self._is_rung = False
                raise

    def _answer(self) -> None:
        # NOTE: before the calls, or one that comes behind them would be heard by nobody.
        self._is_rung = False
        calls: dict[Callable[[], None], None] = {}
        while self._calls:
            calls[self._calls.popleft()] = None
        for call in calls:
            call()
