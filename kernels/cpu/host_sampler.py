"""Picks tokens from rows of logits in host memory: the kernel `sample`, in a step or by itself.

Knows no program: a device of another kind is handed a `HostSampler` for what it doesn't sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeinfer import platform
from edgeinfer.kernels.buffers import Arena, Buffer
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.builders import Progress
from edgeinfer.kernels.cpu.commands import KernelOp, KernelPart
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.team import KERNELS, Op, Tape, Team, shared_team
from edgeinfer.sampling.params import SampleTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE = "sample"


class Sampling:
    """The kernel and its memory, before there is any."""

    def __init__(self, n_vocab: int, n_threads: int) -> None:
        self.n_vocab, self._thread_bytes = n_vocab, layout.sample_scratch_bytes(n_vocab)
        self.scratch = Buffer("sampling", n_threads * self._thread_bytes)

    def op(self, logits: Buffer | int, stride: int) -> KernelOp:
        """Samples each wanted row, `stride` bytes apart, as the step's table asks."""
        args = layout.SAMPLE.pack(
            logits=logits, stride=stride, n_vocab=self.n_vocab, scratch=self.scratch,
            scratch_bytes=self._thread_bytes,
        )  # fmt: skip
        return KernelOp("sample", [KernelPart(SAMPLE, args, layout.COUNT_WANTED)])


class SampleRun:
    """The kernel run by itself, on logits wherever they lie."""

    def __init__(
        self, op: KernelOp, n_vocab: int, library: Library, team: Team, n_threads: int
    ) -> None:
        self._team, self._n_vocab = team, n_vocab
        self._header = np.zeros(layout.HEADER_WORDS, np.int64)
        self._tape = Tape([Op.of(op, library)], self._header.ctypes.data, n_threads)

    def __call__(self, logits: NDArray[np.float32], table: SampleTable) -> None:
        """Fill the outputs of a table's first R rows from logits (R, V).

        Rows may lie apart. Logits are changed on the way and put back.
        """
        n_rows, n_vocab = logits.shape
        assert n_vocab == self._n_vocab, f"{n_vocab} logits a row, not {self._n_vocab}"
        assert n_rows <= table.n_rows, f"{n_rows} rows, and {table.n_rows} that say how"
        assert logits.dtype == np.float32 and logits.strides[1] == 4 and logits.flags.writeable
        self._tape.set_word(0, layout.SAMPLE_LOGITS, logits.ctypes.data)
        self._tape.set_word(0, layout.SAMPLE_STRIDE, logits.strides[0])
        self._header[layout.H_WANTED_ROWS // layout.WORD] = n_rows
        self._header[layout.H_SAMPLES // layout.WORD] = table.address
        self._team.run(self._tape)

    def close(self) -> None:
        self._team.quiesce()
        self._tape.close()


class HostSampler:
    """Samples on the team of this process, which all that runs on the CPU shares.

    Takes nothing before `open`. Not thread-safe: one call at a time.
    """

    def __init__(
        self, library: Library, n_vocab: int, n_threads: int, progress: Progress | None = None
    ) -> None:
        self._library, self._progress = library, progress
        self._n_vocab, self._n_threads = n_vocab, n_threads
        self._sampling, self._arena = Sampling(n_vocab, n_threads), Arena()
        self._arena.place(self._sampling.scratch)
        self._memory: platform.Memory | None = None
        self._run: SampleRun | None = None

    @property
    def n_bytes(self) -> int:
        """Memory that it holds from `open` to `close`."""
        return self._arena.n_bytes

    @property
    def building_bytes(self) -> int:
        """Memory that `open` takes for a while, where kernels must be built."""
        return self._library.building_bytes({SAMPLE, *KERNELS})

    def open(self) -> None:
        """Load or build the kernel and reserve memory; once."""
        self._library.load({SAMPLE, *KERNELS}, self._progress)
        team = shared_team(self._library, self._n_threads)
        self._memory = platform.Memory(self.n_bytes)
        self._arena.settle(self._memory.address)
        op = self._sampling.op(0, 0)
        self._run = SampleRun(op, self._n_vocab, self._library, team, self._n_threads)

    def sample(self, logits: NDArray[np.float32], table: SampleTable) -> None:
        """Fill the outputs of a table's first R rows from logits (R, V); see `SampleRun`."""
        assert self._run is not None, "open it first"
        self._run(logits, table)

    def close(self) -> None:
        """Free everything."""
        if self._run is not None:
            self._run.close()
            self._run = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
