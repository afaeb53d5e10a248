"""Devices that segments of a model can be compiled for: what a plan asks of them, and opening one.

Knows no steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from edgeinfer import config
from edgeinfer.batch import HOST, Demand, Numerics, Sampler, StepLimits, StepRequest
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import Segment
from edgeinfer.kernels.cuda import joined
from edgeinfer.kernels.cuda.blueprint import Blueprint
from edgeinfer.kernels.cuda.device import Device, DeviceFacts
from edgeinfer.kernels.cuda.program import CudaProgram
from edgeinfer.kernels.shapes import check_shapes

Progress: TypeAlias = Callable[[str, int, int], None]  # stage, done, total
# The sampler for a vocabulary of a size, and so many threads: what the device leaves to the host.
MakeSampler: TypeAlias = Callable[[int, int], Sampler]

LEAST_FAST_ARCH = 75  # the first whose tensor cores have sums of halves in floats by this mma
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
        numerics: Numerics = "exact",
        *,
        joins: bool = False,
    ) -> None:
        """`numerics` are "fast" only where the device has the tensor cores for it.

        `joins`: where it can, the launches of a step of one row are joined, see `joined.py`.
        """
        has_fast = device.facts.arch >= LEAST_FAST_ARCH
        self.numerics: Numerics = numerics if has_fast else "exact"
        has_room = device.facts.shared_bytes > joined.MOST_SHARED_BYTES
        self.joins = joins and has_room and device.facts.is_cooperative
        self.device, self.name, self._make_sampler = device, name, make_sampler
        self._progress = progress or (lambda stage, done, total: None)
        self._drawn: Blueprint | None = None  # what `compile` will most likely be asked for

    def with_numerics(self, numerics: Numerics) -> CudaBackend:
        """Another one of the same device."""
        return self._other(numerics, self.joins)

    def with_joined_kernels(self, joins: bool) -> CudaBackend:
        """Another one of the same device."""
        return self._other(self.numerics, joins)

    def _other(self, numerics: Numerics, joins: bool) -> CudaBackend:
        make = self._make_sampler
        return CudaBackend(self.device, self.name, make, self._progress, numerics, joins=joins)

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
            segment.windows,
            _max_rows(self.device.facts),
            _SHARED_ROWS,
            _ROW_COST,
        )
        drawn = self._drawn = self._draw(segment, limits)
        sampler = self.sampler(drawn)
        return Demand(limits, self.rows(drawn), sampler.building_bytes if sampler else 0)

    def rows(self, drawn: Blueprint) -> dict[str, dict[str, int]]:
        """Bytes by memory and purpose."""
        sampler = self.sampler(drawn)
        here = {
            "logits": drawn.logits_bytes + (sampler.n_bytes if sampler else 0),
            "weights on their way": 2 * drawn.staging_bytes,
        }
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
            drawn = self._draw(segment, limits)
        sampler, rows = self.sampler(drawn), self.rows(drawn)
        return CudaProgram(self.device, self.name, drawn, sampler, rows, self._progress)

    def prepare(self, segments: Iterable[tuple[Segment, StepLimits]]) -> int:
        """Compile or load the kernels of programs to come, all at once; how many there are."""
        kernels = {kernel for each in segments for kernel in self._draw(*each).kernels()}
        self.device.load(kernels, lambda done, total, _: self._progress("kernels", done, total))
        return len(kernels)

    def _draw(self, segment: Segment, limits: StepLimits) -> Blueprint:
        facts = self.device.facts
        drawn = Blueprint(segment, limits, facts.arch, self.numerics, joins=self.joins)
        launches = drawn.lowered.launches
        most = max(launches, key=lambda each: each.shared_bytes)
        if most.shared_bytes > facts.shared_bytes:
            raise UnsupportedModelError(
                f"kernel {most.kernel} would take {most.shared_bytes} bytes of shared memory, a "
                f"block of {self.name} ({facts.name}) has {facts.shared_bytes}; run this model "
                "with device cpu"
            )
        return drawn


def open_device(kind: str, index: int) -> Device:
    """A GPU ("cuda"), or the processors in its place ("shim")."""
    if kind == "shim":
        from edgeinfer.kernels.cuda.shim import ShimDevice

        return ShimDevice()
    from edgeinfer.kernels.cuda.cupy_device import CudaDevice

    return CudaDevice(
        index,
        waits_for_each=config.waits_for_each_kernel(),
        begins_early=config.begins_kernels_early(),
    )


def _max_rows(facts: DeviceFacts) -> int:
    """Rows that a step computes best: enough tiles for all multiprocessors, and no more memory."""
    if facts.n_multiprocessors <= 20:
        return 256
    return 2048 if facts.arch >= 90 and facts.n_multiprocessors > 100 else 512
