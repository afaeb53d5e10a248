"""A segment of a model made runnable on the CPU: packed weights, KV pages, scratch and a tape.

Knows no scheduling and no files. One step is one native call; see `team.py`.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer import platform
from edgeinfer.batch import (
    Batch,
    OpTime,
    OutputKind,
    Outputs,
    PageTable,
)
from edgeinfer.errors import ClosedError
from edgeinfer.kernels.buffers import Arena, Buffer
from edgeinfer.kernels.cached import CacheVerbs
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.blueprint import Blueprint
from edgeinfer.kernels.cpu.commands import KernelOp, first_rows, recut
from edgeinfer.kernels.cpu.host_sampler import SampleRun
from edgeinfer.kernels.cpu.idle import IdleBuild, IdleWork
from edgeinfer.kernels.cpu.layout import row_stride
from edgeinfer.kernels.cpu.team import Op, Part, Tape, shared_team
from edgeinfer.kernels.cpu.trial import Trial
from edgeinfer.kernels.cpu.tune import Schedule, Tuning, schedules

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeinfer.kernels.cpu.backend import CpuBackend
    from edgeinfer.sampling.params import SampleTable

_FEW_ROWS = 8  # of steps that read weights faster than they multiply
_STEP = struct.Struct(f"={layout.H_ABORT // layout.WORD + 1}q")  # of the header, from H_ROWS on


class CpuTicket:
    """A submitted step."""

    def __init__(self, program: CpuProgram, batch: Batch, schedule: Schedule) -> None:
        self._program, self._batch, self._schedule = program, batch, schedule

    def wait(self) -> Outputs:
        """Run the step on this thread and the team, without the interpreter lock."""
        return self._program._run(self._batch, self._schedule)

    def abort(self) -> None:
        """Cut the step short, from any thread."""
        self._program._set(layout.H_ABORT, 1)


class CpuProgram(CacheVerbs):
    """Runs batches of one segment. Not thread-safe: one step at a time."""

    def __init__(self, backend: CpuBackend, drawn: Blueprint) -> None:
        self.segment, self.limits = drawn.segment, drawn.limits
        self._backend, self._closed = backend, False
        self._drawn, self._lowered, self._weights = drawn, drawn.lowered, drawn.weights
        self.draft: CpuProgram | None = None  # what guesses tokens, with weights of this one
        self._memories: list[platform.Memory] = []
        self._pages = self._copies = np.zeros(0, np.int32)  # of the page tables of a step
        self._placed: list[PageTable] = []
        self._shapes: list[tuple[int, int, int]] = []
        try:
            self._make()
        except BaseException:
            self._free()  # an error keeps what its frames refer to
            raise

    def _make(self) -> None:
        backend, drawn, limits = self._backend, self._drawn, self.limits
        self._weights.reserve()
        # Steps read all over it: in pages of 4 KiB attention takes a quarter longer.
        self._kv = self._reserve(drawn.kv, huge=True)
        self._scratch = self._reserve(drawn.scratch)
        self._cached = drawn.cached()
        backend.load(drawn.kernels())
        library, lowered = backend.library, self._lowered
        self._team = shared_team(library, limits.n_threads)
        backend.pack(self._weights, self._team, limits.n_threads)
        self._make_step_arrays()
        # Those that steps have asked for.
        self._tapes: dict[tuple[Schedule, OutputKind, int], Tape] = {}
        self._sample_run: SampleRun | None = None  # once somebody has edited logits
        self._trial = Trial(self._team, lowered.ops, self._tape)
        self._schedules = schedules(limits.n_threads)
        path = library.folder / f"decode-{self._trial.key}-{limits.n_threads}.json"
        self._tuning = Tuning(self._schedules, path, self._trial)
        self.memory = drawn.rows()
        can_build = backend.can_build_beside(sum(self.memory.values()))
        # One after the other: what is measured must be the kernels that will run.
        build = IdleBuild(library.inexact() if can_build else (), library.folder, library.target)
        self._idle: IdleWork = self._tuning if build.is_done else build
        self.draft = CpuProgram(backend, drawn.draft) if drawn.draft else None

    # -- steps ---------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> CpuTicket:
        """Prepare one step; it runs when the ticket is waited for."""
        if self._closed:
            raise ClosedError("this program was closed")
        n_rows, n_wanted, limits = batch.n_rows, len(batch.wanted), self.limits
        assert 0 < n_rows <= limits.max_rows, f"{n_rows} rows, room for {limits.max_rows}"
        assert n_wanted <= limits.max_outputs, f"{n_wanted} outputs, room for {limits.max_outputs}"
        assert len(batch.tables) <= limits.max_sequences
        batch.check()
        self._pos[:n_rows], self._seq[:n_rows] = batch.pos, batch.seq
        self._wanted[:n_wanted] = batch.wanted
        if len(batch.ids):
            self._ids[:n_rows] = batch.ids
        if batch.hidden is not None:
            self._input[:n_rows] = batch.hidden
        self._copy_tables(batch.tables)
        if self._drawn.states:
            self._copy_states(batch)
        samples = batch.samples.address if batch.samples else 0
        _STEP.pack_into(self._step_words, 0, n_rows, n_wanted, len(batch.tables), samples, 0)
        is_few = n_rows <= _FEW_ROWS
        schedule = self._tuning.next(n_rows) if is_few else self._schedules[0]
        return CpuTicket(self, batch, schedule)

    def _copy_states(self, batch: Batch) -> None:
        states, kept = batch.states, batch.kept
        assert states is not None and kept is not None, "this segment has states"
        slots = np.concatenate([states, kept])
        n_states = self.limits.n_states
        assert ((slots >= -1) & (slots < n_states)).all(), f"{n_states} slots"
        self._states[: len(states)], self._kept[: len(kept)] = states, kept

    def _copy_tables(self, tables: list[tuple[PageTable, ...]]) -> None:
        """Have the page tables of a step where kernels find them, as those of most steps lie."""
        flat = [table for of_sequence in tables for table in of_sequence]
        if len(flat) == len(self._placed) and all(map(is_, flat, self._placed)):
            return
        shapes = [(len(pages), n_pinned, n_visible) for pages, n_pinned, n_visible in flat]
        if shapes != self._shapes:
            self._place_tables(tables)
            self._shapes = shapes
        np.concatenate([table.pages for table in flat], out=self._copies)
        self._placed = flat

    def _place_tables(self, tables: list[tuple[PageTable, ...]]) -> None:
        """Tell kernels where the copies of these tables lie, and what is seen of them."""
        n = sum(len(table.pages) for of_sequence in tables for table in of_sequence)
        self._placed, self._shapes = [], []  # until all of it is done
        if n > len(self._pages):
            self._pages = np.empty(n, np.int32)
        self._copies, address = self._pages[:n], self._pages.ctypes.data
        for i, of_sequence in enumerate(tables):
            for group, (pages, n_pinned, n_visible) in zip(self._tables, of_sequence, strict=True):
                group[i] = address, len(pages), n_pinned, n_visible
                address += pages.nbytes

    def _run(self, batch: Batch, schedule: Schedule) -> Outputs:
        tape = self._step_tape(schedule, batch.output, batch.n_logits)
        self._idle.begin_step()
        try:
            begun = time.perf_counter()
            self._team.run(tape)
            seconds = time.perf_counter() - begun
        finally:
            self._idle.end_step()
        n, is_aborted = len(batch.wanted), bool(self._get(layout.H_ABORT))
        if batch.n_rows <= _FEW_ROWS and not is_aborted:
            self._tuning.took(schedule, batch.n_rows, seconds)
        out = Outputs(self._no_rows, self._no_rows, self._no_ids, aborted=is_aborted)
        out.residuals = {i: self._residuals[i][: batch.n_rows] for i in batch.residuals}
        is_last = self.segment.is_last
        if not is_last or batch.output == "hidden" or batch.with_hidden:
            out.hidden = self._hidden[: n if is_last else batch.n_rows]
        if is_last and batch.output == "logits":
            out.logits = self._logits[:n, : batch.n_logits or None]
        elif is_last and batch.output == "ids":
            assert batch.samples is not None
            out.ids = batch.samples.ids[:n]
        return out

    def sample(self, logits: NDArray[np.float32], table: SampleTable) -> None:
        """As a step does, by the same kernel."""
        if self._sample_run is None:
            op, n_vocab = self._drawn.sample, self.segment.output.dim
            assert op is not None, "only the last segment has logits"
            library, n_threads = self._backend.library, self.limits.n_threads
            self._sample_run = SampleRun(op, n_vocab, library, self._team, n_threads)
        self._sample_run(logits, table)

    def describe(self) -> dict[str, Any]:
        """What it runs on."""
        return {"device": "cpu", "threads": self.limits.n_threads}

    def tune(self, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
        """Find out now what would be when idle: how steps of few rows run fastest."""
        self._tuning.finish(lambda: progress(*self._tuning.progress))
        n_threads = self._tuning.current.n_threads
        return "on 1 thread" if n_threads == 1 else f"on {n_threads} threads"

    def build_exactly(self, progress: Callable[[int, int], None]) -> int:
        """Build now what would be built when idle; returns how many kernels that were."""
        return self._backend.library.rebuild(lambda done, total, name: progress(done, total))

    @property
    def unkept(self) -> str:
        """Why what was built and measured here is for this process alone; "" where it is kept."""
        return self._backend.library.unkept or self._tuning.unkept

    def close(self) -> None:
        """Free everything, but scratch for who keeps a view of what a step yielded."""
        if self._closed:
            return
        self._closed = True
        if self.draft is not None:
            self.draft.close()
        self._idle.close()
        self._tuning.close()
        self._team.quiesce()
        self._trial.close()
        if self._sample_run is not None:
            self._sample_run.close()
        for tape in self._tapes.values():
            tape.close()
        self._forget_views()
        self._free()

    def _reserve(self, arena: Arena, *, huge: bool = False) -> platform.Memory:
        """Memory for an arena, which `close` frees."""
        memory = platform.Memory(arena.n_bytes, huge=huge)
        self._memories.append(memory)
        arena.settle(memory.address)
        return memory

    def _free(self) -> None:
        for memory in self._memories:
            memory.close()
        self._weights.close()

    def __enter__(self) -> CpuProgram:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- construction --------------------------------------------------------------------------

    def _make_step_arrays(self) -> None:
        limits = self.limits
        self._header = np.zeros(layout.HEADER_WORDS, np.int64)
        self._step_words = self._header.data.cast("B")
        self._pos = np.zeros(limits.max_rows, np.int64)
        self._seq = np.zeros(limits.max_rows, np.int32)
        self._ids = np.zeros(limits.max_rows, np.int32)
        self._wanted = np.zeros(limits.max_outputs, np.int32)
        self._states = np.zeros(limits.max_sequences, np.int32)
        self._kept = np.zeros(limits.max_rows, np.int32)
        shape = len(self.segment.groups), limits.max_sequences, layout.TABLE_BYTES // layout.WORD
        self._tables: NDArray[np.int64] = np.zeros(shape, np.int64)
        for word, array in (
            (layout.H_POS, self._pos),
            (layout.H_SEQ, self._seq),
            (layout.H_IDS, self._ids),
            (layout.H_WANTED, self._wanted),
            (layout.H_TABLES, self._tables),
            (layout.H_STATES, self._states),
            (layout.H_KEPT, self._kept),
        ):
            self._set(word, array.ctypes.data)
        self._no_rows = np.zeros((0, 0), np.float32)
        self._no_ids = np.zeros(0, np.int32)
        lowered, dim = self._lowered, self.segment.graph.hparams.dim
        if lowered.input:
            self._input = self._floats(lowered.input, limits.max_rows, dim)
        assert lowered.hidden is not None
        n_hidden = limits.max_outputs if self.segment.is_last else limits.max_rows
        self._hidden = self._floats(lowered.hidden, n_hidden, dim)
        if lowered.logits:
            vocab = self.segment.output.dim
            self._logits = self._floats(lowered.logits, limits.max_outputs, vocab)
        self._residuals = {
            layer: self._floats(buffer, limits.max_rows, dim)
            for layer, buffer in lowered.residuals.items()
        }

    def _floats(self, buffer: Buffer, n_rows: int, dim: int) -> NDArray[np.float32]:
        """A view of scratch, which hooks may keep for longer than this program lives."""
        stride = row_stride(dim)
        raw = self._scratch.view(buffer.address, n_rows * stride)
        return np.frombuffer(raw, np.float32).reshape(n_rows, stride // 4)[:, :dim]

    def _step_tape(self, schedule: Schedule, output: OutputKind, n_logits: int) -> Tape:
        key = schedule, output, n_logits
        if key not in self._tapes:
            lowered = self._lowered
            ops = lowered.ops[: lowered.head]
            if output != "hidden":
                head = lowered.ops[lowered.head :]
                ops += [first_rows(op, n_logits) for op in head] if n_logits else head
            if schedule != self._schedules[0] or n_logits:
                ops = [recut(op, *schedule) if op.reads_weights else op for op in ops]
            if output == "ids" and self._drawn.sample:
                ops.append(self._drawn.sample)
            prologue = [Part.of(part, self._backend.library) for part in lowered.prologue]
            tape = self._tape(ops, self._header.ctypes.data, schedule.n_threads, prologue)
            self._tapes[key] = tape
        return self._tapes[key]

    def _tape(
        self, ops: Sequence[KernelOp], header: int, n_threads: int, prologue: Sequence[Part] = ()
    ) -> Tape:
        library = self._backend.library
        return Tape([Op.of(op, library) for op in ops], header, n_threads, prologue)

    def _set(self, word: int, value: int) -> None:
        self._header[word // layout.WORD] = value

    def _get(self, word: int) -> int:
        return int(self._header[word // layout.WORD])

    def _forget_views(self) -> None:
        self._cached = None
        self._hidden = self._no_rows
        self._logits = self._no_rows
        self._input = self._no_rows
        self._residuals = {}

    # -- measuring -----------------------------------------------------------------------------

    @property
    def step_weight_bytes(self) -> int:
        """Packed weights that a step of one row reads."""
        return self._drawn.step_weight_bytes

    def read_bandwidth(self) -> float:
        """Bytes per second at which the team reads the packed weights once, doing nothing else."""
        from edgeinfer.kernels.cpu import measure  # what benchmarks need

        self._set(layout.H_ABORT, 0)
        weights, library = self._weights, self._backend.library
        return measure.read_bandwidth(weights, library, self._team, self._team_args())

    def op_seconds(self, batch: Batch) -> list[OpTime]:
        """Run a step op by op and time each, less what starting any costs; for benchmarks."""
        from edgeinfer.kernels.cpu import measure  # what benchmarks need

        self.submit(batch)
        library, team = self._backend.library, self._team
        return measure.op_seconds(self._lowered, batch, library, team, self._team_args())

    def _team_args(self) -> tuple[int, int]:
        return self._header.ctypes.data, self.limits.n_threads
