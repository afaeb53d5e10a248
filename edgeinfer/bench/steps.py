"""How long single steps take, as a whole by rows and depth, and op by op.

Knows nothing of requests; nothing else may run on the model meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgeinfer.backend import ReadsMemory, TimesOps
from edgeinfer.batch import Batch, OpTime
from edgeinfer.bench.speed import Tell, check_room, quiet
from edgeinfer.engine.cache import PagePool, SequenceCache
from edgeinfer.errors import BusyError, DeviceError, Keyword
from edgeinfer.runtime import Runtime
from edgeinfer.sampling.params import SampleTable, SamplingParams

SWEEP_ROWS = (1, 2, 4, 8)
_SWEEP_DEPTHS = (0, 512, 2048, 8192, 32768)
_READS = 7


@dataclass(frozen=True, slots=True)
class SweepRow:
    """Seconds of a step that adds `rows` rows to a sequence of `depth` tokens."""

    threads: int | None  # where the device has a number of them
    depth: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OpRow:
    """The ops of one kind in a step, `n` of them; 0 where an op reads or multiplies nothing."""

    op: str
    kernels: str
    n: int
    seconds: float
    share: float  # of the step
    gb_s: float
    read_fraction: float  # of the bandwidth that reading alone reaches
    gmac_s: float


def sweep(runtime: Runtime, repeat: int, tell: Tell = quiet) -> list[SweepRow]:
    """Every depth that the context holds, with few and many rows."""
    deepest = runtime.engine.n_ctx - max(SWEEP_ROWS)
    n_threads = runtime.program.describe().get("threads")
    return [
        SweepRow(n_threads, depth, rows, seconds)
        for depth in _SWEEP_DEPTHS
        if depth <= deepest
        for rows, seconds in step_seconds(runtime, SWEEP_ROWS, depth, repeat, tell).items()
    ]


def sweep_threads(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i <= most)})


def step_seconds(
    runtime: Runtime, rows: Iterable[int], depth: int, repeat: int, tell: Tell = quiet
) -> dict[int, float]:
    """Median seconds of a step that adds so many rows to one sequence and samples each."""
    params, counts = SamplingParams(temperature=0.0, seed=1), list(rows)
    cache, table = _filled(runtime, depth, max(counts), tell), SampleTable(max(counts))
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    for turn in range(repeat):
        tell("steps", turn, repeat)
        for n in counts:
            for i in range(n):
                table.set_row(i, params, 1, i)
            table.n_rows = n
            begun = time.perf_counter()
            runtime.program.submit(_rows(cache, depth, n, table)).wait()
            seconds[n].append(time.perf_counter() - begun)
    return {n: statistics.median(each) for n, each in seconds.items()}


def time_ops(
    runtime: Runtime, n_rows: int, depth: int, repeat: int, tell: Tell = quiet
) -> list[OpRow]:
    """One step op by op, ops of a kind together, in the order of the step."""
    program = runtime.program
    if not isinstance(program, TimesOps) or not isinstance(program, ReadsMemory):
        raise DeviceError(
            f"the {runtime.device} device does not run op by op",
            advice=("use ", Keyword("device", "cpu")),
        )
    check_room(depth, 1, runtime.engine.n_ctx)
    n_rows = min(n_rows, runtime.engine.limits.max_rows, runtime.engine.n_ctx - depth)
    cache = _filled(runtime, depth, n_rows, tell)
    runs, reads = [], []
    for turn in range(repeat):
        tell("steps", turn, repeat)
        runs.append(program.op_seconds(_rows(cache, depth, n_rows, None)))
        reads += [program.read_bandwidth() for _ in range(_READS)]
    return group_ops(runs, statistics.median(reads))


def group_ops(runs: list[list[OpTime]], read_bandwidth: float) -> list[OpRow]:
    """Ops of one name as one row, each op's time being the median of its runs."""
    grouped: dict[str, list[tuple[OpTime, float]]] = {}
    for op, *others in zip(*runs, strict=True):
        middle = statistics.median([op.seconds, *(other.seconds for other in others)])
        grouped.setdefault(op.name, []).append((op, middle))
    total = sum(seconds for ops in grouped.values() for _, seconds in ops)
    rows = []
    for name, ops in grouped.items():
        seconds = sum(each for _, each in ops)
        per_second = sum(op.weight_bytes for op, _ in ops) / seconds
        kernels = dict.fromkeys(kernel for op, _ in ops for kernel in op.kernels)
        gmac_s = sum(op.macs for op, _ in ops) / seconds / 1e9
        rows.append(
            OpRow(
                name, " ".join(kernels), len(ops), seconds, seconds / total, per_second / 1e9,
                per_second / read_bandwidth, gmac_s,
            )
        )  # fmt: skip
    return rows


def _filled(runtime: Runtime, depth: int, n_more: int, tell: Tell) -> SequenceCache:
    """A sequence of `depth` tokens with room for more, in place of all that is kept of others.

    BusyError where an answer runs, or is paused: it would lose what it holds.
    """
    engine, program = runtime.engine, runtime.program
    if not engine.forget():
        raise BusyError("answers that have not ended hold what is measured in; end them first")
    limits = engine.limits
    pools = [PagePool(n_pages) for n_pages in limits.n_pages.values()]
    cache = SequenceCache(pools, engine.layout("error"))
    cache.grow(depth + n_more)
    most = limits.max_rows
    for start in range(0, depth, most):
        tell("depth", start, depth)
        program.submit(_rows(cache, start, min(most, depth - start), None)).wait()
    return cache


def _rows(cache: SequenceCache, start: int, n: int, samples: SampleTable | None) -> Batch:
    """A step of `n` rows of one sequence; without samples only the last row's logits.

    What is in the state that it goes on from has no part in its time: it is always the same slot's.
    """
    wanted = range(n) if samples is not None else [n - 1]
    kept = np.full(n, -1, np.int32)
    kept[-1] = 1
    return Batch(
        ids=np.arange(start, start + n, dtype=np.int32) % 97,
        pos=np.arange(start, start + n, dtype=np.int64),
        seq=np.zeros(n, np.int32),
        tables=[cache.tables],
        wanted=np.array(wanted, np.int32),
        output="logits" if samples is None else "ids",
        samples=samples,
        states=np.array([0 if start else -1], np.int32),
        kept=kept,
    )
