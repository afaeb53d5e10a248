"""A program made of programs over consecutive layers: each hands its rows on to the next.

Knows no device. A cut changes no bit: rows are handed on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeinfer.backend import (
    Backend,
    Drafts,
    Program,
    Ticket,
    build_exactly,
    tune,
    unkept_kernels,
)
from edgeinfer.batch import HOST, Batch, Demand, Outputs, StepLimits, StepRequest
from edgeinfer.graph import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeinfer.sampling.params import SampleTable


class Stretch(NamedTuple):
    """The layers from `first` on, up to the next stretch, and the machine that runs them."""

    first: int
    backend: Backend


class ChainBackend:
    """Compiles a whole model for several machines, each for a stretch of its layers."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        firsts = [stretch.first for stretch in stretches]
        assert firsts[0] == 0 and firsts == sorted(set(firsts)), "stretches follow each other"
        self._stretches = tuple(stretches)

    def memories(self, host: int) -> dict[str, int]:
        """Of each memory what the most cautious of the machines says."""
        least: dict[str, int] = {}
        for stretch in self._stretches:
            for name, n_bytes in stretch.backend.memories(host).items():
                least[name] = min(n_bytes, least.get(name, n_bytes))
        return least

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        """What all of them take together, for steps as large as the least of them runs.

        UnsupportedModelError where one lacks an operation, or a layer can't begin a stretch.
        """
        parts = self._parts(segment)
        demands = [backend.demand(part, request) for backend, part in parts]
        most_rows = min(demand.limits.max_rows for demand in demands)
        if any(demand.limits.max_rows > most_rows for demand in demands):
            request = request._replace(most_rows=most_rows)
            demands = [backend.demand(part, request) for backend, part in parts]
        limits = [demand.limits for demand in demands]
        n_pages = {window: n for each in limits for window, n in each.n_pages.items()}
        whole = limits[-1]._replace(
            n_pages={window: n_pages[window] for window in segment.windows},
            max_sequences=min(each.max_sequences for each in limits),
            shared_rows=min(each.shared_rows for each in limits),
            row_cost=max(each.row_cost for each in limits),
        )
        # Weights are packed by one after the other.
        return Demand(
            whole,
            _added(demand.memories for demand in demands),
            _building_bytes(demands),
            max(demand.packing_bytes for demand in demands),
        )

    def compile(self, segment: Segment, limits: StepLimits) -> Chain:
        """One program for each stretch; none is left where one of them can't be made."""
        windows = segment.windows
        with ExitStack() as stack:
            links = []
            parts, n_layers = self._parts(segment), self._layer_counts(segment)
            for (backend, part), n in zip(parts, n_layers, strict=True):
                n_pages = {window: limits.n_pages[window] for window in part.windows}
                program = backend.compile(part, limits._replace(n_pages=n_pages))
                stack.callback(program.close)
                groups = tuple(map(windows.index, part.groups))
                links.append(Link(program, groups, n, frozenset(part.residuals)))
            stack.pop_all()
        return Chain(links)

    def _layer_counts(self, segment: Segment) -> list[int]:
        firsts = [stretch.first for stretch in self._stretches]
        ends = [*firsts[1:], segment.graph.hparams.n_layers]
        return [end - first for first, end in zip(firsts, ends, strict=True)]

    def _parts(self, segment: Segment) -> list[tuple[Backend, Segment]]:
        parts = []
        for stretch in reversed(self._stretches[1:]):
            segment, part = segment.cut(stretch.first)
            parts.append((stretch.backend, part))
        return [(self._stretches[0].backend, segment), *reversed(parts)]


def _building_bytes(demands: Iterable[Demand]) -> int:
    """Kernels are built by one after the other, beside what those before it hold of the host's."""
    held = most = 0
    for demand in demands:
        if demand.building_bytes:
            most = max(most, held + demand.building_bytes)
        held += sum(demand.memories.get(HOST, {}).values())
    return most


def _added(demands: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Bytes by memory and purpose of several demands together."""
    total: dict[str, dict[str, int]] = {}
    for memories in demands:
        for memory, rows in memories.items():
            added = total.setdefault(memory, {})
            for purpose, n_bytes in rows.items():
                added[purpose] = added.get(purpose, 0) + n_bytes
    return total


class Link(NamedTuple):
    """A program, which of a sequence's page tables are those of its cache groups, its layers.

    And the layers whose entering streams it may yield.
    """

    program: Program
    groups: tuple[int, ...]
    n_layers: int
    residuals: frozenset[int] = frozenset()

    def batch(self, step: Batch, *, is_last: bool) -> Batch:
        """This program's part of a step; before the last all rows are handed on."""
        tables = [tuple(tables[i] for i in self.groups) for tables in step.tables]
        residuals = tuple(layer for layer in step.residuals if layer in self.residuals)
        if is_last:
            return replace(step, tables=tables, residuals=residuals)
        nothing = np.zeros(0, np.int32)
        return replace(
            step, tables=tables, wanted=nothing, output="hidden", samples=None,
            with_hidden=False, residuals=residuals, n_logits=0,
        )  # fmt: skip


class Chain:
    """Programs over consecutive layers, as one. One step at a time."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = tuple(links)

    @property
    def programs(self) -> tuple[Program, ...]:
        return tuple(link.program for link in self._links)

    @property
    def draft(self) -> Program | None:
        """Beside the last program, which has the head."""
        last = self._links[-1].program
        return last.draft if isinstance(last, Drafts) else None

    @property
    def step_weight_bytes(self) -> int:
        return sum(program.step_weight_bytes for program in self.programs)

    def submit(self, batch: Batch) -> ChainTicket:
        """Begin a step with the first program; the others take their turns in `wait`."""
        batch.check()
        first, *others = self._links
        step = batch.snapshot()  # they do so when the caller may have changed it
        last = others[-1] if others else first
        later = [(link.program, link.batch(step, is_last=link is last)) for link in others]
        return ChainTicket(first.program.submit(first.batch(batch, is_last=not others)), later)

    def sample(self, logits: NDArray[np.float32], table: SampleTable) -> None:
        """By the last program, which has made the logits."""
        self._links[-1].program.sample(logits, table)

    def describe(self) -> dict[str, Any]:
        """The facts of all programs, and the number of "layers" by device.

        Devices and GPUs are those of all; where two have another fact, it is the first one's.
        """
        facts: dict[str, Any] = {}
        layers: dict[str, int] = {}
        described = [link.program.describe() for link in self._links]
        for link, each in zip(self._links, described, strict=True):
            facts = each | facts
            layers[each["device"]] = layers.get(each["device"], 0) + link.n_layers
        facts["device"] = " + ".join(layers)
        if gpus := [each["gpu"] for each in described if "gpu" in each]:
            facts["gpu"] = " + ".join(gpus)
        return {**facts, "layers": layers}

    # -- what it caches: the bytes of the programs in order ------------------------------------

    @property
    def cache_layout(self) -> str:
        return " + ".join(program.cache_layout for program in self.programs)

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        for program, own in self._with_group(group):
            program.copy_pages(own, sources, targets)

    def read_pages(self, group: int, pages: Sequence[int]) -> NDArray[np.uint8]:
        parts = [program.read_pages(own, pages) for program, own in self._with_group(group)]
        return np.concatenate(parts, axis=1)

    def write_pages(self, group: int, pages: Sequence[int], data: NDArray[np.uint8]) -> None:
        owners = self._with_group(group)
        widths = [program.read_pages(own, []).shape[1] for program, own in owners]
        for (program, own), part in zip(owners, _columns(data, widths), strict=True):
            program.write_pages(own, pages, part)

    def page_positions(self, group: int) -> NDArray[np.uint8]:
        owners = self._with_group(group)
        return np.concatenate([program.page_positions(own) for program, own in owners])

    def read_states(self, slots: Sequence[int]) -> NDArray[np.uint8]:
        return np.concatenate([program.read_states(slots) for program in self.programs], axis=1)

    def write_states(self, slots: Sequence[int], data: NDArray[np.uint8]) -> None:
        widths = [program.read_states([]).shape[1] for program in self.programs]
        for program, part in zip(self.programs, _columns(data, widths), strict=True):
            program.write_states(slots, part)

    def _with_group(self, group: int) -> list[tuple[Program, int]]:
        """The programs that have layers of a cache group, and which of their own it is."""
        return [
            (link.program, link.groups.index(group)) for link in self._links if group in link.groups
        ]

    def build_exactly(self, progress: Callable[[int, int], None]) -> int:
        return sum(build_exactly(program, progress) for program in self.programs)

    def tune(self, progress: Callable[[int, int], None]) -> str:
        return ", ".join(filter(None, [tune(program, progress) for program in self.programs]))

    @property
    def unkept(self) -> str:
        return next(filter(None, map(unkept_kernels, self.programs)), "")

    def close(self) -> None:
        """Close all, whatever one of them raises."""
        with ExitStack() as stack:
            for program in self.programs:
                stack.callback(program.close)

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _columns(data: NDArray[np.uint8], widths: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Bytes of pages cut into those of each program; ValueError where there are more or fewer."""
    if data.ndim != 2 or data.shape[1] != sum(widths):
        raise ValueError(
            f"{data.dtype} of {data.shape} can't be written: it must be rows of {sum(widths)} "
            "bytes, read from a program of equal cache_layout"
        )
    return np.split(data, np.cumsum(widths)[:-1], axis=1)


class ChainTicket:
    """A step on its way through a chain."""

    def __init__(self, ticket: Ticket, later: list[tuple[Program, Batch]]) -> None:
        self._ticket, self._later = ticket, later
        self._is_aborted = False
        self._residuals: dict[int, NDArray[np.float32]] = {}

    def wait(self) -> Outputs:
        """Run what is left of the step, program by program."""
        outputs = self._ticket.wait()
        self._residuals.update(outputs.residuals)
        while self._later and not (self._is_aborted or outputs.aborted):
            program, batch = self._later[0]
            batch.hidden = outputs.hidden
            self._ticket = program.submit(batch)
            del self._later[0]
            if self._is_aborted:  # it came while the ticket was another's
                self._ticket.abort()
            outputs = self._ticket.wait()
            self._residuals.update(outputs.residuals)
        outputs.residuals = self._residuals
        if self._later:  # nobody has run them
            outputs.aborted = True
        return outputs

    def abort(self) -> None:
        """Cut the step short in the program that it has come to, from any thread."""
        self._is_aborted = True
        self._ticket.abort()
