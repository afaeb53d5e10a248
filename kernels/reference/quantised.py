"""What every kernel computes, bit for bit: norms, rotation, attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, SEGMENT_PAGES
from edgeinfer.dequantize import dequantize
from edgeinfer.graph import ActivationKind, KVType
from edgeinfer.kernels.reference.blocks import Blocks, load_blocks, matmul_blocks
from edgeinfer.kernels.reference.caches import (
    BLOCK,
    add_block_values,
    hadamard,
    scores_of_blocks,
    to_blocks,
)
from edgeinfer.kernels.reference.functions import (
    exp,
    fma,
    gelu,
    pad,
    relu2,
    sigmoid,
    silu,
    softplus,
    sum_lanes,
    tanh,
)
from edgeinfer.kernels.reference.numerics import Bools, Doubles, Floats, Ints, f32, scaled
from edgeinfer.ops import KV_BLOCK
from edgeinfer.quant import Weight


class Quantised:
    def load(self, weight: Weight) -> Floats | Blocks:
        return load_blocks(weight) if weight.type.block > 1 else dequantize(weight)

    def matmul(self, x: Floats, weight: Floats | Blocks) -> Floats:
        if isinstance(weight, Blocks):
            return matmul_blocks(x, weight)
        return matmul_floats(x, weight)

    def rms_norm(self, x: Floats, weight: Floats | None, eps: float) -> Floats:
        """s = 1 / sqrt(sum(x^2) / n + eps); out = (x * s) * weight, or x * s."""
        mean = sum_of_squares(x) / np.float32(x.shape[1])
        s = np.float32(1) / np.sqrt(mean + np.float32(eps))
        out: Floats = x * s[:, None]
        return out if weight is None else out * weight

    def activation(self, kind: ActivationKind, x: Floats) -> Floats:
        return ACTIVATIONS[kind](x)

    def soft_cap(self, x: Floats, cap: float) -> Floats:
        """tanh(x / cap) * cap."""
        return scaled(tanh(x / np.float32(cap)), cap)

    def softmax(self, x: Floats) -> Floats:
        """p = exp(x - max); p / l. Vector i of 8 p adds to accumulator i % 4 of l, ascending."""
        p = exp(x - x.max(axis=1, keepdims=True))
        vectors = pad(p, 32).reshape(len(x), -1, 4, 8)
        acc = np.zeros((len(x), 4, 8), np.float32)
        for i in range(vectors.shape[1]):
            acc = acc + vectors[:, i]
        out: Floats = p / sum_lanes(acc)[:, None]
        return out

    def rotate(
        self, x0: Floats, x1: Floats, angles: Doubles, magnitude: Doubles
    ) -> tuple[Floats, Floats]:
        """x0' = fma(x0, c, -(x1 * s)), x1' = fma(x0, s, x1 * c).

        c and s are computed in float64, times the magnitude, and rounded to float32.
        """
        c, s = f32(np.cos(angles) * magnitude), f32(np.sin(angles) * magnitude)
        return fma(x0, c, -(x1 * s)), fma(x0, s, x1 * c)

    def hadamard(self, x: Floats) -> Floats:
        return hadamard(x)

    def stored(self, x: Floats, kind: KVType) -> NDArray[Any]:
        """Rounded to float16, or in blocks."""
        return x.astype(np.float16) if kind == "f16" else to_blocks(x, kind)

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
        """Each page by itself, pages folded inside segments of 16 pages, segments folded.

        score = (fma(q[j], k[j], acc), j ascending) * scale, then its soft-cap. In a page, over its
        visible positions: m = max of scores, p = exp(score - m), l = sum of the 32 p (0 where not
        visible) in `sum_lanes` order, o = fma(p, v, o) ascending; an invisible V is skipped.
        Where K or V is in blocks, `scores_of_blocks` and `add_block_values` say how that goes.
        A segment is a range of absolute pages; both folds run in ascending order and start from
        their first member. A sink is folded last: m = sink, l = 1, and no o. out = o * (1 / l).
        """
        scores = _scores(q, k) * np.float32(scale)  # (P, H, 32)
        if soft_cap:
            scores = self.soft_cap(scores, soft_cap)
        scores = np.where(is_visible[:, None], scores, np.float32(-np.inf))
        m = scores.max(axis=2)  # (P, H)
        p = np.where(is_visible[:, None], exp(scores - m[:, :, None]), np.float32(0))
        l = sum_lanes(p.reshape(*m.shape, 4, 8))  # noqa: E741
        add = add_block_values if v.dtype == BLOCK else _add_values
        width = v.shape[3] * (KV_BLOCK if v.dtype == BLOCK else 1)
        o = np.zeros((*m.shape, width), np.float32)  # (P, H, v_dim)
        for i in range(PAGE):
            o = np.where(is_visible[:, i, None, None], add(p[:, :, i], v[:, :, i], o), o)
        parts = [_Part(*part) for part in zip(m, l, o, strict=True)]
        members = groupby(zip(pages.tolist(), parts, strict=True), lambda x: x[0] // SEGMENT_PAGES)
        whole = reduce(_fold, [reduce(_fold, [part for _, part in group]) for _, group in members])
        if sinks is not None:
            whole = _fold_sinks(whole, sinks)
        out: Floats = whole.o * (np.float32(1) / whole.l)[:, None]
        return out

    def convolve(self, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """acc = fma(weight[:, j], x[j], acc), j ascending, from +0; then acc + bias."""
        acc = np.zeros(x.shape[1], np.float32)
        for j in range(len(x)):
            acc = fma(weight[:, j], x[j], acc)
        return acc if bias is None else acc + bias

    def delta(
        self, s: Floats, q: Floats, k: Floats, v: Floats, decay: Floats, beta: Floats
    ) -> tuple[Floats, Floats]:
        """S is read once for k and q, then written: each column j for itself.

        g = exp(decay); a = S^T k, b = S^T q and c = k . q, each a `sum_of_products`;
        delta = fma(-g, a, v) * beta; out = fma(c, delta, g * b), as if S were read behind the
        write; S = fma(k[i], delta[j], S[i, j] * g).
        """
        g = exp(decay)[:, None]
        a, b = sum_of_products(s, k[:, :, None]), sum_of_products(s, q[:, :, None])
        c = sum_of_products(k[:, :, None], q[:, :, None])
        delta = fma(-g, a, v) * beta[:, None]
        out = fma(c, delta, g * b)
        return fma(k[:, :, None], delta[:, None], s * g[:, None]), out


def _scores(q: Floats, k: NDArray[Any]) -> Floats:
    if k.dtype == BLOCK:
        return scores_of_blocks(q, k)
    acc = np.zeros(k.shape[:3], np.float32)
    for j in range(k.shape[3]):
        acc = fma(q[:, :, j, None], f32(k[:, :, :, j]), acc)
    return acc


def _add_values(p: Floats, v: NDArray[Any], o: Floats) -> Floats:
    return fma(p[..., None], f32(v), o)


@dataclass(frozen=True, slots=True)
class _Part:
    """Attention over some positions: maximum m, sum l of exp(score - m), and those times V."""

    m: Floats  # (H,)
    l: Floats  # noqa: E741
    o: Floats  # (H, v_dim)


def _fold(a: _Part, b: _Part) -> _Part:
    """m = max; l = fma(a.l, exp(a.m - m), b.l * exp(b.m - m)); o likewise."""
    m = np.maximum(a.m, b.m)
    scale_a, scale_b = exp(a.m - m), exp(b.m - m)
    return _Part(
        m,
        fma(a.l, scale_a, b.l * scale_b),
        fma(a.o, scale_a[:, None], b.o * scale_b[:, None]),
    )


def _fold_sinks(a: _Part, sinks: Floats) -> _Part:
    """l = fma(a.l, exp(a.m - m), exp(sink - m)); o = a.o * exp(a.m - m)."""
    m = np.maximum(a.m, sinks)
    scale = exp(a.m - m)
    return _Part(m, fma(a.l, scale, exp(sinks - m)), a.o * scale[:, None])


def matmul_floats(x: Floats, weight: Floats) -> Floats:
    """F32, F16 and BF16: acc[k % 4] = fma(w[k], x[k], acc[k % 4]), k ascending, from +0.

    The result is (acc[0] + acc[1]) + (acc[2] + acc[3]). x is not quantised.
    """
    x, weight = pad(x, 4), pad(weight, 4)
    acc = np.zeros((len(x), len(weight), 4), np.float32)
    for k in range(0, x.shape[1], 4):
        acc = fma(weight[None, :, k : k + 4], x[:, None, k : k + 4], acc)
    return (acc[..., 0] + acc[..., 1]) + (acc[..., 2] + acc[..., 3])


def sum_of_products(x: Floats, y: Floats) -> Floats:
    """Over i of (H, n, columns): acc[i % 4] = fma(x[i], y[i], acc[i % 4]), ascending, from +0.

    The result is (acc[0] + acc[1]) + (acc[2] + acc[3]), as in `matmul_floats`.
    """
    acc = np.zeros((4, len(x), x.shape[2]), np.float32)
    for i in range(x.shape[1]):
        acc[i % 4] = fma(x[:, i], y[:, i], acc[i % 4])
    total: Floats = (acc[0] + acc[1]) + (acc[2] + acc[3])
    return total


def sum_of_squares(x: Floats) -> Floats:
    """Per row: vectors of 8 values; vector i is squared into accumulator i % 4, ascending."""
    vectors = pad(x, 32).reshape(len(x), -1, 4, 8)
    acc = np.zeros((len(x), 4, 8), np.float32)
    for i in range(vectors.shape[1]):
        acc = fma(vectors[:, i], vectors[:, i], acc)
    return sum_lanes(acc)


ACTIVATIONS: dict[ActivationKind, Callable[[Floats], Floats]] = {
    "silu": silu,
    "gelu": gelu,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "relu2": relu2,
}
