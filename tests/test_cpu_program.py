"""What is the CPU backend's alone; what every backend must do is in `test_backends`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.cpu.program import CpuProgram
from edgeinfer.model import Model

from .backends import IDS, LIMITS, batch_of
from .models_for_tests import tiny_model
from .native import cache_root


def cpu(segment: Segment, n_threads: int = 2, isa: str | None = None) -> CpuProgram:
    limits = LIMITS._replace(n_threads=n_threads)
    return CpuBackend(cache_root(), isa=isa).compile(segment, limits)


def logits(segment: Segment, ids: list[int], **options: object) -> NDArray[np.float32]:
    with cpu(segment, **options) as program:  # type: ignore[arg-type]
        return program.submit(batch_of(ids)).wait().logits.copy()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Model]:
    path = tiny_model(tmp_path, arch="qwen3", quant="Q4_0", qk_norm=True)
    with GGUFFile.open(path) as file:
        yield Model.load(file)


@pytest.mark.parametrize(
    "options", [{"n_threads": 1}, {"n_threads": 3}, {"isa": "avx2"}, {"isa": "generic"}]
)
def test_bits_do_not_depend_on_threads_or_instruction_set(
    small: Model, options: dict[str, object]
) -> None:
    segment = small.graph.segment()
    assert np.array_equal(logits(segment, IDS), logits(segment, IDS, **options))


def test_memory_is_what_was_promised(small: Model) -> None:
    with cpu(small.graph.segment()) as program:
        kv = 2 * 2 * sum(c.n_heads * c.k_dim for c in program.segment.caches.values())
        assert program.memory["KV cache"] == LIMITS.n_pages[0] * 32 * kv
        assert sum(program.memory.values()) < 4 << 20
