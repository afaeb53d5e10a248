"""Fast numerics: near exact ones of the same device, and the same bits in steps of any size.

Judged by tolerance: their bits are those of a kind of GPU, which no hash is known of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.backend import Backend, RunsOnGpu
from edgeinfer.graph import Segment
from edgeinfer.selftest import numerics, tiny
from edgeinfer.selftest.cases import Rows, Sequences, limits, logits

if TYPE_CHECKING:
    from edgeinfer.selftest.run import Run

# Nats between two choices of a token. Halves alone make 1e-6 of it; products of blocks, which round
# to 8 bits, make 1e-4 of any change.
MOST_DIVERGENCE = 1e-3
_AT_ONCE, _IN_PARTS = (40, 40, 40), (1, 7, 32, 17, 23, 40)  # rows of steps
_CASES = (
    "attention 0", "attention 1", "attention 2", "matrix F16 33x100", "matrix BF16 100x7",
    "llama F16",
)  # fmt: skip


def cases() -> dict[str, Callable[[], Segment]]:
    """Models with all that is fast, by name."""
    every = (*numerics.cases(), *tiny.cases())
    return {case.name: case.segment for case in every if case.name in _CASES}


def compare(run: Run, end: float) -> dict[str, Any]:
    """Each case by itself; nothing where the device has no fast numerics."""
    exact = run.backend
    fast = exact.with_numerics("fast") if isinstance(exact, RunsOnGpu) else exact
    if not isinstance(fast, RunsOnGpu) or fast.numerics != "fast":
        return {"state": "skipped", "why": "it has exact numerics alone"}
    found: dict[str, Any] = {"cases": 0, "differ": [], "failed": [], "left_out": []}
    for name, segment in cases().items():
        if time.monotonic() >= end:
            found["left_out"].append(name)
            continue
        compared = run.attempt(name, partial(_compare, exact, fast, segment()))
        if "state" in compared:
            found["failed"].append({"case": name, "why": compared["why"]})
            continue
        found["cases"] += 1
        for why in _objections(**compared):
            found["differ"].append({"case": name, "what": "fast", "why": why})
            run.tell(f"{name}, fast: {why}")
        found["divergence"] = max(compared["divergence"], found.get("divergence", 0.0))
    states = (("failed", "failed"), ("differ", "differs"), ("left_out", "cut"))
    return {**found, "state": next((state for key, state in states if found[key]), "ok")}


def _compare(exact: Backend, fast: Backend, segment: Segment) -> dict[str, Any]:
    expected = _logits(exact, segment, _AT_ONCE)
    whole, parts = (_logits(fast, segment, rows) for rows in (_AT_ONCE, _IN_PARTS))
    n_other = int((whole.view(np.uint32) != parts.view(np.uint32)).sum())
    return {"divergence": divergence(expected, whole), "n_other": n_other}


def _objections(divergence: float, n_other: int) -> Iterator[str]:
    if not divergence <= MOST_DIVERGENCE:
        yield f"{divergence:.2g} nats from exact numerics, {MOST_DIVERGENCE} at most"
    if n_other:
        yield f"{n_other} logits depend on how many rows share a step"


def _logits(backend: Backend, segment: Segment, n_rows: tuple[int, ...]) -> NDArray[np.float32]:
    """Of a sequence, in steps of so many rows."""
    steps, program = Sequences(segment), backend.compile(segment, limits(segment))
    firsts = np.cumsum((0, *n_rows)).tolist()
    try:
        batches = (steps.step(Rows(0, *each)) for each in zip(firsts, n_rows, strict=False))
        return logits(program, *batches)
    finally:
        program.close()


def divergence(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    """The largest Kullback-Leibler divergence, in nats, of rows of logits q from p."""
    log_p, log_q = (
        x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        for x in (y.astype(np.float64) - y.max(axis=1, keepdims=True) for y in (p, q))
    )
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).max())
