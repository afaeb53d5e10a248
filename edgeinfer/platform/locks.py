"""Locks of the process that takes them: a child of a fork finds them open."""

from __future__ import annotations

import os
import threading


class ProcessLock:
    """`with` it as a `threading.Lock`; one that another thread held at a fork is free in the child.

    That thread does not exist there, and would never release it.
    """

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}

    def __enter__(self) -> None:
        self._locks.setdefault(os.getpid(), threading.Lock()).acquire()

    def __exit__(self, *error: object) -> None:
        self._locks[os.getpid()].release()
