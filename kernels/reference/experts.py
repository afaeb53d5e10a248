"""Routes to experts, and what is computed along them. The order of every sum is part of the law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeinfer.dequantize import dequantize
from edgeinfer.graph import ExpertLinear, GatingKind, Route
from edgeinfer.kernels.reference.numerics import Floats, Ints, Numerics
from edgeinfer.ops import SMALLEST_SUM


def choose(numerics: Numerics, op: Route, x: Floats) -> Floats:
    """Numbers of the chosen experts, then their weights.

    A group's score is the sum of its two largest. A score that is no number counts as -inf, of
    groups too. Weights are added up in the order of the route; w / max(sum, SMALLEST_SUM) and
    w * scale round once each.
    """
    p = _gate(numerics, op.gating, x)
    scores = p if op.bias is None else p + dequantize(op.bias)
    scores = _numbers(scores)
    is_out = np.zeros(scores.shape, np.bool_)
    if op.n_groups > 1:
        grouped = np.sort(scores.reshape(len(x), op.n_groups, -1), axis=2)
        best = _largest(_numbers(grouped[..., -1] + grouped[..., -2]), op.n_groups_used)
        is_in = (np.arange(op.n_groups) == best[..., None]).any(axis=1)
        is_out = np.repeat(~is_in, x.shape[1] // op.n_groups, axis=1)
    chosen = _largest(scores, op.n_used, is_out)
    w = np.take_along_axis(p, chosen, axis=1)
    if op.gating == "raw":
        w = numerics.softmax(w)
    if op.norm:
        w = w / np.maximum(_sum_in_order(w), np.float32(SMALLEST_SUM))
    if op.scale != 1:
        w = w * np.float32(op.scale)
    return np.concatenate([chosen.astype(np.float32), w], axis=1)


def _gate(numerics: Numerics, gating: GatingKind, x: Floats) -> Floats:
    match gating:
        case "softmax":
            return numerics.softmax(x)
        case "sigmoid":
            return numerics.activation("sigmoid", x)
        case "sqrt_softplus":
            return np.sqrt(numerics.activation("softplus", x))
        case "raw":
            return x


def _numbers(scores: Floats) -> Floats:
    return np.where(np.isnan(scores), np.float32(-np.inf), scores)


def _largest(scores: Floats, n: int, is_out: Any = None) -> Ints:
    """Places of the n largest of each row, the largest first, the lower place among equals."""
    keys = [-scores] if is_out is None else [-scores, is_out]
    order: Ints = np.lexsort(keys, axis=1)[:, :n]
    return order


def _sum_in_order(w: Floats) -> Floats:
    """Of each row, from the first value to the last."""
    total = w[:, :1]
    for i in range(1, w.shape[1]):
        total = total + w[:, i : i + 1]
    return total


def multiply_chosen(
    numerics: Numerics, op: ExpertLinear, x: Floats, route: Floats, stack: Sequence[Any]
) -> Floats:
    """(x W^T) * scale + bias: a matmul as any other, then a product and a sum that round."""
    n_rows, (_, n_out, n_in) = len(x), op.weight.shape
    x = np.broadcast_to(x.reshape(n_rows, -1, n_in), (n_rows, op.n_used, n_in))
    chosen = route[:, : op.n_used].astype(np.int64)
    out = np.empty((n_rows, op.n_used, n_out), np.float32)
    for i in np.unique(chosen).tolist():
        row, slot = np.nonzero(chosen == i)
        out[row, slot] = numerics.matmul(np.ascontiguousarray(x[row, slot]), stack[i])
    if op.scale is not None:
        out *= dequantize(op.scale)[chosen][..., None]
    if op.bias is not None:
        out += dequantize(op.bias)[chosen]
    return out.reshape(n_rows, -1)


def add_parts(x: Floats, route: Floats) -> Floats:
    """w0 * x0, plus w1 * x1, and so on: each product and each sum rounds."""
    w = route[:, route.shape[1] // 2 :]
    parts = x.reshape(*w.shape, -1) * w[..., None]
    total: Floats = parts[:, 0]
    for i in range(1, parts.shape[1]):
        total = total + parts[:, i]
    return total
