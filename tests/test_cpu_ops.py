"""The small CPU kernels against their NumPy twins: norm, swiglu, sinks, copies, rotation.

Knows no model and no attention.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, PageTable
from edgeinfer.graph import ActivationKind
from edgeinfer.kernels.cpu import layout, ready
from edgeinfer.kernels.reference.blocks import quantise
from edgeinfer.kernels.reference.exact import Exact
from edgeinfer.kernels.reference.functions import exp, silu, tanh
from edgeinfer.kernels.reference.quantised import ACTIVATIONS, Quantised
from tests import native

FAMILIES = [None, "avx2", "generic"]
Floats = NDArray[np.float32]
TWIN = Quantised()


def rows_of(n: int, dim: int, seed: int = 0) -> Floats:
    """Random rows of very different sizes, some zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim)) * np.exp(rng.uniform(-8, 8, (n, 1)))
    x[rng.random((n, dim)) < 0.05] = 0
    return x.astype(np.float32)


class Sinks:
    """Memory for rows left in both formats."""

    def __init__(self, n: int, dim: int, a32: bool = True) -> None:
        self.whole = np.full((n, layout.whole_vectors(dim)), np.nan, np.float32)
        self.rows = self.whole[:, :dim]
        self.a32 = np.full(n * dim // 32 * layout.A32_BYTES, 0xEE, np.uint8) if a32 else None

    @property
    def words(self) -> list[int]:
        a32 = 0 if self.a32 is None else self.a32.ctypes.data
        return [self.whole.ctypes.data, self.whole[0].nbytes, 0, a32]


def tiles(n: int) -> list[slice]:
    """Rows of every tile, as the layout says."""
    return [slice(t, min(t + layout.MAX_TILE, n)) for t in range(0, n, layout.MAX_TILE)]


def blocks_of(rows: Floats) -> NDArray[np.uint8]:
    """Rows in a32, tile by tile."""
    q, d = quantise(rows)
    sums = q.reshape(len(q), -1, 2, 16).sum(axis=3)
    dsum = d * sums.sum(axis=2).astype(np.float32)
    parts = q.astype("i1"), d[..., None], dsum[..., None], sums.astype("<i2")
    blocks = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=2)
    return np.concatenate([blocks[tile].swapaxes(0, 1).reshape(-1) for tile in tiles(len(rows))])


def check_sinks(sinks: Sinks, expected: Floats) -> None:
    np.testing.assert_array_equal(sinks.rows, expected)
    assert not sinks.whole[:, expected.shape[1] :].any()
    if sinks.a32 is not None:
        np.testing.assert_array_equal(sinks.a32, blocks_of(expected))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13, 23])
def test_quantise_in_tiles(n: int) -> None:
    x, sinks = rows_of(n, 512), Sinks(n, 512)
    x[0, 32:64] = 0
    x[-1, 256:] = 0
    args = [x.ctypes.data, x[0].nbytes, 512, layout.ALL_ROWS, *sinks.words]
    native.run("quantise", native.header(H_ROWS=n), args, range(n))
    check_sinks(sinks, x)


def test_quantise_counts_wanted_rows_and_keeps_its_input() -> None:
    x, sinks = rows_of(9, 256), Sinks(3, 256)
    args = [x.ctypes.data, x[0].nbytes, 256, layout.WANTED_ROWS, *sinks.words]
    args[4:6] = args[0:2]
    native.run("quantise", native.header(H_ROWS=9, H_WANTED_ROWS=3), args, range(3))
    sinks.rows[:] = x[:3]
    check_sinks(sinks, x[:3])


def test_quantise_of_the_smallest_floats_stays_finite() -> None:
    x, sinks = np.full((1, 32), 1e-40, np.float32), Sinks(1, 32)
    args = [x.ctypes.data, x[0].nbytes, 32, layout.ALL_ROWS, *sinks.words]
    native.run("quantise", native.header(H_ROWS=1), args, range(1))
    assert sinks.a32 is not None and not sinks.a32.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dim", [1, 7, 8, 16, 24, 37, 40, 100, 256, 576, 2048])
def test_norm(dim: int, family: str | None) -> None:
    n, weight, eps = 13, rows_of(1, dim, seed=1)[0], 1e-5
    x, sinks = rows_of(n, dim), Sinks(n, dim, dim % 32 == 0)
    args = [
        x.ctypes.data, x[0].nbytes, weight.ctypes.data, native.float_bits(eps), dim,
        layout.ALL_ROWS, *sinks.words,
    ]  # fmt: skip
    native.run("norm", native.header(H_ROWS=n), args, range(n), family)
    check_sinks(sinks, TWIN.rms_norm(x, weight, eps))


def test_floats_that_nobody_reads_take_one_row_a_thread() -> None:
    x, weight, sinks = rows_of(5, 256), rows_of(1, 256, 1)[0], Sinks(5, 256)
    words = sinks.words
    words[1:3] = 0, sinks.rows[0].nbytes
    args = [
        x.ctypes.data, x[0].nbytes, weight.ctypes.data, native.float_bits(1e-5), 256,
        layout.ALL_ROWS, *words,
    ]  # fmt: skip
    native.run("norm", native.header(H_ROWS=5), args, range(5))
    expected = TWIN.rms_norm(x, weight, 1e-5)
    assert sinks.a32 is not None
    np.testing.assert_array_equal(sinks.a32, blocks_of(expected))
    np.testing.assert_array_equal(sinks.rows[0], expected[-1])  # thread 0 made all, the last stays
    assert np.isnan(sinks.rows[1:]).all()


def test_norm_and_copy_of_wanted_rows() -> None:
    x, weight, wanted = rows_of(9, 256), rows_of(1, 256, 1)[0], np.array([2, 3, 8], np.int32)
    h = native.header(H_ROWS=9, H_WANTED_ROWS=3, H_WANTED=wanted.ctypes.data)
    sinks = Sinks(3, 256)
    args = [
        x.ctypes.data, x[0].nbytes, weight.ctypes.data, native.float_bits(1e-6), 256,
        layout.PICKED_ROWS, *sinks.words,
    ]  # fmt: skip
    native.run("norm", h, args, range(3))
    check_sinks(sinks, TWIN.rms_norm(x[wanted], weight, 1e-6))
    for rows, chosen in ((layout.PICKED_ROWS, wanted), (layout.ALL_ROWS, np.arange(9))):
        for dim in (77, 256):
            sinks = Sinks(len(chosen), dim, dim == 256)
            copy = [x.ctypes.data, x[0].nbytes, dim, rows, *sinks.words]
            native.run("copy_rows", h, copy, range(len(chosen)))
            check_sinks(sinks, x[chosen, :dim])


@pytest.mark.parametrize(("n_heads", "head_dim"), [(1, 37), (4, 8), (3, 32), (2, 100)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_norm_of_heads(n_heads: int, head_dim: int, has_weight: bool) -> None:
    dim, weight = n_heads * head_dim, rows_of(1, head_dim, seed=1)[0]
    x, sinks = rows_of(5, dim), Sinks(3, dim, dim % 32 == 0)
    args = [
        x.ctypes.data, x[0].nbytes, weight.ctypes.data if has_weight else 0,
        native.float_bits(1e-5), n_heads, head_dim, layout.WANTED_ROWS, *sinks.words,
    ]  # fmt: skip
    native.run("norm_heads", native.header(H_ROWS=5, H_WANTED_ROWS=3), args, range(3))
    heads = x[:3].reshape(-1, head_dim)
    expected = TWIN.rms_norm(heads, weight if has_weight else None, 1e-5)
    check_sinks(sinks, expected.reshape(3, dim))


# Each a kernel, and what it does to a, b and the parameter 0.7.
POINTWISE: dict[str, Callable[[Floats, Floats], Floats]] = {
    **{kind: lambda a, b, f=f: f(a) for kind, f in ACTIVATIONS.items()},
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "scale": lambda a, b: a * np.float32(0.7),
    "soft_cap": lambda a, b: TWIN.soft_cap(a, 0.7),
    "clamp": lambda a, b: a.clip(np.float32(0.7), np.float32(1.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["avx2", "generic"])
@pytest.mark.parametrize("kind", sorted(POINTWISE.keys() - {"gelu"}))
def test_pointwise_on_poorer_vocabularies(kind: str, family: str) -> None:
    check_pointwise(kind, family)


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, None) for kind in POINTWISE), ("gelu", "avx2"), ("gelu", "generic")],
)
def test_pointwise(kind: str, family: str | None) -> None:
    check_pointwise(kind, family)


def check_pointwise(kind: str, family: str | None) -> None:
    assert set(POINTWISE) == set(ready.POINTWISE)
    for dim, stride, n_rows in ((768, 1, 5), (37, 1, 5), (64, 0, 3)):
        n_whole = layout.whole_vectors(dim)
        a, b = rows_of(5, n_whole), rows_of(5, n_whole, 1)
        a[0, :16] = [0, -0.0, 200, -200, 88, -88, 0.625, -0.625, 0.62, 9, -9, 20, -20, 1e9, 1e-9, 1]
        sinks = Sinks(n_rows, dim, dim % 32 == 0)
        rows = layout.WANTED_ROWS if n_rows == 3 else layout.ALL_ROWS
        args = [
            a.ctypes.data, a[0].nbytes, b.ctypes.data, stride * b[0].nbytes,
            native.float_bits(0.7) | native.float_bits(1.5) << 32, dim, rows, *sinks.words,
        ]  # fmt: skip
        h = native.header(H_ROWS=5, H_WANTED_ROWS=3)
        native.run(f"pointwise.{kind}", h, args, range(n_rows), family)
        with np.errstate(over="ignore"):
            expected = POINTWISE[kind](a, b if stride else b[:1])
        check_sinks(sinks, expected[:n_rows, :dim])


@pytest.mark.parametrize("kind", POINTWISE)
def test_what_is_no_number_is_none_afterwards_where_the_law_says_so(kind: str) -> None:
    """A model that overflows says so in its logits, on every backend."""
    a = np.array([[np.nan, np.inf, -np.inf, 3e38, -3e38, 0, np.nan, 1]], np.float32)
    b, sinks = rows_of(1, 8, 1), Sinks(1, 8, False)
    args = [
        a.ctypes.data, a[0].nbytes, b.ctypes.data, b[0].nbytes,
        native.float_bits(0.7) | native.float_bits(1.5) << 32, 8, layout.ALL_ROWS, *sinks.words,
    ]  # fmt: skip
    native.run(f"pointwise.{kind}", native.header(H_ROWS=1), args, range(1))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(sinks.rows, POINTWISE[kind](a, b))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_close_to_the_truth(kind: ActivationKind) -> None:
    x = np.concatenate([np.linspace(-30, 30, 100_001), np.linspace(-1, 1, 10_001)])
    x = np.append(x, [100.0, -85.0, 1e-20, -1e-20]).astype(np.float32)
    with np.errstate(over="ignore"):
        ours, truth = TWIN.activation(kind, x), Exact().activation(kind, x)
    # gelu subtracts what is nearly equal: as in every float32 one, its error is that of 1.
    slack = 1e-7 * np.abs(x) if kind == "gelu" else 0
    assert (np.abs(ours - truth) <= 4e-7 * np.abs(truth) + slack).all()


def test_tanh_and_soft_caps_are_close_to_the_truth() -> None:
    x = np.linspace(-20, 20, 100_001).astype(np.float32)
    truth = np.tanh(x.astype(np.float64))
    assert (np.abs(tanh(x) - truth) <= 3e-7 * np.abs(truth)).all()
    capped, exact = TWIN.soft_cap(50 * x, 30.0), Exact().soft_cap(50 * x, 30.0)
    assert (np.abs(capped - exact) <= 4e-7 * np.abs(exact)).all()
    assert np.abs(capped).max() <= 30


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dim", [768, 37])
def test_swiglu(dim: int, family: str | None) -> None:
    n_whole = layout.whole_vectors(dim)
    gate, up, sinks = rows_of(5, n_whole), rows_of(5, n_whole, 1), Sinks(5, dim, dim % 32 == 0)
    gate[0, :8] = [0, -0.0, 200, -200, 87.3, -87.3, -88.3, 1e-30]
    args = [gate.ctypes.data, up.ctypes.data, gate[0].nbytes, dim, *sinks.words]
    native.run("swiglu", native.header(H_ROWS=5), args, range(5), family)
    check_sinks(sinks, (silu(gate) * up)[:, :dim])


def test_exp_is_close_to_the_truth() -> None:
    x = np.linspace(-87.2, 88.2, 100_001).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    assert np.abs(exp(x) / truth - 1).max() < 2e-7


# -- sine and cosine -----------------------------------------------------------------------------

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def _true_sincos(x: float) -> tuple[Decimal, Decimal]:
    """By 60-digit series."""
    with decimal.localcontext() as context:
        context.prec = 75
        r = Decimal(x) % (2 * _PI)
        s, c, term, n = Decimal(0), Decimal(0), Decimal(1), 0
        while n < 20 or abs(term) > Decimal("1e-50"):
            sign = -1 if n // 2 % 2 else 1
            if n % 2:
                s += sign * term
            else:
                c += sign * term
            n += 1
            term = term * r / n
        return s, c


def test_sincos_to_the_last_digits() -> None:
    from edgeinfer.kernels.cpu.native.math import sincos

    rng = np.random.default_rng(0)
    near = [k * float(_PI / 2) for k in (1, 2, 3, 1000, 12345, 355, 636619771)]
    xs = [0.0, 1e-300, 1e-9, 0.5, 1.0, *near, *(10 ** rng.uniform(-3, 13, 300)).tolist()]
    xs += [float(n) for n in rng.integers(0, 10**13, 100)] + [-x for x in near]
    for x in xs:
        for got, true in zip(sincos(x), _true_sincos(x), strict=True):
            assert abs(Decimal(got) - true) <= Decimal("1e-15") * abs(true), x


# -- rotation ------------------------------------------------------------------------------------


class Positions:
    """Rows of two sequences, the second slid, and their page tables."""

    def __init__(self) -> None:
        self.tables = [
            PageTable(np.array([5, 3, 9], np.int32), 0, 1 << 20),
            PageTable(np.array([1, 0, 7, 8, 4, 2], np.int32), 2, 3),
        ]
        self.pos = np.array([30, 31, 32, 33, 34, 1000, 1001], np.int64)
        self.seq = np.array([0] * 5 + [1] * 2, np.int32)
        self.records = np.array(
            [[t.pages.ctypes.data, len(t.pages), t.n_pinned, t.n_visible] for t in self.tables]
        )
        self.pinned_pos = np.array(
            [self.tables[s].pinned_pos(int(p)) for s, p in zip(self.seq, self.pos, strict=True)]
        )
        self.header = native.header(
            H_ROWS=7, H_POS=self.pos.ctypes.data, H_SEQ=self.seq.ctypes.data,
            H_TABLES=self.records.ctypes.data,
        )  # fmt: skip


SPAN = 13  # positions of one magnitude


def angles_of(
    positions: Positions, freqs: NDArray[np.float64], magnitudes: NDArray[np.float64] | None = None
) -> tuple[Floats, Floats]:
    """The angles kernel's rows: at their positions, and at those for pinned pages."""
    n = len(freqs)
    out = np.full((2, 7, 2 * n), np.nan, np.float32)
    args = [freqs.ctypes.data, n, out[0].ctypes.data, out[1].ctypes.data, 0]
    if magnitudes is None:
        native.run("angles", positions.header, args, range(7))
    else:
        args += [magnitudes.ctypes.data, SPAN, len(magnitudes)]
        native.run("angles.scaled", positions.header, args, range(7))
    return out[0], out[1]


def frequencies(n_pairs: int) -> NDArray[np.float64]:
    return np.asarray(1 / 10000.0 ** (np.arange(n_pairs) / n_pairs))


@pytest.mark.parametrize("magnitudes", [None, [1.13862943], [1, 1.25, 0.7, 2.125]])
def test_angles(magnitudes: list[float] | None) -> None:
    positions, freqs = Positions(), frequencies(12)
    table = np.array(magnitudes or [1], np.float64)
    plain, pinned = angles_of(positions, freqs, table if magnitudes else None)
    for got, pos in ((plain, positions.pos), (pinned[5:], positions.pinned_pos[5:])):
        angles = pos[:, None] * freqs
        expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        expected *= table[np.minimum(pos // SPAN, len(table) - 1)][:, None]
        np.testing.assert_array_equal(got, expected.astype(np.float32))
    assert np.isnan(pinned[:5]).all()  # nothing is gone from the first sequence


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", ["neox", "norm"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("k_dim", "v_dim", "n_pairs"),
    [(64, 64, 32), (80, 72, 20), (16, 8, 0), (6, 20, 3), (100, 100, 50), (2, 1, 1)],
)
def test_rotate(
    style: str, normed: bool, k_dim: int, v_dim: int, n_pairs: int, family: str | None
) -> None:
    n, n_heads, n_kv_heads, eps = 7, 6, 2, 1e-6
    positions, freqs = Positions(), frequencies(n_pairs)
    angles, pinned_angles = angles_of(positions, freqs)
    q, k = rows_of(n, n_heads * k_dim), rows_of(n, n_kv_heads * k_dim, 1)
    v = rows_of(n, n_kv_heads * v_dim, 2)
    q_weight, k_weight = rows_of(1, k_dim, 3)[0], rows_of(1, k_dim, 4)[0]
    pinned_q = np.full_like(q, np.nan)
    k_cache = np.full((12, n_kv_heads, k_dim, PAGE), np.nan, np.float16)
    v_room = layout.whole_vectors(v_dim)
    v_cache = np.full((12, n_kv_heads, PAGE, v_room), np.nan, np.float16)

    def turned(x: Floats, weight: Floats, pos: NDArray[np.int64]) -> Floats:
        heads = x.reshape(-1, k_dim)
        out = (TWIN.rms_norm(heads, weight, eps) if normed else heads).reshape(n, -1, k_dim).copy()
        i = np.arange(n_pairs)
        a, b = (i, i + n_pairs) if style == "neox" else (2 * i, 2 * i + 1)
        turns = (pos[:, None] * freqs)[:, None, :]
        out[..., a], out[..., b] = TWIN.rotate(out[..., a], out[..., b], turns, 1.0)
        return out

    expected_q, expected_k = turned(q, q_weight, positions.pos), turned(k, k_weight, positions.pos)
    expected_pinned = turned(q, q_weight, positions.pinned_pos).reshape(n, -1)
    args = [
        q.ctypes.data, q[0].nbytes, k.ctypes.data, k[0].nbytes, v.ctypes.data, v[0].nbytes,
        pinned_q.ctypes.data, n_heads, n_kv_heads, k_dim, v_dim, n_pairs,
        angles.ctypes.data, pinned_angles.ctypes.data,
        q_weight.ctypes.data if normed else 0, k_weight.ctypes.data if normed else 0,
        native.float_bits(eps), k_cache.ctypes.data, k_cache[0].nbytes,
        v_cache.ctypes.data, v_cache[0].nbytes, 0,
        k_cache[0, 0].nbytes, v_cache[0, 0].nbytes, 0, 0,
    ]  # fmt: skip
    native.run(f"rotate.{style}", positions.header, args, range(n), family)
    np.testing.assert_array_equal(q, expected_q.reshape(n, -1))
    np.testing.assert_array_equal(pinned_q[5:], expected_pinned[5:])
    assert np.isnan(pinned_q[:5]).all()
    written = 0
    for row in range(n):
        table, pos = positions.tables[positions.seq[row]], int(positions.pos[row])
        page = table.pages[table.slot(pos // PAGE)]
        with np.errstate(over="ignore"):
            halves = expected_k[row].astype(np.float16), v[row].astype(np.float16)
        np.testing.assert_array_equal(k_cache[page, :, :, pos % PAGE], halves[0])
        np.testing.assert_array_equal(
            v_cache[page, :, pos % PAGE, :v_dim], halves[1].reshape(-1, v_dim)
        )
        written += n_kv_heads * k_dim
    assert np.count_nonzero(~np.isnan(k_cache)) == written
    assert np.count_nonzero(~np.isnan(v_cache)) == written // k_dim * v_dim
