"""Experts: routes by the law, bits that don't depend on who else chose, files in every form."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeinfer.batch import Batch, StepLimits
from edgeinfer.errors import EdgeInferError, InvalidModelError, UnsupportedModelError
from edgeinfer.graph import ExpertLinear, ExpertSum, GatingKind, Graph, Route, Segment, Value
from edgeinfer.inspect_file import describe
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.kernels.reference.exact import Exact
from edgeinfer.kernels.reference.experts import choose
from edgeinfer.kernels.reference.quantised import Quantised
from edgeinfer.quant import QUANT_TYPES, QuantType, Weight

from . import native
from .golden_models import GOLDENS, Draft
from .random_graphs import RandomGraph
from .test_cpu_program import batch_of
from .test_fusion import record
from .test_graphs import SETTINGS, backend, check

Floats = NDArray[np.float32]
F32 = QUANT_TYPES[0]


# -- routes --------------------------------------------------------------------------------------


def route(n: int, gating: GatingKind, n_used: int, bias: Floats | None, **options: Any) -> Route:
    g = RandomGraph()
    weight = None if bias is None else Weight("bias", (n,), F32, memoryview(bias.tobytes()))
    fields = {"n_groups": 1, "n_groups_used": 1, "norm": True, "scale": 1.0, **options}
    return Route(0, Value(g, 1, 2 * n_used), Value(g, 0, n), gating, n_used, weight, **fields)


def chosen_on_cpu(op: Route, x: Floats) -> Floats:
    n, n_used = x.shape[1], op.n_used
    rows = np.zeros((len(x), layout.row_stride(n) // 4), np.float32)
    rows[:, :n] = x
    out = np.full((len(x), layout.row_stride(2 * n_used) // 4), np.nan, np.float32)
    scratch = native.huge(layout.route_scratch_bytes(n))
    scratch[:] = 0xFF
    bias = np.frombuffer(op.bias.data[:], np.float32) if op.bias else None
    args = [
        rows.ctypes.data, rows.strides[0], n, n_used, 0 if bias is None else bias.ctypes.data,
        op.n_groups, op.n_groups_used, int(op.norm), native.float_bits(op.scale),
        scratch.ctypes.data, out.ctypes.data, out.strides[0], 0, 0,
    ]  # fmt: skip
    h = native.header(H_ROWS=len(x))
    native.run(f"route.{op.gating}", h, args, range(len(x)))
    assert (out[:, 2 * n_used :] == 0).all()
    return out[:, : 2 * n_used]


VALUES = st.sampled_from([0.0, 1.0, 1.0, -2.0, 0.5, 3.25, -40.0, 90.0, 7.0])


@st.composite
def routes(draw: st.DrawFn) -> tuple[Route, Floats]:
    """With many equal logits: ties are what a sort may get wrong."""
    size, n_groups = draw(st.integers(2, 9)), draw(st.integers(1, 5))
    n = size * n_groups
    n_groups_used = draw(st.integers(1, n_groups))
    n_used = draw(st.integers(1, min(10, size * n_groups_used)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = draw(st.lists(VALUES, min_size=n, max_size=n))
    bias = rng.choice([0.0, 0.25, -1.0], n).astype(np.float32) if draw(st.booleans()) else None
    gating = draw(st.sampled_from(get_args(GatingKind)))
    options = dict(n_groups=n_groups, n_groups_used=n_groups_used, norm=draw(st.booleans()))
    op = route(n, gating, n_used, bias, scale=draw(st.sampled_from([1.0, 2.5])), **options)
    rows = np.array([x, x, x], np.float32)
    rows[1] += rng.standard_normal(n).astype(np.float32)
    return op, rows


def test_routes_are_the_references() -> None:
    native.library().load(f"route.{kind}" for kind in get_args(GatingKind))

    @settings(max_examples=300, **SETTINGS)
    @given(routes())
    def check(drawn: tuple[Route, Floats]) -> None:
        op, x = drawn
        np.testing.assert_array_equal(chosen_on_cpu(op, x), choose(Quantised(), op, x))
        ids = choose(Exact(), op, x)[:, : op.n_used]
        assert all(len(set(row)) == op.n_used for row in ids.tolist())

    check()


@pytest.mark.parametrize("kind", get_args(GatingKind))
def test_a_router_of_no_numbers_chooses_experts_that_are_there(kind: GatingKind) -> None:
    """What a broken model computes must not lead outside its weights."""
    x = np.full((3, 6), np.nan, np.float32)
    x[1], x[2, 4] = np.inf, 1.0
    for options in ({}, dict(n_groups=3, n_groups_used=2)):
        op = route(6, kind, 4, None, **options)
        for ids in chosen_on_cpu(op, x)[:, :4].tolist():
            assert len(set(ids)) == 4 and set(ids) <= set(range(6))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_group_whose_score_is_no_number_comes_last(place: int) -> None:
    """Its two largest are +inf and -inf."""
    x = np.array([[-np.inf, -np.inf, 1, 2, 4, 3]], np.float32)
    x = np.roll(x, 2 * place)
    x[0, 2 * place] = np.inf
    op = route(6, "raw", 2, None, norm=False, n_groups=3, n_groups_used=2)
    expected = (np.array([4, 5]) + 2 * place) % 6
    with np.errstate(invalid="ignore"):  # as a program computes
        rows = chosen_on_cpu(op, x), choose(Quantised(), op, x)
    assert [row[0, :2].tolist() for row in rows] == 2 * [expected.tolist()]


def numbers_and_weights(op: Route, x: list[float]) -> tuple[list[float], list[float]]:
    row = choose(Exact(), op, np.array([x], np.float32))[0].tolist()
    return row[: op.n_used], row[op.n_used :]


def test_what_a_route_is() -> None:
    """By hand, of four experts and more."""
    x, e = [1.0, 2.0, 3.0, 3.0], np.exp
    softmax = e([3, 3, 2]) / e(x).sum()
    ids, weights = numbers_and_weights(route(4, "softmax", 3, None, norm=False), x)
    assert ids == [2, 3, 1] and weights == pytest.approx(softmax)
    ids, weights = numbers_and_weights(route(4, "softmax", 3, None, scale=2.0), x)
    assert weights == pytest.approx(2 * softmax / softmax.sum())
    ids, weights = numbers_and_weights(route(4, "raw", 2, None, norm=False), [5, 1, 4, 0])
    assert ids == [0, 2] and weights == pytest.approx(e([5, 4]) / e([5, 4]).sum())
    ids, weights = numbers_and_weights(route(4, "sqrt_softplus", 1, None, norm=False), x)
    assert ids == [2] and weights == pytest.approx([np.sqrt(np.log1p(e(3)))])
    # The bias chooses, and weighs nothing.
    bias = np.array([9, 0, 0, 0], np.float32)
    ids, weights = numbers_and_weights(route(4, "sigmoid", 2, bias, norm=False), x)
    assert ids == [0, 2] and weights == pytest.approx([1 / (1 + e(-1)), 1 / (1 + e(-3))])
    # The largest is alone in its group: the two of another are more.
    groups = dict(n_groups=2, n_groups_used=1, norm=False)
    ids, _ = numbers_and_weights(route(4, "sigmoid", 2, None, **groups), [2, -9, 1, 1])
    assert ids == [2, 3]
    # A sum of nearly nothing divides as 2^-14.
    ids, weights = numbers_and_weights(route(4, "sigmoid", 1, None), [-20.0, -30, -30, -30])
    assert weights == pytest.approx([e(-20.0) * 2**14], rel=1e-5)


# -- bits ----------------------------------------------------------------------------------------

N_ROWS = 150  # so that an expert has more than a tile of rows
LIMITS = StepLimits(n_pages={}, max_rows=N_ROWS, max_outputs=N_ROWS, max_sequences=1, n_threads=2)
IDS = [(7 * i * i + 3 * i) % 40 for i in range(N_ROWS)]


def experts_alone(**options: Any) -> Segment:
    """Layers of nothing but experts: a row depends on its token alone."""
    return record(lambda g, h, blk: g.experts(h, blk, 256), 2, dim=256, **options)


def batch(ids: list[int]) -> Batch:
    return Batch(
        ids=np.array(ids, np.int32),
        pos=np.arange(len(ids), dtype=np.int64),
        seq=np.zeros(len(ids), np.int32),
        tables=[()],  # there is no attention
        wanted=np.arange(len(ids), dtype=np.int32),
    )


def rows(program: Any, ids: list[int]) -> Floats:
    logits: Floats = program.submit(batch(ids)).wait().logits.copy()
    return logits


def check_company(kind: str) -> None:
    segment = experts_alone(types=(kind,))
    with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as reference:
        expected = rows(reference, IDS[:20])
    with backend().compile(segment, LIMITS) as program:
        whole = rows(program, IDS)
        np.testing.assert_array_equal(whole[:20], expected)
        for start, n in ((0, 1), (9, 2), (20, 3), (31, 4), (40, 7), (60, 64), (80, 70)):
            np.testing.assert_array_equal(
                rows(program, IDS[start : start + n]), whole[start : start + n]
            )
        np.testing.assert_array_equal(rows(program, IDS[::-1]), whole[::-1])
    with backend().compile(segment, LIMITS._replace(n_threads=5)) as program:
        np.testing.assert_array_equal(rows(program, IDS), whole)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "F16"])
def test_a_rows_bits_do_not_depend_on_who_else_chose_its_experts(kind: str) -> None:
    check_company(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind.name for kind in QUANT_TYPES.values() if kind.is_runnable])
def test_so_of_every_type(kind: str) -> None:
    check_company(kind)


def test_steps_of_ever_other_experts_in_more_threads_than_processors() -> None:
    """Chunk counts change from step to step: no thread may go by those of another."""
    segment = experts_alone()
    with backend().compile(segment, LIMITS._replace(n_threads=6)) as program:
        expected = {token: rows(program, [token]) for token in range(40)}
        for i in range(400):
            some = [(i * 13 + 7 * k) % 40 for k in range(i % 9 + 1)]
            found = rows(program, some)
            np.testing.assert_array_equal(found, np.concatenate([expected[t] for t in some]))


def test_a_step_that_is_cut_short_leaves_the_next_one_whole() -> None:
    segment = experts_alone(types=("Q4_0",))
    n_cut = 0
    with backend().compile(segment, LIMITS) as program:
        expected = rows(program, IDS)
        begun = time.perf_counter()
        rows(program, IDS)
        seconds = time.perf_counter() - begun
        for i in range(60):
            ticket = program.submit(batch(IDS))
            timer = threading.Timer(seconds * i / 60, ticket.abort)
            timer.start()
            n_cut += ticket.wait().aborted
            timer.join()
            if i % 6 == 0:
                np.testing.assert_array_equal(rows(program, IDS), expected)
    assert n_cut


# -- files ---------------------------------------------------------------------------------------


def logits(draft: Draft, folder: Path) -> Floats:
    """Of the CPU, which has the reference's bits."""
    step, limits = batch_of(list(range(20))), StepLimits({0: 2}, 20, 20, 1, 2)
    with draft.loaded(folder) as model:
        segment = model.graph.segment()
        with ReferenceBackend().compile(segment, limits, mode="quantised") as reference:
            expected: Floats = reference.submit(step).wait().logits
        with backend().compile(segment, limits) as program:
            np.testing.assert_array_equal(program.submit(step).wait().logits, expected)
    return expected


def moe() -> Draft:
    return GOLDENS["qwen3moe"].draft()


def with_twins(draft: Draft) -> Draft:
    """What may stand beside a matrix of experts: scales and biases."""
    rng = np.random.default_rng(0)
    for name, values in list(draft.tensors.items()):
        if name.endswith("_exps.weight"):
            stem = name.removesuffix("weight")
            draft.tensors[f"{stem}scale"] = rng.uniform(0.5, 2, len(values)).astype(np.float32)
            draft.tensors[f"{stem}bias"] = rng.standard_normal(values.shape[:2], np.float32)
    return draft


def test_gate_and_up_may_be_one_matrix(tmp_path: Path) -> None:
    draft = with_twins(moe())
    for i in range(2):  # a scale is of both
        name = f"blk.{i}.ffn_{{}}_exps.scale"
        draft.tensors[name.format("gate")] = draft.tensors[name.format("up")]
    split = logits(draft, tmp_path)
    for i in range(2):
        for kind in ("weight", "bias", "scale"):
            gate, up = (draft.tensors.pop(f"blk.{i}.ffn_{n}_exps.{kind}") for n in ("gate", "up"))
            both = up if kind == "scale" else np.concatenate([gate, up], axis=1)
            draft.tensors[f"blk.{i}.ffn_gate_up_exps.{kind}"] = both
    np.testing.assert_array_equal(logits(draft, tmp_path), split)


KEYS = {
    "selection bias": {},
    "sigmoid": {"expert_gating_func": 2},
    "softmax of the chosen": {"expert_gating_func": 3, "expert_weights_scale": 1.5},
    "square root of softplus": {"expert_gating_func": 4},
    "groups": {"expert_group_count": 4, "expert_group_used_count": 1},
    "no norm": {"expert_weights_norm": False},
    "scale": {"expert_weights_scale": 2.5},
    "clamp": {"swiglu_clamp_exp": [0.02, 0.01]},
    "shared": {"expert_shared_feed_forward_length": 32},
    "shared and weighed": {"expert_shared_feed_forward_length": 32},
    "twins": {},
}


def changed(name: str) -> Draft:
    draft, rng = moe(), np.random.default_rng(1)
    draft.keys.update(KEYS[name])
    for i in range(2):
        if name == "selection bias":
            bias = rng.uniform(-1, 1, 8).astype(np.float32)
            draft.tensors[f"blk.{i}.exp_probs_b.bias"] = bias
        if name.startswith("shared"):
            for part, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
                values = rng.standard_normal(shape, np.float32) / 4
                draft.tensors[f"blk.{i}.ffn_{part}_shexp.weight"] = values
        if name == "shared and weighed":
            weigher = rng.standard_normal(64, np.float32)
            draft.tensors[f"blk.{i}.ffn_gate_inp_shexp.weight"] = weigher
    return with_twins(draft) if name == "twins" else draft


def test_what_a_file_says_acts(tmp_path: Path) -> None:
    found = {name: logits(changed(name), tmp_path) for name in KEYS}
    found["nothing"] = logits(moe(), tmp_path)
    for name, values in found.items():
        for other, others in found.items():
            assert name == other or np.abs(values - others).max() > 1e-3, (name, other)


def test_what_changes_nothing_does_not(tmp_path: Path) -> None:
    draft = moe()
    before = logits(draft, tmp_path)
    draft.keys |= {
        "expert_gating_func": 0, "expert_group_count": 0, "expert_group_used_count": 0,
        "expert_weights_scale": 0.0, "swiglu_clamp_exp": 0.0, "expert_shared_count": 0,
    }  # fmt: skip
    np.testing.assert_array_equal(logits(draft, tmp_path), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 0),
        ("expert_count", -1),
        ("expert_count", 1 << 31),
        ("expert_count", "8"),
        ("expert_used_count", 0),
        ("expert_used_count", 9),
        ("expert_gating_func", -1),
        ("expert_gating_func", 5),
        ("expert_group_count", 3),
        ("expert_group_count", 8),
        ("expert_group_used_count", 5),
        ("expert_weights_scale", float("nan")),
        ("expert_weights_norm", 2),
        ("swiglu_clamp_exp", -1.0),
        ("swiglu_clamp_exp", [1.0]),
        ("expert_feed_forward_length", 0),
    ],
)
def test_a_senseless_number_is_named(tmp_path: Path, key: str, value: Any) -> None:
    draft = moe()
    draft.keys |= {"expert_group_count": 4, "expert_group_used_count": 2, key: value}
    with pytest.raises((InvalidModelError, UnsupportedModelError), match=f"qwen3moe.{key}"):
        with draft.loaded(tmp_path):
            pass


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("expert_count", 7, "blk.0.ffn_gate_inp.weight"),
        ("expert_feed_forward_length", 32, "blk.0.ffn_gate_exps.weight"),
    ],
)
def test_a_number_that_contradicts_the_tensors(
    tmp_path: Path, key: str, value: int, tensor: str
) -> None:
    draft = moe()
    draft.keys[key] = value
    with pytest.raises(InvalidModelError) as caught, draft.loaded(tmp_path):
        pass
    assert caught.value.field == tensor


@pytest.mark.parametrize("name", ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])
def test_experts_that_are_not_there_are_named(tmp_path: Path, name: str) -> None:
    draft = moe()
    del draft.tensors[f"blk.1.{name}.weight"]
    with pytest.raises(EdgeInferError, match=f"blk.1.{name}.weight"), draft.loaded(tmp_path):
        pass


def test_a_value_that_is_no_route_is_refused() -> None:
    """Its numbers would be taken for those of experts."""

    def body(g: Graph, h: Value, blk: str) -> Value:
        return g.experts(h, blk, 32)

    segment = record(body)
    i, op = next((i, op) for i, op in enumerate(segment.ops) if isinstance(op, ExpertLinear))
    ops = list(segment.ops)
    ops[i] = op._replace(route=op.x)
    with pytest.raises(UnsupportedModelError, match="route of ExpertLinear in layer 0"):
        backend().compile(segment._replace(ops=tuple(ops)), LIMITS)


def test_experts_of_other_widths_may_read_one_value() -> None:
    """All of a row, or a part of it for each: what is gathered for one is not what others read."""

    def body(g: Graph, h: Value, blk: str) -> Value:
        router = g.linear(h, f"{blk}.ffn_gate_inp", 4)
        fields: dict[str, Any] = dict(bias=None, n_groups=1, n_groups_used=1, norm=True, scale=1.0)
        route = g._record(Route, 4, x=router, gating="softmax", n_used=2, **fields)
        sums = []
        for n_cols in (h.dim, h.dim // 2):
            weight = g._weight(f"{blk}.ffn_{n_cols}_exps.weight", 4, h.dim, n_cols)
            twins: dict[str, Any] = dict(scale=None, bias=None)
            parts = g._record(ExpertLinear, 2 * h.dim, x=h, route=route, weight=weight, **twins)
            sums.append(g._record(ExpertSum, h.dim, x=parts, route=route))
        return sums[0] + sums[1]

    for types in (("F32",), ("Q4_0",)):
        check(record(body, dim=64, types=types), 7)


def test_a_file_may_tell_the_width_of_experts_alone(tmp_path: Path) -> None:
    draft = moe()
    expected = logits(draft, tmp_path)
    assert "expert_feed_forward_length" in draft.keys
    draft.keys["feed_forward_length"] = 0
    np.testing.assert_array_equal(logits(draft, tmp_path), expected)
    del draft.keys["feed_forward_length"]
    np.testing.assert_array_equal(logits(draft, tmp_path), expected)


def test_what_is_said_of_a_file(tmp_path: Path) -> None:
    facts = describe(str(moe().write(tmp_path / "experts.gguf")))
    assert (facts["n_experts"], facts["n_experts_used"], facts["ffn_dim"]) == (8, 2, 48)
    plain = describe(str(GOLDENS["qwen3"].draft().write(tmp_path / "plain.gguf")))
    assert "n_experts" not in plain


def test_parts_of_a_stack_are_read_as_if_they_followed_each_other() -> None:
    values = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    whole = Weight("w", (3, 4, 5), F32, memoryview(values.tobytes()))
    part = whole.parts(1, 3)
    assert part.shape == (3, 2, 5) and part.name == "w[:, 1:3]" and len(part.data) == 120
    expected = values[:, 1:3].tobytes()
    assert bytes(part.data[:]) == expected and bytes(part.data[37:95]) == expected[37:95]
    assert bytes(part.data[5:2]) == b""
    assert bytes(part.matrix(2).data[:]) == values[2, 1:3].tobytes()
    buffer = memoryview(bytearray(90))
    part.read_into(buffer, 21)
    assert bytes(buffer) == expected[21:111]
    vectors = Weight("b", (3, 4), F32, memoryview(values[:, :, 0].tobytes()))
    assert bytes(vectors.parts(2, 4).data[:]) == values[:, 2:4, 0].tobytes()


@pytest.mark.parametrize("kind", ["Q8_0", "IQ1_S", "unknown"])
def test_what_can_not_be_cut_there_is_named(kind: str) -> None:
    """A bias inside a block, and types of which nothing is known: of rows and of parts alike."""
    known = {each.name: each for each in QUANT_TYPES.values()}
    type_ = known.get(kind) or QuantType("type 999", 999, 0, 0)
    vector = Weight("w", (48,), type_, memoryview(b""))
    stack = Weight("w", (2, 48), type_, memoryview(b""))
    for cut in (vector.rows, stack.parts):
        with pytest.raises(UnsupportedModelError, match=f"w is {type_.name}"):
            cut(0, 16)
