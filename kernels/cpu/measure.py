"""How fast a program's weights are read, and how long each op of a step takes; for benchmarks.

`at` is the address of a step's header, and the number of threads.
"""

from __future__ import annotations

import ctypes

import numpy as np

from edgeinfer.batch import Batch, OpTime
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.commands import KernelOp, Lowered
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.team import Op, Part, Team
from edgeinfer.kernels.cpu.weights import PackedWeights

_READ_CHUNK = 256 << 10
_STARTS = 9  # of an empty op, to know what starting one costs
_LEAST_SECONDS = 1e-7  # of an op: less is not measured


def read_bandwidth(
    weights: PackedWeights, library: Library, team: Team, at: tuple[int, int]
) -> float:
    """Bytes per second at which a team reads weights once, doing nothing else."""
    n_chunks = -(-weights.n_bytes // _READ_CHUNK)
    sink = np.zeros(1, np.int64)
    args = [weights.address, weights.n_bytes // 64 * 64, _READ_CHUNK, sink.ctypes.data]
    part = Part(library.address("read"), args, n_chunks)
    return weights.n_bytes / team.run_once([Op([part])], *at)


def op_seconds(
    lowered: Lowered, batch: Batch, library: Library, team: Team, at: tuple[int, int]
) -> list[OpTime]:
    """The ops of a step that was submitted, each timed by itself, less what starting any costs."""
    import statistics  # 5 ms that starts don't need

    if lowered.prologue:  # as an op of its own: it plans the attention of this step
        team.run_once([Op.of(KernelOp("plan", lowered.prologue), library)], *at)
    starting = statistics.median(team.run_once([], *at) for _ in range(_STARTS))
    times = []
    for op in lowered.ops:
        alone = Op.of(op, library)
        if not op.plans:
            alone = Op([part._replace(rule=_planned(part)) for part in alone.parts])
        seconds = max(team.run_once([alone], *at) - starting, _LEAST_SECONDS)
        times.append(_op_time(op, batch, seconds))
    return times


def _op_time(op: KernelOp, batch: Batch, seconds: float) -> OpTime:
    macs = 0
    for part in op.parts:
        is_wanted = part.rows == layout.WANTED_ROWS
        macs += part.macs * (len(batch.wanted) if is_wanted else batch.n_rows)
    kernels = tuple(dict.fromkeys(part.kernel for part in op.parts))
    return OpTime(op.group, kernels, seconds, sum(part.weight_bytes for part in op.parts), macs)


def _planned(part: Part) -> int:
    """The rule of a part, or how many chunks it has by the plan that was made last."""
    if part.rule != layout.COUNT_PLANNED:
        return part.rule
    plan, per_item = part.args[:2]
    return ctypes.c_int64.from_address(plan).value * per_item
