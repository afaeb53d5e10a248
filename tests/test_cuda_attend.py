"""CUDA attention on the shim against its NumPy twin, bit for bit, over pages in any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from edgeinfer.batch import PAGE, PageTable
from edgeinfer.graph import KV, KVType
from edgeinfer.kernels.cuda.attention import (
    AttendLaunch,
    AttendRowsLaunch,
    n_segments,
    part_floats,
)
from edgeinfer.kernels.cuda.kernel import Kernel, Sources
from edgeinfer.kernels.cuda.tiles import x8_bytes
from edgeinfer.kernels.reference.caches import BLOCK
from edgeinfer.kernels.reference.quantised import Quantised
from tests.cuda_shim import Floats, pages_of_blocks, rows_in_memory, run, same_bits, step, stride_of
from tests.shim import SEEDS

TWIN = Quantised()
for_usual_heads = pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "dim", "has_cap"),
    [(32, 32, 128, False), (16, 8, 128, False), (32, 8, 128, False), (64, 8, 128, False)]
    + [(9, 3, 64, False), (32, 8, 64, False), (14, 2, 64, False), (8, 4, 256, True)],
)
READY: dict[str, Any] = dict(  # queries are, and keys are stored
    k=None, v=None, q_norm=None, k_norm=None, eps=0.0, angles=None, pinned_angles=None,
    n_pairs=0, is_neox=0,
)  # fmt: skip


@dataclass
class Rows:
    """The rows of one sequence in a step: positions first .. first + n - 1."""

    first: int
    n: int = 1
    n_pinned: int = 0
    n_visible: int = 1 << 30
    n_ring: int = 0  # pages of the ring; 0: as many as there are

    @property
    def pos(self) -> range:
        return range(self.first, self.first + self.n)


@dataclass
class Case:
    """A step: page tables into one arena whose unwritten halves are NaN."""

    cache: KV
    group: int
    sequences: list[Rows]
    seed: int = 0
    cap: float = 0.0
    has_sinks: bool = False
    tables: list[PageTable] = field(default_factory=list)

    def __post_init__(self) -> None:
        cache, rng = self.cache, np.random.default_rng(self.seed)
        self.n_heads = self.group * cache.n_heads
        n_pages = [
            min(r.pos[-1] // PAGE + 1, r.n_pinned + (r.n_ring or 1 << 20)) for r in self.sequences
        ]
        n_arena = sum(n_pages) + 3
        shape = n_arena, cache.n_heads, PAGE
        self.k = _unwritten(shape, cache.k_dim, cache.k_type)
        self.v = _unwritten(shape, cache.v_dim, cache.v_type)
        free = rng.permutation(n_arena).astype(np.int32)
        for rows, n in zip(self.sequences, n_pages, strict=True):
            table = PageTable(free[:n].copy(), rows.n_pinned, rows.n_visible)
            free = free[n:]
            self.tables.append(table)
            for page in {p for pos in rows.pos for p in table.visible(pos, cache.window)}:
                at, n_written = (
                    table.pages[table.slot(page)],
                    min(PAGE, rows.pos[-1] + 1 - page * PAGE),
                )
                for pages, dim, kind in (
                    (self.k, cache.k_dim, cache.k_type),
                    (self.v, cache.v_dim, cache.v_type),
                ):
                    written = rng.standard_normal((cache.n_heads, n_written, dim), np.float32)
                    pages[at, :, :n_written] = TWIN.stored(written, kind)
        if cache.k_is_v:
            self.v = self.k[..., : cache.v_dim] if cache.k_type == "f16" else self.k
        self.pos = np.array([p for r in self.sequences for p in r.pos], np.int64)
        counts = [r.n for r in self.sequences]
        self.seq = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        shape_q = len(self.pos), self.n_heads, cache.k_dim
        self.q = rng.standard_normal(shape_q, np.float32)
        self.pinned_q = rng.standard_normal(shape_q, np.float32)
        self.scale = float(np.float32(1.7 / np.sqrt(cache.k_dim)))
        self.sinks = rng.standard_normal(self.n_heads, np.float32) if self.has_sinks else None

    def expected(self, row: int) -> Floats:
        """What the twin says of one row."""
        window, table, pos = self.cache.window, self.tables[self.seq[row]], int(self.pos[row])
        pages = np.array(table.visible(pos, window))
        is_visible = np.array([table.sees(pos, int(page), window) for page in pages])
        slots = [table.pages[table.slot(p)] for p in pages]
        q = np.where((pages < table.n_pinned)[:, None, None], self.pinned_q[row], self.q[row])
        if not self.has_slid(row):
            q = np.broadcast_to(self.q[row], q.shape)
        q = TWIN.hadamard(q) if self.cache.transforms_k else q
        k, v = (x[slots].repeat(self.group, axis=1) for x in (self.k, self.v))
        scales = k["d"] if k.dtype == BLOCK else k
        scales[np.isnan(scales)] = 0  # unwritten: the twin would only warn
        out = TWIN.attend(q, k, v, pages, is_visible, self.scale, self.cap, self.sinks)
        out = np.ascontiguousarray(out[:, : self.cache.v_dim])
        return (TWIN.hadamard(out) if self.cache.transforms_v else out).reshape(-1)

    def has_slid(self, row: int) -> bool:
        table = self.tables[self.seq[row]]
        return table.first_ring_page(int(self.pos[row])) > table.n_pinned

    # -- as it lies on a device ------------------------------------------------------------------

    def k_cache(self) -> np.ndarray:
        """(page, kv head, ceil(k_dim / 8), 32, 8), of halves."""
        if self.k.dtype == BLOCK:
            return pages_of_blocks(self.k, self.cache.k_type, is_key=True)
        n_chunks = -(-self.cache.k_dim // 8)
        padded = np.full((*self.k.shape[:3], 8 * n_chunks), np.nan, np.float16)
        padded[..., : self.cache.k_dim] = self.k
        chunks = padded.reshape(*self.k.shape[:3], n_chunks, 8).swapaxes(2, 3)
        return np.ascontiguousarray(chunks).view(np.uint16)

    def v_cache(self) -> np.ndarray:
        """(page, kv head, 32, v_dim rounded up to 8), of halves."""
        if self.v.dtype == BLOCK:
            return pages_of_blocks(self.v, self.cache.v_type, is_key=False)
        room = -(-self.cache.v_dim // 8) * 8
        padded = np.full((*self.v.shape[:3], room), np.nan, np.float16)
        padded[..., : self.cache.v_dim] = self.v
        return padded.view(np.uint16)

    def table_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.cumsum([0, *(len(t.pages) for t in self.tables)])
        entries = [
            [start, len(t.pages), t.n_pinned, t.n_visible]
            for start, t in zip(starts, self.tables, strict=False)
        ]
        return np.array(entries, np.int32), np.concatenate([t.pages for t in self.tables])

    def run(
        self,
        seed: int = 0,
        rows: list[int] | None = None,
        spare: int = 0,
        abort: int = 0,
        kernel: str = "attend",
    ) -> Floats:
        """Rows of attention from the kernels, of these rows only; `spare` segments too many.

        `kernel`: "attend", "rows" or "single rows", or the first two "by mma".
        """
        chosen = list(range(len(self.pos))) if rows is None else rows
        cache, n = self.cache, len(chosen)
        q, pinned_q = self.q[chosen].reshape(n, -1), self.pinned_q[chosen].reshape(n, -1).copy()
        for i, row in enumerate(chosen):
            if not self.has_slid(row):
                pinned_q[i] = np.nan
        tables, pages = self.table_arrays()
        out = rows_in_memory(np.full((n + 1, self.n_heads * cache.v_dim), np.nan, np.float32))
        common = dict(
            step=step(n, 0, len(tables), abort), pos=self.pos[chosen], seq=self.seq[chosen],
            tables=tables, window=cache.window, seed=seed,
        )  # fmt: skip
        inputs = dict(
            q=rows_in_memory(q), pinned_q=rows_in_memory(pinned_q),
            q_stride=stride_of(self.n_heads * cache.k_dim), k_cache=self.k_cache(),
            v_cache=None if cache.k_is_v else self.v_cache(), pages=pages, n_heads=self.n_heads,
            n_kv_heads=cache.n_heads, scale=self.scale, soft_cap=self.cap,
        )  # fmt: skip
        has_x8, dim = cache.v_dim % 32 == 0, self.n_heads * cache.v_dim
        x8 = np.full((n + 1, x8_bytes(dim)), 0xEE, np.uint8) if has_x8 else None
        end = dict(sinks=self.sinks, out=out, out_stride=out.shape[1], x8=x8)
        heads = cache, self.n_heads, self.cap > 0
        if kernel.startswith("attend"):
            launch = AttendLaunch.of(*heads, mma="mma" in kernel)
            self.run_segments(launch, common, inputs, end, n, spare)
        else:
            most_rows = 1 if kernel == "single rows" else 16
            launch = AttendRowsLaunch.of(*heads, most_rows)
            launch = AttendRowsLaunch.by_mma(*heads) if "mma" in kernel else launch
            grid = launch.n_tiles, -(-n // launch.n_rows) + spare
            run(launch.kernel, grid, launch.threads, **common, **inputs, **end)
        assert np.isnan(out[n]).all()
        if x8 is not None and not abort:
            check_quantised(x8, out[:, :dim])
        return out[:n, :dim]

    def run_segments(
        self,
        launch: AttendLaunch,
        common: dict[str, Any],
        inputs: dict[str, Any],
        end: dict[str, Any],
        n: int,
        spare: int,
    ) -> None:
        """By segments, whose parts are folded."""
        cache = self.cache
        most = spare + max(
            n_segments(self.tables[s], p, cache.window)
            for s, p in zip(common["seq"], common["pos"].tolist(), strict=True)
        )
        parts = np.full((n, self.n_heads, most, part_floats(cache.v_dim)), np.nan, np.float32)
        grid = launch.n_tiles, most, n + 1
        counters = np.zeros((n, launch.n_tiles), np.int32)
        args = dict(**READY, **common, **inputs, **end, parts=parts, counters=counters)
        run(launch.kernel, grid, launch.threads, **args)
        assert not counters.any()


def _unwritten(shape: tuple[int, ...], dim: int, kind: KVType) -> np.ndarray:
    """Heads that are no numbers."""
    if kind == "f16":
        return np.full((*shape, dim), np.nan, np.float16)
    return np.full((*shape, -(-dim // 32)), np.array((np.nan, 99), BLOCK))


def check_quantised(x8: np.ndarray, rows: Floats) -> None:
    """x8 has the rows as the kernel `quantise` leaves them, and nothing of the last."""
    n, dim = len(rows) - 1, rows.shape[1]
    expected = np.full_like(x8, 0xEE)
    run(
        Kernel("quantise"), (-(-dim // 1024), n), 256, step=step(n), rows=0,
        x=rows_in_memory(rows), x8=expected, k=dim,
    )  # fmt: skip
    used = np.flatnonzero((expected[:n] != 0xEE).any(axis=0))
    np.testing.assert_array_equal(x8[:n, used], expected[:n, used])
    assert (x8[n] == 0xEE).all()


def check(case: Case, seeds: tuple[int, ...] = (0,), **options: Any) -> Floats:
    expected = np.array([case.expected(row) for row in range(len(case.pos))])
    for kernel in ("attend", "rows"):
        for seed in seeds:
            same_bits(case.run(seed, kernel=kernel, **options), expected)
    return expected


def case_of(sequences: list[Rows], group: int = 2, seed: int = 0, **options: Any) -> Case:
    heads = dict(n_heads=2, k_dim=64, v_dim=64)
    names = ("n_heads", "k_dim", "v_dim", "window", "k_is_v", "k_type", "v_type")
    heads.update({name: options.pop(name) for name in names if name in options})
    return Case(KV(**heads), group, sequences, seed, **options)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 511, 512, 513, 1500])
def test_one_row_at_page_and_segment_borders(length: int) -> None:
    check(case_of([Rows(length - 1)]), SEEDS if length == 513 else (0,))


HEADS = [(1, 1, 1), (8, 8, 3), (33, 33, 4), (64, 64, 8), (80, 80, 1), (96, 96, 4), (128, 128, 9)]
HEADS += [(192, 128, 3), (256, 256, 5), (20, 12, 1), (1000, 600, 1)]


@pytest.mark.parametrize(("k_dim", "v_dim", "group"), HEADS)
def test_heads_of_any_width_and_groups_of_any_size(k_dim: int, v_dim: int, group: int) -> None:
    """Over pages and segments, and a slid sequence."""
    slid = Rows(640, 3, n_pinned=3, n_visible=5, n_ring=8)
    sequences = [Rows(530, 2), slid, Rows(2)]
    check(case_of(sequences, group, k_dim=k_dim, v_dim=v_dim), SEEDS if group == 3 else (7,))


def test_several_sequences_in_one_step() -> None:
    case = case_of([Rows(700), Rows(0, 40), Rows(1300, 3), Rows(31, 2), Rows(512)])
    together = check(case, spare=2)
    for row in (0, 1, 40, 41, 43, 45, 46):
        assert np.array_equal(case.run(rows=[row])[0], together[row])
        assert np.array_equal(case.run(rows=[row], kernel="rows")[0], together[row])
    for chosen in ([3, 4, 5, 41, 42, 46], [0, 40, 41, 43, 45]):
        assert np.array_equal(case.run(rows=chosen, kernel="rows"), together[chosen])
    assert np.array_equal(case.run(kernel="single rows"), together)


@pytest.mark.parametrize("first", [255, 300, 640, 2000])
@pytest.mark.parametrize("n_pinned", [0, 1, 3, 17])
def test_slid_sequences(first: int, n_pinned: int) -> None:
    """Pages between the pinned ones and the ring are gone; pinned ones are seen by pinned q."""
    slid = Rows(first, 40, n_pinned=n_pinned, n_visible=5, n_ring=8)
    check(case_of([slid, Rows(33), Rows(first + 500, 1, n_pinned, 20, 21)]))


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 100, 512, 545])
def test_windows(window: int) -> None:
    """Shorter and longer than pages, segments and what there is."""
    check(case_of([Rows(500, 17), Rows(0, 70), Rows(1200), Rows(62, 3)], window=window))


@pytest.mark.parametrize("window", [1, 33, 90, 1000])
def test_windows_over_slid_sequences(window: int) -> None:
    """Counted in the distances that queries are rotated by, so that pages behind a gap are seen."""
    slid = Rows(640, 40, n_pinned=3, n_visible=5, n_ring=8)
    check(case_of([slid, Rows(700, 1, 17, 20, 21), Rows(90, 3, n_pinned=2)], window=window))


@pytest.mark.parametrize(
    ("cap", "has_sinks", "window"), [(2.0, False, 0), (0.0, True, 0), (50.0, True, 40)]
)
def test_soft_caps_and_sinks(cap: float, has_sinks: bool, window: int) -> None:
    sequences = [Rows(600, 5), Rows(3)]
    capped = check(case_of(sequences, cap=cap, has_sinks=has_sinks, window=window))
    assert (capped != case_of(sequences, window=window).run()).any(axis=1).all()


@pytest.mark.parametrize(("k_dim", "v_dim", "window"), [(72, 64, 0), (20, 12, 40)])
def test_keys_that_serve_as_values(k_dim: int, v_dim: int, window: int) -> None:
    sequences = [Rows(600, 3), Rows(3), Rows(640, 9, n_pinned=3, n_visible=5, n_ring=8)]
    check(case_of(sequences, 3, k_dim=k_dim, v_dim=v_dim, window=window, k_is_v=True))


# Transformed and not, whole blocks and not.
IN_BLOCKS: list[tuple[int, int, int, KVType, KVType]] = [
    (64, 64, 3, "q8_0", "q8_0"), (128, 128, 8, "q4_0", "q4_0"), (6, 20, 2, "q8_0", "q4_0"),
    (100, 33, 1, "f16", "q4_0"), (192, 64, 4, "q4_0", "f16"),
]  # fmt: skip


@pytest.mark.parametrize(("k_dim", "v_dim", "group", "k_type", "v_type"), IN_BLOCKS)
def test_caches_in_blocks(
    k_dim: int, v_dim: int, group: int, k_type: KVType, v_type: KVType
) -> None:
    """Over segments, and behind a gap."""
    slid = Rows(640, 3, n_pinned=3, n_visible=5, n_ring=8)
    sequences = [Rows(530, 2), slid, Rows(2), Rows(31, 19)]
    heads = dict(k_dim=k_dim, v_dim=v_dim, k_type=k_type, v_type=v_type)
    check(case_of(sequences, group, **heads), SEEDS if group == 2 else (7,))


@pytest.mark.parametrize(
    ("k_dim", "v_dim", "kind"), [(192, 128, "q8_0"), (72, 64, "q4_0"), (64, 24, "q8_0")]
)
def test_keys_in_blocks_that_serve_as_values(k_dim: int, v_dim: int, kind: KVType) -> None:
    sequences = [Rows(600, 3), Rows(3), Rows(640, 20, n_pinned=3, n_visible=5, n_ring=8)]
    types = dict(k_type=kind, v_type=kind, k_is_v=True, window=40)
    check(case_of(sequences, 3, k_dim=k_dim, v_dim=v_dim, has_sinks=True, cap=3.0, **types))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_of_large_infinite_queries_or_none(kind: KVType) -> None:
    case = case_of([Rows(100, 9), Rows(40)], k_type=kind, v_type=kind)
    case.q *= 40
    case.q[0, 0, 0], case.q[1, 1, 1], case.q[2] = np.inf, np.nan, -np.inf
    case.q[3], case.q[4], case.q[5] = 3e37, 0, 1e-38
    with np.errstate(all="ignore"):
        check(case)


def test_scores_that_are_large_infinite_or_no_number() -> None:
    case = case_of([Rows(100, 9), Rows(40)])
    case.q *= 40
    check(case)
    case.q[0, 0, 0], case.q[1, 1, 1], case.q[2] = np.inf, np.nan, -np.inf
    case.q[3] = 3e37
    case.v[case.tables[1].pages[0]] = -6e-8  # products round to -0
    with np.errstate(all="ignore"):
        check(case)


def test_more_segments_than_are_folded_at_a_time() -> None:
    check(case_of([Rows(36 * 512)], 1, n_heads=1, k_dim=8, v_dim=8))


def test_an_aborted_step_writes_nothing() -> None:
    case = case_of([Rows(1100)])
    for kernel in ("attend", "rows"):
        assert np.isnan(case.run(abort=1, kernel=kernel)).all()


def test_segments_are_counted_as_pages_are_seen() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        n_pinned = int(rng.choice([0, 1, 3, 16, 17, 40]))
        n_visible = int(rng.choice([1, 2, 5, 16, 40, 1 << 30]))
        window, pos = int(rng.choice([0, 1, 32, 33, 700])), int(rng.integers(0, 4000))
        table = PageTable(np.zeros(n_pinned + 50, np.int32), n_pinned, n_visible)
        segments = {page // 16 for page in table.visible(pos, window)}
        assert n_segments(table, pos, window) == len(segments)


@for_usual_heads
def test_what_usual_models_need_is_compiled_ahead(
    n_heads: int, n_kv_heads: int, dim: int, has_cap: bool
) -> None:
    sources, cache = Sources(), KV(n_kv_heads, dim, dim)
    launch = AttendLaunch.of(cache, n_heads, has_cap)
    rows = AttendRowsLaunch.of(cache, n_heads, has_cap)
    for kernel in (launch.kernel, rows.kernel):
        assert kernel in sources.variants(kernel.name)
    assert launch.n_tiles == rows.n_tiles == n_kv_heads


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_any_heads_over_any_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k_dim, v_dim = (int(rng.choice([rng.integers(1, 300), 64, 128])) for _ in range(2))
    sequences = [
        Rows(
            first=int(rng.integers(0, 1500)),
            n=int(rng.integers(1, 40)),
            n_pinned=int(rng.choice([0, 1, 4, 17])),
            n_visible=(n_visible := int(rng.choice([1, 3, 20, 1 << 30]))),
            n_ring=0 if n_visible == 1 << 30 else n_visible + 3,
        )
        for _ in range(rng.integers(1, 5))
    ]
    case = case_of(
        sequences,
        group=int(rng.integers(1, 17)),
        seed=seed,
        n_heads=int(rng.integers(1, 4)),
        k_dim=k_dim,
        v_dim=v_dim,
        k_is_v=(k_is_v := bool(v_dim <= k_dim and rng.integers(0, 2))),
        k_type=(k_type := str(rng.choice(["f16", "q8_0", "q4_0"]))),
        v_type=k_type if k_is_v else str(rng.choice(["f16", "q8_0", "q4_0"])),
        window=int(rng.choice([0, 0, 1, 33, 700])),
        cap=float(rng.choice([0.0, 0.0, 20.0])),
        has_sinks=bool(rng.integers(0, 2)),
    )
    together = check(case, (int(rng.choice(SEEDS)),), spare=int(rng.integers(0, 3)))
    assert np.array_equal(case.run(kernel="single rows"), together)
