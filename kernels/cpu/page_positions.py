"""Which of a page's positions its bytes belong to: `page_layout.py`, read from the bytes' side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from edgeinfer.graph import KV
from edgeinfer.kernels.cached import Bytes, position_runs
from edgeinfer.kernels.cpu.layout import PAGE
from edgeinfer.kernels.cpu.page_layout import (
    GROUP,
    KV_BYTES,
    PACKED_BYTES,
    VECTOR_BYTES,
    v_room,
    whole_blocks,
)


def positions_of(group: Iterable[KV]) -> Iterator[Bytes]:
    """Of K, and of V where it is kept, of each of the layers that share a page."""
    for kv in group:
        yield np.tile(_k_positions(kv.k_dim, kv.k_type), kv.n_heads)
        if not kv.k_is_v:
            yield np.tile(_v_positions(kv.v_dim, kv.v_type), kv.n_heads)


def _k_positions(dim: int, kind: str) -> Bytes:
    """Of one head: a block of a group has a scale of each lane, then 4 codes of each in turn."""
    if kind == "f16":
        return position_runs(dim, KV_BYTES)
    lanes = np.arange(GROUP, dtype=np.uint8)
    codes = np.tile(np.repeat(lanes, 4), (PACKED_BYTES[kind] - 2 * GROUP) // (4 * GROUP))
    group = np.tile(np.concatenate([np.repeat(lanes, 2), codes]), whole_blocks(dim) // 32)
    return np.concatenate([group + np.uint8(first) for first in range(0, PAGE, GROUP)])


def _v_positions(dim: int, kind: str) -> Bytes:
    room = v_room(dim, kind)
    codes = position_runs(1, room // 8 * VECTOR_BYTES[kind])
    return codes if kind == "f16" else np.concatenate([position_runs(room // 32, 2), codes])
