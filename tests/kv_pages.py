"""Pages of K and V as the CPU keeps them, made of the reference's, by NumPy.

From arrays (pages, 32 positions, heads, values or blocks) to bytes (pages, bytes of a page).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.kernels.cpu import layout

Bytes = NDArray[np.uint8]


def k_pages(k: NDArray[Any], kind: str) -> Bytes:
    """As `page_layout.py` says of K."""
    n_pages, n_heads = k.shape[0], k.shape[2]
    if kind == "f16":
        return _flat(k.transpose(0, 2, 3, 1))
    blocks = k.reshape(n_pages, 4, 8, n_heads, -1).transpose(0, 3, 1, 4, 2)  # lanes last
    scales = np.ascontiguousarray(blocks["d"]).view(np.uint8)
    codes = blocks["q"].astype(np.int16)
    codes = codes + 128 if kind == "q8_0" else (codes[..., :16] + 8) | (codes[..., 16:] + 8) << 4
    quads = codes.reshape(*codes.shape[:-1], -1, 4).swapaxes(-3, -2).astype(np.uint8)
    return _flat(np.concatenate([scales, quads.reshape(*scales.shape[:-1], -1)], axis=-1))


def v_pages(v: NDArray[Any], kind: str) -> Bytes:
    """As `page_layout.py` says of V."""
    n_pages, _, n_heads, n = v.shape
    if kind == "f16":
        room = np.full((n_pages, n_heads, 32, layout.whole_vectors(n)), np.nan, np.float16)
        room[..., :n] = v.transpose(0, 2, 1, 3)
        return _flat(room)
    blocks = v.transpose(0, 2, 1, 3)  # (pages, heads, 32, blocks)
    scales = np.ascontiguousarray(blocks["d"].swapaxes(2, 3)).view(np.uint8)
    codes = blocks["q"].astype(np.int16)
    if kind == "q4_0":
        pairs = codes.reshape(*codes.shape[:-1], 2, 2, 8) + 8
        codes = pairs[..., 0, :] | pairs[..., 1, :] << 4
    parts = (scales, codes.astype(np.uint8))
    return _flat(np.concatenate([x.reshape(n_pages, n_heads, -1) for x in parts], axis=-1))


def _flat(pages: NDArray[Any]) -> Bytes:
    whole: Bytes = np.ascontiguousarray(pages).view(np.uint8).reshape(len(pages), -1)
    return whole
