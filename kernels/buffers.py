"""Where a program's memory lies before there is any, and when each piece of it is in use.

Knows no kernel: a lowering asks for buffers, and a program gives their arenas memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeinfer.fused_ops import Matmul, Step
from edgeinfer.fusion import parts_of
from edgeinfer.graph import Embed, ExpertLinear, Linear, Segment, Value
from edgeinfer.ops import named_inputs
from edgeinfer.quant import Weight


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory that a program will have; its address is an offset until its arena has memory."""

    name: str
    n_bytes: int
    address: int = 0
    is_kept: bool = False  # it outlives the step: weights, and what layers cache


class Arena:
    """Buffers beside each other, laid out before there is memory for them.

    Each begins at a multiple of `alignment` bytes.
    """

    def __init__(self, alignment: int = 64) -> None:
        self.n_bytes = 0
        self._alignment = alignment
        self._buffers: list[Buffer] = []

    def aligned(self, n_bytes: int) -> int:
        """Bytes that a buffer takes here."""
        return -(-n_bytes // self._alignment) * self._alignment

    def place(self, buffer: Buffer, offset: int | None = None) -> Buffer:
        """Behind all others, or where others lie that are dead when this one lives."""
        if offset is None:
            offset = self.n_bytes
            self.n_bytes += self.aligned(buffer.n_bytes)
        buffer.address = offset
        self._buffers.append(buffer)
        return buffer

    def place_by_life(
        self, uses: Sequence[Iterable[Buffer]], outside: Iterable[Buffer | None]
    ) -> None:
        """Place what ops use, in their order; one that is no longer read gives its place on.

        `outside` are those that whoever runs the ops writes before them or reads after them.
        """
        n_ops = len(uses)
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for i, buffers in enumerate(uses):
            for buffer in buffers:
                if not buffer.is_kept:
                    first.setdefault(buffer, i)
                    last[buffer] = i
        for each in outside:
            if each is not None:
                first[each], last[each] = 0, n_ops
        starting, ending = _by_op(first, n_ops), _by_op(last, n_ops)
        free: dict[int, list[int]] = {}
        for i in range(n_ops):
            for buffer in starting[i]:
                places = free.get(buffer.n_bytes)
                self.place(buffer, places.pop() if places else None)
            for buffer in ending[i]:
                free.setdefault(buffer.n_bytes, []).append(buffer.address)

    def settle(self, address: int) -> None:
        """There is memory now: offsets become addresses. Once."""
        for buffer in self._buffers:
            buffer.address += address


def _by_op(when: Mapping[Buffer, int], n_ops: int) -> list[list[Buffer]]:
    lists: list[list[Buffer]] = [[] for _ in range(n_ops + 1)]
    for buffer, i in when.items():
        lists[i].append(buffer)
    return lists


class Reads:
    """Which steps read a value, and as what: floats, or what products of blocks read."""

    def __init__(self, steps: Sequence[Step], kept: set[Value]) -> None:
        self._reads: dict[Value, list[int]] = {}  # the steps that read it, ascending
        self._as_floats, self._as_blocks = set(kept), set[Value]()
        self._kept = kept
        for i, step in enumerate(steps):
            for op in parts_of(step):
                in_blocks = isinstance(op, (Matmul, ExpertLinear)) and reads_blocks(op)
                for name, value in named_inputs(op):
                    self._reads.setdefault(value, []).append(i)
                    (self._as_blocks if in_blocks and name == "x" else self._as_floats).add(value)

    def is_last(self, value: Value, i: int) -> bool:
        """Whether step i reads a value as the only one from there on, and once."""
        reads = self._reads[value]
        return value not in self._kept and reads[-1] == i and reads.count(i) == 1

    def is_only(self, value: Value, i: int) -> bool:
        """Whether nobody but step i reads a value, nor who runs the steps."""
        return value not in self._kept and set(self._reads.get(value, ())) == {i}

    def is_quantised(self, value: Value) -> bool:
        return value in self._as_blocks

    def is_quantised_only(self, value: Value) -> bool:
        return value in self._as_blocks and value not in self._as_floats


def reads_blocks(op: Matmul | ExpertLinear) -> bool:
    """Whether a product reads x quantised in blocks of 32, as matrices in blocks do."""
    return op.weight.type.block > 1


def weights_of(segment: Segment) -> tuple[list[Weight], list[Weight]]:
    """The matrices and the vectors that a segment's ops read."""
    matrices, vectors = list[Weight](), list[Weight]()
    for op in segment.ops:
        weights = [field for field in op if isinstance(field, Weight)]
        if isinstance(op, (Embed, Linear, ExpertLinear)):
            matrices.append(op.weight)
            weights.remove(op.weight)
        vectors += weights
    return matrices, vectors
