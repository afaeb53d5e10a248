"""What a program keeps between steps, as bytes: pages of its caches, and slots of state.

Knows neither machines nor what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import PAGE
from edgeinfer.errors import ClosedError
from edgeinfer.graph import Segment

Bytes: TypeAlias = NDArray[np.uint8]
Numbers: TypeAlias = NDArray[np.intp]


class Part(Protocol):
    """One array of equal pieces."""

    @property
    def n_bytes(self) -> int:
        """Of a piece."""
        ...

    def copy(self, sources: Numbers, targets: Numbers) -> None: ...

    def read(self, numbers: Numbers) -> Bytes:
        """Some pieces, (n, n_bytes)."""
        ...

    def write(self, numbers: Numbers, data: Bytes) -> None: ...


class HostPart:
    """Pieces in the host's memory, (n, n_bytes)."""

    def __init__(self, pieces: Bytes) -> None:
        self._pieces = pieces
        self.n_bytes = pieces.shape[1]

    def copy(self, sources: Numbers, targets: Numbers) -> None:
        self._pieces[targets] = self._pieces[sources]

    def read(self, numbers: Numbers) -> Bytes:
        return self._pieces[numbers]

    def write(self, numbers: Numbers, data: Bytes) -> None:
        self._pieces[numbers] = data


class Pieces:
    """Pieces by number, each spread over parts: its bytes are those of the parts in order.

    `positions` yields, part by part of a page, which of its 32 positions each byte belongs to.
    """

    def __init__(
        self, n: int, parts: Iterable[Part], positions: Callable[[], Iterable[Bytes]] = tuple
    ) -> None:
        self._n, self._parts, self._positions = n, tuple(parts), positions
        self.n_bytes = sum(part.n_bytes for part in self._parts)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Each source to the target of its place; no target is a source, none comes twice."""
        assert len(sources) == len(targets) == len(set(targets) - set(sources))
        of, to = self._numbers(sources), self._numbers(targets)
        for part in self._parts:
            part.copy(of, to)

    def read(self, numbers: Sequence[int]) -> Bytes:
        """A copy of some, (n, n_bytes)."""
        index, end = self._numbers(numbers), 0
        found = np.empty((len(index), self.n_bytes), np.uint8)
        for part in self._parts:
            start, end = end, end + part.n_bytes
            found[:, start:end] = part.read(index)
        return found

    def write(self, numbers: Sequence[int], data: Bytes) -> None:
        """What `read` gave; ValueError where that was no such number of bytes."""
        index = self._numbers(numbers)
        if data.dtype != np.uint8 or data.shape != (len(index), self.n_bytes):
            raise ValueError(
                f"{data.dtype} of {data.shape} can't be written: it must be bytes of "
                f"{(len(index), self.n_bytes)}, read from a program of equal cache_layout"
            )
        end = 0
        for part in self._parts:
            start, end = end, end + part.n_bytes
            part.write(index, data[:, start:end])

    def positions(self) -> Bytes:
        """Which of a page's positions each of its bytes belongs to."""
        return np.concatenate([np.empty(0, np.uint8), *self._positions()])

    def _numbers(self, numbers: Sequence[int]) -> Numbers:
        index = np.array(numbers, np.intp)
        assert index.ndim == 1 and ((index >= 0) & (index < self._n)).all(), f"of {self._n} pieces"
        return index


def position_runs(n: int, n_bytes: int) -> Bytes:
    """The positions of n runs of bytes in which each of a page's positions has `n_bytes`."""
    return np.tile(np.repeat(np.arange(PAGE, dtype=np.uint8), n_bytes), n)


class Cached(NamedTuple):
    """All that a program keeps between steps."""

    pages: tuple[Pieces, ...]  # by cache group
    states: Pieces
    layout: str


class CacheVerbs:
    """What a program has for the bytes of its cache: see `edgeinfer.backend.Program`.

    Whoever inherits this keeps `_cached`, which is None once the program is closed.
    """

    _cached: Cached | None

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._changing().pages[group].copy(sources, targets)

    def read_pages(self, group: int, pages: Sequence[int]) -> Bytes:
        return self._open().pages[group].read(pages)

    def write_pages(self, group: int, pages: Sequence[int], data: Bytes) -> None:
        self._changing().pages[group].write(pages, data)

    def page_positions(self, group: int) -> Bytes:
        return self._open().pages[group].positions()

    def read_states(self, slots: Sequence[int]) -> Bytes:
        return self._open().states.read(slots)

    def write_states(self, slots: Sequence[int], data: Bytes) -> None:
        self._changing().states.write(slots, data)

    @property
    def cache_layout(self) -> str:
        return self._open().layout

    def _open(self) -> Cached:
        if self._cached is None:
            raise ClosedError("this program was closed")
        return self._cached

    def _changing(self) -> Cached:
        """The same, before it is changed."""
        return self._open()


def layout_of(machine: str, segment: Segment) -> str:
    """A name for bytes in the order of a machine: "cpu 1" is a family of them and a version."""
    layers: dict[str, list[int]] = {}
    for kept in (segment.caches, segment.states):
        for layer, what in kept.items():
            layers.setdefault(str(what), []).append(layer)
    listed = [f"{what} of {' '.join(map(str, of))}" for what, of in layers.items()]
    return "; ".join([machine, *listed])
