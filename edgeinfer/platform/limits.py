"""Limits that a process sets itself; the one in which templates run imports this and no more."""

from __future__ import annotations

import mmap
import signal
import sys
import time
from typing import TYPE_CHECKING

from edgeinfer.platform import system_files

if TYPE_CHECKING:
    from edgeinfer.platform import windows


def ended_for_time(status: int) -> bool:
    """Whether a process ran too long, by its exit status: `allow_seconds` or `kill` ended it."""
    if sys.platform == "win32":
        return status in (1, _WINDOWS_QUOTA)
    return -status in (signal.SIGPROF, signal.SIGKILL)


_WINDOWS_QUOTA = 1816


class ProcessLimits:
    """What the system holds this process to: `n_bytes` more memory, and seconds of a processor.

    `ends_loops` is False where the system can't end what runs too long; macOS keeps no limit of
    memory.
    """

    def __init__(self, n_bytes: int) -> None:
        self._job = _job()
        self.ends_loops = self._job is not None or hasattr(signal, "setitimer")
        if self._job is not None:
            self._job.limit(memory=n_bytes + _WINDOWS_BASE)
        if hasattr(signal, "setitimer"):
            # Who started us may have ignored or blocked signals, which a process inherits.
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.signal(signal.SIGVTALRM, _raise_timeout)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF, signal.SIGVTALRM])
        words = (system_files.read("/proc/self/statm") or "").split()
        pages = system_files.number(words[0]) if words else None
        if pages:
            _lower_limit("RLIMIT_AS", pages * mmap.PAGESIZE + n_bytes)
        _lower_limit("RLIMIT_CORE", 0)

    def allow_seconds(self, seconds: float | None) -> None:
        """End the process once it has run this much longer; None takes the limit off.

        TimeoutError comes a little before that, if Python code runs then.
        """
        if self._job is not None:
            self._job.limit(seconds=None if seconds is None else time.process_time() + seconds)
        elif hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_VIRTUAL, _WARNED_SHARE * (seconds or 0))
            signal.setitimer(signal.ITIMER_PROF, seconds or 0)


_WARNED_SHARE = 0.8
_WINDOWS_BASE = 64 << 20  # what Python itself has committed there


def _job() -> windows.Job | None:
    if sys.platform != "win32":
        return None
    from edgeinfer.platform import windows  # and with it ctypes

    return windows.Job.of_this_process()


def _raise_timeout(*_: object) -> None:
    raise TimeoutError("time")


def _lower_limit(name: str, value: int) -> None:
    try:
        import resource

        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (lower, lower))
    except (ImportError, AttributeError, OSError, ValueError):  # not this system's way
        pass
