"""Plans of several memories: each within its own budget; a machine of two is made up of numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer import platform, runtime
from edgeinfer.backend import Program
from edgeinfer.batch import Demand, StepLimits, StepRequest
from edgeinfer.cli.main import main
from edgeinfer.engine.memory_plan import MemoryPlan, PlanRequest, Pool, solve
from edgeinfer.errors import PlanError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.model import Model
from edgeinfer.tui.errors import in_chat
from edgeinfer.tui.launch import _plan

from .models_for_tests import tiny_model

MiB = 1 << 20


class TwoMemories:
    """The weights in a GPU's memory, the cache in `cache_in`, a kilobyte a token."""

    def __init__(self, gpu: int, cache_in: str = "cuda:0", weights: int = 100 * MiB) -> None:
        self._gpu, self._cache_in, self._weights = gpu, cache_in, weights

    def memories(self, host: int) -> Mapping[str, int]:
        return {"host": host, "cuda:0": self._gpu}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        rows: dict[str, dict[str, int]] = {"cuda:0": {"weights Q4_0": self._weights}}
        rows.setdefault("host", {})["staging"] = 64 * MiB
        rows[self._cache_in]["KV cache"] = request.n_ctx * request.slots << 10
        return Demand(StepLimits({0: 1}, 1, 1, 1, 1), rows)

    def compile(self, segment: Segment, limits: StepLimits) -> Program:
        raise AssertionError("a plan compiles nothing")


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Segment]:
    with GGUFFile.open(tiny_model(tmp_path_factory.mktemp("plan"), n_ctx=8192)) as file:
        yield Model.load(file).graph.segment()


def plan_for(
    segment: Segment,
    backend: TwoMemories,
    n_ctx: int | None = None,
    host: int = 1 << 30,
    freed: Mapping[str, int] | None = None,
) -> MemoryPlan:
    return solve(segment, backend, PlanRequest(n_ctx, 1, 1, host, freed or {}))


def test_each_memory_has_its_rows_and_its_budget(segment: Segment) -> None:
    plan = plan_for(segment, TwoMemories(200 * MiB), 1024)
    host, gpu = plan.pools
    assert gpu == Pool("cuda:0", {"weights Q4_0": 100 * MiB, "KV cache": MiB}, 200 * MiB)
    assert (host.name, host.available, plan.host) == ("host", 1 << 30, host)
    assert {"staging", "tokenizer", "Python", "chat templates"} == set(host.rows)
    assert plan.rows["KV cache (cuda:0)"] == MiB and plan.rows["staging"] == 64 * MiB
    assert sum(plan.rows.values()) == plan.total_bytes == host.total_bytes + gpu.total_bytes
    assert plan.summary == f"{host.total_bytes // MiB} MiB, 101 MiB on cuda:0"


@pytest.mark.parametrize(
    ("backend", "host", "memory"),
    [
        (TwoMemories(101 * MiB), 1 << 30, "cuda:0"),
        (TwoMemories(-5), 1 << 30, "cuda:0"),  # a margin that is more than what is free
        (TwoMemories(1 << 30, "host"), 179 * MiB, "host"),
        (TwoMemories(1 << 30), 100 * MiB, "host"),
    ],
)
def test_the_memory_that_is_short_is_named(
    segment: Segment, backend: TwoMemories, host: int, memory: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_for(segment, backend, 8192, host)
    error = caught.value
    assert error.memory == memory and error.needed is not None and error.available is not None
    assert error.needed > error.available >= 0
    assert (" on cuda:0" in str(error)) == (memory == "cuda:0") == ("on cuda:0" in in_chat(error))
    if error.n_ctx:
        assert plan_for(segment, backend, error.n_ctx, host).fits


def test_a_context_is_as_long_as_the_memory_of_its_cache_allows(segment: Segment) -> None:
    assert plan_for(segment, TwoMemories(103 * MiB)).n_ctx == 2048
    assert plan_for(segment, TwoMemories(108 * MiB)).n_ctx == 8192
    assert "8192 would be usual" in plan_for(segment, TwoMemories(103 * MiB)).note
    assert plan_for(segment, TwoMemories(103 * MiB), freed={"cuda:0": 5 * MiB}).n_ctx == 8192
    assert plan_for(segment, TwoMemories(103 * MiB), freed={"host": 5 * MiB}).n_ctx == 2048


@settings(max_examples=60, deadline=None)
@given(
    gpu=st.integers(0, 300 * MiB), host=st.integers(0, 400 * MiB),
    n_ctx=st.none() | st.integers(1, 100_000), cache_in=st.sampled_from(["host", "cuda:0"]),
)  # fmt: skip
def test_a_plan_is_within_every_budget_or_an_error(
    segment: Segment, gpu: int, host: int, n_ctx: int | None, cache_in: str
) -> None:
    try:
        plan = plan_for(segment, TwoMemories(gpu, cache_in), n_ctx, host)
    except PlanError as error:
        assert error.needed is not None and error.available is not None
        assert error.needed > error.available == {"host": host, "cuda:0": gpu}[error.memory]
    else:
        assert plan.pools[0].total_bytes <= host and plan.pools[1].total_bytes <= gpu


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that is planned for a machine whose GPU has room for 2,048 tokens of it."""
    monkeypatch.setattr(runtime, "open_backend", lambda device, **_: TwoMemories(103 * MiB))
    monkeypatch.setattr(platform, "available_memory", lambda: 1 << 30)
    return str(tiny_model(tmp_path, n_ctx=8192))


def test_the_command_prints_each_memory(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", path])
    text = capsys.readouterr().out
    assert text.index("host:") < text.index("staging") < text.index("of 1024\n")
    assert text.index("of 1024\n") < text.index("cuda:0:") < text.index("102.0 MiB of 103\n")
    with pytest.raises(SystemExit):
        main(["plan", path, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert {row["memory"] for row in facts["rows"]} == {"host", "cuda:0"}
    assert facts["total_bytes"] == sum(row["bytes"] for row in facts["rows"])
    gpu = {"name": "cuda:0", "bytes": 102 * MiB, "available_bytes": 103 * MiB}
    assert facts["memories"][1] == gpu and facts["memories"][0]["name"] == "host"


def test_what_an_open_model_holds_of_a_gpu_counts_for_the_next(path: str) -> None:
    assert _plan(path, {}, {}).n_ctx == 2048
    found = _plan(path, {"memory": "1G"}, {"host": 1 << 40, "cuda:0": 5 * MiB})
    assert found.n_ctx == 8192 and found.note == "once the open model is closed"
    assert found.available == 1 << 30
    assert _plan(path, {}, {"host": 5 * MiB}).n_ctx == 2048  # of the memory that is not short
