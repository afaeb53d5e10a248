"""Which variants of the attention kernels fit a layer's heads, and how they are launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgeinfer.batch import PAGE, SEGMENT_PAGES, PageTable
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import KV
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.ops import KV_BLOCK

SHARED_BYTES = 48 << 10  # static shared memory of a block, on any GPU
_TILE_VALUES = 1024  # of the query heads of a block: more take registers that loads in flight need
_MOST_QUERIES = 12  # of a warp that takes several rows
_TILE_QUERIES = 16  # of a warp with tensor cores
_MOST_MMA_DIM = 256  # of heads: what is folded of wider ones has no room in shared memory
_LANES = 32


class AttendLaunch(NamedTuple):
    """Attention of each row by itself (attend.cu): a block for each tile, segment and row."""

    kernel: Kernel
    n_tiles: int  # of query heads, in all
    threads: int
    makes_heads: bool  # whether a warp has room to norm and rotate a head, in steps of one row

    @classmethod
    def of(
        cls, cache: KV, n_heads: int, has_cap: bool, *, mma: bool = False, most_warps: int = 16
    ) -> AttendLaunch:
        """`mma`: by tensor cores. UnsupportedModelError where heads are too wide."""
        most = max(1, _TILE_VALUES // cache.v_dim)
        most = min(most, _TILE_QUERIES) if mma else most
        queries, n_tiles = _tiles(n_heads // cache.n_heads, most)
        lanes = _Lanes.of(cache.v_dim, queries)

        def n_floats(warps: int) -> int:
            """Of `Shared` in attend.cu."""
            of_warp = PAGE * lanes.padded + queries * cache.v_dim + 4 * queries
            return queries * _query_floats(cache, mma) + warps * of_warp + 2 * queries + 4

        # 512 threads have 128 registers each: too few for the loads and scores of more queries, and
        # with tensor cores for any, as compilers for one GPU or another have it.
        are_halves = cache.k_type == cache.v_type == "f16"
        most_queries = 0 if mma else 4 if are_halves else 3
        most_warps = most_warps if queries <= most_queries else 8
        choices = tuple(n for n in (16, 8, 4, 2, 1) if n <= most_warps)
        warps = _most_warps(cache, choices, n_floats)
        kernel = _kernel("attend", cache, has_cap, QUERIES=queries, WARPS=warps, MMA=int(mma))
        makes_heads = cache.k_dim <= queries * cache.v_dim
        return cls(kernel, n_tiles * cache.n_heads, _LANES * warps, makes_heads)


class AttendRowsLaunch(NamedTuple):
    """Attention of many rows (attend_rows.cu): a block for each tile and `n_rows` rows."""

    kernel: Kernel
    n_tiles: int  # of query heads, in all
    n_rows: int
    threads: int

    @classmethod
    def of(cls, cache: KV, n_heads: int, has_cap: bool, most_rows: int = 16) -> AttendRowsLaunch:
        """`most_rows` of a sequence share what is read; 1 is best where no two are of one.

        UnsupportedModelError where heads are too wide.
        """
        most = max(1, _TILE_VALUES // max(cache.k_dim, cache.v_dim))
        most = min(most, _MOST_QUERIES)
        group, n_tiles = _tiles(n_heads // cache.n_heads, most)
        rows = min(most_rows, most // group)
        lanes, queries = _Lanes.of(cache.v_dim, rows * group), rows * group

        def n_floats(warps: int) -> int:
            """Of `Shared` in attend_rows.cu."""
            values = 8 * lanes.rounds * lanes.set_queries * _LANES
            return warps * (queries * _query_floats(cache, False) + PAGE * lanes.padded + values)

        warps = _most_warps(cache, (4, 2, 1), n_floats)
        kernel = _kernel("attend_rows", cache, has_cap, GROUP=group, ROWS=rows, WARPS=warps)
        return cls(kernel, n_tiles * cache.n_heads, rows * warps, _LANES * warps)

    @classmethod
    def by_mma(cls, cache: KV, n_heads: int, has_cap: bool) -> AttendRowsLaunch:
        """Of attend_rows_mma.cu; UnsupportedModelError where heads are too wide."""
        group, n_tiles = _tiles(n_heads // cache.n_heads, _TILE_QUERIES)
        rows = _TILE_QUERIES // group
        queries, room = rows * group, -(-cache.v_dim // 64) * 64

        def n_floats(warps: int) -> int:
            """Of `Shared` in attend_rows_mma.cu."""
            return warps * (queries * _query_floats(cache, True) + 2 * _TILE_QUERIES * room)

        warps = _most_warps(cache, (4, 2, 1), n_floats)
        kernel = _kernel("attend_rows_mma", cache, has_cap, GROUP=group, ROWS=rows, WARPS=warps)
        return cls(kernel, n_tiles * cache.n_heads, rows * warps, _LANES * warps)


def fits_mma(cache: KV) -> bool:
    """Whether tensor cores may take heads of these widths."""
    return max(cache.k_dim, cache.v_dim) <= _MOST_MMA_DIM


def part_floats(v_dim: int) -> int:
    """Of a part that `attend` leaves for each row, query head and segment."""
    return v_dim + 2


def n_segments(table: PageTable, pos: int, window: int) -> int:
    """Segments of 16 pages of which a query at `pos` sees anything."""
    last = pos // PAGE
    gone = table.first_ring_page(pos) - table.n_pinned
    first = max(table.pinned_pos(pos) - window + 1, 0) // PAGE if window else 0
    pinned_end = table.n_pinned if gone else 0
    begin = max(pinned_end, first) + gone
    behind = -(-pinned_end // SEGMENT_PAGES)
    n_pinned = max(behind - first // SEGMENT_PAGES, 0) if first < pinned_end else 0
    first_segment = max(begin // SEGMENT_PAGES, behind if n_pinned else 0)
    return n_pinned + max(last // SEGMENT_PAGES + 1 - first_segment, 0)


class _Lanes(NamedTuple):
    """`Lanes` of attend.cuh."""

    rounds: int
    set_queries: int
    padded: int

    @classmethod
    def of(cls, v_dim: int, queries: int) -> _Lanes:
        chunks = _whole(v_dim) // 8
        width = min(chunks, _LANES)
        sets = min(_LANES // width, queries)
        set_queries = -(-queries // sets)
        return cls(-(-chunks // width), set_queries, sets * set_queries)


def _query_floats(cache: KV, mma: bool) -> int:
    """Of `QueriesOf` of attend.cuh: of blocks their codes, scales and sums, in whole 16 bytes.

    Or of `HalfQueries` of attend_mma.cuh, a bit more.
    """
    if mma:
        return 16 * (-(-cache.k_dim // 32) | 1) + 4
    if cache.k_type == "f16":
        return _whole(cache.k_dim)
    return -(-10 * -(-cache.k_dim // KV_BLOCK) // 4) * 4


def _whole(dim: int) -> int:
    """Rounded up to whole loads of 16 bytes."""
    return -(-dim // 8) * 8


def _tiles(group: int, most: int) -> tuple[int, int]:
    """Query heads of a tile, at most so many, and the tiles of a kv head's group."""
    n_tiles = -(-group // most)
    return -(-group // n_tiles), n_tiles


def _most_warps(cache: KV, choices: tuple[int, ...], n_floats: Callable[[int], int]) -> int:
    for warps in choices:
        if 4 * n_floats(warps) <= SHARED_BYTES:
            return warps
    raise UnsupportedModelError(
        f"heads of {cache.k_dim} and {cache.v_dim} values are wider than the memory of a CUDA "
        "block; run it with device cpu"
    )


def _kernel(name: str, cache: KV, has_cap: bool, **defines: int) -> Kernel:
    return Kernel.of(
        name,
        K_DIM=cache.k_dim,
        V_DIM=cache.v_dim,
        K_IS_V=int(cache.k_is_v),
        SOFT_CAP=int(has_cap),
        K_TYPE=cache.k_type,
        V_TYPE=cache.v_type,
        **defines,
    )
