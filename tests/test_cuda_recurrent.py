"""Recurrent ops on the shim, kernels and whole steps, against the law, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import Batch, PageTable, StepLimits, StepRequest
from edgeinfer.fused_ops import Convs, SiluConv
from edgeinfer.fusion import fuse
from edgeinfer.graph import KV, Conv, DeltaNet, Pairing, Segment, Value
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.reference.functions import silu
from edgeinfer.kernels.reference.quantised import Quantised
from edgeinfer.kernels.reference.recurrent import convolve, delta_net
from edgeinfer.sampling.params import SampleTable, SamplingParams
from tests.backends import backend
from tests.cuda_shim import Floats, empty_rows, rows_in_memory, run, same_bits, step, stride_of
from tests.random_graphs import RandomGraph
from tests.shim import SEEDS
from tests.test_cpu_ops import rows_of

N_SLOTS = 7


class Rows(NamedTuple):
    """Sequences of a step: where each goes on from, and where the states behind rows are kept."""

    spans: NDArray[np.int32]
    seq: NDArray[np.int32]
    states: NDArray[np.int32]
    kept: NDArray[np.int32]

    @classmethod
    def of(cls, *parts: tuple[int, int, dict[int, int]]) -> Rows:
        """Of each its rows, its slot, and the slots of some of its rows."""
        spans, seq, kept, end = [], list[int](), list[int](), 0
        for i, (n, _, slots) in enumerate(parts):
            spans.append([end, n])
            seq += [i] * n
            kept += [slots.get(t, -1) for t in range(n)]
            end += n
        states = [slot for _, slot, _ in parts]
        return cls(*(np.array(each, np.int32) for each in (spans, seq, states, kept)))

    @property
    def batch(self) -> Batch:
        nothing = np.zeros(len(self.seq), np.int32)
        batch = Batch(nothing, nothing.astype(np.int64), self.seq, [], nothing)
        batch.states, batch.kept = self.states, self.kept
        return batch

    @property
    def args(self) -> dict[str, Any]:
        arrays = dict(spans=self.spans, states=self.states, kept=self.kept)
        return {**arrays, "step": step(len(self.seq), 0, len(self.spans))}


ROWS = [
    Rows.of((1, -1, {0: 3})),
    Rows.of((1, 4, {0: 0}), (1, 4, {}), (1, 6, {0: 2})),
    Rows.of((3, 5, {1: 0, 2: 1}), (19, -1, {2: 2, 18: 3}), (8, 6, {7: 4})),
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dim", "n_taps", "bias"), [(37, 4, False), (300, 2, True), (64, 7, True)])
@pytest.mark.parametrize("has_silu", [False, True])
def test_conv(rows: Rows, dim: int, n_taps: int, bias: bool, has_silu: bool) -> None:
    g, n = RandomGraph(), len(rows.seq)
    x, slots = rows_of(n, dim), rows_of(N_SLOTS * (n_taps - 1), dim, 1)
    weight = g._weight("conv", dim, n_taps)
    value = Value(g, 0, dim)
    op = Conv(0, value, value, weight, g._weight("b", dim) if bias else None)
    slots = slots.reshape(N_SLOTS, n_taps - 1, dim)
    ours, law, out = slots.copy(), slots.copy(), empty_rows(n, dim)
    expected = convolve(Quantised(), op, x, rows.batch, law)
    part = dict(
        x=rows_in_memory(x), weight=floats_of(weight), slots=ours, out=out, dim=dim,
        bias=floats_of(op.bias) if op.bias else None,
    )  # fmt: skip
    # The second of two parts, behind one that has another width.
    first = {**part, "slots": slots[..., :5].copy(), "out": empty_rows(n, 5), "dim": 5}
    first["x"] = rows_in_memory(x[:, :5])
    parts = [first, part, dict.fromkeys(part, 0)]
    given = {f"{name}_{i}": each[name] for i, each in enumerate(parts) for name in each}
    run(
        Kernel("conv"), (1 + -(-dim // 256), n + 1), 256, **rows.args, seq=rows.seq,
        n_taps=n_taps, silu=int(has_silu), **given,
    )  # fmt: skip
    law_out = silu(expected) if has_silu else expected
    same_bits(out[:, :dim], law_out)
    same_bits(ours, law)
    same_bits(first["out"][:, :5], law_out[:, :5])
    same_bits(first["slots"], law[..., :5].copy())


def floats_of(weight: Any) -> Floats:
    return np.frombuffer(weight.data, np.float32).copy()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("dim", "n_k_heads", "n_v_heads", "pairing"),
    [
        (16, 1, 2, "tiled"),
        (16, 2, 6, "tiled"),
        (16, 2, 6, "interleaved"),
        (42, 2, 2, "interleaved"),
        (128, 1, 2, "tiled"),
    ],
)
def test_delta_net(rows: Rows, dim: int, n_k_heads: int, n_v_heads: int, pairing: Pairing) -> None:
    n, width = len(rows.seq), n_v_heads * dim
    q, k = (rows_of(n, n_k_heads * dim, i) / np.float32(dim**0.5) for i in (2, 3))
    v, decay, beta = rows_of(n, width, 4), -np.abs(rows_of(n, n_v_heads, 5)), rows_of(n, n_v_heads)
    slots = rows_of(N_SLOTS * n_v_heads * dim, dim, 1).reshape(N_SLOTS, n_v_heads, dim, dim)
    given = (q, k, v, decay, beta)
    op = DeltaNet(0, *[Value(RandomGraph(), 0, dim)] * 6, n_k_heads, n_v_heads, dim, pairing)
    law = slots.copy()
    expected = delta_net(Quantised(), op, given, rows.batch, law)
    names = ("q", "k", "v", "decay", "beta")
    in_memory = {name: rows_in_memory(x) for name, x in zip(names, given, strict=True)}
    for seed in SEEDS:
        ours, out = slots.copy(), empty_rows(n, width)
        run(
            Kernel.of("delta_net", DIM=dim), (-(-dim // 32), n_v_heads, len(rows.spans) + 1), 128,
            seed=seed, **rows.args, **in_memory, key_stride=stride_of(n_k_heads * dim),
            is_normed=0, eps=0.0, q_factor=1.0, k_factor=1.0, bias=None, rate=None,
            v_stride=stride_of(width), head_stride=stride_of(n_v_heads), slots=ours,
            n_key_heads=n_k_heads, tiled=int(pairing == "tiled"), out=out,
            out_stride=stride_of(width),
        )  # fmt: skip
        same_bits(out[:, :width], expected)
        same_bits(ours, law)


# -- whole steps ---------------------------------------------------------------------------------

MACHINES = ["shim", pytest.param("cuda", marks=pytest.mark.cuda), "reference+shim"]
LIMITS = StepLimits({0: 8}, max_rows=24, max_outputs=24, max_sequences=4, n_threads=1, n_states=8)
PROMPT = [(11 * i + 3) % 40 for i in range(40)]


@pytest.fixture(scope="module")
def segment() -> Segment:
    """Two layers with states, one of either pairing, around one of attention."""
    g = RandomGraph(3, 64, ("Q4_0", "F32"))
    x = g.embed()
    for blk in g.layers():
        h = g.rms_norm(x, f"{blk}.norm")
        x = g.layer_output(x + (attention(g, h, blk) if blk == "blk.1" else mixer(g, h, blk)))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))
    return g.segment()


def attention(g: RandomGraph, h: Value, blk: str) -> Value:
    q, k, v = (g.linear(h, f"{blk}.{name}", 16) for name in "qkv")
    return g.linear(g.attention(q, k, v, cache=KV(2, 8, 8)), f"{blk}.o", h.dim)


def mixer(g: RandomGraph, h: Value, blk: str, way: str = "") -> Value:
    """A delta net, its operands made as models make them but for one thing."""
    n_k, n_v, dim = 2, 4, 16
    widths = {"q": n_k * dim, "k": n_k * dim, "v": n_v * dim}
    parts = [g.linear(h, f"{blk}.{name}", width) for name, width in widths.items()]
    q, k, v = map(g.silu, g.convs(parts, f"{blk}.conv", 4))
    if way != "no norm":
        weight = f"{blk}.q_norm" if way == "a norm with a weight" else None
        q = g.rms_norm(q, weight, n_k if way != "a norm of rows" else 1)
        k = g.rms_norm(k, None, n_k, 0.5 if way == "two epsilons" else None)
    normed = q
    q = g.scale(q, 1 / dim)
    k = k if way == "no factor" else g.scale(k, dim**-0.5)
    rate = g.linear(h, f"{blk}.a", n_v)
    rate = rate if way == "no bias" else g.add_vector(rate, f"{blk}.dt")
    rate = g.activation("silu" if way == "no softplus" else "softplus", rate)
    decay = (
        g.scale(g.mul_vector(rate, f"{blk}.rate"), -0.3)
        if way == ""
        else g.mul_vector(
            g.scale(rate, -0.3) if way == "a factor of the rate" else rate, f"{blk}.rate"
        )
    )
    beta = g.activation(
        "softplus" if way == "no sigmoid" else "sigmoid", g.linear(h, f"{blk}.b", n_v)
    )
    pairing: Pairing = "tiled" if blk == "blk.0" else "interleaved"
    o = g.delta_net(q, k, v, decay=decay, beta=beta, n_k_heads=n_k, pairing=pairing)
    for name, value in {
        "norm": normed,
        "factor": q,
        "gate": beta,
        "rate": decay,
        "sum": rate,
    }.items():
        if way == f"a {name} that is read again":
            o = g.mul_parts(o, g.linear(value, f"{blk}.again", 1))
    return g.linear(o, f"{blk}.o", h.dim)


class Part(NamedTuple):
    """Rows of one sequence in a step; `kept` by their number in the prompt."""

    begin: int
    end: int
    state: int
    kept: dict[int, int]
    pages: tuple[int, ...]


def batch_of(*parts: Part, n_groups: int = 1) -> Batch:
    rows = Rows.of(
        *(
            (part.end - part.begin, part.state, {t - part.begin: s for t, s in part.kept.items()})
            for part in parts
        )
    )
    pos = np.concatenate([np.arange(part.begin, part.end) for part in parts])
    return Batch(
        ids=np.array(PROMPT, np.int32)[pos],
        pos=pos,
        seq=rows.seq,
        tables=[(PageTable(np.array(part.pages, np.int32), 0, 2),) * n_groups for part in parts],
        wanted=np.arange(len(pos), dtype=np.int32),
        states=rows.states,
        kept=rows.kept,
    )


def run_step(program: Any, *parts: Part, n_groups: int = 1) -> Floats:
    logits: Floats = program.submit(batch_of(*parts, n_groups=n_groups)).wait().logits.copy()
    return logits


@pytest.fixture(scope="module")
def expected(segment: Segment) -> Floats:
    """Logits after each token of the prompt, by the law."""
    limits = LIMITS._replace(max_rows=40, max_outputs=40)
    with backend("reference").compile(segment, limits) as law:
        return run_step(law, Part(0, 40, -1, {}, (0, 1)))


@pytest.fixture(params=MACHINES)
def program(request: pytest.FixtureRequest, segment: Segment) -> Iterator[Any]:
    with backend(request.param).compile(segment, LIMITS) as program:
        yield program


@pytest.mark.parametrize("chunk", [1, 5, 17, 24])
def test_bits_do_not_depend_on_chunks(program: Any, expected: Floats, chunk: int) -> None:
    rows, state = [], -1
    for begin in range(0, 40, chunk):
        end = min(begin + chunk, 40)
        rows.append(
            run_step(program, Part(begin, end, state, {end - 1: begin // chunk % 2}, (3, 1)))
        )
        state = begin // chunk % 2
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_bits_do_not_depend_on_company(program: Any, expected: Floats) -> None:
    """A decoding sequence, a prompt and a newcomer in one step, each with its own state."""
    run_step(program, Part(0, 11, -1, {10: 5}, (0, 1)), Part(0, 3, -1, {2: 2}, (2, 3)))
    for t in range(4):
        logits = run_step(
            program,
            Part(3 + t, 4 + t, (2, 1)[t % 2], {3 + t: (1, 2)[t % 2]}, (2, 3)),
            Part(11 + 3 * t, 14 + 3 * t, (5, 4)[t % 2], {13 + 3 * t: (4, 5)[t % 2]}, (0, 1)),
            Part(0, 1 + t, -1, {}, (5, 6)),
        )
        wanted = [3 + t, *range(11 + 3 * t, 14 + 3 * t), *range(1 + t)]
        np.testing.assert_array_equal(logits, expected[wanted])


def test_any_row_can_be_gone_on_from(program: Any, expected: Floats) -> None:
    """States behind drafted rows: whichever is taken is that of a sequence that ended there."""
    run_step(program, Part(0, 20, -1, {14: 0, 15: 1, 16: 2, 19: 3}, (0, 1)))
    for t, slot in ((14, 0), (15, 1), (16, 2), (19, 3)):
        for _ in range(2):  # a state that is read stays
            found = run_step(program, Part(t + 1, 24, slot, {}, (0, 1)))
            np.testing.assert_array_equal(found, expected[t + 1 : 24])


def test_states_go_on_in_another_program(program: Any, segment: Segment, expected: Floats) -> None:
    run_step(program, Part(0, 20, -1, {9: 6, 19: 3}, (0, 1)))
    states, pages = program.read_states([3, 6]), program.read_pages(0, [0])
    program.write_states([3], np.zeros_like(states[:1]))
    assert not np.array_equal(run_step(program, Part(20, 24, 3, {}, (0, 1))), expected[20:24])
    with backend("shim").compile(segment, LIMITS) as other:
        if other.cache_layout == program.cache_layout:
            other.write_pages(0, [5], pages)
            other.write_states([0, 7], states)
            for begin, slot in ((20, 0), (10, 7)):
                found = run_step(other, Part(begin, 24, slot, {}, (5, 2)))
                np.testing.assert_array_equal(found, expected[begin:24])
    program.write_states([2], states[:1])
    np.testing.assert_array_equal(program.read_states([2]), states[:1])
    np.testing.assert_array_equal(run_step(program, Part(20, 24, 2, {}, (0, 1))), expected[20:24])


def test_an_aborted_step_spoils_no_state_that_it_reads(program: Any, expected: Floats) -> None:
    run_step(program, Part(0, 20, -1, {19: 3}, (0, 1)))
    ticket = program.submit(batch_of(Part(20, 24, 3, {23: 4}, (0, 1))))
    ticket.abort()
    assert ticket.wait().aborted
    np.testing.assert_array_equal(run_step(program, Part(20, 24, 3, {}, (0, 1))), expected[20:24])


def test_slots_that_are_not_there_are_an_error(segment: Segment) -> None:
    with backend("shim").compile(segment, LIMITS) as program:
        for part in (
            Part(0, 2, 8, {}, (0,)),
            Part(0, 2, -1, {1: 8}, (0,)),
            Part(0, 2, -2, {}, (0,)),
        ):
            with pytest.raises(AssertionError, match="slots"):
                program.submit(batch_of(part))


def test_a_plan_says_what_states_take(segment: Segment) -> None:
    machine = backend("shim")
    demand = machine.demand(segment, StepRequest(64, 1, 1, n_states=5))
    slot_bytes = sum(each.n_bytes for states in segment.states.values() for each in states)
    rows = demand.memories[machine.name]
    assert demand.limits.n_states == 5 and 0 <= rows["state"] - 5 * slot_bytes < 8 * 256
    before = machine.device.memory()[0]
    with machine.compile(segment, demand.limits) as program:
        assert before - machine.device.memory()[0] == sum(rows.values())
        assert program.read_states([4]).shape == (1, slot_bytes)


def test_nothing_is_begun_ahead_where_there_is_state(segment: Segment) -> None:
    with backend("shim").compile(segment, LIMITS) as program:
        table, tables = SampleTable(1), batch_of(Part(0, 1, -1, {}, (0, 1))).tables
        for t in range(5):
            table.clear()
            table.set_row(0, SamplingParams(temperature=0.0), 1, t)
            batch = batch_of(Part(t, t + 1, t - 1, {t: t}, (0, 1)))
            batch.tables, batch.output, batch.samples = tables, "ids", table
            program.submit(batch).wait()
            assert program._guess is None


WAYS = [
    "as usual", "no norm", "a norm with a weight", "a norm of rows", "two epsilons", "no factor",
    "no bias", "no softplus", "no sigmoid", "a factor of the rate",
    *(f"a {name} that is read again" for name in ("norm", "factor", "gate", "rate", "sum")),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_delta_net_makes_what_only_it_reads(way: str) -> None:
    g = RandomGraph(1, 64)
    x = g.embed()
    for blk in g.layers():
        x = g.layer_output(x + mixer(g, g.rms_norm(x, f"{blk}.norm"), blk, way))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))
    rows = []
    for name in ("shim", "cpu", "reference"):
        with backend(name).compile(g.segment(), LIMITS._replace(n_pages={})) as program:
            parts = Part(0, 11, -1, {10: 2}, ()), Part(11, 12, 2, {}, ())
            rows.append(np.concatenate([run_step(program, part, n_groups=0) for part in parts]))
            if name == "shim":
                kernels = [str(launch.kernel) for launch in program._lowered.launches]
            if name == "cpu":
                groups = [op.group for op in program._lowered.ops]
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[1], rows[2])
    assert sum(each == "conv" for each in kernels) == groups.count("conv") == 1
    before = groups[: groups.index("delta_net")][-3:]
    together = ["norm+norm+add+sigmoid", "scale+scale+softplus", "mul"]
    assert (before == together) == (way == "as usual"), groups
    apart = [each for each in kernels if "pointwise" in each or "rms_norm(WARPS=1)" in each]
    apart = [each for each in apart if "KIND=silu" not in each]  # of the convolutions
    assert (apart == []) == (way in ("as usual", "no factor"))


def test_convolutions_run_beside_each_other_where_none_reads_another() -> None:
    g = RandomGraph(1, 64)
    x = g.embed()
    for blk in g.layers():
        h = g.rms_norm(x, f"{blk}.norm")
        parts = g.convs((h, h, x, h), f"{blk}.conv", 3)
        (of_one,) = g.convs((parts[0],), f"{blk}.more", 3)
        longer, wide = g.convs((h, g.linear(h, f"{blk}.wide", 300)), f"{blk}.long", 4)
        silus = [g.silu(each) for each in g.convs((longer, wide), f"{blk}.last", 4)]
        every = [*parts, of_one, g.linear(silus[1], f"{blk}.narrow", 64), silus[0]]
        for each in every:
            x = x + each
        g.layer_output(x)
    g.head(g.rms_norm(g.select_rows(x), "output_norm"))
    segment, rows = g.segment(), list[Floats]()
    sizes = [
        (len(step.parts), type(step.parts[0])) for step in fuse(segment) if isinstance(step, Convs)
    ]
    assert sizes == [(4, Conv), (1, Conv), (2, Conv), (2, SiluConv)]
    for name in ("shim", "cpu", "reference"):
        with backend(name).compile(segment, LIMITS._replace(n_pages={})) as program:
            steps = Part(0, 11, -1, {10: 2}, ()), Part(11, 12, 2, {}, ())
            rows.append(np.concatenate([run_step(program, each, n_groups=0) for each in steps]))
            if name == "shim":
                kernels = [launch.kernel.name for launch in program._lowered.launches]
                assert kernels.count("conv") == 5  # of four parts one is left
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[1], rows[2])
