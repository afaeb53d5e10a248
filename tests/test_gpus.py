"""Several GPUs: layers split by the memory of each, and the tokens of one; on the CUDA shim."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import LLM, DeviceError, PlanError, plan
from edgeinfer.backend import Program
from edgeinfer.balance import balanced
from edgeinfer.batch import Demand, StepLimits, StepRequest
from edgeinfer.chain import ChainBackend, Stretch
from edgeinfer.cli.main import main
from edgeinfer.cli.models import start_notes
from edgeinfer.device import Choice, Device
from edgeinfer.engine.memory_plan import PlanRequest
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.kernels.cuda.shim import ShimDevice
from edgeinfer.model import Model
from edgeinfer.options import LoadOptions
from edgeinfer.placement import place

from .backends import IDS, LIMITS, backend, batch_of
from .models_for_tests import tiny_model
from .test_windows import segment as windowed

N_LAYERS = 4
MiB = 1 << 20
BOTH = (Device("shim", 0), Device("shim", 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tiny_model(tmp_path_factory.mktemp("gpus"), n_layers=N_LAYERS, quant="Q4_0")
    with GGUFFile.open(path) as file:
        yield Model.load(file)


# -- who gets which layers -----------------------------------------------------------------------


class Numbers:
    """A GPU where a program takes 3 megabytes, a layer what `sizes` say, and a head 4 more."""

    def __init__(self, index: int, room: int, sizes: list[int], max_rows: int = 512) -> None:
        self.name, self.room, self.sizes, self.max_rows = f"cuda:{index}", room, sizes, max_rows
        self.asked: list[StepRequest] = []

    def memories(self, host: int) -> Mapping[str, int]:
        return {"host": host, self.name: self.room}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        self.asked.append(request)
        layers = sum(self.sizes[layer] for layer in segment.caches)
        rows = {"scratch": 3 * MiB, "weights": layers + 4 * MiB * segment.is_last}
        limits = StepLimits.of(request, 320, segment.groups, self.max_rows)
        return Demand(limits, {"host": {"logits": 1000}, self.name: rows})

    def compile(self, segment: Segment, limits: StepLimits) -> Program:
        raise AssertionError("a placement compiles nothing")


def gpus_of(rooms: list[int], sizes: list[int]) -> list[Numbers]:
    return [Numbers(i, room * MiB, sizes) for i, room in enumerate(rooms)]


REQUEST = PlanRequest(None, 1, 2, 4 << 30)


def fullest(gpus: list[Numbers], bounds: tuple[int, ...]) -> float:
    """The share of the GPU that is fullest, which is what `balanced` makes least."""
    shares = []
    for gpu, begin, end in zip(gpus, bounds, bounds[1:], strict=False):
        head = 4 * MiB * (end == len(gpu.sizes))
        used = 3 * MiB + sum(gpu.sizes[begin:end]) + head if begin < end else 0
        shares.append(used / max(1, gpu.room))
    return max(shares)


@pytest.mark.parametrize(
    "rooms",
    [[24, 24], [24, 8], [8, 24], [100, 5], [0, 24], [24, 0], [24, 24, 24], [40, 2, 40], [9, 20, 9]],
    ids=str,
)
@pytest.mark.parametrize("kind", ["alike", "growing", "odd"])
def test_the_fullest_is_as_empty_as_any_split_leaves_it(rooms: list[int], kind: str) -> None:
    n = 12
    rng = np.random.default_rng(len(rooms))
    sizes = {
        "alike": [MiB] * n,
        "growing": [MiB * i // 4 for i in range(1, n + 1)],
        "odd": rng.integers(MiB // 8, 3 * MiB, n).tolist(),
    }[kind]
    model, gpus = windowed(*[0] * n), gpus_of(rooms, sizes)
    stretches = balanced(model, 0, gpus, [], REQUEST)
    firsts = {id(stretch.backend): stretch.first for stretch in stretches}
    assert [stretch.first for stretch in stretches] == sorted(set(firsts.values()))
    assert stretches[0].first == 0
    bounds = [n]
    for gpu in reversed(gpus):
        bounds.insert(0, firsts.get(id(gpu), bounds[0]))
    every = ((0, *cuts, n) for cuts in combinations_with_replacement(range(n + 1), len(rooms) - 1))
    least = min(fullest(gpus, each) for each in every)
    # With three a better split may need two layers to move at once.
    slack = 1.0 if len(rooms) == 2 else 1.1
    assert fullest(gpus, tuple(bounds)) <= slack * least


def test_all_are_asked_for_steps_as_large_as_the_least_machine_runs() -> None:
    first, second = Numbers(0, 50 * MiB, [MiB] * 4, 96), Numbers(1, 50 * MiB, [MiB] * 4, 512)
    slow = Numbers(2, 0, [MiB] * 4, 64)
    balanced(windowed(0, 0, 0, 0), 0, [first, second], [slow], REQUEST)
    assert len(slow.asked) == 1
    assert {each.most_rows for each in (*first.asked[1:], *second.asked[1:])} == {64}


def test_a_cache_that_a_later_layer_reads_stays_with_it() -> None:
    model = windowed(0, 40, shared=True)  # the third layer reads the first one's
    (stretch,) = balanced(model, 0, gpus_of([20, 20], [MiB] * 3), [], REQUEST)
    assert stretch.first == 0


def test_more_gpus_than_layers() -> None:
    stretches = balanced(windowed(0, 0), 0, gpus_of([20] * 5, [MiB] * 2), [], REQUEST)
    assert [stretch.first for stretch in stretches] == [0, 1]


@pytest.mark.parametrize(
    ("rooms", "asked", "used", "n_gpu_layers"),
    [
        ([30, 30], None, ["cuda:0"], 12),  # 19 megabytes
        ([10, 30], None, ["cuda:1"], 12),  # one alone holds it, if not the first
        ([13, 13], None, ["cuda:0", "cuda:1"], 12),
        ([13, 13, 13], None, ["cuda:0", "cuda:1"], 12),
        ([9, 9], None, ["host", "cuda:0", "cuda:1"], 8),
        ([2, 2], None, ["host"], 0),
        ([9, 9], 2, ["host", "cuda:0"], 2),
        ([9, 9], 5, ["host", "cuda:0", "cuda:1"], 5),
        ([9, 9], 0, ["host"], 0),
    ],
)
def test_no_more_gpus_than_are_needed(
    rooms: list[int], asked: int | None, used: list[str], n_gpu_layers: int
) -> None:
    gpus = gpus_of(rooms, [MiB] * 12)
    choices = [[gpu] for gpu in gpus] + [gpus[:n] for n in range(2, len(gpus) + 1)]
    placed = place(windowed(*[0] * 12), choices, lambda: backend("cpu"), asked, REQUEST)
    on_gpus = [name for name in used if name != "host"]
    assert [pool.name for pool in placed.plan.pools] == ["host", *on_gpus]
    assert placed.n_gpu_layers == n_gpu_layers and placed.plan.fits
    on_host = any(purpose.startswith("weights") for purpose in placed.plan.host.rows)
    assert on_host == ("host" in used)


def test_what_fits_on_no_choice_is_an_error_that_names_the_gpu() -> None:
    gpus = gpus_of([9, 9], [MiB] * 12)
    with pytest.raises(PlanError, match="on cuda:[01]") as caught:
        place(windowed(*[0] * 12), [gpus], lambda: backend("cpu"), -1, REQUEST)
    assert caught.value.memory in ("cuda:0", "cuda:1")


# -- on two devices ------------------------------------------------------------------------------


def test_any_cut_between_two_gpus_gives_the_bits_of_one(model: Model) -> None:
    segment = model.graph.segment()
    with backend("shim").compile(segment, LIMITS) as program:
        expected = program.submit(batch_of(IDS)).wait().logits.copy()
    first, second = backend("shim:0"), backend("shim:1")
    for cut in range(1, N_LAYERS):
        chain = ChainBackend([Stretch(0, first), Stretch(cut, second)])
        with chain.compile(segment, LIMITS) as program:
            for chunk in (len(IDS), 4, 1):
                parts = [
                    program.submit(batch_of(IDS[i : i + chunk], i)).wait().logits.copy()
                    for i in range(0, len(IDS), chunk)
                ]
                np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.fixture
def shims(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Shims by number once they are opened; a number here before is the memory that one is to have.

    A device leaves a part of its memory to its driver.
    """
    backend("shim")
    opened: dict[int, Any] = {}

    def open_device(kind: str, index: int) -> ShimDevice:
        room = opened.get(index, 1 << 30)
        if isinstance(room, Exception):
            raise room
        opened[index] = ShimDevice(memory_bytes=room + (300 << 20))
        return opened[index]

    monkeypatch.setattr("edgeinfer.kernels.cuda.backend.open_device", open_device)
    return opened


def answers(llm: LLM) -> list[Any]:
    several = llm.generate_batch(
        ["abc", "a longer prompt " * 4], max_tokens=9, temperature=0.9, seed=4
    )
    slid = llm.generate("x" * 100, max_tokens=80, overflow="slide", temperature=0.0)
    ids: list[Any] = [each.token_ids for each in (*several, slid)]
    return [*ids, llm.logits(IDS, prefill_chunk=5).view(np.int32).tolist()]


@pytest.fixture(scope="module")
def expected(model: Model) -> list[Any]:
    with LLM(model.file.path, device="cpu", **OPTIONS) as llm:
        return answers(llm)


# So many contexts that layers take more than the scratch that every GPU needs.
OPTIONS: LoadOptions = {"threads": 1, "n_ctx": 160, "slots": 32}


def short_room(path: Path) -> int:
    """Bytes that do not hold three layers of four."""
    return plan(path, device="shim:0", **OPTIONS).pools[1].total_bytes * 4 // 5


@pytest.mark.parametrize("gpu_layers", ["auto", 3])
def test_two_gpus_hold_what_one_does_not(
    model: Model,
    shims: dict[int, Any],
    expected: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    gpu_layers: Any,
) -> None:
    choice = Choice(BOTH[0], further=BOTH[1:], if_needed=True)
    monkeypatch.setattr("edgeinfer.load_settings.find_device", lambda name: choice)
    room = short_room(model.file.path)
    shims.update({0: room, 1: room})
    with LLM(model.file.path, device="cuda", gpu_layers=gpu_layers, **OPTIONS) as llm:
        host, *pools = llm.plan.pools
        assert [pool.name for pool in pools] == ["shim:0", "shim:1"]
        for i, pool in enumerate(pools):
            total = shims[i].memory()[1]
            assert total - shims[i].memory()[0] == pool.total_bytes <= room
        facts, n_layers = llm.runtime.program.describe(), llm.runtime.n_gpu_layers
        assert n_layers == sum(facts["layers"][str(each)] for each in BOTH)
        assert facts["gpu"] == "CPU shim + CPU shim"
        if gpu_layers == 3:
            assert facts["device"] == llm.runtime.devices == "cpu + shim:0 + shim:1"
            assert facts["layers"]["cpu"] == 1 and n_layers == 3
            assert llm.runtime.runs_on.startswith("2 + 1 of 4 layers on ")
            assert "1 thread" in llm.runtime.runs_on
        assert "shim:0 + shim:1" in repr(llm)
        assert answers(llm) == expected
    assert all(shim.memory()[0] == shim.memory()[1] for shim in shims.values())


@pytest.mark.parametrize("if_needed", [True, False])
def test_one_that_holds_it_is_alone_unless_both_are_named(
    model: Model,
    shims: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
    if_needed: bool,
) -> None:
    if if_needed:
        choice = Choice(BOTH[0], further=BOTH[1:], if_needed=True)
        monkeypatch.setattr("edgeinfer.load_settings.find_device", lambda name: choice)
    found = plan(model.file.path, device="shim:1,shim:0", **OPTIONS)
    names = [pool.name for pool in found.pools]
    assert names == (["host", "shim:0"] if if_needed else ["host", "shim:1", "shim:0"])
    assert sorted(shims) == ([0] if if_needed else [0, 1])  # no other is opened


def test_one_that_can_not_be_opened_is_done_without_and_said(
    model: Model, shims: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice(BOTH[0], further=BOTH[1:], if_needed=True)
    room = short_room(model.file.path)
    shims.update({0: room, 1: DeviceError("shim:1 is busy")})
    with pytest.raises(DeviceError, match="shim:1 is busy"):
        plan(model.file.path, device="shim:0,shim:1", **OPTIONS)
    monkeypatch.setattr("edgeinfer.load_settings.find_device", lambda name: choice)
    shims[0] = room
    with LLM(model.file.path, device="cuda", **OPTIONS) as llm:
        assert llm.runtime.devices == "cpu + shim:0"
        assert start_notes(llm) == ["shim:1 is not used: shim:1 is busy"]


def test_the_next_one_is_taken_where_the_first_can_not_be_opened(
    model: Model, shims: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice(BOTH[0], further=BOTH[1:], if_needed=True)
    monkeypatch.setattr("edgeinfer.load_settings.find_device", lambda name: choice)
    for error in (DeviceError("in use"), PlanError("nothing is free", memory="shim:0")):
        shims.clear()
        shims[0] = error
        with LLM(model.file.path, **OPTIONS) as llm:
            assert llm.runtime.devices == "shim:1"
            assert start_notes(llm) == [f"shim:0 is not used: {error}"]
    shims[1] = DeviceError("neither")
    with pytest.raises(PlanError, match="nothing is free"):
        LLM(model.file.path, device="cuda", **OPTIONS)
    with LLM(model.file.path, **OPTIONS) as llm:
        assert start_notes(llm) == ["no GPU is used: nothing is free"]


def test_where_not_one_layer_fits_the_gpu_is_left_or_an_error(
    model: Model, shims: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latter where somebody has asked for it."""
    monkeypatch.setattr("edgeinfer.load_settings.find_device", lambda name: Choice(BOTH[0]))
    shims[0] = 1 << 20
    with LLM(model.file.path, **OPTIONS) as llm:
        assert llm.runtime.devices == "cpu"
        [note] = start_notes(llm)
        assert note == "no GPU is used: not one layer fits into the free memory of shim:0"
    for asked in ({"device": "cuda"}, {"device": "cuda", "gpu_layers": "auto"}):
        shims[0] = 1 << 20
        with pytest.raises(
            PlanError, match="^not one layer fits .* or use device='cpu'$"
        ) as caught:
            LLM(model.file.path, **{**OPTIONS, **asked})  # type: ignore[typeddict-item]
        assert caught.value.memory == "shim:0"


def test_on_the_command_line(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    backend("shim")
    path = str(model.file.path)
    with pytest.raises(SystemExit) as exit:
        main(["plan", path, "--json", "--device", "shim:0,shim:1"])
    assert exit.value.code == 0
    memories = json.loads(capsys.readouterr().out)["memories"]
    assert [each["name"] for each in memories] == ["host", "shim:0", "shim:1"]
    with pytest.raises(SystemExit) as exit:
        main(["plan", path, "--device", "shim:0,cpu"])
    assert exit.value.code and "--gpu-layers leaves" in capsys.readouterr().err
