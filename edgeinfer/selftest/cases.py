"""What is computed to compare a device with the CPU: a segment, steps of it, and their results.

Knows neither devices nor hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeinfer.backend import Program
from edgeinfer.batch import Batch, OutputKind, PageTable, StepLimits
from edgeinfer.graph import Segment

Results: TypeAlias = Mapping[str, NDArray[Any]]  # by what was computed

MOST_ROWS = 40  # of a step
_N_PAGES = 12


class Case(NamedTuple):
    """A model and what is asked of it."""

    name: str
    segment: Callable[[], Segment]
    results: Callable[[Program, Segment], Results]


class Rows(NamedTuple):
    """Rows first .. first + n - 1 of a sequence, in a step."""

    sequence: int
    first: int
    n: int


def limits(segment: Segment) -> StepLimits:
    """Of every case."""
    return StepLimits(
        n_pages={window: _N_PAGES for window in segment.groups},
        max_rows=MOST_ROWS,
        max_outputs=MOST_ROWS,
        max_sequences=2,
        n_threads=2,
        n_states=2 * Sequences.N,
    )


class Sequences:
    """The page tables of a case: of two sequences that see everything, and of one that slides.

    A step goes on from the states that the last one with rows of the same sequence has left.
    """

    N, SLID = 3, 2

    def __init__(self, segment: Segment) -> None:
        tables = (
            PageTable(np.array([5, 0, 3, 7], np.int32), 0, 4),
            PageTable(np.array([2, 8, 1], np.int32), 0, 3),
            # Page 0 is pinned, and two of the others are seen.
            PageTable(np.array([4, 11, 6, 9], np.int32), 1, 2),
        )
        self._n_vocab = segment.graph.hparams.vocab_size
        self._tables = [(table,) * len(segment.groups) for table in tables]
        self._slots = [-1] * self.N

    def step(
        self,
        *rows: Rows,
        output: OutputKind = "logits",
        ids: Sequence[int] | NDArray[np.int32] | None = None,
    ) -> Batch:
        """Every row's result is wanted; without `ids` tokens follow from positions."""
        pos = np.concatenate([np.arange(r.first, r.first + r.n, dtype=np.int64) for r in rows])
        own = np.repeat([r.sequence for r in rows], [r.n for r in rows])
        states, kept = self._states(rows, len(pos))
        return Batch(
            ids=np.array(
                (7 * pos + 31 * own + 3) % self._n_vocab if ids is None else ids, np.int32
            ),
            pos=pos,
            seq=np.repeat(np.arange(len(rows), dtype=np.int32), [r.n for r in rows]),
            tables=[self._tables[r.sequence] for r in rows],
            wanted=np.arange(len(pos), dtype=np.int32),
            output=output,
            states=states,
            kept=kept,
        )

    def _states(
        self, rows: Sequence[Rows], n_rows: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Slots to start from, and to keep what is behind the last row of each sequence."""
        states = np.array([self._slots[r.sequence] for r in rows], np.int32)
        kept = np.full(n_rows, -1, np.int32)
        for r, end in zip(rows, np.cumsum([r.n for r in rows]), strict=True):
            i = r.sequence
            self._slots[i] = kept[end - 1] = 2 * i if self._slots[i] != 2 * i else 2 * i + 1
        return states, kept


def logits(program: Program, *steps: Batch) -> NDArray[np.float32]:
    """Of some steps, one after the other."""
    return np.concatenate([program.submit(step).wait().logits.copy() for step in steps])
