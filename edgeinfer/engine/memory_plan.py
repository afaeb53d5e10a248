"""Every byte a model will take, reckoned and made to fit before anything is allocated.

Knows nothing of how memory is obtained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple

from edgeinfer.backend import Backend
from edgeinfer.batch import PAGE, StepLimits, StepRequest, pages_for
from edgeinfer.engine.plan_error import does_not_fit
from edgeinfer.engine.plan_rows import (
    LEAST_N_CTX,
    LEAST_STATES,
    SPARE_PAGES,
    SPARE_STATES,
    HostBytes,
    Pool,
    pools_of,
    size_text,
    spare_pages,
    spare_states,
)
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import KVType, Segment

DEFAULT_N_CTX = 8192
_FEW_ROWS = 64  # of a step, where the usual number leaves no room for even that
_ALL_ROWS = 1 << 30
_SPARE_ROWS = SPARE_PAGES, SPARE_STATES

KVTypes = tuple[KVType, KVType]
USUAL_TYPES: KVTypes = ("f16", "f16")
# What unasked replaces them: its perplexity differs in the third digit, that of fewer bits more.
_SMALLER_TYPES: KVTypes = ("q8_0", "q8_0")


class MemoryPlan(NamedTuple):
    """What a model takes of each memory, the host's first, and the settings that was solved for."""

    pools: tuple[Pool, ...]
    n_ctx: int
    slots: int
    limits: StepLimits
    note: str  # why n_ctx or the types of K and V are not the usual ones, "" if they are
    kv_types: KVTypes = USUAL_TYPES
    n_spare_pages: int = 0  # of those in `limits`: for prompts to come
    n_spare_states: int = 0

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
    def kept_bytes(self) -> int:
        """For prompts that were read before, beyond what the context has room for."""
        return sum(pool.rows.get(row, 0) for pool in self.pools for row in _SPARE_ROWS)

    @property
    def summary(self) -> str:
        """ "412 MiB", and what other memories hold: "412 MiB, 5210 MiB on cuda:0"."""
        host, *others = (size_text(pool.total_bytes) for pool in self.pools)
        beside = (f", {n} on {p.name}" for n, p in zip(others, self.pools[1:], strict=True))
        return host + "".join(beside)

    @property
    def choices(self) -> tuple[str, ...]:
        """What was chosen, a line for each, with the reason where it is not the usual one."""
        k_type, v_type = self.kv_types
        types = k_type if k_type == v_type else f"{k_type} for K, {v_type} for V"
        n_spare, n_states = self.n_spare_pages * PAGE, self.n_spare_states
        states = f" and for {n_states} snapshots of the state" if n_states else ""
        return (
            f"context {self.n_ctx} tokens" + (f" in each of {self.slots} slots" * (self.slots > 1)),
            f"K and V as {types}",
            f"room for {n_spare} tokens of earlier prompts{states}, beside what the context has",
            f"steps of up to {self.limits.max_rows} rows and {self.limits.max_sequences} sequences",
        )

    @property
    def available(self) -> int:
        """Bytes of the host's memory that there are to take."""
        return self.host.available

    @property
    def fits(self) -> bool:
        return all(pool.fits for pool in self.pools)

    @property
    def room(self) -> int:
        """Bytes that are left of the shortest memory, below 0 where it does not fit."""
        return min(pool.available - pool.total_bytes for pool in self.pools)

    @property
    def n_missing(self) -> int:
        """Bytes by which it is too large for the memories that there are."""
        return sum(max(0, pool.total_bytes - pool.available) for pool in self.pools)


class PlanRequest(NamedTuple):
    """What a plan is solved for; what is None is chosen: see `solve`."""

    n_ctx: int | None
    slots: int
    n_threads: int
    available: int  # bytes of the host's memory
    freed: Mapping[str, int] = MappingProxyType({})  # bytes by memory that come back before
    kv_types: KVTypes | None = None
    host: HostBytes = HostBytes()
    most_available: int = 0  # bytes of the host's that there would be, were the user to allow it
    kept_tokens: int | None = None  # of earlier prompts, beside the slots


class Setting(NamedTuple):
    """What a plan chooses."""

    n_ctx: int
    kv_types: KVTypes
    n_spare_pages: int = 0
    n_spare_states: int = 0
    most_rows: int = _ALL_ROWS


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
    """The plan that fits, each memory by itself; PlanError says what would.

    What was asked for is not changed. Of the rest, the first that fits of: the usual context in
    f16 and spare pages for earlier prompts; without them; in q8_0; half the context in f16, then
    in q8_0, and so on down to 512 tokens; steps of fewer rows.
    """
    plans = []
    for setting, plan in _plans(segment, backend, request, _settings(segment, request)):
        if plan.fits:
            return plan._replace(note=_note(setting, request, usual_n_ctx(segment)))
        plans.append(plan)

    def room(asked: PlanRequest) -> int:
        """Bytes that `solve` would leave, below 0 where it finds no plan: of what it tries last."""
        settings = [*_settings(segment, asked)][-len(_types(asked)) :]
        found = []
        with suppress(UnsupportedModelError):  # of types that nobody but an advice asks for
            for _, plan in _plans(segment, backend, asked, reversed(settings)):  # smallest first
                found.append(plan.room)
                if plan.fits:
                    break
        return max(found, default=-1)

    raise does_not_fit(min(plans, key=lambda plan: plan.n_missing), request, room)


def _plans(
    segment: Segment, backend: Backend, request: PlanRequest, settings: Iterable[Setting]
) -> Iterator[tuple[Setting, MemoryPlan]]:
    """Settings with their plans; of types that nobody asked for, where the machine has them."""
    for setting in settings:
        try:
            yield setting, planned(segment, backend, request, setting)
        except UnsupportedModelError:
            if setting.kv_types in (USUAL_TYPES, request.kv_types):
                raise


def planned(
    segment: Segment, backend: Backend, request: PlanRequest, setting: Setting
) -> MemoryPlan:
    """What a setting takes, whether it fits or not."""
    # Of the same values: whatever else a segment says of them stays.
    segment = segment.for_context(setting.n_ctx, setting.kv_types)
    n_states = LEAST_STATES * request.slots + setting.n_spare_states if segment.states else 0
    step = StepRequest(
        setting.n_ctx, request.slots, request.n_threads, setting.most_rows, n_states,
        setting.n_spare_pages,
    )  # fmt: skip
    demand = backend.demand(segment, step)
    pools = pools_of(demand, step, available_bytes(backend, request), request.host)
    return MemoryPlan(
        pools, setting.n_ctx, request.slots, demand.limits, "", setting.kv_types,
        setting.n_spare_pages, setting.n_spare_states,
    )  # fmt: skip


def _settings(segment: Segment, request: PlanRequest) -> Iterator[Setting]:
    """What may be chosen, in the order in which it is tried."""
    usual = usual_n_ctx(segment)
    n_ctx = usual if request.n_ctx is None else request.n_ctx
    choices = _types(request)
    spare = spare_pages(segment, n_ctx, choices[0]), spare_states(segment)
    least = 0, min(1, spare[1])  # a state can't be shared but where one was kept
    if request.kept_tokens is not None:
        kept = pages_for(request.kept_tokens)
        spare, least = (kept, spare[1]), (kept, least[1])
    if spare != least:
        yield Setting(n_ctx, choices[0], *spare)
    yield from (Setting(n_ctx, types, *least) for types in choices)
    while request.n_ctx is None and (half := n_ctx // 2 // PAGE * PAGE) >= min(usual, LEAST_N_CTX):
        n_ctx = half
        yield from (Setting(n_ctx, types, *least) for types in choices)
    yield from (Setting(n_ctx, types, *least, most_rows=_FEW_ROWS) for types in choices)


def _types(request: PlanRequest) -> tuple[KVTypes, ...]:
    return (USUAL_TYPES, _SMALLER_TYPES) if request.kv_types is None else (request.kv_types,)


def _note(setting: Setting, request: PlanRequest, usual: int) -> str:
    """What memory was too short for."""
    missing = []
    if request.n_ctx is None and setting.n_ctx < usual:
        missing.append(str(usual))
    if request.kv_types is None and setting.kv_types != USUAL_TYPES:
        missing.append("f16")
    if setting.most_rows < _ALL_ROWS:
        missing.append("longer steps")
    return f"memory is short: {' and '.join(missing)} would be usual" if missing else ""
