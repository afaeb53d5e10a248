"""What a step runs on the CPU: kernels with their arguments, cut into chunks, and their memory.

Knows no model: `lower.py` says which kernels, and `program.py` runs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from edgeinfer.kernels.buffers import Arena, Buffer
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.formats import GROUP_ROWS

# Weight bytes of a matmul's chunks: long ones read memory fastest, short ones even out the end.
# Measured in tests/bench/TUNING.md, "Chunks".
_MOST_CHUNK, _LEAST_CHUNK = 1 << 20, 32 << 10
_N_FIXED = layout.MATMUL_BOUNDS // layout.WORD  # words of a matmul's arguments before its bounds
SHARE = 2.0  # how many times smaller a chunk is than a thread's even share of the rest


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
    residuals: dict[int, Buffer] = field(default_factory=dict)  # by the layer they enter
    scratch: Arena = field(default_factory=Arena)

    def kernels(self) -> set[str]:
        parts = [*(part for op in self.ops for part in op.parts), *self.prologue]
        return {part.kernel for part in parts}

    def place(self) -> None:
        """Offsets for every buffer; one that is no longer read gives its place to the next."""
        uses = [list(op.buffers()) for op in self.ops]
        outside = (self.input, self.hidden, self.logits, *self.residuals.values())
        self.scratch.place_by_life(uses, outside)


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


def first_rows(op: KernelOp, n: int) -> KernelOp:
    """Matmuls that leave the first n values of each row at least; another op as it is.

    They are values of the same bits, in the same places.
    """
    if not op.reads_weights:
        return op
    parts = list[KernelPart]()
    for part in op.parts:
        whole = part.args[-1]
        assert isinstance(whole, int)
        n_groups = min(whole, -(-n // GROUP_ROWS))
        n_bytes, macs = (each * n_groups // whole for each in (part.weight_bytes, part.macs))
        args = [*part.args[:_N_FIXED], 0, n_groups]
        parts.append(part._replace(args=args, rule=1, weight_bytes=n_bytes, macs=macs))
    return KernelOp(op.group, parts)


def recut(op: KernelOp, n_threads: int, share: float) -> KernelOp:
    """The same matmuls in other chunks."""
    parts = []
    left = sum(part.weight_bytes for part in op.parts)
    for part in op.parts:
        n_groups = part.args[-1]
        assert isinstance(n_groups, int)
        bounds = cut(n_groups, part.weight_bytes // n_groups, left, n_threads, share)
        left -= part.weight_bytes
        parts.append(part._replace(args=[*part.args[:_N_FIXED], *bounds], rule=len(bounds) - 1))
    return KernelOp(op.group, parts)
