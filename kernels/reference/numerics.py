"""What both modes of the reference share: their types, and what does not depend on the mode."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeinfer.dequantize import dequantize
from edgeinfer.graph import ActivationKind, KVType, Rotate
from edgeinfer.quant import Weight

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


class Numerics(Protocol):
    """The arithmetic of one mode. Weights pass from `load` to `matmul` unseen."""

    def load(self, weight: Weight) -> Any:
        """What `matmul` needs of a weight matrix."""

    def matmul(self, x: Floats, weight: Any) -> Floats:
        """x W^T, x (T, K)."""

    def rms_norm(self, x: Floats, weight: Floats | None, eps: float) -> Floats:
        """Each row of x divided by its root mean square, times weight."""

    def activation(self, kind: ActivationKind, x: Floats) -> Floats:
        """`graph.Activation` of every value."""

    def soft_cap(self, x: Floats, cap: float) -> Floats:
        """cap * tanh(x / cap)."""

    def softmax(self, x: Floats) -> Floats:
        """Of each row."""

    def rotate(
        self, x0: Floats, x1: Floats, angles: Doubles, magnitude: Doubles
    ) -> tuple[Floats, Floats]:
        """Pairs (x0, x1) turned by their angles, times a magnitude of each row, (T, 1, 1)."""

    def hadamard(self, x: Floats) -> Floats:
        """The transform of q, K and V for a cache that asks for it, and of results back."""

    def stored(self, x: Floats, kind: KVType) -> NDArray[Any]:
        """Heads (T, heads, dim) as a cache of a type keeps them: (T, heads, dim or blocks)."""

    def attend(
        self,
        q: Floats,
        k: NDArray[Any],
        v: NDArray[Any],
        pages: Ints,
        is_visible: Bools,
        scale: float,
        soft_cap: float = 0.0,
        sinks: Floats | None = None,
    ) -> Floats:
        """softmax(q K^T * scale) V of one row: (H, v_dim).

        q (P, H, k_dim), k (P, H, 32, k_dim), v (P, H, 32, v_dim) as they are stored for the P
        absolute `pages`, of whose positions `is_visible` (P, 32); sinks (H,).
        """

    def convolve(self, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """The last of L rows x (L, C), its channels convolved with weight (C, L): (C,)."""

    def delta(
        self, s: Floats, q: Floats, k: Floats, v: Floats, decay: Floats, beta: Floats
    ) -> tuple[Floats, Floats]:
        """One row of `graph.DeltaNet`: the state behind it, (H, dim, dim), and out, (H, dim).

        s as the state, q, k, v (H, dim), each for its value head; decay and beta (H,).
        """


def embed(weight: Weight, ids: NDArray[np.int32]) -> Floats:
    """Rows `ids` of a matrix as `dequantize` gives them."""
    n_rows, dim = weight.shape
    assert ((ids >= 0) & (ids < n_rows)).all()
    size = weight.type.row_bytes(dim)
    out = np.empty((len(ids), dim), np.float32)
    for i, row in enumerate(ids.tolist()):
        out[i] = dequantize(weight.data[row * size : (row + 1) * size], weight.type, (dim,))
    return out


def scaled(x: Floats, factor: float) -> Floats:
    out: Floats = x * np.float32(factor)
    return out


def rotate(numerics: Numerics, op: Rotate, x: Floats, pos: Ints) -> Floats:
    """Rotate the first n_dims of each head by its row's position, the rest stays.

    The angle of pair i is pos * frequencies()[i], in float64. "norm" pairs 2i with 2i + 1, "neox" i
    with i + n_dims / 2.
    """
    rope, out = op.rope, x.copy().reshape(len(x), op.n_heads, -1)
    angles = (pos[:, None] * rope.frequencies())[:, None, :]
    n, half = rope.n_dims, rope.n_dims // 2
    first, second = slice(0, half), slice(half, n)
    if rope.kind == "norm":
        first, second = slice(0, n, 2), slice(1, n, 2)
    magnitudes, span = rope.magnitudes(), rope.growth.n_ctx if rope.growth else 1
    magnitude = magnitudes[np.minimum(pos // span, len(magnitudes) - 1)][:, None, None]
    turned = numerics.rotate(out[..., first], out[..., second], angles, magnitude)
    out[..., first], out[..., second] = turned
    flat: Floats = out.reshape(x.shape)
    return flat


def f32(x: NDArray[Any]) -> Floats:
    """Rounded to nearest even."""
    rounded: Floats = x.astype(np.float32)
    return rounded
