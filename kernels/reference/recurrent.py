"""Ops that keep a state of each sequence: convolutions and delta nets, row by row.

A prompt is what its rows are one after the other, whatever steps it is cut into. The order of
every sum is part of the law.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import Batch
from edgeinfer.dequantize import dequantize
from edgeinfer.graph import Conv, DeltaNet
from edgeinfer.kernels.reference.numerics import Floats, Numerics


def convolve(numerics: Numerics, op: Conv, x: Floats, batch: Batch, slots: Floats) -> Floats:
    """Rows of x behind the last ones that the state holds; slots (n_states, L - 1, C)."""
    weight = dequantize(op.weight)  # (C, L)
    bias = None if op.bias is None else dequantize(op.bias)
    out, n_before = np.empty_like(x), op.n_taps - 1
    for state, rows, kept in _sequences(batch, slots):
        seen = np.concatenate([state, x[rows]])
        for t, row in enumerate(rows):
            out[row] = numerics.convolve(seen[t : t + op.n_taps], weight, bias)
            if kept[t] >= 0:
                slots[kept[t]] = seen[t + 1 : t + 1 + n_before]
    return out


def delta_net(
    numerics: Numerics, op: DeltaNet, given: Sequence[Floats], batch: Batch, slots: Floats
) -> Floats:
    """Every row in turn, all heads beside each other; slots (n_states, n_v_heads, dim, dim).

    `given` are q, k, v, decay and beta.
    """
    q, k, v, decay, beta = given
    key_heads = [op.key_head(h) for h in range(op.n_v_heads)]
    q, k = (x.reshape(len(x), op.n_k_heads, op.dim)[:, key_heads] for x in (q, k))
    v, out = v.reshape(len(v), op.n_v_heads, op.dim), np.empty_like(v)
    for state, rows, kept in _sequences(batch, slots):
        for t, row in enumerate(rows):
            state, o = numerics.delta(state, q[row], k[row], v[row], decay[row], beta[row])
            out[row] = o.reshape(-1)
            if kept[t] >= 0:
                slots[kept[t]] = state
    return out


def _sequences(batch: Batch, slots: Floats) -> Iterator[tuple[Floats, list[int], list[int]]]:
    """Of each sequence its state, its rows, and where the state behind each is kept."""
    assert batch.states is not None and batch.kept is not None, "this segment has states"
    for i, slot in enumerate(batch.states.tolist()):
        rows: NDArray[np.intp] = np.flatnonzero(batch.seq == i)
        state = np.zeros(slots.shape[1:], np.float32) if slot < 0 else slots[slot].copy()
        yield state, rows.tolist(), batch.kept[rows].tolist()
