"""Models on a GPU through CuPy, on host memory: the CPU's tokens, and what becomes of any fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, DeviceError, PlanError
from edgeinfer.cli.models import start_notes
from edgeinfer.kernels.cuda.cubins import Cubins
from tests import cupy_on_shim
from tests.fake_cupy import OUT_OF_MEMORY, Cuda

from .models_for_tests import tiny_model

ILLEGAL_ADDRESS, NO_BINARY = 700, 209
PROMPT = "one two three four five"
OPTIONS: Any = dict(n_ctx=96, threads=1)
WAYS: list[dict[str, Any]] = [
    dict(temperature=0.0),
    dict(temperature=0.9, seed=3, repeat_penalty=1.3),
    dict(temperature=0.7, seed=5, mirostat=2),
    dict(temperature=0.0, logprobs=2),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("faults"), quant="Q4_0")


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Any]:
    with LLM(path, device="cpu", **OPTIONS) as llm:
        return answers(llm)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return cupy_on_shim.install(monkeypatch, 2)


def answers(llm: LLM) -> list[Any]:
    found: list[Any] = [llm.generate(PROMPT, max_tokens=20, **way).token_ids for way in WAYS]
    batch = llm.generate_batch([PROMPT, "x", "y z"], max_tokens=9, temperature=0.0)
    return [*found, [each.token_ids for each in batch]]


def first_tokens(llm: LLM) -> list[int]:
    return llm.generate(PROMPT, max_tokens=6, temperature=0.0).token_ids


@pytest.mark.parametrize("device", ["auto", "cuda:1", "cuda:0,cuda:1"])
def test_tokens_are_the_cpus(path: Path, cuda: Cuda, expected: list[Any], device: str) -> None:
    with LLM(path, device=device, **OPTIONS) as llm:
        assert answers(llm) == expected
        devices = "cuda:0" if device == "auto" else device.replace(",", " + ")
        assert llm.runtime.devices == devices
    assert not cuda.runtime.memory and cuda.launches


def test_so_they_are_where_each_kernel_is_waited_for(
    path: Path, cuda: Cuda, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_SYNC", "1")
    with LLM(path, device="cuda", **OPTIONS) as llm:
        assert first_tokens(llm) == expected[0][:6]


def n_calls(path: Path, cuda: Cuda) -> tuple[int, int]:
    """Of CUDA until a model is open, and until it has answered."""
    cuda.runtime.fail(0, 0)
    with LLM(path, device="cuda:0", **OPTIONS) as llm:
        opened = cuda.runtime.n_calls
        first_tokens(llm)
        n = cuda.runtime.n_calls
    assert opened < n and not cuda.runtime.memory
    return opened, n


def fault(path: Path, cuda: Cuda, at: int, status: int, right: list[int]) -> str:
    """Have a call fail: where that is told, and that what is whole goes on with the right tokens.

    All memory comes back, unless the GPU is lost.
    """
    before = set(cuda.runtime.memory)  # of those that were lost
    cuda.runtime.fail(at, status)
    try:
        llm = LLM(path, device="cuda:0", **OPTIONS)
    except (DeviceError, PlanError) as error:
        assert re.match(f"cuda:0( failed)?: .*cudaError{status}", str(error)), (at, error)
        where = "load"
    else:
        with llm:
            where = answer_of(llm, right)
            if cuda.runtime.is_lost:
                assert answer_of(llm, right) == "step"
            else:
                assert first_tokens(llm) == right, at
    assert cuda.runtime.is_lost or set(cuda.runtime.memory) <= before, at
    return where


def answer_of(llm: LLM, right: list[int]) -> str:
    try:
        assert first_tokens(llm) == right
    except (DeviceError, PlanError) as error:
        assert str(error).startswith("cuda:0"), error
        return "step"
    return "none"


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, ILLEGAL_ADDRESS])
@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_any_call_may_fail(
    path: Path, cuda: Cuda, expected: list[Any], status: int, step: int
) -> None:
    opened, n = n_calls(path, cuda)
    found = [fault(path, cuda, at, status, expected[0][:6]) for at in range(1, n + 1, step)]
    assert found.count("load") >= opened // step - 1 and {"load", "step"} <= set(found)
    cuda.runtime.fail(0, 0)
    with LLM(path, device="cuda:0", **OPTIONS) as llm:
        assert first_tokens(llm) == expected[0][:6]


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, NO_BINARY])
def test_auto_runs_on_the_cpu_where_the_gpu_fails_to_load(
    path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[Any], status: int
) -> None:
    cuda = cupy_on_shim.install(monkeypatch)
    opened, _ = n_calls(path, cuda)
    for at in range(2, opened, 41):
        cuda.runtime.fail(at, status)
        with LLM(path, device="auto", **OPTIONS) as llm:
            assert llm.runtime.device.kind == "cpu"
            [note] = start_notes(llm)
            assert re.match(f"no GPU is used: cuda:0.*cudaError{status}", note), note
            assert first_tokens(llm) == expected[0][:6]


def test_what_can_not_be_compiled_is_an_error_or_left_to_the_cpu(
    path: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(cubins: Any, *args: Any) -> Any:
        raise DeviceError("NVRTC can't compile k: k.cu(3): error: none")

    monkeypatch.setattr(Cubins, "load", fail)
    with pytest.raises(DeviceError, match=r"^NVRTC can't compile k: k.cu\(3\)"):
        LLM(path, device="cuda", **OPTIONS)
    assert not cuda.runtime.memory
    with LLM(path, **OPTIONS) as llm:
        assert start_notes(llm) == ["no GPU is used: NVRTC can't compile k: k.cu(3): error: none"]


def test_a_gpu_that_is_lost_leaves_other_models_alone(
    path: Path, cuda: Cuda, expected: list[Any]
) -> None:
    with LLM(path, device="cuda:0", **OPTIONS) as lost, LLM(path, device="cpu", **OPTIONS) as llm:
        stream = lost.stream(PROMPT, max_tokens=60, temperature=0.0)
        next(stream)
        cuda.runtime.fail(1, ILLEGAL_ADDRESS)
        with pytest.raises(DeviceError, match="cuda:0 failed: .*cudaError700"):
            list(stream)
        assert first_tokens(llm) == expected[0][:6]
        with pytest.raises(DeviceError, match="cuda:0 failed: .*cudaError700"):
            lost.generate(PROMPT, max_tokens=2)
