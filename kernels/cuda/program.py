"""A segment of a model made runnable on a device: weights, KV pages, scratch and launches.

Knows no scheduling and no files, nor whether the device is a GPU or the shim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgeinfer.batch import PAGE, Batch, Outputs, Sampler
from edgeinfer.errors import ClosedError, DeviceError
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cached import Cached, CacheVerbs
from edgeinfer.kernels.cuda.attention import n_segments
from edgeinfer.kernels.cuda.blueprint import Blueprint
from edgeinfer.kernels.cuda.device import Device
from edgeinfer.kernels.cuda.joined import Joined
from edgeinfer.kernels.cuda.layout import StepArrays
from edgeinfer.kernels.cuda.lower_base import FEW_ROWS
from edgeinfer.kernels.cuda.running import Picked, Running, store
from edgeinfer.kernels.cuda.samples import SampleArrays
from edgeinfer.kernels.cuda.steps import Result, Shape, Steps
from edgeinfer.kernels.cuda.tiles import row_stride
from edgeinfer.sampling.params import SampleTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress: TypeAlias = Callable[[str, int, int], None]  # stage, done, total


_N_RESULTS = 4  # steps whose tokens are on their way or not yet taken, at most


class CudaTicket:
    """A submitted step."""

    def __init__(self, program: CudaProgram, batch: Batch, running: Running) -> None:
        self._program, self._batch, self._running = program, batch, running
        self._outputs: Outputs | None = None

    def wait(self) -> Outputs:
        """Block, without the interpreter lock, until the step is done."""
        if self._outputs is None:
            self._outputs = self._program._collect(self._batch, self._running)
        return self._outputs

    def abort(self) -> None:
        """Cut the step short, from any thread."""
        self._program._abort(self._running)


class CudaProgram(CacheVerbs):
    """Runs batches of one segment. Not thread-safe: one step at a time.

    Where the device picks a token for every sequence of a step, it begins the next step before
    anybody has asked: what it computes is taken if the next batch says just that. Else it is lost:
    it has written behind the ends of sequences only, and whoever writes there comes after it.
    """

    def __init__(
        self,
        device: Device,
        name: str,
        drawn: Blueprint,
        sampler: Sampler | None,
        memory: Mapping[str, Mapping[str, int]],
        progress: Progress,
    ) -> None:
        self.segment, self.limits, self.memory = drawn.segment, drawn.limits, memory
        self._device, self._name = device, name
        self._drawn, self._lowered = drawn, drawn.lowered
        self._reserved: list[int] = []
        self._sampler = sampler
        self.draft: CudaProgram | None = None  # what guesses tokens, with weights of this one
        self._closed = False
        try:
            self._make(progress)
        except BaseException:
            self._free()  # an error keeps what its frames refer to
            raise

    def _make(self, progress: Progress) -> None:
        device, drawn = self._device, self._drawn
        for arena in drawn.arenas():
            if arena.n_bytes:
                self._reserved.append(device.reserve(arena.n_bytes))
                arena.settle(self._reserved[-1])
                if arena is drawn.kv:  # zeros, as every machine's begins
                    device.fill(self._reserved[-1], arena.n_bytes)
        self._cached = drawn.cached(device)
        device.load(drawn.kernels(), lambda done, total, _: progress("kernels", done, total))
        self._arrays = drawn.step_arrays
        self._asked = StepArrays(self.limits, self.segment.groups, bool(self.segment.states))
        n_vocab = self.segment.output.dim if self.segment.is_last else 0
        self._samples, self._asked_samples = (
            drawn.sample_arrays, SampleArrays(self.limits, n_vocab)
        )  # fmt: skip
        step = drawn.step_buffer.address
        device.write(step, self._arrays.memory)
        drawn.weights.upload(device, step, lambda done, total: progress("weights", done, total))
        if self._sampler is not None:
            self._sampler.open()
        joined = Joined(device, drawn.runs, drawn.segment_counts, drawn.count)
        self._steps = Steps(device, self._lowered, joined)
        n_words = 4 * self.limits.max_outputs
        self._results = device.host(4 * _N_RESULTS * n_words).view(np.int32)
        self._results = self._results.reshape(_N_RESULTS, n_words)
        self._n_steps = 0
        self._last_pos = np.zeros(0, np.int64)
        self._current: Running | None = None  # what was submitted last
        self._guess: Running | None = None  # what runs after it, the step that `_arrays` says
        self._lock = threading.Lock()  # over these three: an abort comes from any thread
        self._no_rows = np.zeros((0, 0), np.float32)
        self._no_ids = np.zeros(0, np.int32)
        if drawn.draft is not None:
            self.draft = CudaProgram(device, self._name, drawn.draft, None, {}, progress)

    # -- steps ---------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> CudaTicket:
        """Send a step to the device, if it is not there already."""
        self._check(batch)
        running = self._guessed(batch) or self._begin(batch, self._result_of(batch))
        with self._lock:
            self._current = running
        if self._is_told(batch, running):
            self._guess_next(batch, running)
        self._last_pos = batch.pos.copy()
        return CudaTicket(self, batch, running)

    def guess(self, batch: Batch, n: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The likeliest token behind each wanted row, and n - 1 more behind that: (n, R).

        Of the batch's first `n_logits` tokens where it names so many. With the last step's hidden
        rows, where the batch asks for them.
        """
        self._check(batch)
        assert 0 < n <= _N_RESULTS, f"{n} tokens, room for {_N_RESULTS}"
        result, n_wanted = Result.LIKELIEST, len(batch.wanted)
        runs, step, lowered = [self._begin(batch, result)], self._drawn.step_buffers, self._lowered
        assert lowered.input is not None and lowered.hidden is not None, "this is no draft"
        row_bytes = 4 * row_stride(self.segment.hidden.dim)
        for _ in range(n - 1):
            batch = _following(batch)
            self._take_in(batch)
            self._write_step(result)
            self._device.copy(step.ids.address, step.sampled.address, 4 * n_wanted)
            self._device.copy(lowered.input.address, lowered.hidden.address, n_wanted * row_bytes)
            runs.append(self._run(batch, batch.pos, result))
        runs[-1].is_over.wait()
        out = Outputs(self._no_rows, self._no_rows, self._no_ids)
        self._read_beside(batch, runs[-1], out)
        return np.stack([run.picked.ids for run in runs if run.picked is not None]), out.hidden

    def _check(self, batch: Batch) -> None:
        if self._closed:
            raise ClosedError("this program was closed")
        batch.check()
        n_rows, n_wanted, limits = batch.n_rows, len(batch.wanted), self.limits
        assert 0 < n_rows <= limits.max_rows, f"{n_rows} rows, room for {limits.max_rows}"
        assert n_wanted <= limits.max_outputs, f"{n_wanted} outputs, room for {limits.max_outputs}"
        assert len(batch.tables) <= limits.max_sequences

    def _begin(self, batch: Batch, result: Result) -> Running:
        self._take_in(batch)
        if batch.hidden is not None:
            self._write_rows(self._lowered.input, batch.hidden)
        if result is Result.SAMPLED:
            self._samples.fill(_samples_of(batch), len(batch.wanted))
        self._write_step(result)
        return self._run(batch, batch.pos, result)

    def _take_in(self, batch: Batch) -> None:
        self._asked.fill(batch)
        self._arrays, self._asked = self._asked, self._arrays

    def _write_step(self, result: Result) -> None:
        write, arrays, samples = self._device.write, self._arrays, self._samples
        write(self._drawn.step_buffer.address, arrays.memory[: arrays.n_bytes])
        if result is Result.SAMPLED:
            write(self._drawn.samples_buffer.address, samples.memory[: samples.n_bytes])

    def _result_of(self, batch: Batch) -> Result:
        if not self.segment.is_last or batch.output == "hidden":
            return Result.HIDDEN
        table, n_wanted = batch.samples, len(batch.wanted)
        if table is None or not n_wanted or table.has_masks:
            return Result.LOGITS  # of masked rows the host picks, who knows masks later
        if table.is_greedy(n_wanted):
            return Result.LIKELIEST
        return Result.SAMPLED if self._samples.fits(table, n_wanted) else Result.LOGITS

    def _run(self, batch: Batch, pos: NDArray[np.int64], result: Result) -> Running:
        """Have the step computed that has been written, of rows at these positions."""
        device, n_wanted = self._device, len(batch.wanted)
        n_seen = self._most_segments(batch, pos)
        n_logits = batch.n_logits if batch.n_logits < self.segment.output.dim else 0
        self._steps.run(Shape(batch.n_rows, n_wanted, n_seen, result, n_logits))
        picked = None
        if result in (Result.LIKELIEST, Result.SAMPLED):
            self._n_steps += 1
            slot = self._results[self._n_steps % _N_RESULTS]
            device.fetch(self._drawn.step_buffers.sampled.address, slot)
            ids, status, *_ = slot.reshape(4, -1)[:, :n_wanted]
            mu = slot[len(slot) // 2 :].view(np.float64)
            picked = Picked(ids, status, mu[:n_wanted])
        return Running(result, device.mark(), picked)

    def _most_segments(self, batch: Batch, pos: NDArray[np.int64]) -> int:
        """Of attention that the row sees that sees most, rounded up to one of few numbers."""
        if batch.n_rows > FEW_ROWS:
            return 1  # none of its launches cuts attention into segments
        most = max(
            (
                n_segments(batch.tables[seq][group], at, window)
                for seq, at in zip(batch.seq.tolist(), pos.tolist(), strict=True)
                for group, window in enumerate(self.segment.groups)
            ),
            default=1,
        )
        return next(n for n in self._drawn.segment_counts if n >= most)

    # -- the step ahead ------------------------------------------------------------------------

    def _guessed(self, batch: Batch) -> Running | None:
        """The step that runs already, if it is this one."""
        with self._lock:
            guess, before, self._guess = self._guess, self._current, None
        if guess is None or before is None or self._result_of(batch) is not guess.result:
            return None
        before.is_over.wait()
        assert before.picked is not None
        self._arrays.set_ids(before.picked.ids)
        self._asked.fill(batch)
        is_held = self._asked.says_the_same(self._arrays)
        if is_held and guess.result is Result.SAMPLED:
            self._samples.set_picked(before.picked.ids, before.picked.mu)
            self._asked_samples.fill(_samples_of(batch), len(batch.wanted))
            is_held = self._asked_samples.says_the_same(self._samples)
        return guess if is_held else None

    def _is_told(self, batch: Batch, running: Running) -> bool:
        """Whether the next step follows from this one, which went on from the one before."""
        n_rows = batch.n_rows
        return (
            running.picked is not None
            and self.segment.input is None  # rows from another machine can't be guessed
            and not (batch.with_hidden or batch.residuals)  # it would lie in the place of these
            and not self.segment.states  # which slots it would read and write is not known either
            and n_rows == len(batch.wanted) == len(set(batch.seq.tolist())) <= FEW_ROWS
            and np.array_equal(self._last_pos + 1, batch.pos)
            and not ((batch.pos + 1) % PAGE == 0).any()  # there the tables may get a page
        )

    def _guess_next(self, batch: Batch, running: Running) -> None:
        self._arrays.go_on()
        if running.result is Result.SAMPLED:
            self._samples.go_on(_samples_of(batch), batch.n_rows)
        self._write_step(running.result)
        step = self._drawn.step_buffers
        self._device.copy(step.ids.address, step.sampled.address, 4 * batch.n_rows)
        guess = self._run(batch, batch.pos + 1, running.result)
        with self._lock:
            if not running.is_aborted:
                self._guess = guess

    def _abort(self, running: Running) -> None:
        """Whatever the device is at is cut short: the guess is lost, too."""
        word = self._drawn.step_buffer.address + self._arrays.abort_offset
        with self._lock:
            running.is_aborted = True
            if running is self._current:
                self._guess = None
                self._device.write_now(word, 1)

    def _changing(self) -> Cached:
        """A guess has read the cache as it was before."""
        with self._lock:
            self._guess = None
        return self._open()

    # -- results -------------------------------------------------------------------------------

    def _collect(self, batch: Batch, running: Running) -> Outputs:
        running.is_over.wait()
        out = Outputs(self._no_rows, self._no_rows, self._no_ids, aborted=running.is_aborted)
        if running.is_aborted:
            return out
        n_wanted, segment, lowered = len(batch.wanted), self.segment, self._lowered
        self._read_beside(batch, running, out)
        if running.result is Result.HIDDEN:
            return out
        if running.picked is not None:
            store(running.picked, running.result, _samples_of(batch))
        else:
            rows = self._read_rows(lowered.logits, n_wanted, segment.output.dim)
            out.logits = rows[:, : batch.n_logits or None]
        if batch.output == "ids":
            assert batch.samples is not None and self._sampler is not None
            if running.picked is None and n_wanted:
                self._sampler.sample(out.logits, batch.samples)
            out.ids, out.logits = batch.samples.ids[:n_wanted], self._no_rows
        return out

    def _read_beside(self, batch: Batch, running: Running, out: Outputs) -> None:
        """What is asked for but logits and tokens."""
        segment, lowered = self.segment, self._lowered
        if running.result is Result.HIDDEN or batch.with_hidden:
            n_rows = len(batch.wanted) if segment.is_last else batch.n_rows
            out.hidden = self._read_rows(lowered.hidden, n_rows, segment.hidden.dim)
        for layer in batch.residuals:
            dim = segment.residuals[layer].dim
            rows = self._read_rows(lowered.residuals[layer], batch.n_rows, dim)
            out.residuals = {**out.residuals, layer: rows}

    def sample(self, logits: NDArray[np.float32], table: SampleTable) -> None:
        """On the host: the logits are there."""
        assert self._sampler is not None, "only the last segment has logits"
        self._sampler.sample(logits, table)

    def _write_rows(self, buffer: Buffer | None, rows: NDArray[np.float32]) -> None:
        assert buffer is not None, "this segment starts from token ids"
        n_rows, dim = rows.shape
        padded = np.zeros((n_rows, row_stride(dim)), np.float32)
        padded[:, :dim] = rows
        self._device.write(buffer.address, padded)

    def _read_rows(self, buffer: Buffer | None, n_rows: int, dim: int) -> NDArray[np.float32]:
        assert buffer is not None, "this segment has no such rows"
        rows = np.empty((n_rows, row_stride(dim)), np.float32)
        self._device.read(buffer.address, rows)
        return rows[:, :dim]

    # -- what it is ----------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        facts = {"device": self._name, "gpu": self._device.facts.name}
        numerics = self._drawn.numerics
        return facts if numerics == "exact" else {**facts, "numerics": numerics}

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of weights that a step of one row reads."""
        return self._drawn.step_weight_bytes

    @property
    def unkept(self) -> str:
        """Why kernels that were compiled can't be kept for the next process; "" where they are."""
        return self._device.unkept

    def close(self) -> None:
        """Free everything."""
        if not self._closed:
            self._closed, self._cached = True, None
            self._free()

    def _free(self) -> None:
        if self.draft is not None:
            self.draft.close()
        if self._sampler is not None:
            self._sampler.close()
        for address in self._reserved:
            with suppress(DeviceError):  # one that has faulted takes nothing back
                self._device.free(address)
        self._reserved.clear()

    def __enter__(self) -> CudaProgram:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _following(batch: Batch) -> Batch:
    """A row more of each sequence of which a row was wanted: nobody here knows what it holds."""
    wanted, rows = batch.wanted, np.arange(len(batch.wanted), dtype=np.int32)
    ids, pos, seq = np.zeros_like(rows), batch.pos[wanted] + 1, batch.seq[wanted]
    return replace(batch, ids=ids, pos=pos, seq=seq, wanted=rows, hidden=None)


def _samples_of(batch: Batch) -> SampleTable:
    assert batch.samples is not None
    return batch.samples
