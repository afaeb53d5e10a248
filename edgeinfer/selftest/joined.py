"""Launches of a step of one row that become one kernel: which cases have them, and what it gains.

Knows nothing of how they are joined.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from statistics import median
from typing import Any

from edgeinfer import quant
from edgeinfer.backend import Program, RunsOnGpu
from edgeinfer.batch import Batch
from edgeinfer.graph import Hparams, Segment
from edgeinfer.models import llama
from edgeinfer.selftest import tiny
from edgeinfer.selftest.cases import Case, Rows, Sequences, limits
from edgeinfer.selftest.made_up import MadeUp

_CASES = ("llama Q4_0", "llama Q4_K", "gemma3 Q8_0")
_WARM_UP, _MEASURED = 4, 41  # steps


def cases() -> list[Case]:
    return [case for case in tiny.cases() if case.name in _CASES]


def measure(
    apart: RunsOnGpu, joined: RunsOnGpu, layers: int = 16, dim: int = 2048
) -> dict[str, Any]:
    """Microseconds of a device for a step of one row, of a model as large as Llama 3.2 1B.

    Launches apart, joined, and both once more: what differs between turns is noise.
    """
    segment = model(layers, dim)
    took: dict[str, list[float]] = {"apart_us": [], "joined_us": []}
    for _ in range(2):
        for name, backend in zip(took, (apart, joined), strict=True):
            with closing(backend.compile(segment, limits(segment))) as program:
                seconds = _step_seconds(backend, program, segment)
                took[name].append(float(f"{1e6 * seconds:.4g}"))
    return took


def model(layers: int, dim: int) -> Segment:
    numbers = {
        "attention.head_count": dim // 64,
        "attention.head_count_kv": max(1, dim // 256),
        "feed_forward_length": 4 * dim,
    }
    hparams = Hparams("llama", layers, dim, 32000, 4096)
    graph = MadeUp(hparams, numbers, lambda name: quant.Q4_K, is_large=True)
    llama.forward(graph)
    return graph.segment()


def _step_seconds(backend: RunsOnGpu, program: Program, segment: Segment) -> float:
    """Of the median step, each of another position: none is begun ahead of its time."""
    step = Sequences(segment).step
    return median(
        [
            _seconds(backend, program.submit, step(Rows(0, (2 * i) % 96, 1)))
            for i in range(_WARM_UP + _MEASURED)
        ][_WARM_UP:]
    )


def _seconds(backend: RunsOnGpu, submit: Callable[[Batch], Any], batch: Batch) -> float:
    begin = backend.device.mark()
    ticket = submit(batch)
    end = backend.device.mark()
    ticket.wait()
    end.wait()
    return end.seconds_since(begin)
