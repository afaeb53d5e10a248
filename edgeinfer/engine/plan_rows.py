"""The rows of a plan: what a machine demands, and what is taken whatever the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from edgeinfer.batch import HOST, PAGE, STATE_ROW, Demand, StepRequest, cache_row, pages_for
from edgeinfer.graph import KV, KVType, Segment

_MiB = 1 << 20

# VmHWM on x86-64 Linux, CPython 3.11, NumPy 2, with a model of 0.1 MB: 36 MiB with all that is
# imported, threads and their stacks among it. The rest is for other versions.
PYTHON_BYTES = 40 * _MiB
# The process that renders chat templates: 15.5 MiB, 17.8 with the longest of 12 public ones.
TEMPLATES_BYTES = 18 * _MiB
_TOKEN_BYTES = 64  # Python's integers while a prompt is read, then 4 bytes thrice; text in pieces
# By requests that don't run: some 2,900 short ones, or 2 million tokens; no more are taken.
WAITING_BYTES = 8 * _MiB
_SEQUENCE_BYTES = 192 << 10  # that index's tables, and what is sampled by
_MOST_SPARE_BYTES = 64 * _MiB
_SPARE_SHARE = 4  # of a context: a quarter
LEAST_N_CTX = 512  # what a default is lowered to before a model is refused
LEAST_STATES = 2  # slots of a sequence: one that a step reads, one that it writes
_TYPE_BITS: Mapping[KVType, float] = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}

SPARE_PAGES, SPARE_STATES = "prefix pages", "snapshots"  # names of rows
BUILDING = "building kernels, once"
_LOADING = "loading, once"


class HostBytes(NamedTuple):
    """What whoever loads a model knows to be taken of the host's memory beside the machine."""

    text: int = 0  # by the tokenizer, and the header that it is read from
    text_building: int = 0  # while it is built
    screen: int = 0  # by what this process has loaded to show the model's answers
    gpu: int = 0  # by what drives a GPU from here


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

    @property
    def largest(self) -> str:
        """The purpose that takes most."""
        return max(self.rows, key=lambda row: self.rows[row])

    @property
    def is_for_building(self) -> bool:
        """Whether most is for kernels that are built once."""
        return self.largest == BUILDING


def base_bytes(host: HostBytes) -> int:
    """What is held before a machine takes anything."""
    return PYTHON_BYTES + TEMPLATES_BYTES + host.screen + host.gpu + host.text


def pools_of(
    demand: Demand, step: StepRequest, available: Mapping[str, int], host: HostBytes
) -> tuple[Pool, ...]:
    """The host's pool, with what is taken there whatever the machine, and the others."""
    memories = {name: _with_spare(rows, demand, step) for name, rows in demand.memories.items()}
    taken = memories.pop(HOST, {})
    n_tokens = step.slots * step.n_ctx
    rows = {
        **taken,
        "requests": n_tokens * _TOKEN_BYTES + demand.limits.max_sequences * _SEQUENCE_BYTES,
        "waiting requests": WAITING_BYTES,
        "tokenizer": host.text,
        "Python": PYTHON_BYTES,
        "chat templates": TEMPLATES_BYTES,
        "chat screen": host.screen,
        "GPU libraries": host.gpu,
    }
    rows = {name: n_bytes for name, n_bytes in rows.items() if n_bytes}
    # Builders have ended before weights are packed, and steps begin after that: of either only
    # what it takes beyond the rest counts.
    held = sum(n for name, n in taken.items() if name.startswith("weights ")) + taken.get("code", 0)
    building = base_bytes(host) + taken.get("code", 0) + demand.building_bytes
    loading = base_bytes(host) + held + demand.packing_bytes + host.text_building - host.text
    excess, name = max((building, BUILDING), (loading, _LOADING))
    if demand.building_bytes + demand.packing_bytes and (excess := excess - sum(rows.values())) > 0:
        rows[name] = excess
    others = (Pool(name, dict(each), available[name]) for name, each in memories.items())
    return (Pool(HOST, rows, available[HOST]), *others)


def _with_spare(rows: Mapping[str, int], demand: Demand, step: StepRequest) -> dict[str, int]:
    """Rows in which pages and states beyond those of the slots are apart."""
    spare, found = 0, dict(rows)
    n_states = step.n_states - LEAST_STATES * step.slots
    if STATE_ROW in rows and n_states > 0:
        found[SPARE_STATES] = rows[STATE_ROW] * n_states // step.n_states
        found[STATE_ROW] -= found[SPARE_STATES]
    for window, n_pages in demand.limits.n_pages.items():
        n_spare = n_pages - step.slots * pages_for(step.n_ctx)
        if step.n_spare_pages and n_spare > 0 and (name := cache_row(window)) in found:
            spare += (n_bytes := found[name] * n_spare // n_pages)
            found[name] -= n_bytes
    return {**found, SPARE_PAGES: spare} if spare else found


def spare_pages(segment: Segment, n_ctx: int, types: tuple[KVType, KVType]) -> int:
    """Pages for earlier prompts that are planned unasked: a quarter of a context, up to 64 MiB."""
    layers = segment.caches.values()
    page_bytes = sum(_page_bytes(kv._replace(k_type=types[0], v_type=types[1])) for kv in layers)
    most = _MOST_SPARE_BYTES // page_bytes if page_bytes else 0
    return min(pages_for(n_ctx) // _SPARE_SHARE, most)


def spare_states(segment: Segment) -> int:
    """State slots for earlier prompts that are planned unasked: 2 to 16, as many as 64 MiB hold."""
    slot_bytes = sum(state.n_bytes for states in segment.states.values() for state in states)
    return max(2, min(16, _MOST_SPARE_BYTES // slot_bytes)) if slot_bytes else 0


def _page_bytes(kv: KV) -> int:
    """About what a page takes of one layer; machines may pad it."""
    k_bits = kv.k_dim * _TYPE_BITS[kv.k_type]
    v_bits = 0 if kv.k_is_v else kv.v_dim * _TYPE_BITS[kv.v_type]
    return int(PAGE * kv.n_heads * (k_bits + v_bits) / 8)


def size_text(n_bytes: int) -> str:
    """ "412 MiB"; below ten of a unit in the next smaller one."""
    if n_bytes >= 10 * _MiB:
        return f"{n_bytes / _MiB:.0f} MiB"
    if n_bytes >= 10 << 10:
        return f"{n_bytes / 1024:.0f} KiB"
    return "1 byte" if n_bytes == 1 else f"{n_bytes} bytes"
