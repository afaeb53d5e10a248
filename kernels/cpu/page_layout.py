"""How K and V of a head lie in a page of 32 positions, by type: sizes and order.

- K, f16: [k_dim][32 positions] halves. V, f16: [32 positions][v_dim in whole vectors] halves.
- K, q8_0 and q4_0: [4 groups of 8 positions][blocks of 32 values], packed as weights are of 8 rows
  (`formats.py`).
- V, q8_0 and q4_0: scales [blocks][32 positions] halves | [32 positions][blocks][32] codes: signed
  bytes; or 8 more than the code in nibbles, where the low ones of 8 bytes are one vector of 8
  values, and the high ones the next.
"""

from __future__ import annotations

from edgeinfer.kernels.cpu.layout import PAGE, whole_vectors

KV_BYTES = 2  # of a value of K or V as f16
K_ROW_BYTES = PAGE * KV_BYTES  # of one value of K in all positions of a page
SCALES_BYTES = PAGE * 2  # of a block of V, in all positions
GROUP = 8  # positions of K that are packed together
PACKED_BYTES = {"q8_0": 272, "q4_0": 144}  # of a block of K in such a group
VECTOR_BYTES = {"f16": 16, "q8_0": 8, "q4_0": 4}  # of 8 values of V


def whole_blocks(n: int) -> int:
    """The places that n values take: blocks of 32."""
    return (n + 31) & -32


def k_room(dim: int, kind: str) -> int:
    """The places that a key or a query of `dim` values takes."""
    return dim if kind == "f16" else whole_blocks(dim)


def v_room(dim: int, kind: str) -> int:
    """The places that `dim` values take."""
    return whole_vectors(dim) if kind == "f16" else whole_blocks(dim)


def k_bytes(dim: int, kind: str) -> int:
    """Bytes of K of one head in a page."""
    if kind == "f16":
        return K_ROW_BYTES * dim
    return PAGE // GROUP * (whole_blocks(dim) // 32) * PACKED_BYTES[kind]


def v_bytes(dim: int, kind: str) -> int:
    """Bytes of V of one head in a page."""
    room = v_room(dim, kind)
    scales = 0 if kind == "f16" else room // 32 * SCALES_BYTES
    return scales + PAGE * room // 8 * VECTOR_BYTES[kind]


def rooms(k_dim: int, v_dim: int, k_type: str, v_type: str) -> tuple[int, int]:
    """The places of a key and of a value."""
    return k_room(k_dim, k_type), v_room(v_dim, v_type)
