"""What a step runs on a device: kernels with their arguments, and how many blocks of them.

Knows no model: `lower.py` says which kernels, and `program.py` launches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, TypeAlias

from edgeinfer.kernels.buffers import Arena, Buffer
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.layout import ALIGNMENT

ALL_ROWS, WANTED_ROWS = 0, 1  # the rows of a step that a kernel is for: its argument `rows`
ANY_NUMBER = 1 << 30

Arg: TypeAlias = "int | float | Buffer | Segments"  # a buffer is its address


class Segments(Enum):
    """As many blocks as a row of the step sees segments at most, or that number."""

    OF_STEP = auto()


class Launch(NamedTuple):
    """A kernel for some rows of a step: `blocks` of so many threads for each `rows_per_block`.

    It runs where there are least_rows to most_rows of them; others do the same for other numbers.
    Blocks for rows are at most `most_blocks`, which then are those for the step's sequences.
    Where it makes `values_per_block` of each row in a block, fewer blocks make the first of them.
    """

    kernel: Kernel
    args: Mapping[str, Arg]
    rows: int  # ALL_ROWS or WANTED_ROWS
    blocks: tuple[int | Segments, ...]  # x, or x and y: rows come behind
    threads: int
    shared_bytes: int = 0
    rows_per_block: int = 1
    least_rows: int = 1
    most_rows: int = ANY_NUMBER
    most_blocks: int = ANY_NUMBER
    values_per_block: int = 0

    def takes(self, n_rows: int) -> bool:
        return self.least_rows <= n_rows <= self.most_rows

    def grid(self, n_rows: int, n_segments: int) -> tuple[int, int, int]:
        blocks = (n_segments if isinstance(n, Segments) else n for n in self.blocks)
        of_rows = min(-(-n_rows // self.rows_per_block), self.most_blocks)
        x, y, z = (*blocks, of_rows, 1)[:3]
        return x, y, z

    def first_values(self, n: int) -> Launch:
        """The same of the first n values of each row at least, with the bits that all would have.

        As it is where it makes them in another way.
        """
        if not self.values_per_block:
            return self
        of_values, *others = self.blocks
        assert isinstance(of_values, int)
        return self._replace(blocks=(min(of_values, -(-n // self.values_per_block)), *others))

    def values(self, n_segments: int) -> dict[str, int | float]:
        """The arguments, once buffers have addresses."""
        values: dict[str, int | float] = {}
        for name, arg in self.args.items():
            if isinstance(arg, Buffer):
                values[name] = arg.address
            else:
                values[name] = n_segments if isinstance(arg, Segments) else arg
        return values

    @property
    def depends_on_segments(self) -> bool:
        return any(isinstance(each, Segments) for each in (*self.blocks, *self.args.values()))

    def buffers(self) -> Iterable[Buffer]:
        return (arg for arg in self.args.values() if isinstance(arg, Buffer))


@dataclass(slots=True)
class Lowered:
    """The launches of a segment and the buffers by which a program talks to them."""

    launches: list[Launch] = field(default_factory=list)
    head: int = 0  # launches before the logits: a step that wants hidden rows stops there
    input: Buffer | None = None
    hidden: Buffer | None = None
    logits: Buffer | None = None
    residuals: dict[int, Buffer] = field(default_factory=dict)  # by the layer they enter
    # What picks a token from each row of logits: the likeliest, or as the step's samples say.
    argmax: Launch | None = None
    sample: Launch | None = None
    scratch: Arena = field(default_factory=lambda: Arena(ALIGNMENT))

    def kernels(self) -> set[Kernel]:
        launches = [*self.launches, self.argmax, self.sample]
        return {launch.kernel for launch in launches if launch is not None}

    def place(self) -> None:
        """Offsets for every buffer."""
        uses = [list(launch.buffers()) for launch in self.launches]
        outside = (self.input, self.hidden, self.logits, *self.residuals.values())
        self.scratch.place_by_life(uses, outside)
