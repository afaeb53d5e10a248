"""Every byte a model will take, reckoned and made to fit before anything is allocated.

Knows nothing of how memory is obtained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgeinfer.backend import Backend
from edgeinfer.batch import PAGE, Demand, StepLimits, StepRequest
from edgeinfer.errors import Advice, Keyword, PlanError
from edgeinfer.graph import Segment

DEFAULT_N_CTX = 8192
_LEAST_N_CTX = 512  # what a default is lowered to before a model is refused
_MiB = 1 << 20
_BUILDING = "building kernels, once"

# Measured on x86-64 Linux, Python 3.11: interpreter, NumPy, the tokenizer library, and LLVM
# where it has to link or to be asked.
PYTHON_BYTES = 90 * _MiB
_TEMPLATES_BYTES = 22 * _MiB  # the process that renders chat templates, with one of them
_TOKEN_BYTES = 700  # of a vocabulary entry while the tokenizer is built


class MemoryPlan(NamedTuple):
    """Bytes by purpose, and the settings they were solved for."""

    rows: dict[str, int]
    available: int
    n_ctx: int
    slots: int
    limits: StepLimits
    note: str  # why n_ctx is not the usual one, "" if it is

    @property
    def total_bytes(self) -> int:
        return sum(self.rows.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available


class PlanRequest(NamedTuple):
    """What a plan is solved for; `n_ctx` None asks for the usual length or what fits."""

    n_ctx: int | None
    slots: int
    n_threads: int
    available: int


def solve(segment: Segment, backend: Backend, request: PlanRequest) -> MemoryPlan:
    """The plan that fits; PlanError says what would."""

    def plan(n_ctx: int, note: str = "") -> MemoryPlan:
        step = StepRequest(n_ctx, request.slots, request.n_threads)
        demand = backend.demand(segment, step)
        rows = _rows(demand, segment.graph.hparams.vocab_size)
        return MemoryPlan(rows, request.available, n_ctx, request.slots, demand.limits, note)

    if request.n_ctx is not None:
        asked = plan(request.n_ctx)
        if not asked.fits:
            raise _too_large(plan, asked)
        return asked
    n_ctx = usual = min(segment.graph.hparams.n_ctx_train, DEFAULT_N_CTX)
    note = ""
    while not (found := plan(n_ctx, note)).fits:
        n_ctx = n_ctx // 2 // PAGE * PAGE
        note = f"memory is short: {usual} would be usual"
        if n_ctx < min(usual, _LEAST_N_CTX):
            raise _too_large(plan, found)
    return found


def _rows(demand: Demand, vocab_size: int) -> dict[str, int]:
    rows = {
        **demand.rows,
        "tokenizer": vocab_size * _TOKEN_BYTES,
        "Python": PYTHON_BYTES,
        "chat templates": _TEMPLATES_BYTES,
    }
    # Builders have ended before weights are packed: only what they take beyond that counts.
    if (excess := demand.building_bytes + PYTHON_BYTES - sum(rows.values())) > 0:
        rows[_BUILDING] = excess
    return rows


def _too_large(solved: Callable[[int], MemoryPlan], plan: MemoryPlan) -> PlanError:
    fits = None
    n_ctx = plan.n_ctx
    while n_ctx > PAGE and fits is None:
        n_ctx = n_ctx // 2 // PAGE * PAGE
        if n_ctx and solved(n_ctx).fits:
            fits = n_ctx
    largest = max(plan.rows, key=lambda row: plan.rows[row])
    advice: Advice = ("no context length would fit; take a smaller file",)
    if largest == _BUILDING:
        advice = (
            "give it that once: `edgeinfer warmup` builds the kernels that later starts take",
        )
    elif fits is not None:
        advice = (Keyword("n_ctx", fits), " would fit")
    slots = f" in {plan.slots} slots" if plan.slots > 1 else ""
    return PlanError(
        f"the model needs {plan.total_bytes // _MiB} MiB for {plan.n_ctx} tokens of context{slots},"
        f" {plan.available // _MiB} MiB are available (most of it is {largest}, "
        f"{plan.rows[largest] // _MiB} MiB)",
        advice=advice,
        needed=plan.total_bytes,
        available=plan.available,
        n_ctx=fits,
    )
