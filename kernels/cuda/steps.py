"""Has a device compute steps: launch after launch, or as a graph where such a step has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from edgeinfer.kernels.cuda.commands import WANTED_ROWS, Launch, Lowered
from edgeinfer.kernels.cuda.device import Bound, Device, Graph
from edgeinfer.kernels.cuda.joined import Joined
from edgeinfer.kernels.cuda.lower_base import FEW_ROWS

_MOST_GRAPHS = 32  # each takes a few MiB of the driver's memory
_FROM = 2  # the step of a shape from which on it is a graph: all kernels have run by then
_TRIED_AGAIN = 1000  # steps after one that could not become a graph


class Result(Enum):
    """What of a step is wanted."""

    HIDDEN = auto()
    LOGITS = auto()
    LIKELIEST = auto()  # the ids of the largest logits
    SAMPLED = auto()  # ids, picked as the step's samples say


class Shape(NamedTuple):
    """What launches depend on. Kernels look at the step itself for how many rows there are."""

    n_rows: int
    n_wanted: int
    n_segments: int  # of attention
    result: Result
    n_logits: int = 0  # the first of a row that are wanted, 0: all

    @property
    def rounded(self) -> Shape:
        """The same for all steps that take the same graph."""
        return self._replace(n_rows=_up(self.n_rows), n_wanted=_up(self.n_wanted))


def _up(n: int) -> int:
    """1, 2, 4, 8 or 16: numbers between them take the kernels that the next one takes."""
    return 1 << (n - 1).bit_length() if n else 0


class Steps:
    """Computes the step that has been written to the device's memory."""

    def __init__(self, device: Device, lowered: Lowered, joined: Joined) -> None:
        self._device, self._lowered, self._joined = device, lowered, joined
        self._bound: dict[tuple[int, int, int], Bound] = {}  # by launch, segments and logits
        self._counts: Counter[Shape] = Counter()
        self._graphs: dict[Shape, Graph] = {}

    def run(self, shape: Shape) -> None:
        if shape.n_rows > FEW_ROWS or shape.n_wanted > FEW_ROWS:
            self._launch(shape)
            return
        shape = shape.rounded
        graph = self._graphs.pop(shape, None)
        if graph is None and self._is_known(shape):
            graph = self._record(shape)
        if graph is None:
            self._launch(shape)
            return
        self._graphs[shape] = graph  # the last of them is the one that was used last
        if len(self._graphs) > _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        graph.replay()

    def _record(self, shape: Shape) -> Graph | None:
        """None where the driver has no memory for a graph: launches need none."""
        try:
            return self._device.record(lambda: self._launch(shape))
        except MemoryError:
            self._counts[shape] = -_TRIED_AGAIN
            return None

    def _is_known(self, shape: Shape) -> bool:
        self._counts[shape] += 1
        return self._counts[shape] >= _FROM

    def _launch(self, shape: Shape) -> None:
        is_of_one = shape.n_rows == shape.n_wanted == 1
        done = range(0)
        for i, launch in self._launches(shape.result, shape.n_logits):
            if is_of_one and i not in done:
                done = self._joined.launch(i, shape.n_segments)
            n_rows = shape.n_wanted if launch.rows == WANTED_ROWS else shape.n_rows
            if i not in done and n_rows and launch.takes(n_rows):
                grid = launch.grid(n_rows, shape.n_segments)
                bound = self._bind(i, launch, shape)
                self._device.launch(launch.kernel, grid, launch.threads, launch.shared_bytes, bound)

    def _launches(self, result: Result, n_logits: int) -> Iterator[tuple[int, Launch]]:
        """With their numbers."""
        lowered = self._lowered
        yield from enumerate(lowered.launches[: lowered.head])
        if result is Result.HIDDEN:
            return
        for i, launch in enumerate(lowered.launches[lowered.head :], lowered.head):
            yield i, launch.first_values(n_logits) if n_logits else launch
        last = {Result.LIKELIEST: lowered.argmax, Result.SAMPLED: lowered.sample}
        if result in last:
            picks = last[result]
            assert picks is not None, "only the last segment has logits"
            if n_logits:
                picks = picks._replace(args={**picks.args, "n_vocab": n_logits})
            yield (-1 if result is Result.LIKELIEST else -2), picks

    def _bind(self, i: int, launch: Launch, shape: Shape) -> Bound:
        key = i, shape.n_segments if launch.depends_on_segments else 0, shape.n_logits
        if key not in self._bound:
            args = launch.values(shape.n_segments)
            self._bound[key] = self._device.bind(launch.kernel, args)
        return self._bound[key]
