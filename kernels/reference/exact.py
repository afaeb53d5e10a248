"""The truth: float64, and float32 where weights are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgeinfer.dequantize import dequantize
from edgeinfer.graph import ActivationKind, KVType
from edgeinfer.kernels.reference.numerics import Bools, Doubles, Floats, Ints, f32
from edgeinfer.quant import Weight


class Exact:
    def load(self, weight: Weight) -> Floats:
        return dequantize(weight)

    def matmul(self, x: Floats, weight: Floats) -> Floats:
        out: Floats = x @ weight.T
        return out

    def rms_norm(self, x: Floats, weight: Floats | None, eps: float) -> Floats:
        wide = x.astype(np.float64)
        mean: Doubles = (wide * wide).mean(axis=1, keepdims=True)
        return f32(wide / np.sqrt(mean + eps) * (1 if weight is None else weight))

    def activation(self, kind: ActivationKind, x: Floats) -> Floats:
        return f32(_EXACT_ACTIVATIONS[kind](x.astype(np.float64)))

    def soft_cap(self, x: Floats, cap: float) -> Floats:
        return f32(cap * np.tanh(x.astype(np.float64) / cap))

    def softmax(self, x: Floats) -> Floats:
        p = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
        return f32(p / p.sum(axis=1, keepdims=True))

    def rotate(
        self, x0: Floats, x1: Floats, angles: Doubles, magnitude: Doubles
    ) -> tuple[Floats, Floats]:
        c, s = np.cos(angles) * magnitude, np.sin(angles) * magnitude
        return f32(x0 * c - x1 * s), f32(x0 * s + x1 * c)

    def hadamard(self, x: Floats) -> Floats:
        """Nothing: it would cancel out of scores that are not rounded."""
        return x

    def stored(self, x: Floats, kind: KVType) -> Floats:
        """As they are: no type of a cache is the truth."""
        return x

    def attend(
        self,
        q: Floats,
        k: Floats,
        v: Floats,
        pages: Ints,
        is_visible: Bools,
        scale: float,
        soft_cap: float = 0.0,
        sinks: Floats | None = None,
    ) -> Floats:
        scores = np.einsum("phd,phsd->hps", q, k, dtype=np.float64) * scale
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(is_visible, scores, -np.inf)
        sink = np.full(len(scores), -np.inf) if sinks is None else sinks.astype(np.float64)
        m = np.maximum(scores.max(axis=(1, 2)), sink)[:, None, None]
        p = np.exp(scores - m)
        p /= p.sum(axis=(1, 2), keepdims=True) + np.exp(sink[:, None, None] - m)
        seen = np.where(is_visible[:, None, :, None], v, 0)
        return f32(np.einsum("hps,phsd->hd", p, seen, dtype=np.float64))

    def convolve(self, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        total = (x.astype(np.float64) * weight.T).sum(axis=0)
        return f32(total if bias is None else total + bias)

    def delta(
        self, s: Floats, q: Floats, k: Floats, v: Floats, decay: Floats, beta: Floats
    ) -> tuple[Floats, Floats]:
        wide = s * np.exp(decay.astype(np.float64))[:, None, None]
        error = v - np.einsum("hij,hi->hj", wide, k)
        wide += k[:, :, None] * (beta[:, None] * error)[:, None]
        return f32(wide), f32(np.einsum("hij,hi->hj", wide, q))


_EXACT_ACTIVATIONS: dict[ActivationKind, Callable[[Doubles], Any]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
