"""Which variants of the attention kernels fit a layer's heads, and how they are launched."""

from __future__ import annotations

from typing import NamedTuple

from edgeinfer.batch import PAGE, SEGMENT_PAGES, PageTable
from edgeinfer.graph import KV
from edgeinfer.kernels.cuda.kernel import Kernel

_TILE_VALUES = 1024  # of the query heads of a block: more take registers that loads in flight need
_O_BYTES = 16 << 10  # of what the warps of a block leave in shared memory
_MOST_QUERIES = 12  # of a warp that takes several rows
_ROWS_WARPS = 4
_LANES = 32


class AttendLaunch(NamedTuple):
    """Attention of each row by itself: a block for each tile of heads, segment and row."""

    kernel: Kernel
    n_tiles: int  # of all heads
    threads: int
    fold: Kernel

    @classmethod
    def of(cls, cache: KV, n_heads: int, has_cap: bool) -> AttendLaunch:
        group = n_heads // cache.n_heads
        queries = min(group, max(1, _TILE_VALUES // cache.v_dim))
        n_tiles = -(-group // queries)
        queries = -(-group // n_tiles)
        warps = 8
        while warps > 1 and 4 * warps * queries * cache.v_dim > _O_BYTES:
            warps //= 2
        kernel = Kernel.of(
            "attend",
            K_DIM=cache.k_dim,
            V_DIM=cache.v_dim,
            QUERIES=queries,
            WARPS=warps,
            K_IS_V=int(cache.k_is_v),
            SOFT_CAP=int(has_cap),
        )
        fold = Kernel.of("attend_fold", V_DIM=cache.v_dim)
        return cls(kernel, n_tiles * cache.n_heads, _LANES * warps, fold)


class AttendRowsLaunch(NamedTuple):
    """Attention of many rows: a block for each tile of heads and `n_rows` rows."""

    kernel: Kernel
    n_tiles: int  # of all heads
    n_rows: int
    threads: int

    @classmethod
    def of(cls, cache: KV, n_heads: int, has_cap: bool, most_rows: int = 16) -> AttendRowsLaunch:
        """`most_rows` of a sequence share what is read; 1 is best where no two are of one."""
        group, width = n_heads // cache.n_heads, max(cache.k_dim, cache.v_dim)
        most = min(_MOST_QUERIES, max(1, _TILE_VALUES // width))
        n_tiles = -(-group // most)
        group = -(-group // n_tiles)
        rows = min(most_rows, most // group)
        kernel = Kernel.of(
            "attend_rows",
            K_DIM=cache.k_dim,
            V_DIM=cache.v_dim,
            GROUP=group,
            ROWS=rows,
            WARPS=_ROWS_WARPS,
            K_IS_V=int(cache.k_is_v),
            SOFT_CAP=int(has_cap),
        )
        return cls(kernel, n_tiles * cache.n_heads, rows * _ROWS_WARPS, _LANES * _ROWS_WARPS)


FOLD_THREADS = 128


def part_floats(v_dim: int) -> int:
    """Of a part that `attend` leaves for each row, query head and segment."""
    return -(-v_dim // 4) * 4 + 4


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
