"""Plans of several memories: each within its own budget; a machine of two is made up of numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeinfer import plan, platform, runtime
from edgeinfer.backend import Program
from edgeinfer.batch import Demand, StepLimits, StepRequest
from edgeinfer.cli.main import main
from edgeinfer.engine import memory_plan
from edgeinfer.engine.memory_plan import MemoryPlan, PlanRequest, solve
from edgeinfer.engine.plan_error import _most, would_fit
from edgeinfer.engine.plan_rows import HostBytes, Pool
from edgeinfer.errors import Keyword, PlanError, UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.model import Model
from edgeinfer.parameters import parse_memory
from edgeinfer.server.load_choices import advice_beside
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
    backend: TwoMemories | OneMemory,
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
    assert {"staging", "requests", "waiting requests", "Python", "chat templates"} == set(host.rows)
    assert plan.rows["KV cache (cuda:0)"] == MiB and plan.rows["staging"] == 64 * MiB
    assert sum(plan.rows.values()) == plan.total_bytes == host.total_bytes + gpu.total_bytes
    assert plan.summary == f"{host.total_bytes // MiB} MiB, 101 MiB on cuda:0"


@pytest.mark.parametrize(
    ("backend", "host", "memory"),
    [
        (TwoMemories(101 * MiB), 1 << 30, "cuda:0"),
        (TwoMemories(-5), 1 << 30, "cuda:0"),  # a margin that is more than what is free
        (TwoMemories(1 << 30, "host"), 130 * MiB, "host"),
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


class OneMemory:
    """All in the host's memory; `per_token` bytes of cache in f16, and rows of a step."""

    def __init__(
        self, per_token: int, weights: int, per_row: int, packing: int = 0, *, few: bool = False
    ) -> None:
        """`few`: it runs K and V in f16 alone."""
        self._per_token, self._weights, self._per_row = per_token, weights, per_row
        self._packing, self._is_few = packing, few

    def memories(self, host: int) -> Mapping[str, int]:
        return {"host": host}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        limits = StepLimits.of(request, 320, segment.groups, 256)
        (kv, *_) = segment.caches.values()
        if self._is_few and {kv.k_type, kv.v_type} != {"f16"}:
            raise UnsupportedModelError("heads that are too wide")
        share = {"f16": 64, "q8_0": 34, "q4_0": 18}
        cache = limits.n_pages[0] * 32 * self._per_token * (share[kv.k_type] + share[kv.v_type])
        rows = {
            "weights Q4_0": self._weights,
            "KV cache": cache // 128,
            "scratch": limits.max_rows * self._per_row,
        }
        return Demand(limits, {"host": rows}, packing_bytes=self._packing)

    def compile(self, segment: Segment, limits: StepLimits) -> Program:
        raise AssertionError("a plan compiles nothing")


TYPES: list[tuple[str, str] | None] = [None, ("f16", "f16"), ("f16", "q8_0"), ("q4_0", "q4_0")]


@settings(max_examples=150, deadline=None)
@given(
    weights=st.integers(0, 500 * MiB), per_token=st.integers(1, 60_000),
    per_row=st.integers(0, 200_000), host=st.integers(0, 1 << 30),
    n_ctx=st.none() | st.integers(1, 40_000), slots=st.integers(1, 20),
    types=st.sampled_from(TYPES), is_allowed=st.booleans(), kept=st.none() | st.integers(0, 90_000),
    few=st.booleans(),
)  # fmt: skip
@example(9 * MiB, 20_000, 0, 150 * MiB, 40_000, 700, None, False, None, False)
@example(9 * MiB, 20_000, 0, 150 * MiB, 40_000, 2, ("f16", "f16"), False, 90_000, False)
@example(9 * MiB, 20_000, 0, 150 * MiB, 40_000, 2, ("f16", "f16"), False, 90_000, True)
def test_every_setting_that_an_error_names_works_by_itself(
    segment: Segment, weights: int, per_token: int, per_row: int, host: int, n_ctx: int | None,
    slots: int, types: Any, is_allowed: bool, kept: int | None, few: bool,
) -> None:  # fmt: skip
    few = few and types in TYPES[:2]  # what it does not run is refused for that
    machine = OneMemory(per_token, weights, per_row, packing=16 * MiB, few=few)
    request = PlanRequest(
        n_ctx, slots, 1, host, {}, types, HostBytes(9 * MiB, 20 * MiB), host << is_allowed, kept
    )
    try:
        found = solve(segment, machine, request)
    except PlanError as error:
        named = [each for each in error.advice if isinstance(each, Keyword)]
        assert error.available == host < (error.needed or 0)
        if "together" in str(error):
            assert error.n_ctx is None and 2 <= len(named) <= 4
            assert works(segment, machine, request, *named), str(error)
            assert not any(works(segment, machine, request, each) for each in named)
            return
        assert len(named) <= 2
        assert (error.n_ctx is not None) == ("n_ctx" in {each.name for each in named})
        for each in named:
            assert works(segment, machine, request, each), str(each)
        if not named:
            assert "smaller file" in str(error)
            least_types = "q4_0" if types and not few else None
            least = dict(n_ctx=32, slots=1, kept_tokens=0, kv_type=least_types)
            assert not works(segment, machine, request, *(Keyword(*each) for each in least.items()))
            most = request._replace(available=request.most_available // MiB * MiB)
            least = dict(n_ctx=32, slots=1, kept_tokens=0)
            assert not works(segment, machine, most, *(Keyword(*each) for each in least.items()))
    else:
        assert found.fits and (n_ctx is None or found.n_ctx == n_ctx)
        assert types is None or found.kv_types == types
        assert found.slots == slots


@settings(max_examples=100, deadline=None)
@given(
    weights=st.integers(0, 500 * MiB), per_token=st.integers(1, 60_000),
    budget=st.integers(1, 1 << 30), most=st.integers(1, 2 << 30), left=st.integers(0, 2 << 30),
    others=st.integers(24 * MiB, 600 * MiB), slots=st.integers(1, 9), n_ctx=st.integers(32, 40_000),
)  # fmt: skip
@example(300 * MiB, 1, 300 * MiB, 400 * MiB, 1 << 30, 100 * MiB, 1, 32)
@example(300 * MiB, 60_000, 300 * MiB, 400 * MiB, 1 << 30, 24 * MiB, 1, 40_000)
def test_a_server_advises_what_works_and_no_more_memory_than_there_is(
    segment: Segment, weights: int, per_token: int, budget: int, most: int, left: int, others: int,
    slots: int, n_ctx: int,
) -> None:  # fmt: skip
    """Of its `budget` others have a part; it may have `most`, and `left` of that is left now."""
    machine = OneMemory(per_token, weights, 0)
    request = PlanRequest(
        n_ctx, slots, 1, max(1, budget - others), {}, ("f16", "f16"), most_available=left
    )
    try:
        solve(segment, machine, request)
    except PlanError as error:
        advice = advice_beside(error, others, most)
        named = [each for each in advice if isinstance(each, Keyword)]
        assert "".join(map(str, advice)).strip()
        for each in [] if "together" in str(error) else named:
            if each.name == "memory":
                memory = parse_memory(str(each.value), 0)
                assert memory <= most
                each = Keyword("memory", f"{memory - others}")
            assert works(segment, machine, request, each), str(each)


def works(segment: Segment, machine: OneMemory, request: PlanRequest, *named: Keyword) -> bool:
    """Whether the same request with the settings that an error named has a plan."""
    changed: dict[str, Any] = dict(named)
    if "memory" in changed:
        changed["available"] = parse_memory(changed.pop("memory"), request.available)
    if kind := changed.pop("kv_type", None):
        changed["kv_types"] = kind, kind
    try:
        return solve(segment, machine, request._replace(**changed)).fits
    except (PlanError, UnsupportedModelError):
        return False


def test_what_is_chosen_follows_the_stated_order(segment: Segment) -> None:
    """Spare pages go first, then f16, then half the context; what was asked for stays."""
    machine = OneMemory(10_000, 0, 1000)

    def chosen(host: int, n_ctx: int | None = None, types: Any = None) -> tuple[Any, ...]:
        found = solve(segment, machine, PlanRequest(n_ctx, 1, 1, host, {}, types))
        return found.n_ctx, found.kv_types[0], found.n_spare_pages > 0, found.note

    whole = solve(segment, machine, PlanRequest(8192, 1, 1, 1 << 30))
    cache, spare = whole.rows["KV cache"], whole.rows["prefix pages"]
    f16 = whole.total_bytes - spare
    assert chosen(1 << 30) == chosen(f16 + spare) == (8192, "f16", True, "")
    assert chosen(f16) == chosen(f16 + spare - 1) == (8192, "f16", False, "")
    assert chosen(f16 - 1) == (8192, "q8_0", False, "memory is short: f16 would be usual")
    half = "memory is short: 8192 would be usual"
    assert chosen(f16 - cache // 2) == (4096, "f16", False, half)
    assert chosen(f16 - cache * 3 // 5)[:2] == (4096, "q8_0")
    assert "8192 and f16 would be usual" in chosen(f16 - cache * 3 // 5)[3]
    assert chosen(f16 - 1, types=("f16", "f16")) == (4096, "f16", False, half)
    assert chosen(f16 - 1, n_ctx=8192)[:2] == (8192, "q8_0")
    with pytest.raises(PlanError, match="for 8192 tokens"):
        chosen(f16 - MiB, 8192, ("f16", "f16"))
    assert chosen(f16 - cache * 61 // 64)[:2] == (512, "q8_0")
    few = solve(segment, OneMemory(1, 0, MiB), PlanRequest(512, 1, 1, 160 * MiB))
    assert few.limits.max_rows == 64 and "longer steps" in few.note


@pytest.mark.parametrize("n_ctx", [64, 1024, 8192, 131_072])
@pytest.mark.parametrize("slots", [1, 4])
def test_pages_for_earlier_prompts_are_few_and_printed(
    segment: Segment, n_ctx: int, slots: int
) -> None:
    """A quarter of one context, 64 MiB at most."""
    machine = OneMemory(512, 0, 0)  # what a token takes of this model
    found = solve(segment, machine, PlanRequest(n_ctx, slots, 1, 4 << 30))
    spare = found.rows.get("prefix pages", 0)
    assert spare <= 64 * MiB and found.n_spare_pages <= n_ctx // 32 // 4
    assert (spare > 0) == (n_ctx >= 128)
    said = [line for line in found.choices if "earlier prompts" in line]
    assert len(said) == 1 and f"room for {32 * found.n_spare_pages} tokens" in said[0]
    assert found.limits.n_pages[0] == slots * -(-n_ctx // 32) + found.n_spare_pages


@pytest.mark.parametrize("kept", [0, 1, 5000, 100_000])
def test_what_is_to_be_kept_is_planned_to_the_page(segment: Segment, kept: int) -> None:
    machine = OneMemory(512, 0, 0)
    types = ("f16", "f16")
    request = PlanRequest(1024, 2, 1, 4 << 30, kv_types=types, kept_tokens=kept)
    found = solve(segment, machine, request)
    assert found.n_spare_pages == -(-kept // 32)
    if kept > 1:  # asked for, so not given up where memory is short
        short = request._replace(available=found.total_bytes - 1, most_available=0)
        with pytest.raises(PlanError) as caught:
            solve(segment, machine, short)
        (setting,) = [e for e in caught.value.advice if isinstance(e, Keyword)][:1]
        assert setting.name == "kept_tokens"
        solve(segment, machine, short._replace(kept_tokens=int(setting.value)))


def test_an_error_names_memory_where_no_shorter_context_is_of_use(segment: Segment) -> None:
    """With all that there is, what was asked for does not fit either: less does, in more."""
    machine = OneMemory(20_000, 9 * MiB, 0)
    request = PlanRequest(40_000_000, 3, 1, 1, {}, None, HostBytes(), 1 << 30)
    with pytest.raises(PlanError, match="1 byte is available") as raised:
        solve(segment, machine, request)
    named = [each for each in raised.value.advice if isinstance(each, Keyword)]
    assert [each.name for each in named] == ["slots", "n_ctx", "memory"]
    assert works(segment, machine, request, *named)
    beside = advice_beside(raised.value, 100 * MiB, 1 << 30)
    asked, told = (int(str(each[4].value)[:-1]) for each in (raised.value.advice, beside))
    assert told == asked + 100 and beside[:4] == raised.value.advice[:4]
    assert "smaller file" in advice_beside(raised.value, 100 * MiB, told * MiB - 1)[0]


def test_sizes_of_an_error_are_never_nothing_nor_equal(segment: Segment) -> None:
    with pytest.raises(PlanError) as caught:
        plan_for(segment, TwoMemories(100, weights=700), 1)
    assert "needs 1724 bytes on cuda:0" in str(caught.value)
    assert "100 bytes are available" in str(caught.value)
    machine = OneMemory(0, 0, 0)
    needed = plan_for(segment, machine, 64).total_bytes
    with pytest.raises(PlanError, match="1 byte more than there are"):
        plan_for(segment, machine, 64, needed - 1)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that is planned for a machine whose GPU has room for 2,048 tokens of it."""
    monkeypatch.setattr(runtime, "open_backend", lambda device, **_: TwoMemories(103 * MiB))
    monkeypatch.setattr(platform, "memory_budget", lambda held: 1 << 30)
    return str(tiny_model(tmp_path, n_ctx=8192))


def test_the_command_prints_each_memory(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", path])
    text = capsys.readouterr().out
    assert text.index("host:") < text.index("staging") < text.index("of 1024\n")
    assert text.index("of 1024\n") < text.index("cuda:0:") < text.index("102.0 MiB of 103\n")
    for line in ("context 2048 tokens", "K and V as f16", "earlier prompts", "8192 would be usual"):
        assert line in text
    with pytest.raises(SystemExit):
        main(["plan", path, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert {row["memory"] for row in facts["rows"]} == {"host", "cuda:0"}
    assert facts["total_bytes"] == sum(row["bytes"] for row in facts["rows"])
    assert (facts["solved"]["n_ctx"], facts["solved"]["kv_type"]) == (2048, ["f16", "f16"])
    gpu = {"name": "cuda:0", "bytes": 102 * MiB, "available_bytes": 103 * MiB}
    assert facts["memories"][1] == gpu and facts["memories"][0]["name"] == "host"


def test_what_an_open_model_holds_of_a_gpu_counts_for_the_next(path: str) -> None:
    assert _plan(path, {}, {}).n_ctx == 2048
    found = _plan(path, {"memory": "1G"}, {"host": 1 << 40, "cuda:0": 5 * MiB})
    assert found.n_ctx == 8192 and found.note == "once the open model is closed"
    assert found.available == 1 << 30
    assert _plan(path, {}, {"host": 5 * MiB}).n_ctx == 2048  # of the memory that is not short


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile kernels for processors")
def test_a_plan_for_a_gpu_takes_no_memory_and_names_no_other_way(tmp_path: Path) -> None:
    """However large what is asked for: arrays of a step come with the program, not with its plan.

    Where a GPU was asked for and holds no layer, more memory of the host would change nothing.
    """
    path = tiny_model(tmp_path, n_ctx=4096)
    with pytest.raises(PlanError, match="not one layer fits into the free memory of shim:0"):
        plan(path, device="shim", slots=100_000, n_ctx=2048, memory="1000T")
    with pytest.raises(PlanError, match="not one layer fits") as caught:
        plan(path, device="shim", slots=1_000_000, n_ctx=32, memory="900M")
    assert caught.value.memory == "shim:0"


def test_advice_names_any_number_of_settings() -> None:
    settings = [Keyword("slots", 1), Keyword("n_ctx", 512), Keyword("kv_type", "q8_0")]
    told = ["".join(map(str, would_fit(settings[:n], " and "))) for n in (1, 2, 3)]
    assert told == [
        "slots=1 would fit",
        "slots=1 and n_ctx=512 would fit",
        "slots=1, n_ctx=512 and kv_type='q8_0' would fit",
    ]


_HUGE = 2**31 - 1


@given(
    high=st.integers(0, _HUGE), edge=st.integers(-9, _HUGE), slope=st.integers(1, 1 << 40),
    stair=st.integers(1, 4096), bend=st.integers(1, 1 << 20), most=st.integers(1, 1 << 50),
)  # fmt: skip
@example(_HUGE, 5000, 1 << 40, 1, 1 << 20, 1)
@example(_HUGE, 5000, 1, 4096, 1 << 20, 1 << 50)
def test_the_largest_that_fits_is_found_in_few_looks(
    high: int, edge: int, slope: int, stair: int, bend: int, most: int
) -> None:
    """Of what grows in stairs, faster or slower from some size on, or not at all for long."""
    looks = []

    def room(n: int) -> int:
        looks.append(n)
        beyond = (edge - n) // stair * slope + (0 if n > edge else slope)
        return min(beyond if n <= edge else beyond * bend, most)

    found = _most(high, room)
    expected = max((n for n in (0, high) if n == 0 or room(n) >= 0), default=0)
    del looks[-1:]
    if 0 < found < high:
        assert room(found) >= 0 > room(found + 1)
    else:
        assert found == expected or high < 1
    assert len(looks) <= 50 and (not looks or 1 <= min(looks) <= max(looks) <= max(1, high))


@pytest.mark.parametrize(
    "asked",
    [
        {"n_ctx": _HUGE}, {"slots": _HUGE}, {"kept_tokens": _HUGE}, {"memory": "1K"},
        {"n_ctx": _HUGE, "slots": _HUGE, "kept_tokens": _HUGE},
        {"slots": 1_000_000, "threads": 1024, "kv_type": "f16"},
    ],
)  # fmt: skip
def test_an_absurd_request_is_refused_after_few_reckonings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any
) -> None:
    """One takes 10 to 80 ms of a real model; there were up to 250, of a search by halves."""
    reckon, n = memory_plan.planned, 0

    def counted(*given: Any) -> MemoryPlan:
        nonlocal n
        n += 1
        return reckon(*given)

    monkeypatch.setattr(memory_plan, "planned", counted)
    monkeypatch.setattr(platform, "memory_budget", lambda held: 1 << 30)
    with pytest.raises(PlanError, match="would fit|smaller file"):
        plan(tiny_model(tmp_path, n_ctx=8192), device="cpu", **asked)
    assert n <= 60
