"""The small CUDA kernels on the shim against their NumPy twins, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, PageTable
from edgeinfer.dequantize import dequantize
from edgeinfer.graph import KV, GatingKind, KVType, Rotate, Route, Value
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.layout import page_bytes
from edgeinfer.kernels.cuda.lower_attention import _types_of
from edgeinfer.kernels.cuda.tiles import x8_bytes
from edgeinfer.kernels.reference.caches import BLOCK
from edgeinfer.kernels.reference.experts import add_parts, choose
from edgeinfer.kernels.reference.functions import silu
from edgeinfer.kernels.reference.numerics import rotate
from edgeinfer.kernels.reference.quantised import ACTIVATIONS, Quantised
from edgeinfer.rope import Growth, Rope, Yarn
from edgeinfer.sampling.params import NO_CANDIDATE, OK, SampleRow, SamplingParams
from edgeinfer.sampling.sampler import sample_reference
from tests.cuda_shim import (
    Floats,
    empty_rows,
    pages_of_blocks,
    rows_in_memory,
    run,
    same_bits,
    step,
    stride_of,
)
from tests.random_graphs import RandomGraph
from tests.shim import SEEDS
from tests.test_cpu_ops import rows_of
from tests.test_cuda_attend import check_quantised
from tests.test_experts import route

TWIN = Quantised()

# -- element by element --------------------------------------------------------------------------

# Each does that to a, b and the parameters 0.7 and 1.5.
POINTWISE: dict[str, Callable[[Floats, Floats], Floats]] = {
    **{kind: lambda a, b, f=f: f(a) for kind, f in ACTIVATIONS.items()},
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "swiglu": lambda a, b: silu(a) * b,
    "scale": lambda a, b: a * np.float32(0.7),
    "soft_cap": lambda a, b: TWIN.soft_cap(a, 0.7),
    "clamp": lambda a, b: a.clip(np.float32(0.7), np.float32(1.5)),
}


def pointwise(
    kind: str, a: Floats, b: Floats, rows: int = 0, bounds: tuple[float, float] = (0.7, 1.5)
) -> Floats:
    """Of all 5 rows of the step, or its 3 wanted ones; b is rows, or one vector."""
    dim, n = a.shape[1], 3 if rows else 5
    out = empty_rows(6, dim)
    x8 = np.full((6, x8_bytes(dim)), 0xEE, np.uint8) if dim % 32 == 0 else None
    vector = len(b) == 1
    args = dict(a=rows_in_memory(a), b=b[0].copy() if vector else rows_in_memory(b))
    run(
        Kernel.of("pointwise", KIND=kind), (-(-dim // 1024), 5), 256, step=step(5, 3), **args,
        a_stride=stride_of(dim), b_stride=0 if vector else stride_of(dim), out=out,
        out_stride=stride_of(dim), x8=x8, dim=dim, rows=rows, first=bounds[0], second=bounds[1],
    )  # fmt: skip
    if x8 is not None:
        check_quantised(x8[: n + 1], out[: n + 1, :dim])
    assert np.isnan(out[n:]).all() and np.isnan(out[:, dim:]).all()
    return out[:n, :dim]


@pytest.mark.parametrize("kind", POINTWISE)
def test_pointwise(kind: str) -> None:
    for dim, rows, n_b in ((2048, 0, 5), (37, 0, 5), (1000, 1, 1)):
        a, b = rows_of(5, dim), rows_of(n_b, dim, 1)
        a[0, :16] = [0, -0.0, 200, -200, 88, -88, 0.625, -0.625, 0.62, 9, -9, 20, -20, 1e9, 1e-9, 1]
        a[1, :6] = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42]
        with np.errstate(all="ignore"):
            expected = POINTWISE[kind](a, b)
        got = pointwise(kind, a, b, rows)
        same_bits(got, expected[: len(got)])


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, -0.0), (-np.inf, 0.0), (2.0, 1.0)])
def test_clamps_to_zeros_and_to_nothing(bounds: tuple[float, float]) -> None:
    a = np.tile(np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1, -1, 0.5], np.float32), (5, 9))
    low, high = map(np.float32, bounds)
    same_bits(pointwise("clamp", a, a, bounds=bounds), a.clip(low, high))


@pytest.mark.parametrize(("n_parts", "part_dim"), [(1, 1), (3, 33), (8, 64), (1, 300)])
@pytest.mark.parametrize("rows", [0, 1])
def test_mul_parts(n_parts: int, part_dim: int, rows: int) -> None:
    x, factors, dim = rows_of(4, n_parts * part_dim), rows_of(4, n_parts, 1), n_parts * part_dim
    out, n = empty_rows(4, dim), 2 if rows else 4
    run(
        Kernel("mul_parts"), (-(-dim // 256), 4), 256, step=step(4, 2), x=rows_in_memory(x),
        x_stride=stride_of(dim), factors=rows_in_memory(factors),
        factors_stride=stride_of(n_parts), out=out, out_stride=stride_of(dim), n_parts=n_parts,
        part_dim=part_dim, rows=rows,
    )  # fmt: skip
    same_bits(out[:n, :dim], (x.reshape(4, n_parts, -1) * factors[..., None]).reshape(4, -1)[:n])
    assert np.isnan(out[n:]).all()


def test_select() -> None:
    x, wanted, out = rows_of(9, 77), np.array([2, 3, 8, 0], np.int32), empty_rows(4, 77)
    run(
        Kernel("select"), (1, 4), 256, step=step(9, 3), x=rows_in_memory(x), x_stride=96,
        wanted=wanted, out=out, out_stride=96, dim=77,
    )  # fmt: skip
    same_bits(out[:3, :77], x[wanted[:3]])
    assert np.isnan(out[3]).all()


# -- positions -----------------------------------------------------------------------------------


class Positions:
    """Rows of two sequences, the second slid, and their page tables; one row too many."""

    def __init__(self) -> None:
        self.tables = [
            PageTable(np.array([5, 3, 9], np.int32), 0, 1 << 30),
            PageTable(np.array([1, 0, 7, 8, 4, 2], np.int32), 2, 3),
        ]
        self.pos = np.array([30, 31, 32, 33, 34, 1000, 1001], np.int64)
        self.seq = np.array([0] * 5 + [1] * 2, np.int32)
        pinned = [
            self.tables[s].pinned_pos(int(p)) for s, p in zip(self.seq, self.pos, strict=True)
        ]
        self.pinned_pos = np.array(pinned, np.int64)
        entries = [[0, 3, 0, 1 << 30], [3, 6, 2, 3]]
        self.arrays = dict(
            step=step(7, 0, 2), pos=self.pos, seq=self.seq, tables=np.array(entries, np.int32)
        )
        self.pages = np.concatenate([t.pages for t in self.tables])


ROPES = [
    Rope("norm", 20, 10000.0),
    Rope("neox", 64, 500000.0),
    Rope("neox", 6, 100.0, 0.25, None, Yarn(64, 8.0, 0.5), 1.2, Growth(0.5, 13)),
    Rope("norm", 2, 100.0, 1.0, None, Yarn(64, 8.0, 0.5), 1.2),
    Rope("neox", 0, 10000.0),
]


def angles_of(positions: Positions, rope: Rope, pinned: int, seed: int = 0) -> Floats:
    """Those of one position, as they are made alone and beside those of the other."""
    n_pairs = rope.n_dims // 2
    both = [np.full((8, n_pairs, 2), np.nan, np.float32) for _ in range(2)]
    alone = [both[i].copy() if i == pinned else None for i in range(2)]
    for outs in (both, alone) if n_pairs else ():
        run(
            Kernel("angles"), (-(-n_pairs // 32), 2 if outs is both else 1, 8), 32, seed=seed,
            **positions.arrays, frequencies=rope.frequencies(), n_pairs=n_pairs,
            magnitudes=rope.magnitudes(), n_magnitudes=len(rope.magnitudes()),
            span=rope.growth.n_ctx if rope.growth else 1, angles=outs[0], pinned_angles=outs[1],
        )  # fmt: skip
    found = alone[pinned]
    assert found is not None and np.isnan(found[7]).all()
    same_bits(found, both[pinned])
    return found


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("n_heads", "head_dim"), [(3, 64), (1, 77)])
@pytest.mark.parametrize("pinned", [0, 1])
def test_angles_and_rotation(rope: Rope, n_heads: int, head_dim: int, pinned: int) -> None:
    positions, dim = Positions(), n_heads * head_dim
    x, g = rows_of(7, dim), RandomGraph()
    op = Rotate(0, Value(g, 1, dim), Value(g, 0, dim), n_heads, rope)
    expected = rotate(TWIN, op, x, positions.pinned_pos if pinned else positions.pos)
    angles = angles_of(positions, rope, pinned, seed=pinned)
    args = dict(
        x=rows_in_memory(x), x_stride=stride_of(dim), angles=angles, n_pairs=rope.n_dims // 2,
        head_dim=head_dim, out_stride=stride_of(dim), step=positions.arrays["step"],
    )  # fmt: skip
    kernel = Kernel.of("rotate", NEOX=int(rope.kind == "neox"))
    out = empty_rows(8, dim)
    run(kernel, (n_heads, 8), 64, **args, out=out)
    same_bits(out[:7, :dim], expected)
    assert np.isnan(out[7]).all()


def store(
    positions: Positions,
    n_heads: int,
    k_dim: int,
    v_dim: int,
    k: Floats,
    v: Floats,
    k_cache: NDArray[Any],
    v_cache: NDArray[Any],
    types: Mapping[str, Any],
    n_threads: int = 32,
) -> None:
    run(
        Kernel("store"), (n_heads, 8), n_threads, **positions.arrays, pages=positions.pages,
        k=rows_in_memory(k), k_stride=stride_of(k.shape[1]), v=rows_in_memory(v),
        v_stride=stride_of(v.shape[1]), k_cache=k_cache, v_cache=v_cache, k_dim=k_dim, v_dim=v_dim,
        **types,
    )  # fmt: skip


@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (80, 72), (16, 0), (6, 20), (33, 1)])
def test_store(k_dim: int, v_dim: int) -> None:
    positions, n_heads = Positions(), 2
    k, v = rows_of(7, n_heads * k_dim), rows_of(7, n_heads * max(v_dim, 1), 2)
    k[0, :4] = [65519.0, 65520.0, np.nan, 6e-8]
    rooms = -(-k_dim // 8) * 8, -(-v_dim // 8) * 8
    k_cache = np.full((12, n_heads, rooms[0] // 8, PAGE, 8), 0xFFFF, np.uint16)
    v_cache = np.full((12, n_heads, PAGE, rooms[1] or 1), 0xFFFF, np.uint16)
    store(positions, n_heads, k_dim, v_dim, k, v, k_cache, v_cache, _types_of(KV(1, 8, 8)))
    k_pages = k_cache.swapaxes(2, 3).reshape(12, n_heads, PAGE, -1)
    for value, pages, dim in ((k, k_pages, k_dim), (v, v_cache, v_dim)):
        expected = np.full(pages.shape, 0xFFFF, np.uint16).view(np.float16)
        for row, (pos, seq) in enumerate(zip(positions.pos.tolist(), positions.seq, strict=True)):
            table = positions.tables[seq]
            place = expected[table.pages[table.slot(pos // PAGE)], :, pos % PAGE]
            if dim:
                place[:] = 0
                with np.errstate(over="ignore"):
                    place[:, :dim] = value[row].reshape(n_heads, -1)
        same_bits(np.ascontiguousarray(pages).view(np.float16), expected)


@pytest.mark.parametrize("n_threads", [32, 128])
@pytest.mark.parametrize(
    ("k_dim", "v_dim", "k_type", "v_type"),
    [(64, 128, "q8_0", "q4_0"), (192, 20, "q4_0", "q8_0"), (100, 64, "q4_0", "q8_0")],
)
def test_store_in_blocks(
    k_dim: int, v_dim: int, k_type: KVType, v_type: KVType, n_threads: int
) -> None:
    """With what is large, small, infinite and no number."""
    positions, kv = Positions(), KV(2, k_dim, v_dim, k_type=k_type, v_type=v_type)
    kinds: list[tuple[KVType, bool]] = [(k_type, kv.transforms_k), (v_type, kv.transforms_v)]
    rows = [rows_of(7, 2 * dim, dim) for dim in (k_dim, v_dim)]
    caches, expected = [], []
    for x, (kind, transforms) in zip(rows, kinds, strict=True):
        x[0, 1], x[1, 2], x[2, 3], x[3, 3], x[4, :15], x[5] = np.nan, np.inf, -np.inf, 1e8, 0, 1e-6
        x[6, :2] = 3, -3
        heads = x.reshape(7, 2, -1)
        with np.errstate(all="ignore"):
            blocks = TWIN.stored(TWIN.hadamard(heads) if transforms else heads, kind)
        pages = np.full((12, 2, PAGE, blocks.shape[2]), np.array((0.5, 3), BLOCK))
        caches.append(pages_of_blocks(pages, kind, is_key=not caches))
        for row, (pos, seq) in enumerate(zip(positions.pos.tolist(), positions.seq, strict=True)):
            table = positions.tables[seq]
            pages[table.pages[table.slot(pos // PAGE)], :, pos % PAGE] = blocks[row]
        expected.append(pages_of_blocks(pages, kind, is_key=not expected))
    store(positions, 2, k_dim, v_dim, *rows, *caches, _types_of(kv), n_threads)
    for found, theirs, dim in zip(caches, expected, (k_dim, v_dim), strict=True):
        assert found.shape[1] * found.shape[2] in page_bytes(kv)
        n_scales = PAGE * -(-dim // 32)
        ours, law = (each[..., : -2 * n_scales] for each in (found, theirs))
        np.testing.assert_array_equal(ours, law)
        ours, law = (each[..., -2 * n_scales :].copy().view(np.float16) for each in (found, theirs))
        same_bits(ours + np.float16(0), law + np.float16(0))  # a zero may have any sign


@pytest.mark.parametrize("rope", ROPES[:3])
@pytest.mark.parametrize(
    ("k_dim", "v_dim", "n_kv_heads", "kind"),
    [
        (64, 64, 2, "f16"), (77, 20, 1, "f16"), (64, 0, 2, "f16"), (80, 8, 0, "f16"),
        (64, 64, 2, "q8_0"), (77, 20, 1, "q4_0"), (64, 0, 2, "q4_0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_norms", [False, True])
def test_rotate_and_store_at_once(
    rope: Rope, k_dim: int, v_dim: int, n_kv_heads: int, kind: KVType, has_norms: bool
) -> None:
    """As the norms, rotations and stores one after the other."""
    positions, n_heads, eps = Positions(), 6, 1e-6
    q, k = rows_of(7, n_heads * k_dim), rows_of(7, max(n_kv_heads, 1) * k_dim, 1)
    v = rows_of(7, max(n_kv_heads, 1) * max(v_dim, 1), 2)
    weights = rows_of(2, k_dim, 3)
    kv = KV(n_kv_heads or 1, k_dim, v_dim, k_type=kind, v_type=kind)
    k_cache, v_cache = (np.full(12 * max(n, 1), 0xFF, np.uint8) for n in page_bytes(kv))
    expected_caches = [k_cache.copy(), v_cache.copy()]
    out, pinned_out, expected_k = empty_rows(7, q.shape[1]), empty_rows(7, q.shape[1]), k

    def turned(x: Floats, weight: Floats, pos: NDArray[np.int64]) -> Floats:
        dim, g = x.shape[1], RandomGraph()
        if has_norms:
            x = TWIN.rms_norm(x.reshape(-1, k_dim), weight, eps).reshape(7, dim)
        op = Rotate(0, Value(g, 1, dim), Value(g, 0, dim), dim // k_dim, rope)
        return rotate(TWIN, op, x, pos)

    run(
        Kernel.of("rotate_store", NEOX=int(rope.kind == "neox")),
        (-(-(n_heads + n_kv_heads) // 4), 8), 128, shared=16 * k_dim, **positions.arrays,
        pages=positions.pages, q=rows_in_memory(q), q_stride=stride_of(q.shape[1]),
        k=rows_in_memory(k) if n_kv_heads else None, k_stride=stride_of(k.shape[1]),
        v=rows_in_memory(v) if n_kv_heads else None, v_stride=stride_of(v.shape[1]),
        q_norm=weights[0] if has_norms else None, k_norm=weights[1] if has_norms else None,
        eps=eps, angles=angles_of(positions, rope, 0), pinned_angles=angles_of(positions, rope, 1),
        n_pairs=rope.n_dims // 2, out=out, pinned_out=pinned_out,
        k_cache=k_cache if n_kv_heads else None, v_cache=v_cache if n_kv_heads else None,
        n_heads=n_heads, n_kv_heads=n_kv_heads, k_dim=k_dim, v_dim=v_dim, **_types_of(kv),
    )  # fmt: skip
    same_bits(out[:, : q.shape[1]], turned(q, weights[0], positions.pos))
    expected = turned(q, weights[0], positions.pinned_pos)
    same_bits(pinned_out[5:, : q.shape[1]], expected[5:])
    assert np.isnan(pinned_out[:5]).all()
    if n_kv_heads:
        expected_k = turned(k, weights[1], positions.pos)
        types = _types_of(kv)
        store(positions, n_kv_heads, k_dim, v_dim, expected_k, v, *expected_caches, types)
    for got, cache in zip((k_cache, v_cache), expected_caches, strict=True):
        np.testing.assert_array_equal(got, cache)


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_vocab", [1, 31, 1000, 5000])
@pytest.mark.parametrize("seed", SEEDS)
def test_argmax_is_the_samplers(n_vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 3, (9, n_vocab)).astype(np.float32)
    logits[1] = np.nan
    logits[2] = -np.inf
    logits[3] = -0.0
    logits[3, n_vocab // 2 :] = 0.0
    logits[4, rng.integers(0, n_vocab)] = np.nan
    logits[5, rng.integers(0, n_vocab, 3)] = np.inf
    logits[5, rng.integers(0, n_vocab, 3)] = np.finfo(np.float32).max
    logits[6] = -np.inf
    logits[6, -1] = -np.finfo(np.float32).max
    ids, status = np.full(9, -1, np.int32), np.full(9, -1, np.int32)
    run(
        Kernel("argmax"), (1, 9), 1024, seed=seed, step=step(20, 8), logits=rows_in_memory(logits),
        logits_stride=stride_of(n_vocab), n_vocab=n_vocab, ids=ids, status=status,
    )  # fmt: skip
    greedy = SampleRow(SamplingParams(temperature=0.0), 0, 0, np.empty(0, np.int32), 0.0)
    for row in range(8):
        expected = sample_reference(logits[row], greedy)
        assert (ids[row], status[row]) == (expected.id, expected.status)
    assert {NO_CANDIDATE, OK} == set(status[:8].tolist()) and ids[8] == status[8] == -1


# -- experts -------------------------------------------------------------------------------------


def route_of(op: Route, x: Floats, seed: int = 0) -> Floats:
    n, n_used, out = x.shape[1], op.n_used, empty_rows(len(x) + 1, 2 * op.n_used)
    bias = None if op.bias is None else dequantize(op.bias)
    run(
        Kernel.of("route", GATING=op.gating), (1, len(x) + 1), 32, seed=seed, step=step(len(x)),
        shared=4 * (3 * n + op.n_groups), x=rows_in_memory(x), x_stride=stride_of(n), bias=bias,
        out=out, out_stride=stride_of(2 * n_used), n_experts=n, n_used=n_used,
        n_groups=op.n_groups, n_groups_used=op.n_groups_used, norm=int(op.norm), scale=op.scale,
    )  # fmt: skip
    assert np.isnan(out[:, 2 * n_used :]).all() and np.isnan(out[-1]).all()
    return out[:-1, : 2 * n_used]


@pytest.mark.parametrize("gating", get_args(GatingKind))
def test_routes_are_the_references(gating: GatingKind) -> None:
    """With many equal logits: ties are what a choice may get wrong."""
    rng = np.random.default_rng(0)
    values = np.array([0.0, 1.0, 1.0, -2.0, 0.5, 3.25, -40.0, 90.0, 7.0, -0.0], np.float32)
    for seed, n_groups, size in [
        (0, 1, 2),
        (1, 1, 9),
        (7, 1, 64),
        (0, 1, 130),
        (1, 4, 9),
        (7, 8, 32),
    ]:
        for trial in range(3):
            n = n_groups * size
            n_groups_used = int(rng.integers(1, n_groups + 1))
            n_used = int(rng.integers(1, min(10, size * n_groups_used) + 1))
            x = rng.choice(values, (4, n))
            x[1:3] += rng.standard_normal((2, n), np.float32)
            bias = rng.choice([0.0, 0.25, -1.0], n).astype(np.float32) if trial else None
            op = route(
                n, gating, n_used, bias, n_groups=n_groups, n_groups_used=n_groups_used,
                norm=trial < 2, scale=2.5 if trial == 1 else 1.0,
            )  # fmt: skip
            with np.errstate(all="ignore"):
                expected = choose(TWIN, op, x)
            same_bits(route_of(op, x, seed), expected)


@pytest.mark.parametrize("gating", get_args(GatingKind))
def test_routes_of_no_numbers_are_the_references(gating: GatingKind) -> None:
    """What a broken model computes must not lead outside its weights."""
    x = np.full((6, 6), np.nan, np.float32)
    x[1], x[2, 4] = np.inf, 1.0
    x[3] = [np.inf, -np.inf, 0, 1, np.nan, 5]
    x[4] = [0, 1, np.inf, -np.inf, -np.inf, np.inf]
    x[5] = -np.inf
    for options in ({}, dict(n_groups=3, n_groups_used=2), dict(norm=False)):
        op = route(6, gating, 4, None, **options)
        with np.errstate(all="ignore"):
            expected = choose(TWIN, op, x)
        got = route_of(op, x)
        same_bits(got, expected)
        assert all(len(set(ids)) == 4 and set(ids) <= set(range(6)) for ids in got[:, :4].tolist())


@pytest.mark.parametrize(("n_used", "dim"), [(1, 5), (4, 300), (8, 64)])
def test_expert_sum(n_used: int, dim: int) -> None:
    x, route, out = rows_of(4, n_used * dim), rows_of(4, 2 * n_used, 1), empty_rows(5, dim)
    x[0, :2], route[1, n_used] = [np.inf, -0.0], np.nan
    run(
        Kernel("expert_sum"), (-(-dim // 256), 5), 256, step=step(4), x=rows_in_memory(x),
        x_stride=stride_of(n_used * dim), route=rows_in_memory(route),
        route_stride=stride_of(2 * n_used), out=out, out_stride=stride_of(dim), dim=dim,
        n_used=n_used,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        same_bits(out[:4, :dim], add_parts(x, route))
    assert np.isnan(out[4]).all()
