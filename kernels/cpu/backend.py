"""Makes segments of a model runnable on this machine's CPU.

Knows no scheduling and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from edgeinfer.batch import HOST, Demand, StepLimits, StepRequest
from edgeinfer.graph import Segment
from edgeinfer.kernels.cpu.blueprint import Blueprint
from edgeinfer.kernels.cpu.builders import BUILDER_BYTES
from edgeinfer.kernels.cpu.library import Library
from edgeinfer.kernels.cpu.program import CpuProgram
from edgeinfer.kernels.cpu.team import Team
from edgeinfer.kernels.cpu.weights import PackedWeights
from edgeinfer.kernels.shapes import check_shapes

Progress: TypeAlias = Callable[[str, int, int], None]  # stage, done, total

_MAX_ROWS = 256  # of a step


class CpuBackend:
    """Compiles segments for this machine's CPU.

    `cache_dir` keeps compiled kernels. `progress("kernels" | "weights", done, total)` follows
    `compile`. `memory` is how many bytes there are for all that is done here.
    """

    name = "cpu"

    def __init__(
        self,
        cache_dir: Path,
        progress: Progress | None = None,
        isa: str | None = None,
        memory: int | None = None,
    ) -> None:
        self._progress = progress or (lambda stage, done, total: None)
        self.library = Library.host(cache_dir, isa, memory)
        self._memory = memory
        self._drawn: Blueprint | None = None  # what `compile` will most likely be asked for

    def memories(self, host: int) -> dict[str, int]:
        """All is in the host's memory."""
        return {HOST: host}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        """What a program would take; UnsupportedModelError names what no kernel takes.

        Nothing is allocated. `compile` with the limits that this gives does not lower again.
        """
        check_shapes(segment, self.name)
        vocab_size = segment.graph.hparams.vocab_size
        limits = StepLimits.of(request, vocab_size, segment.windows, _MAX_ROWS)
        drawn = self._drawn = Blueprint(segment, limits)
        kernels = drawn.kernels()
        rows = {**drawn.rows(), "code": self.library.code_bytes(kernels)}
        building_bytes = self.library.building_bytes(kernels)
        return Demand(limits, {HOST: rows}, building_bytes, drawn.weights.packing_bytes)

    def can_build_beside(self, n_bytes: int) -> bool:
        """Whether there is memory for building when idle, beside what a program takes."""
        return self._memory is None or self._memory - n_bytes >= BUILDER_BYTES

    def compile(self, segment: Segment, limits: StepLimits) -> CpuProgram:
        """Load or build kernels, pack weights, reserve memory for `limits`.

        UnsupportedModelError names what no kernel takes.
        """
        drawn, self._drawn = self._drawn, None
        if drawn is None or (drawn.segment, drawn.limits) != (segment, limits):
            check_shapes(segment, self.name)
            drawn = Blueprint(segment, limits)
        return CpuProgram(self, drawn)

    def load(self, names: set[str]) -> None:
        self.library.load(names, lambda done, total, name: self._progress("kernels", done, total))

    def pack(self, weights: PackedWeights, team: Team, n_threads: int) -> None:
        weights.pack(
            team,
            self.library,
            n_threads,
            lambda done, total: self._progress("weights", done, total),
        )
