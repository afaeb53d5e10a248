"""Chains: any cut of a model gives the bits of the whole, also when a step is cut short."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer import LLM, DeviceError, PlanError
from edgeinfer.backend import Program, build_exactly, tune, unkept_kernels
from edgeinfer.batch import Batch, Demand, PageTable, StepLimits, StepRequest
from edgeinfer.chain import Chain, ChainBackend, Link, Stretch
from edgeinfer.cli.main import main
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.memory_plan import PlanRequest
from edgeinfer.engine.sequence import Finished, Request, Token
from edgeinfer.errors import ClosedError, UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.model import Model
from edgeinfer.placement import place
from edgeinfer.sampling.params import SamplingParams

from .backends import IDS, LIMITS, backend, batch_of
from .models_for_tests import tiny_model
from .test_windows import segment as windowed

N_LAYERS = 4
MiB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tiny_model(tmp_path_factory.mktemp("chain"), n_layers=N_LAYERS, quant="Q4_0")
    with GGUFFile.open(path) as file:
        yield Model.load(file)


@pytest.fixture(scope="module")
def segment(model: Model) -> Segment:
    return model.graph.segment()


@pytest.fixture(scope="module")
def expected(segment: Segment) -> NDArray[np.float32]:
    with backend("cpu").compile(segment, LIMITS) as program:
        logits: NDArray[np.float32] = program.submit(batch_of(IDS)).wait().logits.copy()
        return logits


def chain_of(*stretches: tuple[int, str]) -> ChainBackend:
    return ChainBackend([Stretch(first, backend(name)) for first, name in stretches])


def rows(program: Any, chunk: int) -> NDArray[np.float32]:
    parts = [
        program.submit(batch_of(IDS[i : i + chunk], i)).wait().logits.copy()
        for i in range(0, len(IDS), chunk)
    ]
    return np.concatenate(parts)


CUTS: list[tuple[tuple[int, str], ...]] = [
    ((0, "cpu"), (1, "cpu")),
    ((0, "cpu"), (2, "reference")),
    ((0, "reference"), (3, "cpu")),
    ((0, "cpu"), (1, "reference"), (3, "cpu")),
    ((0, "cpu"), (1, "cpu"), (2, "cpu"), (3, "cpu")),
    ((0, "cpu"),),
]


@pytest.mark.parametrize("stretches", CUTS, ids=str)
def test_any_cut_gives_the_bits_of_the_whole(
    segment: Segment, expected: NDArray[np.float32], stretches: tuple[tuple[int, str], ...]
) -> None:
    with chain_of(*stretches).compile(segment, LIMITS) as chain:
        assert len(chain.programs) == len(stretches)
        for chunk in (len(IDS), 4, 1):
            np.testing.assert_array_equal(rows(chain, chunk), expected)


def test_what_a_chain_takes_is_what_its_parts_take(segment: Segment, model: Model) -> None:
    request = StepRequest(256, 1, 2)
    chain = chain_of((0, "cpu"), (1, "reference"))
    first = backend("cpu").demand(model.graph.segment(0, 1), request)
    second = backend("reference").demand(model.graph.segment(1), request)
    demand = chain.demand(segment, request)
    for purpose in ("KV cache", "scratch"):
        assert demand.memories["host"][purpose] == (
            first.memories["host"][purpose] + second.memories["host"][purpose]
        )
    assert demand.limits.n_pages == {0: 8} and demand.limits.max_rows == first.limits.max_rows
    assert demand.limits.row_cost == 1.0  # a step is as dear as its dearest part
    with chain.compile(segment, demand.limits) as program:
        cpu, _ = program.programs
        planned = {name: n for name, n in first.memories["host"].items() if name != "code"}
        assert cpu.memory == planned  # type: ignore[attr-defined]
        whole = sum(each.step_weight_bytes for each in program.programs)
        assert program.step_weight_bytes == whole
        facts = program.describe()
        layers = {"cpu": 1, "law": 3}
        assert facts == {"device": "cpu + law", "threads": 2, "layers": layers}


def test_what_only_some_programs_can_do_a_chain_does_with_them(segment: Segment) -> None:
    with chain_of((0, "reference"), (2, "cpu")).compile(segment, LIMITS) as chain:
        cpu = chain.programs[1]
        assert unkept_kernels(chain) == unkept_kernels(cpu) == ""
        assert build_exactly(chain, lambda done, total: None) == 0  # they are exact already
        assert tune(chain, lambda done, total: None) == tune(cpu, lambda done, total: None) != ""
    with backend("reference").compile(segment, LIMITS) as plain:
        assert tune(plain, lambda done, total: None) == unkept_kernels(plain) == ""
        assert build_exactly(plain, lambda done, total: None) == 0


class Smaller:
    """A machine that runs steps of 24 rows at most."""

    def __init__(self) -> None:
        self._backend = backend("cpu")

    def memories(self, host: int) -> Mapping[str, int]:
        return {"host": host // 2}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        most_rows = min(request.most_rows, 24)
        demand: Demand = self._backend.demand(segment, request._replace(most_rows=most_rows))
        return demand._replace(limits=demand.limits._replace(shared_rows=7))

    def compile(self, segment: Segment, limits: StepLimits) -> Program:
        assert limits.max_rows <= 24
        program: Program = self._backend.compile(segment, limits)
        return program


def test_steps_are_as_large_as_the_least_machine_runs(segment: Segment) -> None:
    for machines in ((backend("cpu"), Smaller()), (Smaller(), backend("cpu"))):
        chain = ChainBackend([Stretch(0, machines[0]), Stretch(2, machines[1])])
        limits = chain.demand(segment, StepRequest(64, 1, 2)).limits
        assert (limits.max_rows, limits.shared_rows) == (24, 7)
        assert chain.memories(100) == {"host": 50}
        with chain.compile(segment, limits) as program:
            assert rows(program, 24).shape == (len(IDS), segment.output.dim)


# -- ends ----------------------------------------------------------------------------------------


class Gate:
    """A program whose steps wait until they are let through, and that counts what it is asked."""

    def __init__(self, program: Any) -> None:
        self.program, self.entered, self.gate = program, threading.Event(), threading.Event()
        self.n_submits = self.n_closes = 0
        self.fails: Exception | None = None

    @property
    def step_weight_bytes(self) -> int:
        n_bytes: int = self.program.step_weight_bytes
        return n_bytes

    def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.program.describe()
        return facts

    def submit(self, batch: Batch) -> Any:
        self.n_submits += 1
        if self.fails:
            raise self.fails
        return _Held(self, self.program.submit(batch))

    def close(self) -> None:
        self.n_closes += 1
        self.program.close()


class _Held:
    def __init__(self, owner: Gate, ticket: Any) -> None:
        self.owner, self.ticket = owner, ticket

    def wait(self) -> Any:
        self.owner.entered.set()
        assert self.owner.gate.wait(120)
        return self.ticket.wait()

    def abort(self) -> None:
        self.ticket.abort()


@pytest.fixture
def gated(model: Model) -> Iterator[tuple[Chain, list[Gate]]]:
    parts = [(0, 2), (2, 3), (3, N_LAYERS)]
    gates = [Gate(backend("cpu").compile(model.graph.segment(*each), LIMITS)) for each in parts]
    links = zip(gates, parts, strict=True)
    chain = Chain([Link(gate, (0,), end - first) for gate, (first, end) in links])
    yield chain, gates
    for gate in gates:
        gate.gate.set()
    chain.close()


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_step_is_cut_short_in_any_of_the_programs(
    gated: tuple[Chain, list[Gate]], expected: NDArray[np.float32], where: int
) -> None:
    chain, gates = gated
    for gate in gates[:where]:
        gate.gate.set()
    ticket, found = chain.submit(batch_of(IDS)), list[Any]()
    thread = threading.Thread(target=lambda: found.append(ticket.wait()))
    thread.start()
    assert gates[where].entered.wait(120)
    ticket.abort()
    for gate in gates:
        gate.gate.set()
    thread.join(120)
    assert found[0].aborted
    assert [gate.n_submits for gate in gates] == [1] * (where + 1) + [0] * (2 - where)
    assert ticket.wait().aborted and sum(gate.n_submits for gate in gates) == where + 1
    np.testing.assert_array_equal(rows(chain, 4), expected)


def test_an_abort_before_the_step_runs_runs_nothing_of_it(gated: tuple[Chain, list[Gate]]) -> None:
    chain, gates = gated
    for gate in gates:
        gate.gate.set()
    ticket = chain.submit(batch_of(IDS))
    ticket.abort()
    assert ticket.wait().aborted
    assert [gate.n_submits for gate in gates] == [1, 0, 0]


def test_an_error_of_a_later_program_ends_the_step_and_no_other(
    gated: tuple[Chain, list[Gate]], expected: NDArray[np.float32]
) -> None:
    chain, gates = gated
    for gate in gates:
        gate.gate.set()
    gates[1].fails = DeviceError("gone")
    ticket = chain.submit(batch_of(IDS))
    with pytest.raises(DeviceError, match="gone"):
        ticket.wait()
    ticket.abort()
    assert ticket.wait().aborted and gates[2].n_submits == 0
    gates[1].fails = None
    np.testing.assert_array_equal(rows(chain, 11), expected)


def test_all_are_closed_whatever_one_of_them_raises(gated: tuple[Chain, list[Gate]]) -> None:
    chain, gates = gated

    def fail() -> None:
        raise OSError("close")

    gates[1].close = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="close"):
        chain.close()
    assert gates[0].n_closes == gates[2].n_closes == 1
    del gates[1].close
    with pytest.raises(ClosedError):
        chain.submit(batch_of(IDS))


class Refuses(Smaller):
    """A machine on which there is no room for a program."""

    def compile(self, segment: Segment, limits: StepLimits) -> Program:
        raise MemoryError("no room")


def test_a_chain_that_can_not_be_made_leaves_no_program(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, made = backend("cpu"), list[Any]()
    compile = cpu.compile

    def noted(segment: Segment, limits: StepLimits) -> Any:
        made.append(compile(segment, limits))
        return made[-1]

    monkeypatch.setattr(cpu, "compile", noted)
    with pytest.raises(MemoryError, match="no room"):
        ChainBackend([Stretch(0, cpu), Stretch(1, Refuses())]).compile(segment, LIMITS)
    with pytest.raises(ClosedError):
        made[0].submit(batch_of(IDS))


# -- through the engine --------------------------------------------------------------------------


def answers(engine: Engine) -> list[list[int]]:
    """Of several requests side by side, one of which is cancelled on its way."""
    requests = [
        Request(
            ids=(256, *range(3 * n, 5 * n + 3)), max_tokens=12,
            params=SamplingParams(temperature=0.7, seed=n),
        )
        for n in range(5)
    ]  # fmt: skip
    running = [engine.submit(request) for request in requests]
    endless = engine.submit(Request(ids=(256, 7), params=SamplingParams(seed=1), max_tokens=200))
    next(endless)
    endless.cancel()
    assert isinstance(list(endless)[-1], Finished)
    return [[event.id for event in each if isinstance(event, Token)] for each in running]


def test_answers_through_the_engine_are_those_of_one_program(segment: Segment) -> None:
    found = []
    for machine in (
        backend("cpu"), chain_of((0, "cpu"), (1, "cpu"), (3, "cpu")),
        chain_of((0, "cpu"), (2, "reference")),
    ):  # fmt: skip
        limits = machine.demand(segment, StepRequest(256, 4, 2)).limits
        engine = Engine(machine.compile(segment, limits), limits, 256, segment.output.dim)
        try:
            found.append(answers(engine))
            logits = engine.logits(IDS, prefill_chunk=4)
            found[-1].append(logits.view(np.int32).tolist())
        finally:
            engine.close()
    assert found[0] == found[1] == found[2]
    assert all(len(tokens) == 12 for tokens in found[0][:5])


# -- models that are not cut everywhere -----------------------------------------------------------


def test_parts_with_other_cache_groups_than_the_whole() -> None:
    """Windows of layers differ, so a part has tables that another lacks."""
    model = windowed(0, 40, 0, 40)
    limits = LIMITS._replace(n_pages={window: 4 for window in model.groups})
    batch = batch_of([id % 40 for id in IDS], n_groups=2)
    batch.tables = [tuple(PageTable(np.array(pages, np.int32), 0, 2) for pages in ((3, 1), (0, 2)))]
    with backend("cpu").compile(model, limits) as program:
        expected = program.submit(batch).wait().logits.copy()
    for firsts in ((0, 1), (0, 3), (0, 1, 2, 3)):
        machine = chain_of(*((first, "cpu") for first in firsts))
        with machine.compile(model, limits) as chain:
            np.testing.assert_array_equal(chain.submit(batch).wait().logits, expected)
        assert machine.demand(model, StepRequest(64, 1, 2)).limits.n_pages == {0: 2, 40: 2}


def test_a_cache_that_a_later_layer_reads_stays_on_its_machine() -> None:
    model = windowed(0, 40, shared=True)  # the third layer reads the first one's
    assert [len(part.caches) for part in windowed(0, 40).cut(1)] == [1, 1]
    for first in (1, 2):
        with pytest.raises(UnsupportedModelError, match=f"layer {first} reads more"):
            chain_of((0, "cpu"), (first, "cpu")).demand(model, StepRequest(64, 1, 2))


# -- how many layers -----------------------------------------------------------------------------


class Numbers:
    """A GPU of `room` bytes, where a layer takes a megabyte and a token of it a kilobyte."""

    def __init__(self, room: int) -> None:
        self.room = room

    def memories(self, host: int) -> Mapping[str, int]:
        return {"host": host, "cuda:0": self.room}

    def demand(self, segment: Segment, request: StepRequest) -> Demand:
        n_layers = len(segment.caches)
        rows = {"weights Q4_0": n_layers * MiB, "KV cache": n_layers * request.n_ctx << 10}
        return Demand(StepLimits.of(request, 320, segment.groups, 512), {"cuda:0": rows})

    def compile(self, segment: Segment, limits: StepLimits) -> Program:
        raise AssertionError("a placement compiles nothing")


def request_of(n_ctx: int | None = None, host: int = 4 << 30) -> PlanRequest:
    return PlanRequest(n_ctx, 1, 2, host)


@pytest.mark.parametrize(
    ("room", "n_layers"),
    [(0, 0), (1, 0), (1280 << 10, 1), (2 * MiB, 1), (2560 << 10, 2), (4 * MiB, 3), (5 * MiB, 4)],
)
def test_as_many_layers_as_fit(segment: Segment, room: int, n_layers: int) -> None:
    """The model was trained for 256 tokens, so a layer takes 1.25 megabytes."""
    placed = place(segment, [[Numbers(room)]], lambda: backend("cpu"), None, request_of())
    assert (placed.n_gpu_layers, placed.plan.n_ctx, placed.plan.note) == (n_layers, 256, "")
    assert placed.plan.fits and len(placed.plan.pools) == 1 + bool(n_layers)


@pytest.mark.parametrize(("asked", "n_layers"), [(0, 0), (1, 1), (3, 3), (4, 4), (99, 4), (-1, 4)])
def test_as_many_layers_as_were_asked_for(segment: Segment, asked: int, n_layers: int) -> None:
    def placed(room: int, n_ctx: int | None = None) -> Any:
        return place(segment, [[Numbers(room)]], lambda: backend("cpu"), asked, request_of(n_ctx))

    assert placed(8 * MiB).n_gpu_layers == n_layers
    if n_layers:
        with pytest.raises(PlanError, match="on cuda:0") as caught:
            placed(n_layers * MiB - 1, 64)
        assert caught.value.memory == "cuda:0"


def test_a_host_that_is_short_gives_layers_to_the_gpu_or_says_so(segment: Segment) -> None:
    with pytest.raises(PlanError) as caught:
        place(segment, [[Numbers(0)]], lambda: backend("cpu"), None, request_of(host=50 * MiB))
    assert caught.value.memory == "host"


def test_where_no_layer_fits_beside_the_usual_context_a_shorter_one_may(
    tmp_path: Path,
) -> None:
    with GGUFFile.open(tiny_model(tmp_path, n_layers=1, n_ctx=8192)) as file:
        one = Model.load(file).graph.segment()
        placed = place(one, [[Numbers(4 * MiB)]], lambda: backend("cpu"), None, request_of())
        assert placed.n_gpu_layers == 1 and placed.plan.n_ctx == 2048 and placed.plan.note


@pytest.mark.parametrize("asked", [1, -1, "3"])
@pytest.mark.parametrize("device", ["cpu", "auto", "reference"])
def test_layers_of_a_gpu_are_refused_where_there_is_none(
    model: Model, device: str, asked: Any
) -> None:
    with pytest.raises(DeviceError, match="gpu_layers is .*and the device is"):
        LLM(model.file.path, device=device, gpu_layers=asked)


@pytest.mark.parametrize("asked", [0, "auto", "0", None])
def test_no_layers_on_a_gpu_are_no_reason_to_refuse(model: Model, asked: Any) -> None:
    with LLM(model.file.path, gpu_layers=asked, threads=1, n_ctx=64) as llm:
        assert llm.runtime.n_gpu_layers == 0 and llm.runtime.runs_on == "1 thread"


@pytest.mark.parametrize("asked", [1, 3, -1, "auto"])
def test_answers_do_not_depend_on_how_many_layers_a_gpu_has(model: Model, asked: Any) -> None:
    """On the CUDA kernels for processors."""
    backend("shim")
    path, found = model.file.path, []
    for device, n_layers in (("cpu", 0), ("shim", asked)):
        with LLM(path, device=device, gpu_layers=n_layers, threads=1, n_ctx=160) as llm:
            answers = llm.generate_batch(
                ["abc", "a longer prompt " * 4], max_tokens=9, temperature=0.9, seed=4
            )
            slid = llm.generate("x" * 100, max_tokens=80, overflow="slide", temperature=0.0)
            found.append([each.token_ids for each in (*answers, slid)])
            found[-1].append(llm.logits(IDS, prefill_chunk=5).view(np.int32).tolist())
            runs_on, n_gpu_layers = llm.runtime.runs_on, llm.runtime.n_gpu_layers
    assert found[0] == found[1]
    assert n_gpu_layers == (asked if asked in (1, 3) else N_LAYERS)
    assert (f"{asked} of 4 layers on " in runs_on) == ("1 thread" in runs_on) == (asked in (1, 3))


def test_layers_on_the_command_line(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    backend("shim")
    path = str(model.file.path)
    for flags, n_memories in ((["2"], 2), (["auto"], 2), (["0"], 1)):
        with pytest.raises(SystemExit) as exit:
            main(["plan", path, "--json", "--device", "shim", "--gpu-layers", *flags])
        assert exit.value.code == 0
        assert len(json.loads(capsys.readouterr().out)["memories"]) == n_memories
    for wrong in ("-2", "all", "1.5"):
        with pytest.raises(SystemExit) as exit:
            main(["plan", path, "--device", "shim", "--gpu-layers", wrong])
        assert exit.value.code == 2 and "number of layers" in capsys.readouterr().err
