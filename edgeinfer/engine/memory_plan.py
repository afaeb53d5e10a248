"""Every byte a model will take, reckoned and made to fit before anything is allocated.

Knows nothing of how memory is obtained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from edgeinfer.backend import Backend
from edgeinfer.batch import HOST, PAGE, Demand, StepLimits, StepRequest
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


class Pool(NamedTuple):
    """One memory: bytes by purpose, and how many there are to take."""

    name: str  # "host", "cuda:0"
    rows: dict[str, int]
    available: int

    @property
    def total_bytes(self) -> int:
        return sum(self.rows.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.available


class MemoryPlan(NamedTuple):
    """What a model takes of each memory, the host's first, and the settings that was solved for."""

    pools: tuple[Pool, ...]
    n_ctx: int
    slots: int
    limits: StepLimits
    note: str  # why n_ctx is not the usual one, "" if it is

    @property
    def host(self) -> Pool:
        return self.pools[0]

    @property
    def rows(self) -> dict[str, int]:
        """Every byte by purpose; those of other memories than the host's name it."""
        return {
            purpose if pool is self.host else f"{purpose} ({pool.name})": n_bytes
            for pool in self.pools
            for purpose, n_bytes in pool.rows.items()
        }

    @property
    def total_bytes(self) -> int:
        return sum(pool.total_bytes for pool in self.pools)

    @property
    def summary(self) -> str:
        """ "412 MiB", and what other memories hold: "412 MiB, 5210 MiB on cuda:0"."""
        host, *others = (f"{pool.total_bytes // _MiB} MiB" for pool in self.pools)
        beside = (f", {n} on {p.name}" for n, p in zip(others, self.pools[1:], strict=True))
        return host + "".join(beside)

    @property
    def available(self) -> int:
        """Bytes of the host's memory that there are to take."""
        return self.host.available

    @property
    def fits(self) -> bool:
        return all(pool.fits for pool in self.pools)


class PlanRequest(NamedTuple):
    """What a plan is solved for; `n_ctx` None asks for the usual length or what fits."""

    n_ctx: int | None
    slots: int
    n_threads: int
    available: int  # bytes of the host's memory
    freed: Mapping[str, int] = MappingProxyType({})  # bytes by memory that come back before


def usual_n_ctx(segment: Segment) -> int:
    """The context length where nobody asks for one, and memory is not short."""
    return min(segment.graph.hparams.n_ctx_train, DEFAULT_N_CTX)


def available_bytes(backend: Backend, request: PlanRequest) -> dict[str, int]:
    """Bytes by memory that there are to take, once what is to be freed has come back."""
    return {
        name: max(0, n_bytes) + request.freed.get(name, 0)
        for name, n_bytes in backend.memories(request.available).items()
    }


def solve(segment: Segment, backend: Backend, request: PlanRequest) -> MemoryPlan:
    """The plan that fits, each memory by itself; PlanError says what would."""
    available = available_bytes(backend, request)

    def plan(n_ctx: int, note: str = "") -> MemoryPlan:
        step = StepRequest(n_ctx, request.slots, request.n_threads)
        demand = backend.demand(segment, step)
        pools = _pools(demand, available, segment.graph.hparams.vocab_size)
        return MemoryPlan(pools, n_ctx, request.slots, demand.limits, note)

    if request.n_ctx is not None:
        asked = plan(request.n_ctx)
        if not asked.fits:
            raise _too_large(plan, asked)
        return asked
    n_ctx = usual = usual_n_ctx(segment)
    note = ""
    while not (found := plan(n_ctx, note)).fits:
        n_ctx = n_ctx // 2 // PAGE * PAGE
        note = f"memory is short: {usual} would be usual"
        if n_ctx < min(usual, _LEAST_N_CTX):
            raise _too_large(plan, found)
    return found


def _pools(demand: Demand, available: Mapping[str, int], vocab_size: int) -> tuple[Pool, ...]:
    """The host's pool, with what is taken there whatever the machine, and the others."""
    rows = {
        **demand.memories.get(HOST, {}),
        "tokenizer": vocab_size * _TOKEN_BYTES,
        "Python": PYTHON_BYTES,
        "chat templates": _TEMPLATES_BYTES,
    }
    # Builders have ended before weights are packed: only what they take beyond that counts.
    if (excess := demand.building_bytes + PYTHON_BYTES - sum(rows.values())) > 0:
        rows[_BUILDING] = excess
    others = (
        Pool(name, dict(taken), available[name])
        for name, taken in demand.memories.items()
        if name != HOST
    )
    return (Pool(HOST, rows, available[HOST]), *others)


def _too_large(solved: Callable[[int], MemoryPlan], plan: MemoryPlan) -> PlanError:
    fits = None
    n_ctx = plan.n_ctx
    while n_ctx > PAGE and fits is None:
        n_ctx = n_ctx // 2 // PAGE * PAGE
        if n_ctx and solved(n_ctx).fits:
            fits = n_ctx
    pool = next(pool for pool in plan.pools if not pool.fits)
    largest = max(pool.rows, key=lambda row: pool.rows[row])
    advice: Advice = ("no context length would fit; take a smaller file",)
    if largest == _BUILDING:
        advice = (
            "give it that once: `edgeinfer warmup` builds the kernels that later starts take",
        )
    elif fits is not None:
        advice = (Keyword("n_ctx", fits), " would fit")
    slots = f" in {plan.slots} slots" if plan.slots > 1 else ""
    where = "" if pool.name == HOST else f" on {pool.name}"
    return PlanError(
        f"the model needs {pool.total_bytes // _MiB} MiB{where} for {plan.n_ctx} tokens of context"
        f"{slots}, {pool.available // _MiB} MiB are available (most of it is {largest}, "
        f"{pool.rows[largest] // _MiB} MiB)",
        advice=advice,
        needed=pool.total_bytes,
        available=pool.available,
        memory=pool.name,
        n_ctx=fits,
    )
