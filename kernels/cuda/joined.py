"""Launches of a step of one row that become parts of one kernel, whose blocks stay: joined.cu.

Small models have hundreds of launches in a step, and between two of them a GPU reads nothing. Not
yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cuda.commands import Launch, Lowered
from edgeinfer.kernels.cuda.device import Bound, Device
from edgeinfer.kernels.cuda.kernel import JOINED, Kernel

WARPS = 8  # of a block of every part
THREADS = 32 * WARPS  # JOINED_THREADS of joined.cuh
MOST_SHARED_BYTES = 96 << 10  # of a block of a part, what headers have beside it left out
# Kernels that wait for their input (await.cuh), each with one array in shared memory at most.
_CAN_BE_PARTS = ("attend", "matmul", "norm_matmul", "norm_swiglu", "pointwise", "quantise",
                 "rms_norm")  # fmt: skip
_LEAST_PARTS = 8  # of a kernel: two layers have as many
_LEAST_SHARED_BYTES = 48 << 10  # that arrays of parts may have
_CALL = np.dtype([("kernel", "i4"), ("blocks", "u4", 3), ("arguments", "u8", 32)])


class Run(NamedTuple):
    """Launches `first` .. `end` - 1 of a segment: of them those for one row as one kernel."""

    first: int
    end: int
    parts: tuple[Launch, ...]
    calls: Buffer  # for each number of segments: `struct Call` for each part

    @property
    def kernel(self) -> Kernel:
        return Kernel(JOINED, parts=tuple(dict.fromkeys(part.kernel for part in self.parts)))

    @property
    def shared_bytes(self) -> int:
        return max(_LEAST_SHARED_BYTES, *(part.shared_bytes for part in self.parts))

    def n_blocks(self, n_segments: int) -> int:
        """Of the part that has most."""
        return max(int(np.prod(part.grid(1, n_segments))) for part in self.parts)

    def table(self, bound: Sequence[Bound], n_segments: int) -> NDArray[Any]:
        """`struct Call` for each part."""
        numbers, calls = self.kernel.parts, np.zeros(len(self.parts), _CALL)
        for call, part, each in zip(calls, self.parts, bound, strict=True):
            call["kernel"] = numbers.index(part.kernel)
            call["blocks"] = part.grid(1, n_segments)
            call["arguments"][: len(each.values)] = each.slots()
        return calls


def runs_of(lowered: Lowered, n_tables: int) -> list[Run]:
    """The launches of a segment that can be joined; each run with room for so many tables."""
    head, launches = lowered.head, list(enumerate(lowered.launches))
    runs = []
    for of_segment in (launches[:head], launches[head:]):  # a step may end between these
        of_one = [(i, launch) for i, launch in of_segment if launch.takes(1)]
        for can_be_part, run in groupby(of_one, lambda each: _can_be_part(each[1])):
            numbers, parts = zip(*run, strict=True)
            if can_be_part and len(parts) >= _LEAST_PARTS:
                calls = Buffer("calls", n_tables * len(parts) * _CALL.itemsize, is_kept=True)
                runs.append(Run(numbers[0], numbers[-1] + 1, parts, calls))
    return runs


def _can_be_part(launch: Launch) -> bool:
    is_known = launch.kernel.name in _CAN_BE_PARTS
    return is_known and launch.threads == THREADS and launch.shared_bytes <= MOST_SHARED_BYTES


class Joined:
    """The runs of a program on a device that has loaded their kernels, where it can have them."""

    def __init__(
        self, device: Device, runs: Sequence[Run], segment_counts: Sequence[int], count: Buffer
    ) -> None:
        """`count` is an int in memory, 0 so far, that nobody else writes."""
        self._device, self._count = device, count
        self._launches: dict[tuple[int, int], tuple[Run, int, Bound]] = {}
        for run in runs:
            n_at_once = device.blocks_at_once(run.kernel, THREADS, run.shared_bytes)
            if n_at_once:
                self._write(run, segment_counts, n_at_once)

    def _write(self, run: Run, segment_counts: Sequence[int], n_at_once: int) -> None:
        device, address = self._device, run.calls.address
        for n_segments in segment_counts:
            bound = [device.bind(p.kernel, p.values(n_segments)) for p in run.parts]
            table = run.table(bound, n_segments)
            device.write(address, table)
            args = {
                "step": run.parts[0].values(n_segments)["step"], "calls": address,
                "n_calls": len(table), "count": self._count.address,
            }  # fmt: skip
            n_blocks = min(n_at_once, run.n_blocks(n_segments))
            launch = run, n_blocks, device.bind(run.kernel, args)
            self._launches[run.first, n_segments] = launch
            address += table.nbytes

    def launch(self, first: int, n_segments: int) -> range:
        """Which launches are done by the one that begins with number `first`, if there is one."""
        if (first, n_segments) not in self._launches:
            return range(0)
        run, n_blocks, bound = self._launches[first, n_segments]
        grid = n_blocks, 1, 1
        self._device.launch(run.kernel, grid, THREADS, run.shared_bytes, bound, at_once=True)
        return range(run.first, run.end)
