"""A program before it takes any memory of a device: what it will launch, and reserve for what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import count, takewhile

import numpy as np

from edgeinfer.batch import SEGMENT_PAGES, STATE_ROW, Numerics, StepLimits, cache_row
from edgeinfer.graph import (
    KV,
    Attention,
    Conv,
    DeltaNet,
    ExpertLinear,
    Linear,
    Segment,
)
from edgeinfer.kernels.buffers import Arena, Buffer, weights_of
from edgeinfer.kernels.cached import Bytes, Cached, Numbers, Pieces, layout_of
from edgeinfer.kernels.cuda.device import Device
from edgeinfer.kernels.cuda.joined import runs_of
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.layout import ALIGNMENT, StepArrays, page_bytes, page_positions
from edgeinfer.kernels.cuda.lower import Lowering
from edgeinfer.kernels.cuda.lower_base import FEW_ROWS, LayerCache, SampleBuffers, StepBuffers
from edgeinfer.kernels.cuda.samples import ROWS_OFFSET, SampleArrays
from edgeinfer.kernels.cuda.tiles import row_stride
from edgeinfer.kernels.cuda.weights import TiledWeights, matrix_bytes


class Blueprint:
    """A segment lowered for steps of up to `limits` on a GPU of `arch`, to become one program."""

    def __init__(
        self,
        segment: Segment,
        limits: StepLimits,
        arch: int,
        numerics: Numerics = "exact",
        beside: TiledWeights | None = None,
        *,
        joins: bool = False,
    ) -> None:
        """Weights that lie `beside` are those of another program, which lives longer.

        `joins`: steps of one row are to be few launches, see `joined.py`.
        """
        self.segment, self.limits = segment, limits
        self.numerics, self._arch = numerics, arch
        self.weights = TiledWeights(*weights_of(segment), beside)
        self.step_arrays = StepArrays(limits, segment.groups, bool(segment.states))
        n_tokens = segment.output.dim if segment.is_last else 0
        self.sample_arrays = SampleArrays(limits, n_tokens)
        self.kv, self.step = Arena(ALIGNMENT), Arena(ALIGNMENT)
        self.step_buffers = step = self._place_step()
        caches = self._caches = self._place_caches()
        self._recurrent = [op for op in segment.ops if isinstance(op, (Conv, DeltaNet))]
        states = self._states = self._place_states()
        lowering = Lowering(
            segment, limits, self.weights, caches, states, step, arch, numerics, joins=joins
        )
        self.lowered = lowering.run(samples=beside is None)
        self.runs = runs_of(self.lowered, len(self.segment_counts)) if joins else []
        for run in self.runs:
            self.step.place(run.calls)
        self.scratch = self.lowered.scratch
        self.scratch.place(self.weights.staging, 0 if self.scratch.n_bytes else None)
        self.scratch.n_bytes = max(
            self.scratch.n_bytes, self.scratch.aligned(self.weights.staging.n_bytes)
        )
        self.draft: Blueprint | None = None
        if (block := segment.draft) is not None:
            self.draft = Blueprint(
                block, limits.of_draft(block.groups), arch, numerics, self.weights, joins=joins
            )

    def arenas(self) -> tuple[Arena, ...]:
        return self.weights.arena, self.kv, self.scratch, self.step

    def kernels(self) -> set[Kernel]:
        """Those of the block that guesses tokens, too."""
        of_draft = self.draft.kernels() if self.draft else set()
        joined = {run.kernel for run in self.runs}
        return self.lowered.kernels() | self.weights.kernels() | joined | of_draft

    def rows(self) -> dict[str, int]:
        """Bytes that the program reserves, by purpose."""
        weights = self.weights.bytes_by_type
        rows = {
            **{f"weights {kind}": n_bytes for kind, n_bytes in weights.items()},
            **self._cache_rows,
            **self._state_rows,
            "scratch": self.scratch.n_bytes + self.step.n_bytes + self._counters_bytes,
        }
        for purpose, n_bytes in self.draft.rows().items() if self.draft else ():
            rows[purpose] = rows.get(purpose, 0) + n_bytes
        return rows

    def cached(self, device: Device) -> Cached:
        """What the program keeps between steps, once the arena of pages has memory."""
        groups = tuple(
            Pieces(
                self.limits.n_pages[window],
                self._parts_of(group, device),
                partial(_positions, group.values()),
            )
            for window, group in self.segment.groups.items()
        )
        states = [
            DevicePart(device, self._states[op.out.index].address, op.state.n_bytes)
            for op in self._recurrent
        ]
        # Rounded otherwise, the bytes are of a kind of GPU.
        machine = f" {self.numerics} sm_{self._arch}" if self.numerics != "exact" else ""
        layout = layout_of(f"cuda 1{machine}", self.segment)
        return Cached(groups, Pieces(self.limits.n_states, states), layout)

    def _parts_of(self, group: Mapping[int, KV], device: Device) -> Iterator[DevicePart]:
        for layer, kv in group.items():
            k_bytes, v_bytes = page_bytes(kv)
            yield DevicePart(device, self._caches[layer].k.address, k_bytes)
            if v_bytes:
                yield DevicePart(device, self._caches[layer].v.address, v_bytes)

    @property
    def logits_bytes(self) -> int:
        """Of the host's memory, for what comes back of a step."""
        dim = self.segment.output.dim if self.segment.is_last else self.segment.hidden.dim
        of_draft = self.draft.logits_bytes if self.draft else 0
        return 4 * row_stride(dim) * self.limits.max_outputs + of_draft

    @property
    def staging_bytes(self) -> int:
        """Of rows that go up at a time."""
        of_draft = self.draft.staging_bytes if self.draft else 0
        return max(self.weights.staging.n_bytes, of_draft)

    @property
    def step_weight_bytes(self) -> int:
        """Weights that a step of one row reads: all matrices but a lone embedding."""
        sizes = {}
        for op in self.segment.ops:
            if isinstance(op, Linear):
                sizes[op.weight.name] = matrix_bytes(op.weight)
            elif isinstance(op, ExpertLinear):
                sizes[op.weight.name] = op.n_used * matrix_bytes(op.weight)
        return sum(sizes.values())

    @property
    def segment_counts(self) -> list[int]:
        """For how many segments attention is launched: 1, 4, 16, ... and as many as can be."""
        most = max((cache.max_segments for cache in self._caches.values()), default=1)
        return [*takewhile(lambda n: n < most, (4**i for i in count())), most]

    def _place_step(self) -> StepBuffers:
        arrays = self.step_arrays
        whole = self.step.place(Buffer("step", arrays.most_bytes, is_kept=True))
        self.step_buffer = whole
        n_bytes = 4 * self.limits.max_outputs
        results = self.step.place(Buffer("sampled", 4 * n_bytes, is_kept=True))
        status, mu = (
            self.step.place(Buffer(name, n_bytes, is_kept=True), results.address + i * n_bytes)
            for i, name in ((1, "status"), (2, "mu"))
        )
        part = self._part
        return StepBuffers(
            part("step"), part("ids"), part("pos"), part("seq"), part("wanted"), part("pages"),
            self._place_samples(), results, status, mu, self._counters(), part("spans"),
            part("states"), part("kept"),
        )  # fmt: skip

    def _place_samples(self) -> SampleBuffers:
        samples = self.sample_arrays
        whole = self.step.place(Buffer("samples", samples.memory.nbytes, is_kept=True))
        self.samples_buffer = whole
        rows, goes_on = (
            self.step.place(Buffer(name, 0, is_kept=True), whole.address + offset)
            for name, offset in (("rows", ROWS_OFFSET), ("goes_on", 0))
        )
        return SampleBuffers(rows, goes_on)

    def _counters(self) -> Buffer:
        """Of blocks that have left a part of attention, in memory that begins as zeros.

        Behind them `count`, of those that wait for each other.
        """
        heads = [op.n_heads for op in self.segment.ops if isinstance(op, Attention)]
        n_bytes = 4 * FEW_ROWS * max(heads, default=0)
        counters = self.kv.place(Buffer("counters", n_bytes + 4, is_kept=True))
        self.count = self.kv.place(Buffer("count", 4, is_kept=True), counters.address + n_bytes)
        self._counters_bytes = self.kv.aligned(counters.n_bytes)
        return counters

    def _part(self, name: str, group: int = 0) -> Buffer:
        offset = self.step_buffer.address + self.step_arrays.offset(name, group)
        return self.step.place(Buffer(name, 0, is_kept=True), offset)

    def _place_caches(self) -> dict[int, LayerCache]:
        """For each layer its pages of K and of V, one array each; a group shares the tables."""
        caches: dict[int, LayerCache] = {}
        self._cache_rows: dict[str, int] = {}
        for i, (window, group) in enumerate(self.segment.groups.items()):
            n_pages, before = self.limits.n_pages[window], self.kv.n_bytes
            tables = self._part("tables", i)
            for layer, kv in group.items():
                k, v = (
                    self.kv.place(Buffer(name, n_pages * n_bytes, is_kept=True))
                    for name, n_bytes in zip("KV", page_bytes(kv), strict=True)
                )
                caches[layer] = LayerCache(k, v, tables, -(-n_pages // SEGMENT_PAGES) + 2)
            self._cache_rows[cache_row(window)] = self.kv.n_bytes - before
        return caches

    def _place_states(self) -> dict[int, Buffer]:
        """For each op that keeps a state its slots, one array; by the number of what it leaves."""
        before, slots = self.kv.n_bytes, dict[int, Buffer]()
        for op in self._recurrent:
            n_bytes = self.limits.n_states * op.state.n_bytes
            slots[op.out.index] = self.kv.place(Buffer("state", n_bytes, is_kept=True))
        self._state_rows = {STATE_ROW: self.kv.n_bytes - before} if slots else {}
        return slots


def _positions(group: Iterable[KV]) -> Iterator[Bytes]:
    for kv in group:
        yield from page_positions(kv)


class DevicePart:
    """Pieces of `n_bytes` in a device's memory, one after the other."""

    def __init__(self, device: Device, address: int, n_bytes: int) -> None:
        self._device, self._address, self.n_bytes = device, address, n_bytes

    def copy(self, sources: Numbers, targets: Numbers) -> None:
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._device.copy(self._at(target), self._at(source), self.n_bytes)

    def read(self, numbers: Numbers) -> Bytes:
        pieces = np.empty((len(numbers), self.n_bytes), np.uint8)
        for first, run in self._runs(numbers, pieces):
            self._device.read(first, run)
        return pieces

    def write(self, numbers: Numbers, data: Bytes) -> None:
        for first, run in self._runs(numbers, data):
            self._device.write(first, run)

    def _runs(self, numbers: Numbers, data: Bytes) -> Iterator[tuple[int, Bytes]]:
        """Where pieces of ascending numbers lie, with their data: those go in one transfer."""
        ends = [*(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            if start < end:
                yield self._at(int(numbers[start])), data[start:end]

    def _at(self, number: int) -> int:
        return self._address + number * self.n_bytes
