"""Locks of the process that takes them: a child of a fork finds them open."""

from __future__ import annotations

import os
import threading


class ProcessLock:
    """`with` its `own`; one that another thread held at a fork is free in the child.

    That thread does not exist there, and would never release it.
    """

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}

    @property
    def own(self) -> threading.Lock:
        """That of this process.

        Python's: in methods of ours that take and release it an interrupt might leave it taken.
        """
        return self._locks.setdefault(os.getpid(), threading.Lock())
