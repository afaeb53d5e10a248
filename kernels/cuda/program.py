"""A segment of a model made runnable on a device: weights, KV pages, scratch and launches.

Knows no scheduling and no files, nor whether the device is a GPU or the shim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgeinfer.batch import HOST, Batch, Demand, Outputs, Sampler, StepLimits, StepRequest
from edgeinfer.errors import ClosedError
from edgeinfer.graph import Segment
from edgeinfer.kernels.buffers import Buffer
from edgeinfer.kernels.cuda.attention import n_segments
from edgeinfer.kernels.cuda.blueprint import Blueprint
from edgeinfer.kernels.cuda.commands import WANTED_ROWS, Launch
from edgeinfer.kernels.cuda.device import Bound, Device, DeviceFacts
from edgeinfer.kernels.cuda.lower_base import FEW_ROWS
from edgeinfer.kernels.cuda.tiles import row_stride
from edgeinfer.kernels.shapes import check_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress: TypeAlias = Callable[[str, int, int], None]  # stage, done, total


# The sampler for a vocabulary of a size, and so many threads: what the device leaves to the host.
MakeSampler: TypeAlias = Callable[[int, int], Sampler]

_DRIVER_BYTES = 300 << 20  # that a GPU's driver takes beside all that is reserved
_SHARED_ROWS = 256  # of prompts, in a step that also decodes
_ROW_COST = 0.02  # of a step of few rows, for one row more: weights are read once for all


class CudaBackend:
    """Compiles segments for one device. `progress("kernels" | "weights", done, total)` follows.

    `name` is that of its memory in a plan, too: "cuda:0".
    """

    def __init__(
        self,
        device: Device,
        name: str,
        make_sampler: MakeSampler,
        progress: Progress | None = None,
    ) -> None:
        self.device, self.name, self._make_sampler = device, name, make_sampler
        self._progress = progress or (lambda stage, done, total: None)
        self._drawn: Blueprint | None = None  # what `compile` will most likely be asked for

    def memories(self, host: int) -> dict[str, int]:
        """Bytes that may be taken of the host's memory and of the device's own, if it has any."""
        free = max(0, self.device.memory()[0] - _DRIVER_BYTES)
        if self.device.facts.has_own_memory:
            return {HOST: host, self.name: free}
        return {HOST: min(host, free)}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        """What a program would take; UnsupportedModelError names what no kernel takes."""
        check_shapes(segment, "cuda")
        limits = StepLimits.of(
            request,
            segment.graph.hparams.vocab_size,
            segment.groups,
            _max_rows(self.device.facts),
            _SHARED_ROWS,
            _ROW_COST,
        )
        drawn = self._drawn = Blueprint(segment, limits)
        sampler = self.sampler(drawn)
        return Demand(limits, self.rows(drawn), sampler.building_bytes if sampler else 0)

    def rows(self, drawn: Blueprint) -> dict[str, dict[str, int]]:
        """Bytes by memory and purpose."""
        sampler = self.sampler(drawn)
        here = {"logits": drawn.logits_bytes + (sampler.n_bytes if sampler else 0)}
        if self.device.facts.has_own_memory:
            return {HOST: here, self.name: drawn.rows()}
        return {HOST: {**drawn.rows(), **here}}

    def sampler(self, drawn: Blueprint) -> Sampler | None:
        """What picks tokens of a program's logits; nothing is taken before it is opened."""
        if not drawn.segment.is_last:
            return None
        return self._make_sampler(drawn.segment.output.dim, drawn.limits.n_threads)

    def compile(self, segment: Segment, limits: StepLimits) -> CudaProgram:
        """Load or compile kernels, reserve memory for `limits`, send the weights up."""
        drawn, self._drawn = self._drawn, None
        if drawn is None or (drawn.segment, drawn.limits) != (segment, limits):
            check_shapes(segment, "cuda")
            drawn = Blueprint(segment, limits)
        return CudaProgram(self, drawn)

    def report(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(stage, done, total)


def open_device(kind: str, index: int) -> Device:
    """A GPU ("cuda"), or the processors in its place ("shim")."""
    if kind == "shim":
        from edgeinfer.kernels.cuda.shim import ShimDevice

        return ShimDevice()
    from edgeinfer.kernels.cuda.cupy_device import CudaDevice

    return CudaDevice(index)


class CudaTicket:
    """A submitted step."""

    def __init__(self, program: CudaProgram, batch: Batch) -> None:
        self._program, self._batch = program, batch
        self._outputs: Outputs | None = None

    def wait(self) -> Outputs:
        """Block, without the interpreter lock, until the step is done."""
        if self._outputs is None:
            self._outputs = self._program._collect(self._batch)
        return self._outputs

    def abort(self) -> None:
        """Cut the step short, from any thread."""
        self._program._abort()


class CudaProgram:
    """Runs batches of one segment. Not thread-safe: one step at a time."""

    def __init__(self, backend: CudaBackend, drawn: Blueprint) -> None:
        self.segment, self.limits = drawn.segment, drawn.limits
        self._backend, self._device = backend, backend.device
        self._drawn, self._lowered = drawn, drawn.lowered
        self._reserved: list[int] = []
        self._sampler: Sampler | None = None
        self._closed = False
        try:
            self._make()
        except BaseException:
            self._free()  # an error keeps what its frames refer to
            raise

    def _make(self) -> None:
        device, drawn = self._device, self._drawn
        for arena in drawn.arenas():
            if arena.n_bytes:
                self._reserved.append(device.reserve(arena.n_bytes))
                arena.settle(self._reserved[-1])
                if arena is drawn.kv:  # zeros, as every machine's begins
                    device.fill(self._reserved[-1], arena.n_bytes)
        report = self._backend.report("kernels")
        device.load(drawn.kernels(), lambda done, total, kernel: report(done, total))
        step = drawn.step_buffer.address
        device.write(step, drawn.step_arrays.memory)
        drawn.weights.upload(device, step, self._backend.report("weights"))
        self._bound: dict[int, list[tuple[Launch, Bound]]] = {}  # launches by segments of a step
        self._arrays = drawn.step_arrays
        self._no_rows = np.zeros((0, 0), np.float32)
        self._no_ids = np.zeros(0, np.int32)
        self._aborted = False
        self.memory = self._backend.rows(drawn)
        self._sampler = self._backend.sampler(drawn)
        if self._sampler is not None:
            self._sampler.open()

    # -- steps ---------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> CudaTicket:
        """Send a step to the device."""
        if self._closed:
            raise ClosedError("this program was closed")
        batch.check()
        n_rows, n_wanted, limits = batch.n_rows, len(batch.wanted), self.limits
        assert 0 < n_rows <= limits.max_rows, f"{n_rows} rows, room for {limits.max_rows}"
        assert n_wanted <= limits.max_outputs, f"{n_wanted} outputs, room for {limits.max_outputs}"
        assert len(batch.tables) <= limits.max_sequences
        self._aborted = False
        n_bytes = self._arrays.fill(batch)
        self._device.write(self._drawn.step_buffer.address, self._arrays.memory[:n_bytes])
        if batch.hidden is not None:
            self._write_rows(self._lowered.input, batch.hidden)
        self._launch(batch)
        return CudaTicket(self, batch)

    def _launch(self, batch: Batch) -> None:
        n_seen = self._most_segments(batch)
        launches = self._launches(n_seen)
        if batch.output == "hidden" and self.segment.is_last:
            launches = launches[: self._lowered.head]
        for launch, args in launches:
            n_rows = len(batch.wanted) if launch.rows == WANTED_ROWS else batch.n_rows
            if n_rows and launch.takes(n_rows):
                grid = launch.grid(n_rows, n_seen)
                self._device.launch(launch.kernel, grid, launch.threads, launch.shared_bytes, args)

    def _most_segments(self, batch: Batch) -> int:
        """Of attention that the row sees that sees most, rounded up to one of few numbers."""
        if batch.n_rows > FEW_ROWS:
            return 1  # none of its launches cuts attention into segments
        most = max(
            n_segments(batch.tables[seq][group], pos, window)
            for seq, pos in zip(batch.seq.tolist(), batch.pos.tolist(), strict=True)
            for group, window in enumerate(self.segment.groups)
        )
        return next(n for n in self._drawn.segment_counts if n >= most)

    def _launches(self, n_seen: int) -> list[tuple[Launch, Bound]]:
        if n_seen not in self._bound:
            self._bound[n_seen] = [
                (each, self._device.bind(each.kernel, each.values(n_seen)))
                for each in self._lowered.launches
            ]
        return self._bound[n_seen]

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

    def _collect(self, batch: Batch) -> Outputs:
        n_wanted, segment, lowered = len(batch.wanted), self.segment, self._lowered
        out = Outputs(self._no_rows, self._no_rows, self._no_ids)
        if not segment.is_last or batch.output == "hidden":
            n_rows = n_wanted if segment.is_last else batch.n_rows
            out.hidden = self._read_rows(lowered.hidden, n_rows, segment.hidden.dim)
        else:
            out.logits = self._read_rows(lowered.logits, n_wanted, segment.output.dim)
        out.aborted = self._aborted
        if segment.is_last and batch.output == "ids" and not out.aborted:
            assert batch.samples is not None and self._sampler is not None
            self._sampler.sample(out.logits, batch.samples)
            out.ids, out.logits = batch.samples.ids[:n_wanted], self._no_rows
        return out

    def _abort(self) -> None:
        self._aborted = True
        step = self._drawn.step_buffer.address
        self._device.write_now(step + self._arrays.abort_offset, 1)

    def describe(self) -> dict[str, Any]:
        return {"device": self._backend.name, "gpu": self._device.facts.name}

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of weights that a step of one row reads."""
        return self._drawn.step_weight_bytes

    def close(self) -> None:
        """Free everything."""
        if not self._closed:
            self._closed = True
            self._free()

    def _free(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
        for address in self._reserved:
            self._device.free(address)
        self._reserved.clear()

    def __enter__(self) -> CudaProgram:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _max_rows(facts: DeviceFacts) -> int:
    """Rows that a step computes best: enough tiles for all multiprocessors, and no more memory."""
    if facts.n_multiprocessors <= 20:
        return 256
    return 2048 if facts.arch >= 90 and facts.n_multiprocessors > 100 else 512
