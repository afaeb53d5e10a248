"""Steps of one row as one kernel whose blocks stay: the bits of one launch after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import config, platform
from edgeinfer.backend import RunsOnGpu, find_device, open_backend
from edgeinfer.batch import Batch, PageTable, StepLimits
from edgeinfer.errors import DeviceError
from edgeinfer.graph import Segment
from edgeinfer.kernels.cuda.backend import CudaBackend
from edgeinfer.kernels.cuda.blueprint import Blueprint
from edgeinfer.kernels.cuda.cubins import Cubins
from edgeinfer.kernels.cuda.kernel import JOINED, Kernel, Sources
from edgeinfer.kernels.cuda.nvrtc import compile_all
from edgeinfer.kernels.cuda.program import CudaProgram
from edgeinfer.sampling.sampler import ReferenceSampler
from edgeinfer.selftest import tiny
from edgeinfer.selftest.cases import Rows, Sequences, limits, logits
from edgeinfer.selftest.joined import model
from edgeinfer.selftest.judge import Judge

from .cuda_registers import ALL, USUAL
from .shim import SEEDS, put, put_step, shim

TEXTS = Path(__file__).parent.parent / "kernels" / "cuda"
CASES = {case.name: case for case in tiny.cases()}


class Watched:
    """A program on a shim that tells what it launches."""

    def __init__(self, segment: Segment, most: StepLimits | None = None, **options: Any) -> None:
        self._device = device = shim(runs_at_once=False, **options)
        machine = CudaBackend(device, "shim:0", lambda n, m: ReferenceSampler(), joins=True)
        launch, self.launched = device.launch, list[str]()

        def tell(kernel: Kernel, *args: Any, **more: Any) -> None:
            self.launched.append(kernel.name)
            launch(kernel, *args, **more)

        device.launch = tell  # type: ignore[method-assign]
        self.program: CudaProgram = machine.compile(segment, most or limits(segment))
        self.launched.clear()

    def close(self) -> None:
        self.program.close()
        self._device.close()


@contextmanager
def watched(case: str, **options: Any) -> Iterator[tuple[Watched, Segment]]:
    segment = CASES[case].segment()
    each = Watched(segment, **options)
    try:
        yield each, segment
    finally:
        each.close()


@pytest.mark.parametrize(
    ("name", "n_blocks", "seed"),
    [
        ("llama Q4_0", 4, 1),
        ("llama Q4_K", 7, 7),
        ("llama Q8_0", 1, 0),
        ("qwen3 Q4_0", 3, 1),
        ("gemma3 Q8_0", 5, 7),
    ],
)
def test_one_kernel_has_the_bits_of_many(name: str, n_blocks: int, seed: int) -> None:
    case = CASES[name]
    with watched(name, blocks_at_once=n_blocks, seed=seed) as (each, segment):
        logits(each.program, Sequences(segment).step(Rows(0, 0, 1)))
        assert 0 < each.launched.count(JOINED) <= 2 and len(each.launched) <= 9, each.launched
        results = dict(case.results(each.program, segment))
        assert not list(Judge.committed().differences(case, results))


@pytest.mark.parametrize("name", ["qwen3moe Q4_K", "lfm2 Q8_0", "llama F16"])
def test_what_can_be_no_part_is_launched_by_itself(name: str) -> None:
    segment = CASES[name].segment()
    assert not Blueprint(segment, limits(segment), 90, joins=True).runs


def batch(first: int, n: int) -> Batch:
    """Rows of a sequence of 20 pages."""
    pos = np.arange(first, first + n, dtype=np.int64)
    table = PageTable(np.arange(20, dtype=np.int32)[::-1].copy(), 0, 20)
    ids, seq = (pos % 97).astype(np.int32), np.zeros(n, np.int32)
    return Batch(ids, pos, seq, [(table,)], np.arange(n, dtype=np.int32), "logits")


def test_attention_in_segments_is_folded_by_the_block_that_is_last() -> None:
    most = StepLimits(n_pages={0: 20}, max_rows=70, max_outputs=70, max_sequences=1, n_threads=1)
    with watched("llama Q4_0", most=most, blocks_at_once=3, seed=7) as (each, _):
        for first in range(0, 560, 70):
            each.program.submit(batch(first, 70)).wait()
        two = logits(each.program, batch(540, 2))
        each.launched.clear()
        ones = logits(each.program, batch(540, 1), batch(541, 1), batch(541, 1), batch(541, 1))
        assert each.launched.count(JOINED) == 2  # the second step was recorded, then replayed
    np.testing.assert_array_equal(ones[:2], two)
    np.testing.assert_array_equal(ones[2:], two[[1, 1]])


def spoilt(folder: Path, file: str, pattern: str, by: str = "") -> Path:
    """A folder with a text of a kernel in which something is replaced."""
    text, n = re.subn(pattern, by, (TEXTS / file).read_text())
    assert n == 1
    (folder / file).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("file", "pattern", "by"),
    [
        ("joined.cuh", r"while \(.*\) \{", "while (false) {"),
        ("joined.cuh", r"0x80000000u - n_others", "0x80000000u"),  # it opens too early
        ("joined.cu", r"            ei_arrive\(\);", ""),
        ("norm.cuh", r"        EI_AWAIT_INPUT\(\);\n", ""),
        ("attend.cu", r"    EI_AWAIT_INPUT\(\);\n", ""),
        ("matmul.cuh", r"        EI_AWAIT_INPUT\(\);\n", ""),
    ],
)
def test_a_barrier_that_is_missing_is_found(
    tmp_path: Path, file: str, pattern: str, by: str
) -> None:
    folder = spoilt(tmp_path, file, pattern, by)
    n_found = 0
    for seed in SEEDS:
        with watched("llama Q4_0", sources=[folder], seed=seed) as (each, segment):
            step = Sequences(segment).step
            steps = [step(Rows(0, i, 1)) for i in range(3)]
            expected = logits(each.program, step(Rows(0, 0, 3)))
            try:
                n_found += not np.array_equal(logits(each.program, *steps), expected)
            except DeviceError as error:
                assert "wait for other blocks" in str(error)
                n_found += 1
    assert n_found == len(SEEDS)


_WAITS = """#include "dev.cuh"
EI_KERNEL(32) k(const Step* step, int* count) {
  if (threadIdx.x == 0) {
    atomicAdd(count, blockIdx.x < 2 ? 1 : 0);
    while (*(volatile int*)count < 3) {
      ei_run->let_others_run(EI_HERE);
    }
  }
  __syncthreads();
}
"""


def test_blocks_that_wait_for_ever_are_told(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text(_WAITS)
    device, kernel = shim(sources=[tmp_path]), Kernel.of("k")
    device.load([kernel])
    count = put(device, np.zeros(1, np.int32))
    args = {"step": put_step(device, 1), "count": count}
    said = r"1 threads \(0 first\) wait for other blocks at k.cu:6, 31 threads .* wait for their bl"
    with pytest.raises(DeviceError, match=said):
        device.launch(kernel, (4, 1, 1), 32, 0, args, at_once=True)
    device.write(count, np.ones(1, np.int32))
    device.launch(kernel, (4, 1, 1), 32, 0, args, at_once=True)
    with pytest.raises(DeviceError, match=r"\(5, 1, 1\) blocks can't run at once"):
        device.launch(kernel, (5, 1, 1), 32, 0, args, at_once=True)
    device.close()


def test_it_is_asked_for_and_only_where_a_gpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_joined(**options: int) -> bool:
        device = shim(**options)
        monkeypatch.setattr("edgeinfer.kernels.cuda.backend.open_device", lambda *_: device)
        opened = open_backend(find_device("shim").device)
        assert isinstance(opened, RunsOnGpu)
        return opened.joins and opened.with_numerics("fast").joins

    assert not is_joined()
    monkeypatch.setenv(config.PERSISTENT, "1")
    assert is_joined() and not is_joined(shared_bytes=64 << 10)  # of Turing


def test_blocks_that_cannot_be_at_once_leave_launches_as_they_are() -> None:
    case = CASES["llama Q4_0"]
    with watched(case.name, blocks_at_once=0) as (each, segment):
        results = dict(case.results(each.program, segment))
        assert not list(Judge.committed().differences(case, results))
        assert JOINED not in each.launched


def joined(segment: Segment) -> list[Kernel]:
    """The kernels that a step of one row becomes."""
    return [run.kernel for run in Blueprint(segment, limits(segment), 90, joins=True).runs]


def objections(kernels: list[Kernel], cuda: int, architectures: tuple[int, ...]) -> list[str]:
    """Of what they take when they are compiled."""
    found = [each for each in platform.nvrtc_libraries() if each.cuda == cuda]
    if not found:
        pytest.skip(f"no NVRTC of CUDA {cuda}")
    jobs = [Cubins(TEXTS, Sources(), a, cuda).job(k) for a in architectures for k in kernels]
    usages = [each.usage for each in compile_all(found[0].path, jobs)]
    return [
        f"sm_{job.arch}: {usage}"
        for job, usage in zip(jobs, usages, strict=True)
        if usage.spilled_bytes or usage.stack_bytes or usage.shared_bytes > 1024
    ]


@pytest.mark.parametrize("cuda", [12, 13])
def test_it_spills_nothing(cuda: int) -> None:
    assert not objections(joined(CASES["llama Q4_0"].segment()), cuda, USUAL[cuda])


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [12, 13])
def test_it_spills_nothing_anywhere(cuda: int) -> None:
    names = ("llama Q4_0", "llama Q4_K", "llama Q6_K", "llama Q8_0", "qwen3 Q4_0", "gemma3 Q8_0")
    segments = [*(CASES[name].segment() for name in names), model(16, 2048)]
    kernels = [kernel for segment in segments for kernel in joined(segment)]
    assert len(kernels) >= len(segments)
    assert not objections(kernels, cuda, ALL[cuda])
