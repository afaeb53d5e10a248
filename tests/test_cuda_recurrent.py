"""The CUDA kernels of recurrent ops on the shim against the law, bit for bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import Batch
from edgeinfer.graph import Conv, DeltaNet, Pairing, Value
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.reference.quantised import Quantised
from edgeinfer.kernels.reference.recurrent import convolve, delta_net
from tests.cuda_shim import Floats, empty_rows, rows_in_memory, run, same_bits, step, stride_of
from tests.random_graphs import RandomGraph
from tests.shim import SEEDS
from tests.test_cpu_ops import rows_of

N_SLOTS = 7


class Rows(NamedTuple):
    """Sequences of a step: where each goes on from, and where the states behind rows are kept."""

    spans: NDArray[np.int32]
    seq: NDArray[np.int32]
    states: NDArray[np.int32]
    kept: NDArray[np.int32]

    @classmethod
    def of(cls, *parts: tuple[int, int, dict[int, int]]) -> Rows:
        """Of each its rows, its slot, and the slots of some of its rows."""
        spans, seq, kept, end = [], list[int](), list[int](), 0
        for i, (n, _, slots) in enumerate(parts):
            spans.append([end, n])
            seq += [i] * n
            kept += [slots.get(t, -1) for t in range(n)]
            end += n
        states = [slot for _, slot, _ in parts]
        return cls(*(np.array(each, np.int32) for each in (spans, seq, states, kept)))

    @property
    def batch(self) -> Batch:
        nothing = np.zeros(len(self.seq), np.int32)
        batch = Batch(nothing, nothing.astype(np.int64), self.seq, [], nothing)
        batch.states, batch.kept = self.states, self.kept
        return batch

    @property
    def args(self) -> dict[str, Any]:
        arrays = dict(spans=self.spans, states=self.states, kept=self.kept)
        return {**arrays, "step": step(len(self.seq), 0, len(self.spans))}


ROWS = [
    Rows.of((1, -1, {0: 3})),
    Rows.of((1, 4, {0: 0}), (1, 4, {}), (1, 6, {0: 2})),
    Rows.of((3, 5, {1: 0, 2: 1}), (19, -1, {2: 2, 18: 3}), (8, 6, {7: 4})),
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dim", "n_taps", "bias"), [(37, 4, False), (300, 2, True), (64, 7, True)])
def test_conv(rows: Rows, dim: int, n_taps: int, bias: bool) -> None:
    g, n = RandomGraph(), len(rows.seq)
    x, slots = rows_of(n, dim), rows_of(N_SLOTS * (n_taps - 1), dim, 1)
    weight = g._weight("conv", dim, n_taps)
    value = Value(g, 0, dim)
    op = Conv(0, value, value, weight, g._weight("b", dim) if bias else None)
    slots = slots.reshape(N_SLOTS, n_taps - 1, dim)
    ours, law, out = slots.copy(), slots.copy(), empty_rows(n, dim)
    expected = convolve(Quantised(), op, x, rows.batch, law)
    run(
        Kernel("conv"), (-(-dim // 256), n + 1), 256, **rows.args, seq=rows.seq,
        x=rows_in_memory(x), x_stride=stride_of(dim), weight=floats_of(weight),
        bias=floats_of(op.bias) if op.bias else None, slots=ours, n_taps=n_taps, dim=dim, out=out,
        out_stride=stride_of(dim),
    )  # fmt: skip
    same_bits(out[:, :dim], expected)
    same_bits(ours, law)


def floats_of(weight: Any) -> Floats:
    return np.frombuffer(weight.data, np.float32).copy()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("dim", "n_k_heads", "n_v_heads", "pairing"),
    [
        (16, 1, 2, "tiled"),
        (16, 2, 6, "tiled"),
        (16, 2, 6, "interleaved"),
        (42, 2, 2, "interleaved"),
        (128, 1, 2, "tiled"),
    ],
)
def test_delta_net(rows: Rows, dim: int, n_k_heads: int, n_v_heads: int, pairing: Pairing) -> None:
    n, width = len(rows.seq), n_v_heads * dim
    q, k = (rows_of(n, n_k_heads * dim, i) / np.float32(dim**0.5) for i in (2, 3))
    v, decay, beta = rows_of(n, width, 4), -np.abs(rows_of(n, n_v_heads, 5)), rows_of(n, n_v_heads)
    slots = rows_of(N_SLOTS * n_v_heads * dim, dim, 1).reshape(N_SLOTS, n_v_heads, dim, dim)
    given = (q, k, v, decay, beta)
    op = DeltaNet(0, *[Value(RandomGraph(), 0, dim)] * 6, n_k_heads, n_v_heads, dim, pairing)
    law = slots.copy()
    expected = delta_net(Quantised(), op, given, rows.batch, law)
    names = ("q", "k", "v", "decay", "beta")
    in_memory = {name: rows_in_memory(x) for name, x in zip(names, given, strict=True)}
    for seed in SEEDS:
        ours, out = slots.copy(), empty_rows(n, width)
        run(
            Kernel.of("delta_net", DIM=dim), (-(-dim // 32), n_v_heads, len(rows.spans) + 1), 128,
            seed=seed, **rows.args, **in_memory, key_stride=stride_of(n_k_heads * dim),
            v_stride=stride_of(width), head_stride=stride_of(n_v_heads), slots=ours,
            n_key_heads=n_k_heads, tiled=int(pairing == "tiled"), out=out,
            out_stride=stride_of(width),
        )  # fmt: skip
        same_bits(out[:, :width], expected)
        same_bits(ours, law)
