"""A decode step's matmuls in every schedule that it might run, to be timed. Knows no policy.

They read the weights that a step reads, on a header and into memory of their own: what the last
step left stays as it is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.commands import KernelOp, KernelPart, recut
from edgeinfer.kernels.cpu.team import Tape, Team
from edgeinfer.kernels.cpu.tune import Schedule

MakeTape: TypeAlias = Callable[[Sequence[KernelOp], int, int], Tape]  # ops, header, n_threads


class Trial:
    """What `tune.Tuning` measures for one program."""

    def __init__(self, team: Team, ops: Sequence[KernelOp], make_tape: MakeTape) -> None:
        self._team, self._make_tape = team, make_tape
        self._ops = _first([op for op in ops if op.reads_weights])
        self._header = np.zeros(layout.HEADER_WORDS, np.int64)
        for word in (layout.H_ROWS, layout.H_WANTED_ROWS):
            self._header[word // layout.WORD] = 1
        self._tapes: dict[Schedule, Tape] = {}
        n_bytes = max((sum(map(_out_bytes, op.parts)) for op in self._ops), default=0)
        self._out = np.empty(n_bytes, np.uint8)

    @property
    def key(self) -> str:
        """The same for models whose matmuls are alike."""
        facts = [
            (part.kernel, part.args[-1], part.weight_bytes) for op in self._ops for part in op.parts
        ]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def allow(self) -> None:
        """Runs may go on from here, until the next `interrupt`."""
        self._header[_ABORT] = 0

    def interrupt(self) -> None:
        """Cut a run short, from any thread."""
        self._header[_ABORT] = 1

    def run(self, schedule: Schedule) -> float | None:
        """Seconds of a step, None where it was cut short."""
        if schedule not in self._tapes:
            ops = [self._apart(recut(op, *schedule)) for op in self._ops]
            header, n_threads = self._header.ctypes.data, schedule.n_threads
            self._tapes[schedule] = self._make_tape(ops, header, n_threads)
        begun = time.perf_counter()
        self._team.run(self._tapes[schedule])
        seconds = time.perf_counter() - begun
        return None if self._header[_ABORT] else seconds

    def _apart(self, op: KernelOp) -> KernelOp:
        """The same, but what it leaves goes to our own memory."""
        parts, out = [], self._out.ctypes.data
        for part in op.parts:
            args = list(part.args)
            args[layout.MATMUL_OUT // layout.WORD] = out
            args[layout.MATMUL_RESIDUAL // layout.WORD] = 0
            parts.append(part._replace(args=args))
            out += _out_bytes(part)
        return KernelOp(op.group, parts)

    def close(self) -> None:
        """Free the tapes; only after `Team.quiesce`."""
        for tape in self._tapes.values():
            tape.close()
        self._tapes.clear()


def _out_bytes(part: KernelPart) -> int:
    """Of one row: 8 floats for each of the groups that its last bound counts."""
    n_groups = part.args[-1]
    assert isinstance(n_groups, int)
    return 32 * n_groups


_ABORT = layout.H_ABORT // layout.WORD
_ENOUGH = 512 << 20  # bytes of weights, more than any cache holds; layers are alike


def _first(ops: Sequence[KernelOp]) -> list[KernelOp]:
    """As many as read enough."""
    chosen, n_bytes = [], 0
    for op in ops:
        if n_bytes < _ENOUGH:
            chosen.append(op)
            n_bytes += sum(part.weight_bytes for part in op.parts)
    return chosen
