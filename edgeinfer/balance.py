"""How GPUs share layers: so that the fullest of them has as much of its memory left as can be.

Knows no kernels: what layers take of a GPU is asked of its backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from edgeinfer.backend import Backend
from edgeinfer.batch import StepRequest
from edgeinfer.chain import Stretch
from edgeinfer.engine.memory_plan import PlanRequest, available_bytes, usual_n_ctx
from edgeinfer.engine.plan_rows import LEAST_STATES
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import Segment


def balanced(
    segment: Segment,
    first: int,
    gpus: Sequence[Backend],
    before: Sequence[Backend],
    request: PlanRequest,
) -> list[Stretch]:
    """Stretches for a segment that begins with layer `first`; the machines `before` run the others.

    GPUs keep their order, the last one has the head. One that is left without layers is left out.
    """
    if len(gpus) == 1:
        return [Stretch(first, gpus[0])]
    shares = _Shares(segment, first, gpus, before, request)
    bounds = shares.first_bounds()
    while (emptier := _emptier(shares, bounds)) is not None:
        bounds = emptier
    return [
        Stretch(shares.cuts[bounds[i]], gpu)
        for i, gpu in enumerate(gpus)
        if bounds[i] < bounds[i + 1]
    ]


class _Shares:
    """What parts of a segment take of each GPU's memory, as shares of what is free there.

    The segment consists of pieces that it can be cut into, mostly one for each layer. `bounds` say
    which each GPU has: i those from `bounds[i]` on, up to `bounds[i + 1]`.
    """

    def __init__(
        self,
        segment: Segment,
        first: int,
        gpus: Sequence[Backend],
        before: Sequence[Backend],
        request: PlanRequest,
    ) -> None:
        self._segment, self._gpus = segment, gpus
        self._available = [available_bytes(gpu, request) for gpu in gpus]
        self.cuts = _cuts(segment, first)
        self._known: dict[tuple[int, int, int], float] = {}
        n_ctx = usual_n_ctx(segment) if request.n_ctx is None else request.n_ctx
        n_states = LEAST_STATES * request.slots if segment.states else 0
        self._step = StepRequest(n_ctx, request.slots, request.n_threads, n_states=n_states)
        # Steps are as large as the least machine runs, and so is what all reserve for them.
        piece = self._part(len(self.cuts) - 1, len(self.cuts))
        limits = [each.demand(piece, self._step).limits for each in (*gpus, *before)]
        self._step = self._step._replace(most_rows=min(each.max_rows for each in limits))

    def first_bounds(self) -> list[int]:
        """As if all pieces were alike: a GPU that the whole would fill half as much has twice."""
        n_pieces = len(self.cuts)
        room = [1 / self._share(gpu, 0, n_pieces) for gpu in range(len(self._gpus))]
        return [0, *(round(n_pieces * part / sum(room)) for part in accumulate(room))]

    def of(self, bounds: Sequence[int]) -> list[float]:
        """The share of each GPU."""
        return [self._share(gpu, *bounds[gpu : gpu + 2]) for gpu in range(len(self._gpus))]

    def _share(self, gpu: int, begin: int, end: int) -> float:
        if begin == end:
            return 0.0
        if (share := self._known.get((gpu, begin, end))) is None:
            demand = self._gpus[gpu].demand(self._part(begin, end), self._step)
            available = self._available[gpu]
            share = max(
                max(1, sum(rows.values())) / max(1, available[memory])
                for memory, rows in demand.memories.items()
            )
            self._known[gpu, begin, end] = share
        return share

    def _part(self, begin: int, end: int) -> Segment:
        part = self._segment
        if end < len(self.cuts):
            part, _ = part.cut(self.cuts[end])
        return part.cut(self.cuts[begin])[1] if begin else part


def _cuts(segment: Segment, first: int) -> list[int]:
    """`first`, and the layers that the segment can be cut at."""
    cuts = [first]
    for layer in range(first + 1, segment.graph.hparams.n_layers):
        try:
            segment.cut(layer)
        except UnsupportedModelError:
            continue
        cuts.append(layer)
    return cuts


def _emptier(shares: _Shares, bounds: list[int]) -> list[int] | None:
    """The bounds once the fullest GPU has given a piece away, None where that leaves one as full.

    The emptiest that can takes it; those between the two have as many pieces as before.
    """
    now = shares.of(bounds)
    fullest = max(range(len(now)), key=now.__getitem__)
    for to in sorted(range(len(now)), key=now.__getitem__):
        low, high = min(to, fullest), max(to, fullest)
        by = 1 if to < fullest else -1
        moved = [bound + by * (low < i <= high) for i, bound in enumerate(bounds)]
        has_any = bounds[fullest] < bounds[fullest + 1]
        if to != fullest and has_any and max(shares.of(moved)[low : high + 1]) < now[fullest]:
            return moved
    return None
