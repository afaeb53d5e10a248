"""Every byte a model will take, reckoned and made to fit before anything is allocated.

Knows nothing of how memory is obtained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgeinfer.batch import PAGE, StepLimits
from edgeinfer.engine.cache import pages_for
from edgeinfer.errors import PlanError
from edgeinfer.graph import Attention, Embed, Linear, Segment
from edgeinfer.quant import Weight

DEFAULT_N_CTX = 8192
_LEAST_N_CTX = 512  # what a default is lowered to before a model is refused
_MAX_ROWS = 256
_MIN_SEQUENCES = 8
_LOGITS_BYTES = 32 << 20
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
    cache_bytes: int  # of K and V, all layers, per position
    packed_bytes: Callable[[Weight], int]
    building_bytes: int = 0  # of processes that build kernels first


def solve(segment: Segment, request: PlanRequest) -> MemoryPlan:
    """The plan that fits; PlanError says what would."""
    trained = segment.graph.hparams.n_ctx_train
    if request.n_ctx is not None:
        plan = _plan(segment, request, request.n_ctx, "")
        if not plan.fits:
            raise _too_large(segment, request, plan)
        return plan
    usual = min(trained, DEFAULT_N_CTX)
    n_ctx, note = usual, ""
    while not (plan := _plan(segment, request, n_ctx, note)).fits:
        n_ctx = n_ctx // 2 // PAGE * PAGE
        note = f"memory is short: {usual} would be usual"
        if n_ctx < min(usual, _LEAST_N_CTX):
            raise _too_large(segment, request, plan)
    return plan


def _plan(segment: Segment, request: PlanRequest, n_ctx: int, note: str) -> MemoryPlan:
    vocab = segment.graph.hparams.vocab_size
    # Each may decode, so a step has a row for every one of them.
    n_sequences = min(max(_MIN_SEQUENCES, request.slots), _MAX_ROWS)
    limits = StepLimits(
        n_pages=request.slots * pages_for(n_ctx),
        max_rows=_MAX_ROWS,
        max_outputs=min(_MAX_ROWS, max(n_sequences, _LOGITS_BYTES // (4 * vocab))),
        max_sequences=n_sequences,
        n_threads=request.n_threads,
    )
    rows = _weight_bytes(segment, request.packed_bytes)
    rows["KV cache"] = limits.n_pages * PAGE * request.cache_bytes
    rows["scratch"] = _scratch_bytes(segment, limits)
    rows["tokenizer"] = vocab * _TOKEN_BYTES
    rows["Python"] = PYTHON_BYTES
    rows["chat templates"] = _TEMPLATES_BYTES
    # Builders have ended before weights are packed: only what they take beyond that counts.
    if (excess := request.building_bytes + PYTHON_BYTES - sum(rows.values())) > 0:
        rows[_BUILDING] = excess
    return MemoryPlan(rows, request.available, n_ctx, request.slots, limits, note)


def _weight_bytes(segment: Segment, packed_bytes: Callable[[Weight], int]) -> dict[str, int]:
    matrices = {op.weight.name: op.weight for op in segment.ops if isinstance(op, (Embed, Linear))}
    rows: dict[str, int] = {}
    for weight in matrices.values():
        purpose = f"weights {weight.type.name}"
        rows[purpose] = rows.get(purpose, 0) + packed_bytes(weight)
    return rows


def _scratch_bytes(segment: Segment, limits: StepLimits) -> int:
    """Activations of a step, its logits, and what sampling them takes."""
    hp = segment.graph.hparams
    attentions = [op.q.dim for op in segment.ops if isinstance(op, Attention)]
    layers = [op.out.dim for op in segment.ops if 0 <= op.layer < hp.n_layers]
    widths = 4 * hp.dim + 3 * max(layers, default=0) + 4 * max(attentions, default=0)
    activations = 6 * limits.max_rows * widths
    logits = 4 * limits.max_outputs * hp.vocab_size
    return activations + logits + 16 * limits.max_sequences * hp.vocab_size


def _too_large(segment: Segment, request: PlanRequest, plan: MemoryPlan) -> PlanError:
    fits = None
    n_ctx = plan.n_ctx
    while n_ctx > PAGE and fits is None:
        n_ctx = n_ctx // 2 // PAGE * PAGE
        if n_ctx and _plan(segment, request, n_ctx, "").fits:
            fits = f"n_ctx={n_ctx}"
    largest = max(plan.rows, key=lambda row: plan.rows[row])
    advice = f"{fits} would fit" if fits else "no context length would fit; take a smaller file"
    if largest == _BUILDING:
        advice = "give it that once: `edgeinfer warmup` builds the kernels that later starts take"
    return PlanError(
        f"the model needs {plan.total_bytes // _MiB} MiB with n_ctx={plan.n_ctx} and "
        f"{plan.slots} slot(s), {plan.available // _MiB} MiB are available (most of it is "
        f"{largest}, {plan.rows[largest] // _MiB} MiB); {advice}",
        needed=plan.total_bytes,
        available=plan.available,
        fits=fits,
    )
