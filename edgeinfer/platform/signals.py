"""Signals: those that end a program, and the one that stops it until its shell goes on with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNAL_CODE = 128  # plus its number: how a program exits that a signal has ended
_GRACE_SECONDS = 5.0
_WAKE_SECONDS = 0.05
_ENDS = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGBREAK")


def ending_signals() -> list[int]:
    """Those that ask a program to end, but for what whoever started this one wants ignored."""
    numbers = (getattr(signal, name, None) for name in _ENDS)
    return [n for n in numbers if n is not None and signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def signals_exit() -> Iterator[None]:
    """While inside, in the main thread, what ends programs is SystemExit: what is open is closed.

    Only once: a second signal of the same kind ends the program at once. Interrupts are not meant.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(SIGNAL_CODE + number)

    with signals_handled([n for n in ending_signals() if n != signal.SIGINT], leave):
        yield


@contextmanager
def signals_call(end: Callable[[int], None], give_up: Callable[[], None]) -> Iterator[None]:
    """While inside, a signal that ends programs calls `end`, which only asks for the end.

    Who needs longer than some seconds for that, or gets a second signal, ends at once, after
    `give_up`. Both are called in a thread of their own: the main one may wait for anything.
    """
    from queue import Empty, SimpleQueue  # 0.7 ms that other commands don't need

    # What a handler interrupts may hold any lock, but for this queue's, which has none.
    numbers: SimpleQueue[int | None] = SimpleQueue()

    def listen() -> None:
        number = numbers.get()
        if number is None:
            return
        end(number)
        with suppress(Empty):
            if numbers.get(timeout=_GRACE_SECONDS) is None:
                return
        with suppress(Exception):
            give_up()
        os._exit(SIGNAL_CODE + number)

    listener = threading.Thread(target=listen, name="edgeinfer-signals", daemon=True)
    listener.start()
    with signals_handled(ending_signals(), lambda number, frame: numbers.put(number)):
        try:
            yield
        finally:
            numbers.put(None)


@contextmanager
def signals_handled(
    numbers: Sequence[int], handler: Callable[[int, FrameType | None], Any] | signal.Handlers
) -> Iterator[None]:
    """A handler while inside; none in another thread than the main one, which can't have any."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def stop_for_shell(
    terminal: int, is_ending: Callable[[], bool], *, now: bool, group: bool = False
) -> bool:
    """Stop like any program at Ctrl-Z; True once the shell goes on with it in the foreground.

    Unless it is to stop `now`, it only waits where it runs in the background; with `group` all
    that was started together stops. In the main thread only; True at once where no shell could go
    on with it, or the system has no such thing. False where it `is_ending` in the background: the
    terminal's modes are another program's, and touching them would stop it.
    """
    if not hasattr(signal, "SIGTSTP"):
        return True
    with signals_handled((signal.SIGTSTP, signal.SIGCONT), signal.SIG_DFL):
        if now:
            os.kill(0 if group else os.getpid(), signal.SIGTSTP)
        # Not to stop again after `bg`: it might be after the `fg` that follows.
        while not _is_in_front(terminal):
            time.sleep(_WAKE_SECONDS)
            if is_ending():
                signal.signal(signal.SIGTTOU, signal.SIG_IGN)
                return False
    return True


def _is_in_front(terminal: int) -> bool:
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:  # it is gone
        return True
