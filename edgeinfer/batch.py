"""What one step computes and what it yields: the flat arrays between the engine and a backend.

Knows no scheduling and no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from edgeinfer.sampling.params import SampleTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE = 32  # positions in a KV page
HOST = "host"  # the memory of the processors; what a GPU shares with them is a part of it
_LEAST_SEQUENCES = 8
_LOGITS_BYTES = 12 << 20  # a row for each position of a step only where logits are asked for
EVERY_PAGE = 1 << 30  # of a table whose queries see whatever a window leaves
SEGMENT_PAGES = 16  # pages whose partial attention folds into one segment (512 positions)

# What a row of a step after the first costs, of the first, until it is measured. On a CPU of 2
# cores: 8 rows cost 2.1 to 2.2 (bench_speculation).
ROW_COST = 0.17

OutputKind: TypeAlias = Literal["logits", "hidden", "ids"]
# "exact": every device's bits. "fast": of GPUs, attention and floats by tensor cores, rounded.
Numerics: TypeAlias = Literal["exact", "fast"]


class PageTable(NamedTuple):
    """Where the pages of one sequence lie, and which of them a query sees.

    Absolute page a (positions 32a .. 32a + 31) is stored in page `pages[slot(a)]` of the arena;
    the first `n_pinned` pages stay for ever, the others share a ring. A query at position p sees
    every pinned page and the last `n_visible` ring pages up to p's own. While nothing has been
    overwritten that is every page up to p.
    """

    pages: NDArray[np.int32]  # (n_pinned + ring length,)
    n_pinned: int
    n_visible: int

    def slot(self, page: int) -> int:
        """Index into `pages` of absolute page `page`."""
        if page < self.n_pinned:
            return page
        return self.n_pinned + (page - self.n_pinned) % (len(self.pages) - self.n_pinned)

    def first_ring_page(self, pos: int) -> int:
        """The oldest unpinned absolute page that a query at `pos` sees."""
        return max(self.n_pinned, pos // PAGE - self.n_visible + 1)

    def visible(self, pos: int, window: int = 0) -> list[int]:
        """Absolute pages of which a query at `pos` sees anything, ascending."""
        last = pos // PAGE
        held = [*range(min(self.n_pinned, last + 1)), *range(self.first_ring_page(pos), last + 1)]
        return [page for page in held if not window or self.sees(pos, page, window).any()]

    def sees(self, pos: int, page: int, window: int = 0) -> NDArray[np.bool_]:
        """Which of the 32 positions of a page it holds a query at `pos` sees.

        A window is counted in distances as the query is rotated: see `pinned_pos`.
        """
        own = self.pinned_pos(pos) if page < self.n_pinned else pos
        distances = own - PAGE * page - np.arange(PAGE)
        return (distances >= 0) & (distances < (window or own + 1))

    def pinned_pos(self, pos: int) -> int:
        """The position by which a query at `pos` is rotated for the pinned pages.

        Once pages between the pinned ones and the ring are gone, distances to pinned keys are
        counted inside the cache (StreamingLLM, Xiao et al. 2023), so they stay bounded.
        """
        return pos - PAGE * (self.first_ring_page(pos) - self.n_pinned)


@dataclass(slots=True)
class Batch:
    """One step: T input rows of any number of sequences.

    Rows of one sequence are consecutive and their positions ascend by one. Input is `ids`, or
    `hidden` for a segment that does not start with token ids. Output "ids" comes with `samples`,
    which say how each is picked and take what is, and no other output does; their masks may be
    filled until the step is waited for.

    Beside the output a step yields what the head reads of the wanted rows, `with_hidden`, and of
    all its rows the `residuals` that enter these layers, all of them declared by the segment. Of
    logits it yields the first `n_logits`, where that is not 0; a program need not compute others.

    A segment with states reads and writes them in numbered slots. A slot is written as a whole,
    once, and no step writes one that it reads, so a step that fails has spoilt nothing.
    """

    ids: NDArray[np.int32]  # (T,)
    pos: NDArray[np.int64]  # (T,) absolute positions
    seq: NDArray[np.int32]  # (T,) index into `tables`
    # Of a sequence, one for each cache group of the segment; another page is in another table.
    tables: list[tuple[PageTable, ...]]
    wanted: NDArray[np.int32]  # (R,) rows whose output is asked for, ascending
    output: OutputKind = "logits"
    hidden: NDArray[np.float32] | None = None  # (T, D)
    samples: SampleTable | None = None  # R rows
    # The state slot that each sequence's first row starts from, -1 where that is its first of all.
    states: NDArray[np.int32] | None = None  # (number of sequences,)
    kept: NDArray[np.int32] | None = None  # (T,) the slot for the state behind a row, -1: none
    with_hidden: bool = False
    residuals: tuple[int, ...] = ()
    n_logits: int = 0

    @property
    def n_rows(self) -> int:
        return len(self.pos)

    def check(self) -> None:
        """Assert what every program relies on, whatever its limits are."""
        assert (self.output == "ids") == (self.samples is not None), "ids come with samples"
        assert self.n_logits >= 0 and (self.output == "logits" or not self.n_logits), "of logits"
        assert (self.states is None) == (self.kept is None), "states come with what is kept"
        if self.states is not None and self.kept is not None:
            assert (len(self.states), len(self.kept)) == (len(self.tables), self.n_rows)
            assert np.count_nonzero(np.diff(self.seq)) < len(self.tables), "runs of sequences"
            written = [slot for slot in self.kept.tolist() if slot >= 0]
            assert len(set(written)) == len(written), "a step writes no state slot twice"
            assert set(written).isdisjoint(self.states.tolist()), "nor one that it reads"

    def snapshot(self) -> Batch:
        """The same step, whatever becomes of the arrays that this one was made of."""
        tables = [
            tuple(table._replace(pages=table.pages.copy()) for table in of_sequence)
            for of_sequence in self.tables
        ]
        hidden, states, kept = (
            None if each is None else each.copy() for each in (self.hidden, self.states, self.kept)
        )
        return Batch(
            self.ids.copy(), self.pos.copy(), self.seq.copy(), tables, self.wanted.copy(),
            self.output, hidden, self.samples, states, kept, self.with_hidden, self.residuals,
            self.n_logits,
        )  # fmt: skip


@dataclass(slots=True)
class Outputs:
    """What a step yields; arrays that were not asked for have no rows.

    All but `ids` are views into the program's memory, valid until its next submit; logits may be
    written to, and given to `Program.sample` then.
    """

    logits: NDArray[np.float32]  # (R, V), or (R, n_logits)
    hidden: NDArray[np.float32]  # (R, D); for a segment before the last every row of the step
    ids: NDArray[np.int32]  # (R,)
    aborted: bool = False  # the step was cut short: nothing else here means anything
    residuals: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)  # (T, D) by layer


class Sampler(Protocol):
    """Picks tokens from rows of logits in host memory, for a program that can't itself."""

    @property
    def n_bytes(self) -> int:
        """Memory that it holds from `open` to `close`."""
        ...

    @property
    def building_bytes(self) -> int:
        """Memory that `open` takes for a while."""
        ...

    def open(self) -> None:
        """Get ready; before that it holds nothing."""
        ...

    def sample(self, logits: NDArray[np.float32], table: SampleTable) -> None:
        """Fill the outputs of a table's first R rows from logits (R, V)."""
        ...

    def close(self) -> None: ...


class OpTime(NamedTuple):
    """What one op of a step took and did, for benchmarks; `macs` are of all its rows."""

    name: str
    kernels: tuple[str, ...]
    seconds: float
    weight_bytes: int
    macs: int


class StepRequest(NamedTuple):
    """What a machine is asked to be ready for."""

    n_ctx: int  # tokens of each of the
    slots: int  # sequences that can all be that long at a time
    n_threads: int
    most_rows: int = 1 << 30  # of a step, where another machine computes a part of it
    n_states: int = 0  # slots, of a model that has states: see `Batch`
    n_spare_pages: int = 0  # beyond those of the slots: for what has ended and may be gone on with


class StepLimits(NamedTuple):
    """The largest step a program must be ready for; all its memory follows from these."""

    # KV pages of 32 positions that all sequences share, of each cache group by its window.
    n_pages: Mapping[int, int]
    max_rows: int  # T
    max_outputs: int  # R
    max_sequences: int
    n_threads: int
    # Prompt rows in a step that also decodes: the other generations wait no longer than these take.
    shared_rows: int = 64
    row_cost: float = ROW_COST
    n_states: int = 0  # slots

    def of_draft(self, windows: Iterable[int]) -> StepLimits:
        """Of the block that guesses tokens beside a model of these limits, in the same pages."""
        n_pages = {window: self.n_pages[window] for window in windows}
        return self._replace(n_pages=n_pages, max_outputs=self.max_sequences, n_states=0)

    @classmethod
    def of(
        cls,
        request: StepRequest,
        vocab_size: int,
        windows: Iterable[int],
        max_rows: int,
        shared_rows: int = 64,
        row_cost: float = ROW_COST,
    ) -> StepLimits:
        """For a machine that computes `max_rows` rows at a time best."""
        max_rows = min(max_rows, request.most_rows)
        # Each may decode, so a step has a row for every one of them.
        n_sequences = min(max(_LEAST_SEQUENCES, request.slots), max_rows)
        n_pages = {}
        for window in windows:
            n_pages[window] = request.slots * pages_for(request.n_ctx) + request.n_spare_pages
            if window:  # one more than run, so that one that has ended can be gone on with
                most = (request.slots + 1) * ring_pages(window, max_rows)
                n_pages[window] = min(n_pages[window], most)
        return cls(
            n_pages=n_pages,
            max_rows=max_rows,
            max_outputs=min(max_rows, max(n_sequences, _LOGITS_BYTES // (4 * vocab_size))),
            max_sequences=n_sequences,
            n_threads=request.n_threads,
            shared_rows=min(shared_rows, max_rows),
            row_cost=row_cost,
            n_states=request.n_states,
        )


class Demand(NamedTuple):
    """What a machine takes of each memory to be ready for `limits`."""

    limits: StepLimits
    # By memory ("host", "cuda:0"): bytes by purpose, all that a program reserves there.
    memories: Mapping[str, Mapping[str, int]]
    building_bytes: int = 0  # of the host's: what getting ready takes before any of that
    # Of the host's: what packing weights takes for a while, before a step needs its memory.
    packing_bytes: int = 0


STATE_ROW = "state"  # the name of the state slots there


def cache_row(window: int) -> str:
    """The name of a cache group among the rows of a demand."""
    return f"KV cache, window {window}" if window else "KV cache"


def ring_pages(window: int, max_rows: int) -> int:
    """Pages that hold what the first of `max_rows` rows sees in a window, and all the rows."""
    return (window + max_rows - 3) // PAGE + 2


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens` positions."""
    return -(-n_tokens // PAGE)
