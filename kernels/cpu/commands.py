"""What a step runs on the CPU: kernels with their arguments, cut into chunks, and their memory.

Knows no model: `lower.py` says which kernels, and `program.py` runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from edgeinfer.kernels.cpu import layout

# Weight bytes of a matmul's chunks: long ones read memory fastest, short ones even out the end.
# Measured in tests/bench/TUNING.md, "Chunks".
_MOST_CHUNK, _LEAST_CHUNK = 1 << 20, 32 << 10
SHARE = 2.0  # how many times smaller a chunk is than a thread's even share of the rest


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory that a program will have; its address is an offset until its arena has memory."""

    name: str
    n_bytes: int
    address: int = 0
    is_kept: bool = False  # it outlives the step: weights, and what layers cache


class Arena:
    """Buffers beside each other, laid out before there is memory for them."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._buffers: list[Buffer] = []

    def place(self, buffer: Buffer, offset: int | None = None) -> Buffer:
        """Behind all others, or where others lie that are dead when this one lives."""
        if offset is None:
            offset = self.n_bytes
            self.n_bytes += aligned(buffer.n_bytes)
        buffer.address = offset
        self._buffers.append(buffer)
        return buffer

    def settle(self, address: int) -> None:
        """There is memory now: offsets become addresses. Once."""
        for buffer in self._buffers:
            buffer.address += address


def aligned(n_bytes: int) -> int:
    """Bytes that a buffer takes in an arena."""
    return -(-n_bytes // 64) * 64


Args: TypeAlias = "list[int | Buffer]"  # argument words; a buffer stands for its address


class KernelPart(NamedTuple):
    """One kernel with its argument words (a Buffer stands for its address) and chunk rule.

    Weight bytes, and multiplications per row of `rows`, are for benchmarks.
    """

    kernel: str
    args: Args
    rule: int
    weight_bytes: int = 0
    macs: int = 0
    rows: int = layout.ALL_ROWS


class KernelOp(NamedTuple):
    """Kernels that may run side by side. `group` names what the op is, for benchmarks."""

    group: str
    parts: list[KernelPart]

    @property
    def reads_weights(self) -> bool:
        """Whether these are matmuls."""
        return self.parts[0].kernel.startswith("matmul.")

    @property
    def plans(self) -> bool:
        """Whether chunks of later ops depend on it."""
        return self.parts[0].kernel == "dispatch"

    def buffers(self) -> Iterable[Buffer]:
        for part in self.parts:
            for arg in part.args:
                if isinstance(arg, Buffer):
                    yield arg


@dataclass(slots=True)
class Lowered:
    """The ops of a segment and the buffers by which a program talks to them."""

    ops: list[KernelOp] = field(default_factory=list)
    prologue: list[KernelPart] = field(default_factory=list)
    head: int = 0  # ops before the logits: a step that wants hidden rows stops there
    input: Buffer | None = None
    hidden: Buffer | None = None
    logits: Buffer | None = None
    scratch: Arena = field(default_factory=Arena)

    def kernels(self) -> set[str]:
        parts = [*(part for op in self.ops for part in op.parts), *self.prologue]
        return {part.kernel for part in parts}

    def place(self) -> None:
        """Offsets for every buffer; one that is no longer read gives its place to the next."""
        n_ops = len(self.ops)
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for i, op in enumerate(self.ops):
            for buffer in op.buffers():
                if not buffer.is_kept:
                    first.setdefault(buffer, i)
                    last[buffer] = i
        for kept in (self.input, self.hidden, self.logits):
            if kept is not None:
                first[kept], last[kept] = 0, n_ops
        starting, ending = _by_op(first, n_ops), _by_op(last, n_ops)
        free: dict[int, list[int]] = {}
        for i in range(n_ops):
            for buffer in starting[i]:
                places = free.get(buffer.n_bytes)
                self.scratch.place(buffer, places.pop() if places else None)
            for buffer in ending[i]:
                free.setdefault(buffer.n_bytes, []).append(buffer.address)


def cut(
    n_groups: int, group_bytes: int, left: int, n_threads: int, share: float = SHARE
) -> list[int]:
    """Bounds of chunks of n_groups groups of 8 weight rows, the first of `left` bytes to be read.

    Whoever comes next takes 1 / `share` of what would be a thread's even share of the rest (guided
    self-scheduling, Polychronopoulos and Kuck 1987), in whole panels of groups.
    """
    bounds = [0]
    while bounds[-1] < n_groups:
        n_bytes = max(_LEAST_CHUNK, min(left / (share * n_threads), _MOST_CHUNK))
        n_panels = max(1, round(n_bytes / (group_bytes * layout.PANEL_GROUPS)))
        bounds.append(min(bounds[-1] + n_panels * layout.PANEL_GROUPS, n_groups))
        left -= (bounds[-1] - bounds[-2]) * group_bytes
    return bounds


def recut(op: KernelOp, n_threads: int, share: float) -> KernelOp:
    """The same matmuls in other chunks."""
    parts = []
    left = sum(part.weight_bytes for part in op.parts)
    for part in op.parts:
        first = layout.MATMUL_BOUNDS // layout.WORD
        n_groups = part.args[-1]
        assert isinstance(n_groups, int)
        bounds = cut(n_groups, part.weight_bytes // n_groups, left, n_threads, share)
        left -= part.weight_bytes
        parts.append(part._replace(args=[*part.args[:first], *bounds], rule=len(bounds) - 1))
    return KernelOp(op.group, parts)


def _by_op(when: Mapping[Buffer, int], n_ops: int) -> list[list[Buffer]]:
    lists: list[list[Buffer]] = [[] for _ in range(n_ops + 1)]
    for buffer, i in when.items():
        lists[i].append(buffer)
    return lists
