"""The thread team's Python half: starts workers, runs tapes on them, ends cleanly.

Knows no operation and no model. Workers enter native code once in their life and never touch the
interpreter lock; the thread that calls `run` works with them.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from edgeinfer import platform
from edgeinfer.errors import ClosedError
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.commands import KernelOp, KernelPart
from edgeinfer.kernels.cpu.library import Library

KERNELS = ("team.work", "team.step")
_JOIN_SECONDS = 2.0
_FUTEX_WAKE = 129


def _word(address: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(address)


class Part(NamedTuple):
    """A kernel, its argument words, and how many chunks it has: a number or a layout.COUNT_*."""

    kernel: int
    args: list[int]
    rule: int

    @classmethod
    def of(cls, part: KernelPart, library: Library) -> Part:
        """With addresses for the loaded kernel's name and for buffers, which have memory now."""
        args = [arg.address if isinstance(arg, Buffer) else arg for arg in part.args]
        return cls(library.address(part.kernel), args, part.rule)


class Op(NamedTuple):
    """Parts that may run at the same time, in any order; `plans`: chunks of later ops depend on it.

    What plans has one chunk.
    """

    parts: list[Part]
    plans: bool = False

    @classmethod
    def of(cls, op: KernelOp, library: Library) -> Op:
        return cls([Part.of(part, library) for part in op.parts], op.plans)


class Tape:
    """A list of ops in the memory layout that the team walks (see layout.py)."""

    def __init__(
        self, ops: list[Op], header: int, n_threads: int, prologue: Sequence[Part] = ()
    ) -> None:
        parts = [*(part for op in ops for part in op.parts), *prologue]
        parts_at = layout.TAPE_SLOTS + layout.SLOT_BYTES * len(ops)
        args_at = parts_at + layout.PART_BYTES * len(parts)
        n_bytes = args_at + sum(len(part.args) for part in parts) * layout.WORD
        self._memory = platform.Memory(n_bytes)
        self.address = self._memory.address
        part_address, args_address = self.address + parts_at, self.address + args_at
        part_addresses = []
        self._args: list[int] = []  # where the words of each part are
        for part in parts:
            part_addresses.append(part_address)
            self._args.append(args_address)
            self._write(part_address, [part.kernel, args_address, 0, part.rule])
            self._write(args_address, part.args)
            part_address += layout.PART_BYTES
            args_address += len(part.args) * layout.WORD
        first = 0
        for i, op in enumerate(ops):
            slot = self.address + layout.TAPE_SLOTS + layout.SLOT_BYTES * i
            n_later = _n_planned(ops, i) if op.plans else 0
            self._write(slot + layout.SLOT_PARTS, [part_addresses[first], len(op.parts), n_later])
            first += len(op.parts)
        prologue_address = part_address - layout.PART_BYTES * len(prologue)
        words = [header, len(ops), n_threads, prologue_address, len(prologue)]
        self._write(self.address, words)

    @staticmethod
    def _write(address: int, words: list[int]) -> None:
        (ctypes.c_int64 * len(words)).from_address(address)[:] = words  # type: ignore[assignment]

    def set_word(self, part: int, offset: int, value: int) -> None:
        """Change an argument word of a part, counted over all ops; between steps."""
        self._write(self._args[part] + offset, [value])

    def close(self) -> None:
        """Free the tape; only after `Team.quiesce`."""
        self._memory.close()
        self.address = 0


def _n_planned(ops: list[Op], i: int) -> int:
    """Ops behind one that plans, up to the last that is planned before another plans."""
    n = 0
    for j, op in enumerate(itertools.takewhile(lambda op: not op.plans, ops[i + 1 :]), 1):
        if any(part.rule == layout.COUNT_PLANNED for part in op.parts):
            n = j
    return n


class Team:
    """Worker threads for one process. One tape runs at a time."""

    def __init__(self, library: Library) -> None:
        library.load(KERNELS)
        calls = platform.thread_calls()
        self._memory = platform.Memory(layout.TEAM_BYTES)
        self._base = self._memory.address
        _word(self._base + layout.TEAM_YIELD).value = calls.yield_
        _word(self._base + layout.TEAM_WAIT).value = calls.wait
        _word(self._base + layout.TEAM_FUTEX).value = calls.futex
        _word(self._base + layout.TEAM_SLEEP_ARG).value = calls.sleep_arg
        two_words = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t, ctypes.c_ssize_t)
        self._work = two_words(library.address("team.work"))
        self._step = two_words(library.address("team.step"))
        self._library = library  # owns the code the workers run
        self._workers: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._dead = ""  # why nothing runs any more

    def grow(self, n_threads: int) -> None:
        """Have at least n_threads - 1 workers; the caller of `run` is the remaining thread.

        Fewer where the system gives no more: they do the same work.
        """
        with self._lock:
            self._workers += platform.start_some(
                [
                    threading.Thread(
                        target=self._work,
                        args=(self._base, index),
                        name=f"edgeinfer-worker-{index}",
                        daemon=True,
                    )
                    for index in range(len(self._workers) + 1, n_threads)
                ]
            )

    def run(self, tape: Tape) -> None:
        """Run one step to its end, on this thread and the workers; other threads may use Python."""
        if self._dead:
            raise ClosedError(self._dead)
        with self._lock:
            self._step(self._base, tape.address)

    def run_once(self, ops: list[Op], header: int, n_threads: int) -> float:
        """Run ops that are needed once; the seconds that took."""
        tape = Tape(ops, header, n_threads)
        try:
            start = time.perf_counter()
            self.run(tape)
            return time.perf_counter() - start
        finally:
            self.quiesce()
            tape.close()

    def quiesce(self) -> None:
        """Return once no worker can touch a tape that has run: then it may be freed."""
        with self._lock:
            _word(self._base + layout.TEAM_TAPE).value = 0
            while not self._dead and _word(self._base + layout.TEAM_ACTIVE).value:
                threading.Event().wait(0.0002)

    def close(self) -> None:
        """End the workers; joins with a timeout, so that an exit never hangs."""
        if self._dead:
            return
        self._dead = "this program ends"
        _word(self._base + layout.TEAM_STOP).value = 1
        futex = _word(self._base + layout.TEAM_FUTEX).value
        if futex:
            syscall = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_ssize_t] * 6)
            wake = syscall(_word(self._base + layout.TEAM_WAIT).value)
            wake(futex, self._base + layout.TEAM_EPOCH, _FUTEX_WAKE, 1 << 30, 0, 0)
        for worker in self._workers:
            worker.join(_JOIN_SECONDS)

    def abandon(self) -> None:
        """In a forked child: the workers do not exist there."""
        self._dead = "this process was forked after the model was loaded; load it again"


_teams: dict[int, Team] = {}
_teams_lock = platform.ProcessLock()


def shared_team(library: Library, n_threads: int) -> Team:
    """The team of this process, shared by all models, with room for n_threads."""
    with _teams_lock.own:
        pid = os.getpid()
        team = _teams.get(pid)
        if team is None:
            team = _teams[pid] = Team(library)
            # A team that is made while the interpreter ends is not closed, and its workers run on.
            platform.keep(team)
            _close_at_exit(team)
    team.grow(n_threads)
    return team


def _close_at_exit(team: Team) -> None:
    reference = weakref.ref(team)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    def abandon() -> None:
        alive = reference()
        if alive is not None:
            alive.abandon()

    atexit.register(close)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=abandon)
