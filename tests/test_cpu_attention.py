"""CPU attention against its NumPy twin, bit for bit, over pages in any order.

Knows no model: queries, keys and values are random.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, PageTable
from edgeinfer.graph import KV, KVType
from edgeinfer.kernels.cpu import attention_layout, page_layout
from edgeinfer.kernels.cpu.lower_attention import attend_kernel, fold_kernel
from edgeinfer.kernels.reference.caches import hadamard
from edgeinfer.kernels.reference.quantised import Quantised
from tests import native
from tests.kv_pages import k_pages, v_pages

FAMILIES = [None, "avx2", "generic"]
TABLES = 64  # where the page tables of these layers begin
Floats = NDArray[np.float32]


TWIN = Quantised()


def _unwritten(positions: NDArray[Any]) -> NDArray[Any]:
    """Pages of as many positions, of which nothing is a number that can be."""
    pages = np.empty((len(positions) // PAGE, PAGE, *positions.shape[1:]), positions.dtype)
    pages.view(np.uint8)[:] = 0xFF
    return pages


@dataclass
class Heads:
    n_heads: int = 4
    n_kv_heads: int = 2
    k_dim: int = 64
    v_dim: int = 64
    window: int = 0
    cap: float = 0.0
    has_sinks: bool = False
    k_is_v: bool = False
    types: tuple[KVType, KVType] = ("f16", "f16")

    @property
    def cache(self) -> KV:
        return KV(self.n_kv_heads, self.k_dim, self.v_dim, self.window, self.k_is_v, *self.types)


@dataclass
class Rows:
    """The rows of one sequence in a step: positions first .. first + n - 1."""

    first: int
    n: int = 1
    n_pinned: int = 0
    n_visible: int = 1 << 20
    n_ring: int = 0  # pages of the ring; 0: as many as there are

    @property
    def pos(self) -> range:
        return range(self.first, self.first + self.n)


@dataclass
class Case:
    """A step: page tables into one arena whose unwritten bytes are NaN."""

    heads: Heads
    sequences: list[Rows]
    rng: np.random.Generator
    tables: list[PageTable] = field(default_factory=list)

    def __post_init__(self) -> None:
        heads, rng = self.heads, self.rng
        n_pages = [
            min(r.pos[-1] // PAGE + 1, r.n_pinned + (r.n_ring or 1 << 20)) for r in self.sequences
        ]
        n_arena = sum(n_pages) + 3
        self.k, self.v = (
            _unwritten(TWIN.stored(np.zeros((n_arena * PAGE, heads.n_kv_heads, dim), "f4"), kind))
            for dim, kind in zip((heads.k_dim, heads.v_dim), heads.types, strict=True)
        )
        free = rng.permutation(n_arena).astype(np.int32)
        for rows, n in zip(self.sequences, n_pages, strict=True):
            table = PageTable(free[:n].copy(), rows.n_pinned, min(rows.n_visible, 1 << 20))
            free = free[n:]
            self.tables.append(table)
            for page in {p for pos in rows.pos for p in table.visible(pos, heads.window)}:
                n_written = min(PAGE, rows.pos[-1] + 1 - page * PAGE)
                self._write(table.pages[table.slot(page)], n_written)
        n_rows = sum(r.n for r in self.sequences)
        self.pos = np.array([p for r in self.sequences for p in r.pos], np.int64)
        self.seq = np.repeat(np.arange(len(n_pages)), [r.n for r in self.sequences]).astype("i4")
        shape = (n_rows, heads.n_heads, heads.k_dim)
        self.q = rng.standard_normal(shape, np.float32)
        self.pinned_q = rng.standard_normal(shape, np.float32)
        self.scale = float(np.float32(1.7 / np.sqrt(heads.k_dim)))
        self.sinks = rng.standard_normal(heads.n_heads, np.float32) if heads.has_sinks else None

    def _write(self, page: int, n: int) -> None:
        heads, rng = self.heads, self.rng
        for arena, dim, kind in (
            (self.k, heads.k_dim, heads.types[0]),
            (self.v, heads.v_dim, heads.types[1]),
        ):
            rows = rng.standard_normal((n, heads.n_kv_heads, dim), np.float32)
            arena[page, :n] = TWIN.stored(rows, kind)

    def has_slid(self, row: int) -> bool:
        table = self.tables[self.seq[row]]
        return table.first_ring_page(int(self.pos[row])) > table.n_pinned

    def expected(self, row: int) -> Floats:
        """What the twin says of one row."""
        heads, table, pos = self.heads, self.tables[self.seq[row]], int(self.pos[row])
        group = heads.n_heads // heads.n_kv_heads
        pages = np.array(table.visible(pos, heads.window))
        is_visible = np.array([table.sees(pos, int(page), heads.window) for page in pages])
        slots = [table.pages[table.slot(p)] for p in pages]
        pinned = self.has_slid(row) & (pages < table.n_pinned)
        q = np.where(pinned[:, None, None], self.pinned_q[row], self.q[row])
        if heads.cache.transforms_k:
            q = hadamard(q)
        k, v = (
            arena[slots].transpose(0, 2, 1, 3).repeat(group, axis=1) for arena in (self.k, self.v)
        )
        v = k if heads.k_is_v else v
        with np.errstate(invalid="ignore"):  # of what is unwritten
            out = TWIN.attend(q, k, v, pages, is_visible, self.scale, heads.cap, self.sinks)
        out = np.ascontiguousarray(out[:, : heads.v_dim])
        return (hadamard(out) if heads.cache.transforms_v else out).reshape(-1)

    def run(self, rows: list[int] | None = None, family: str | None = None) -> Floats:
        """Rows of attention from the kernels, of these rows only."""
        chosen = list(range(len(self.pos))) if rows is None else rows
        heads, n = self.heads, len(chosen)
        q, pinned_q = self.q[chosen], self.pinned_q[chosen]
        for i, row in enumerate(chosen):
            if not self.has_slid(row):
                pinned_q[i] = np.nan
        pos, seq = self.pos[chosen], self.seq[chosen]
        tables = np.array(
            [[t.pages.ctypes.data, len(t.pages), t.n_pinned, t.n_visible] for t in self.tables]
        )
        max_segments = int(pos.max()) // 512 + 1
        items = np.full(attention_layout.items_bytes(n, max_segments) // 8, -1, np.int64)
        rooms = page_layout.rooms(heads.k_dim, heads.v_dim, *heads.types)
        n_parts = attention_layout.parts_bytes(n, heads.n_heads, *rooms, max_segments) // 4
        parts = np.full(n_parts + 4096, np.nan, np.float32)
        out = np.full((n, heads.n_heads * heads.v_dim), np.nan, np.float32)
        h = native.header(
            H_ROWS=n, H_POS=pos.ctypes.data, H_SEQ=seq.ctypes.data,
            H_TABLES=tables.ctypes.data - TABLES,
        )  # fmt: skip
        items_args = [items.ctypes.data, max_segments, heads.window, TABLES]
        shared_type = "f16" if heads.types[0] == "f16" else "q8_0"
        values = native.huge(page_layout.v_bytes(heads.v_dim, shared_type))
        sinks = 0 if self.sinks is None else self.sinks.ctypes.data
        k, v = k_pages(self.k, heads.types[0]), v_pages(self.v, heads.types[1])
        if heads.k_is_v:  # nothing reads that
            v[:] = 0xFF
        args = [
            items.ctypes.data, heads.n_kv_heads, q.ctypes.data, q[0].nbytes, pinned_q.ctypes.data,
            heads.n_heads, native.float_bits(self.scale), k.ctypes.data, k[0].nbytes,
            v.ctypes.data, v[0].nbytes, parts.ctypes.data, *rooms, heads.v_dim, TABLES,
            heads.window, native.float_bits(heads.cap), sinks, values.ctypes.data, out.ctypes.data,
            out[0].nbytes, 0, 0,
        ]  # fmt: skip
        native.run("plan_attention", h, items_args, range(1), family)
        n_chunks = int(items[0]) * heads.n_kv_heads
        backwards = range(n_chunks - 1, -1, -1)  # chunks run in any order
        native.run(attend_kernel(heads.cache, heads.cap > 0), h, args, backwards, family)
        native.run(fold_kernel(heads.cache, sinks > 0), h, args, range(n), family)
        assert np.isnan(parts[n_parts:]).all()
        return out


def check(case: Case, family: str | None = None) -> Floats:
    out = case.run(family=family)
    for row in range(len(out)):
        np.testing.assert_array_equal(out[row], case.expected(row), err_msg=f"row {row}")
    return out


def case_of(sequences: list[Rows], seed: int = 0, **heads: Any) -> Case:
    return Case(Heads(**heads), sequences, np.random.default_rng(seed))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 511, 512, 513, 1500])
def test_one_row_at_page_and_segment_borders(length: int) -> None:
    check(case_of([Rows(length - 1)]))


@pytest.mark.parametrize("first", [0, 20, 505, 1020])
def test_rows_of_one_step_equal_each_row_alone(first: int) -> None:
    case = case_of([Rows(first, 13)])
    together = check(case)
    for row in range(13):
        assert np.array_equal(case.run([row])[0], together[row])
    halves = np.concatenate([case.run(list(range(5))), case.run(list(range(5, 13)))])
    assert np.array_equal(halves, together)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_query_heads(group: int, family: str | None) -> None:
    case = case_of([Rows(500, 37)], n_heads=2 * group, n_kv_heads=2)
    assert np.array_equal(check(case, family), case.run())


@pytest.mark.parametrize("dims", [(8, 16), (72, 80), (80, 72), (96, 64), (128, 128), (256, 256)])
def test_head_dims(dims: tuple[int, int]) -> None:
    check(case_of([Rows(70, 11)], k_dim=dims[0], v_dim=dims[1]))


@pytest.mark.parametrize("dims", [(100, 100), (6, 20)])
def test_heads_that_are_no_whole_vectors(dims: tuple[int, int]) -> None:
    """Over pages, segments, split and whole items, and a slid sequence."""
    slid = Rows(640, 40, n_pinned=3, n_visible=5, n_ring=8)
    case = case_of([Rows(1030, 13), slid, Rows(2)], n_heads=6, k_dim=dims[0], v_dim=dims[1])
    together = check(case)
    assert np.array_equal(case.run([12])[0], together[12])


def test_several_sequences_in_one_step() -> None:
    case = case_of([Rows(700), Rows(0, 40), Rows(1300, 3), Rows(31, 2), Rows(512)])
    together = check(case)
    for row in (0, 1, 40, 41, 43, 45, 46):
        assert np.array_equal(case.run([row])[0], together[row])


@pytest.mark.parametrize("first", [255, 300, 640, 2000])
@pytest.mark.parametrize("n_pinned", [0, 1, 3, 17])
def test_slid_sequences(first: int, n_pinned: int) -> None:
    """Pages between the pinned ones and the ring are gone; pinned ones are seen by pinned q."""
    slid = Rows(first, 40, n_pinned=n_pinned, n_visible=5, n_ring=8)
    case = case_of([slid, Rows(33), Rows(first + 500, 1, n_pinned, 20, 21)])
    together = check(case)
    for row in (0, 39, 40, 41):
        assert np.array_equal(case.run([row])[0], together[row])


def test_many_rows_fall_back_to_unsplit_items() -> None:
    """More short runs of rows than `parts` has room to split."""
    case = case_of([Rows(1100 + 7 * i, 1 + i % 7) for i in range(12)])
    check(case)


def test_families_agree() -> None:
    case = case_of([Rows(600, 21), Rows(90)], n_heads=6, n_kv_heads=2, k_dim=80, v_dim=80)
    first, *others = (case.run(family=family) for family in FAMILIES)
    assert all(np.array_equal(first, other) for other in others)


def test_large_scores() -> None:
    case = case_of([Rows(100, 9)])
    case.q *= 40
    check(case)


# -- windows, soft-caps, sinks -------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 17, 31, 32, 33, 64, 100, 512, 545])
def test_windows(window: int) -> None:
    """Shorter and longer than blocks, pages, segments and the prompt; split and whole items."""
    sequences = [Rows(500, 77), Rows(0, 70), Rows(1200), Rows(62, 3), Rows(527, 6)]
    case = case_of(sequences, window=window)
    together = check(case)
    for row in (0, 13, 76, 77, 100, 146, 147, 149, 156):
        assert np.array_equal(case.run([row])[0], together[row])
    chunks = [case.run(list(range(at, min(at + 25, 157)))) for at in range(0, 157, 25)]
    assert np.array_equal(np.concatenate(chunks), together)


@pytest.mark.parametrize(
    ("cap", "has_sinks", "window", "family"),
    [(0.0, True, 0, None), (2.0, False, 0, None), *((50.0, True, 40, each) for each in FAMILIES)],
)
def test_soft_caps_and_sinks(cap: float, has_sinks: bool, window: int, family: str | None) -> None:
    case = case_of([Rows(600, 21), Rows(3)], window=window, cap=cap, has_sinks=has_sinks, n_heads=6)
    check(case, family)
    plain = case_of([Rows(600, 21), Rows(3)], window=window, n_heads=6).run()
    assert (case.run() != plain).any(axis=1).all()


@pytest.mark.parametrize("window", [1, 33, 90, 1000])
def test_windows_over_slid_sequences(window: int) -> None:
    """Counted in the distances that queries are rotated by, so that pages behind a gap are seen."""
    slid = Rows(640, 40, n_pinned=3, n_visible=5, n_ring=8)
    case = case_of([slid, Rows(700, 1, 17, 20, 21), Rows(90, 3, n_pinned=2)], window=window)
    together = check(case)
    for row in (0, 25, 40, 43):
        assert np.array_equal(case.run([row])[0], together[row])


def test_a_window_of_everything_is_none() -> None:
    sequences = [Rows(600, 21), Rows(3)]
    assert np.array_equal(case_of(sequences, window=622).run(), case_of(sequences).run())


@pytest.mark.parametrize(("dims", "window"), [((72, 64), 0), ((20, 12), 40)])
def test_keys_that_serve_as_values(dims: tuple[int, int], window: int) -> None:
    sequences = [Rows(600, 21), Rows(3), Rows(640, 9, n_pinned=3, n_visible=5, n_ring=8)]
    check(case_of(sequences, n_heads=6, k_dim=dims[0], v_dim=dims[1], window=window, k_is_v=True))


# -- types of K and V ----------------------------------------------------------------------------

# Each is a kernel to be built, which takes 2 s, so these two stand for all.
TYPES: tuple[tuple[KVType, KVType], ...] = (("q8_0", "q4_0"), ("q4_0", "q8_0"))
ALL_TYPES = [(k, v) for k in get_args(KVType) for v in get_args(KVType) if (k, v) != ("f16", "f16")]


@pytest.mark.parametrize("types", TYPES, ids="/".join)
def test_types(types: tuple[KVType, KVType]) -> None:
    """Over pages, segments, split and whole items, and a slid sequence."""
    slid = Rows(640, 20, n_pinned=3, n_visible=5, n_ring=8)
    case = case_of([Rows(1030, 13), slid, Rows(2)], n_heads=6, types=types)
    together = check(case)
    for row in (12, 13, 33):
        assert np.array_equal(case.run([row])[0], together[row])


def check_groups(types: tuple[KVType, KVType], dims: tuple[int, int], family: str | None) -> None:
    """Tiles of every size."""
    for group in (1, 3, 4, 8):
        sequences, n = [Rows(40, 7), Rows(3)], 2 * group
        check(case_of(sequences, n_heads=n, k_dim=dims[0], v_dim=dims[1], types=types), family)


@pytest.mark.parametrize(
    ("i", "dims", "family"), [(0, (64, 64), "avx2"), (1, (100, 72), "generic")]
)
def test_types_on_poorer_machines(i: int, dims: tuple[int, int], family: str) -> None:
    """Also of heads that are no whole blocks."""
    check_groups(TYPES[i], dims, family)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(64, 64), (100, 72), (6, 20), (128, 96), (256, 448)])
@pytest.mark.parametrize("types", ALL_TYPES, ids="/".join)
def test_all_types(types: tuple[KVType, KVType], dims: tuple[int, int]) -> None:
    for family in FAMILIES:
        check_groups(types, dims, family)


def test_types_beside_windows_caps_and_sinks() -> None:
    sequences = [Rows(600, 21), Rows(3), Rows(640, 9, n_pinned=3, n_visible=5, n_ring=8)]
    check(case_of(sequences, n_heads=6, window=40, cap=2.0, has_sinks=True, types=TYPES[0]))


@pytest.mark.parametrize(("kind", "dims"), [("q8_0", (128, 64)), ("q4_0", (72, 64))])
def test_blocks_of_keys_that_serve_as_values(kind: KVType, dims: tuple[int, int]) -> None:
    """Transformed where both fit."""
    sequences = [Rows(600, 5), Rows(3), Rows(640, 9, n_pinned=3, n_visible=5, n_ring=8)]
    heads: Any = dict(k_dim=dims[0], v_dim=dims[1], k_is_v=True, types=(kind, kind))
    check(case_of(sequences, n_heads=6, **heads))
