"""Every backend by name, and chains of them, for the tests that all must pass.

`@pytest.mark.parametrize("name", BACKENDS)`, then `backend(name)`: the test is skipped where that
one can't run.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from edgeinfer import DeviceError
from edgeinfer.backend import Backend, find_device, open_backend
from edgeinfer.batch import Batch, Demand, PageTable, StepLimits, StepRequest
from edgeinfer.chain import ChainBackend, Stretch
from edgeinfer.graph import Segment
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.reference import ReferenceBackend, ReferenceProgram
from edgeinfer.sampling.sampler import ReferenceSampler

from .native import cache_root

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
FAST = ("cpu", "shim", CUDA)
WHOLE = (*FAST, "reference")
# A chain cuts a model of at least two layers in the middle.
BACKENDS = (*WHOLE, "cpu+cpu", "cpu+reference", "reference+cpu", "cpu+shim")

IDS = [3, 141, 59, 26, 5, 35, 89, 79, 32, 38, 46]
LIMITS = StepLimits(n_pages={0: 8}, max_rows=16, max_outputs=16, max_sequences=4, n_threads=2)
TYPES = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "Q4_K_M", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip


class QuantisedReference:
    """The law: the reference's quantised mode."""

    def __init__(self) -> None:
        self._backend = ReferenceBackend(ReferenceSampler())

    def memories(self, host: int) -> dict[str, int]:
        return self._backend.memories(host)

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        return self._backend.demand(segment, request)

    def compile(self, segment: Segment, limits: StepLimits) -> ReferenceProgram:
        return self._backend.compile(segment, limits, mode="quantised")


class _Halves:
    """A chain of two backends, which cuts whatever it compiles in the middle."""

    def __init__(self, first: Backend, second: Backend) -> None:
        self._backends = first, second

    def _chain(self, segment: Segment) -> ChainBackend:
        middle = max(1, segment.graph.hparams.n_layers // 2)
        first, second = self._backends
        return ChainBackend([Stretch(0, first), Stretch(middle, second)])

    def memories(self, host: int) -> Any:
        return ChainBackend([Stretch(i, each) for i, each in enumerate(self._backends)]).memories(
            host
        )

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        return self._chain(segment).demand(segment, request)

    def compile(self, segment: Segment, limits: StepLimits) -> Any:
        return self._chain(segment).compile(segment, limits)


def backend(name: str) -> Any:
    """The backend of this name; skips the test where it can't run here."""
    if "+" in name:
        first, second = map(backend, name.split("+"))
        return _Halves(first, second)
    if name == "reference":
        return QuantisedReference()
    if name == "cpu":
        return CpuBackend(cache_root())
    if name.startswith("shim") and shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for processors")
    try:
        return open_backend(find_device(name).device)
    except DeviceError as error:
        pytest.skip(str(error))


def batch_of(
    ids: list[int],
    pos: int = 0,
    pages: tuple[int, ...] = (0, 1, 2, 3),
    output: str = "logits",
    n_groups: int = 1,
    states: tuple[int, int] = (-1, -1),
) -> Batch:
    """One sequence's rows at `pos`, every output wanted.

    It starts from the first of `states`, and the state behind its last row is kept in the other.
    """
    n = len(ids)
    kept = np.full(n, -1, np.int32)
    kept[-1] = states[1]
    return Batch(
        ids=np.array(ids, np.int32),
        pos=np.arange(pos, pos + n, dtype=np.int64),
        seq=np.zeros(n, np.int32),
        tables=[(PageTable(np.array(pages, np.int32), 0, len(pages)),) * n_groups],
        wanted=np.arange(n, dtype=np.int32),
        output=output,  # type: ignore[arg-type]
        states=np.array(states[:1], np.int32),
        kept=kept,
    )
