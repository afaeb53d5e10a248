"""Which layers of a model run on a GPU: as many as were asked for, or as many as fit.

Knows no kernels, and nothing of how memory is obtained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgeinfer.backend import Backend
from edgeinfer.chain import ChainBackend, Stretch
from edgeinfer.engine.memory_plan import MemoryPlan, PlanRequest, solve
from edgeinfer.errors import PlanError, UnsupportedModelError
from edgeinfer.graph import Segment


class Placement(NamedTuple):
    """The machine, or machines, that a model is compiled for; `n_gpu_layers` are the last ones."""

    backend: Backend
    plan: MemoryPlan
    n_gpu_layers: int


def place(
    segment: Segment,
    gpu: Backend,
    open_cpu: Callable[[], Backend],
    n_gpu_layers: int | None,
    request: PlanRequest,
) -> Placement:
    """`n_gpu_layers` on the GPU, -1 being all, or for None as many as fit beside the usual context.

    PlanError where what was asked for does not fit.
    """
    n_layers = segment.graph.hparams.n_layers

    def placed(n: int) -> Placement:
        backend = _backend(gpu, open_cpu, n_layers - n, n)
        return Placement(backend, solve(segment, backend, request), n)

    if n_gpu_layers is not None:
        return placed(n_layers if n_gpu_layers < 0 else min(n_gpu_layers, n_layers))
    try:
        whole = placed(n_layers)
    except PlanError:
        whole = None
    if whole is not None and not whole.plan.note:
        return whole
    return _most(placed, n_layers) or whole or placed(0)


def _backend(gpu: Backend, open_cpu: Callable[[], Backend], n_cpu: int, n_gpu: int) -> Backend:
    if not n_cpu:
        return gpu
    if not n_gpu:
        return open_cpu()
    return ChainBackend([Stretch(0, open_cpu()), Stretch(n_cpu, gpu)])


def _most(placed: Callable[[int], Placement], n_layers: int) -> Placement | None:
    """The largest part that fits beside the usual context, None where not one layer does."""
    best, low, high = None, 1, n_layers - 1
    while low <= high:
        middle = (low + high + 1) // 2
        try:
            found = placed(middle)
        except (PlanError, UnsupportedModelError):  # too large, or it can't be split there
            high = middle - 1
            continue
        if found.plan.note:
            high = middle - 1
        else:
            best, low = found, middle + 1
    return best
