"""What native kernels of attention are told, and the work items and partial results they share.

As `layout.py`, of which this is a part that other kernels know nothing of.
"""

from __future__ import annotations

from edgeinfer.kernels.cpu.layout import WORD, Block

# angles: cos and sin of every row's rotation, [n_pairs cos, n_pairs sin] floats a row, at its
# position and, where there is a place for them, at its position for pinned pages
# (PageTable.pinned_pos). freqs: double[n_pairs].
# angles.scaled: all of them times a magnitude, double[n], of which each serves a span of positions
# and the last all behind it.
ANGLES = Block("freqs n_pairs out pinned_out tables")
ANGLES_FREQS, ANGLES_N_PAIRS, ANGLES_OUT, ANGLES_PINNED_OUT, ANGLES_TABLES = ANGLES
ANGLES_SCALED = Block("magnitudes span n_magnitudes", first=5)
ANGLES_MAGNITUDES, ANGLES_SPAN, ANGLES_N_MAGNITUDES = ANGLES_SCALED
#
# rotate.<norm|neox>: for one row: normalise q and k heads (where weights are given), rotate them,
# write q back, write q rotated for pinned pages to `pinned_q` where the row's sequence has slid
# (PageTable.first_ring_page > n_pinned), store k and v as halves in the row's page, or with
# `.<type of K>.<type of V>` in these, transformed where they are to be. Without a `pinned_q` and
# heads of k no page table is read.
ROTATE = Block(
    "q q_stride k k_stride v v_stride pinned_q n_heads n_kv_heads k_dim v_dim n_pairs angles "
    "pinned_angles q_norm k_norm eps k_base k_page_bytes v_base v_page_bytes tables "
    "k_head_bytes v_head_bytes transforms_k transforms_v"
)
(
    ROTATE_Q, ROTATE_Q_STRIDE, ROTATE_K, ROTATE_K_STRIDE, ROTATE_V, ROTATE_V_STRIDE,
    ROTATE_PINNED_Q, ROTATE_N_HEADS, ROTATE_N_KV_HEADS, ROTATE_K_DIM, ROTATE_V_DIM,
    ROTATE_N_PAIRS, ROTATE_ANGLES, ROTATE_PINNED_ANGLES, ROTATE_Q_NORM, ROTATE_K_NORM,
    ROTATE_EPS, ROTATE_K_BASE, ROTATE_K_PAGE_BYTES, ROTATE_V_BASE, ROTATE_V_PAGE_BYTES,
    ROTATE_TABLES, ROTATE_K_HEAD_BYTES, ROTATE_V_HEAD_BYTES, ROTATE_TRANSFORMS_K,
    ROTATE_TRANSFORMS_V,
) = ROTATE  # fmt: skip
#
# plan_attention (part of the prologue): the work items of layers with one window (0: none).
# max_segments: the most segments a row of this program can see.
ITEMS = Block("at max_segments window tables")
ITEMS_AT, ITEMS_MAX_SEGMENTS, ITEMS_WINDOW, ITEMS_TABLES = ITEMS
#
# attend.<k_dim>.<v_dim>: one (work item, kv head); partial results go to `parts`. With `.window`
# rows see a window only, with `.cap` scores pass a soft-cap; window and cap mean nothing else. With
# `.shared` K serves as V, and `values` is 64-byte aligned scratch: V of a head in a page, as f16 or
# q8_0, for each thread. With `.k_<type>` or `.v_<type>` K or V is no f16, with `.hadamard` queries
# are transformed. k_room and v_room are the places of a head in `parts`.
# fold: one row: fold its parts in order, divide, leave the row in the sinks. fold.sinks: with a
# float for each head as the score of no value. fold.hadamard, fold.sinks.hadamard: transformed.
# `pinned_q` has the stride of q.
ATTEND = Block(
    "items n_kv_heads q q_stride pinned_q n_heads scale k_base k_page_bytes v_base "
    "v_page_bytes parts k_room v_room v_dim tables window cap sinks values"
)
(
    ATTEND_ITEMS, ATTEND_N_KV_HEADS, ATTEND_Q, ATTEND_Q_STRIDE, ATTEND_PINNED_Q, ATTEND_N_HEADS,
    ATTEND_SCALE, ATTEND_K_BASE, ATTEND_K_PAGE_BYTES, ATTEND_V_BASE, ATTEND_V_PAGE_BYTES,
    ATTEND_PARTS, ATTEND_K_ROOM, ATTEND_V_ROOM, ATTEND_V_DIM, ATTEND_TABLES, ATTEND_WINDOW,
    ATTEND_CAP, ATTEND_SINKS, ATTEND_VALUES,
) = ATTEND  # fmt: skip
FOLD_SINK = 20 * WORD
#
# Items: their number, one record per row of the step, then the work items.
# A work item is up to ATTEND_ROWS consecutive rows of one sequence that see the same pages, with
# all segments that they see (segment ALL) or with one of them: few rows are split by segment, so
# that a long context uses every core, and a step of few rows into items of few, so that a short one
# does.
#
# A part is what one work item leaves for one of its rows, all heads. Parts are counted over the
# step; an item's are consecutive, and a split item's segments follow each other, ascending.
ATTEND_ROWS = 16
ATTEND_FEW_ROWS = 4  # in steps of up to SPLIT_ROWS rows
SPLIT_ROWS = 8  # items of more rows are not split by segment
ALL_SEGMENTS = -1
ITEMS_ROWS = WORD  # behind their number
ROW_PART, ROW_ITEM_ROWS, ROW_INDEX, ROW_N_PARTS = (i * WORD for i in range(4))
ROW_BYTES = 4 * WORD
ITEM_ROW, ITEM_N_ROWS, ITEM_SEGMENT, ITEM_PART = (i * WORD for i in range(4))
ITEM_BYTES = 4 * WORD
#
# Memory of a part, per head ("query"): room for its q, two states of v_room, and the m and l of
# both. The queries of (item, kv head) lie together, row by row, and are cut into tiles of 4,
# the rest is one more: the sums of 4 queries and 2 vectors of positions or values, and what they
# are made of, fit 16 registers. A tile of n queries is
# [k_room][n] q, [n][v_room] state, [n][v_room] state of the current segment, then m and l of the
# first, m and l of the second, 8 floats each. What is in the places behind the v_dim values means
# nothing. For a K of blocks q is [blocks][n] of a32 instead.
MAX_QUERIES = 4
QUERY_EXTRA = 32


def query_bytes(k_room: int, v_room: int) -> int:
    """Bytes of one query of one part."""
    return 4 * (k_room + 2 * v_room + QUERY_EXTRA)


def parts_bytes(max_rows: int, n_heads: int, k_room: int, v_room: int, max_segments: int) -> int:
    """Bytes of `parts`: a part for every row, and for SPLIT_ROWS rows one for every segment."""
    return (max_rows + SPLIT_ROWS * max_segments) * n_heads * query_bytes(k_room, v_room)


def items_bytes(max_rows: int, max_segments: int) -> int:
    """Bytes of the items of a step."""
    n_items = max_rows + SPLIT_ROWS * max_segments
    return ITEMS_ROWS + max_rows * ROW_BYTES + n_items * ITEM_BYTES
