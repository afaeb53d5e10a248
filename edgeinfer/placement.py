"""Which layers of a model run on which GPU: as many as were asked for, or as many as fit.

Knows no kernels, and nothing of how memory is obtained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from edgeinfer.backend import Backend
from edgeinfer.balance import balanced
from edgeinfer.chain import ChainBackend, Stretch
from edgeinfer.device import Device
from edgeinfer.engine.memory_plan import MemoryPlan, PlanRequest, solve
from edgeinfer.errors import (
    DeviceError,
    EdgeInferError,
    Keyword,
    PlanError,
    UnsupportedModelError,
)
from edgeinfer.graph import Segment
from edgeinfer.load_settings import LoadSettings


class Placement(NamedTuple):
    """The machine, or machines, that a model is compiled for; `n_gpu_layers` are the last ones."""

    backend: Backend
    plan: MemoryPlan
    n_gpu_layers: int


def place(
    segment: Segment,
    choices: Iterable[Sequence[Backend]],
    open_cpu: Callable[[], Backend],
    n_gpu_layers: int | None,
    request: PlanRequest,
    leave: Callable[[], object] = lambda: None,
) -> Placement:
    """`n_gpu_layers` on GPUs, -1 being all, or for None as many as fit beside the usual context.

    Of the `choices` of GPUs the first is taken that holds them beside that context, else the last;
    the layers of several are split by their free memory, in their order. PlanError where what was
    asked for does not fit. Before all layers go to the processors `leave` is called, which raises
    where a GPU was asked for.
    """
    n_layers = segment.graph.hparams.n_layers
    is_whole = n_gpu_layers is None or n_gpu_layers < 0
    n_asked = n_layers if n_gpu_layers is None or is_whole else min(n_gpu_layers, n_layers)
    shorter, error, gpus = None, None, list[Backend]()

    def placed(n: int) -> Placement:
        backend = _backend(segment, gpus, open_cpu, n, request)
        return Placement(backend, solve(segment, backend, request), n)

    for choice in choices:
        gpus = list(choice)
        try:
            found = placed(n_asked)
        except PlanError as short:
            error = short
            continue
        if not found.plan.note:
            return found
        shorter = found
    if n_gpu_layers is None:
        if best := _most(placed, n_layers) or shorter:
            return best
        leave()
        return placed(0)
    if shorter is None:
        assert error is not None, "there are choices"
        raise error
    return shorter


def _backend(
    segment: Segment,
    gpus: Sequence[Backend],
    open_cpu: Callable[[], Backend],
    n_gpu_layers: int,
    request: PlanRequest,
) -> Backend:
    """The processors for the first layers, GPUs for the last ones."""
    n_cpu = segment.graph.hparams.n_layers - n_gpu_layers
    cpus = [open_cpu()] if n_cpu else []
    stretches = [Stretch(0, cpu) for cpu in cpus]
    if n_gpu_layers:
        on_gpus = segment.cut(n_cpu)[1] if n_cpu else segment
        stretches += balanced(on_gpus, n_cpu, gpus, cpus, request)
    return stretches[0].backend if len(stretches) == 1 else ChainBackend(stretches)


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


def gpus_in_turn(
    settings: LoadSettings, opened: Callable[[Device], Backend], notes: list[str]
) -> Iterator[Sequence[Backend]]:
    """Which GPUs may have layers, the first choice first; `notes` tell of what can't be opened."""
    devices = settings.device, *settings.further
    if not settings.further_if_needed:
        yield [opened(device) for device in devices]
        return
    gpus, errors = list[Backend](), list[EdgeInferError]()
    for device in devices:
        try:
            gpus.append(opened(device))
        except (DeviceError, PlanError) as error:
            errors.append(error)
            notes.append(f"{device} is not used: {error}")
            continue
        yield gpus[-1:]
    if not gpus:
        raise errors[0]
    yield from (gpus[:n] for n in range(2, len(gpus) + 1))


def without_layers(settings: LoadSettings) -> str:
    """Why no GPU is used where none has room for a layer; PlanError where one was asked for."""
    found = f"not one layer fits into the free memory of {settings.device}"
    if settings.may_leave_gpu:
        return f"no GPU is used: {found}"
    raise PlanError(
        found,
        advice=(
            "make room there, give a smaller ",
            Keyword("n_ctx"),
            ", or use ",
            Keyword("device", "cpu"),
        ),
        memory=str(settings.device),
    )
