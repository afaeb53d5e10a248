"""How attention weighs positions: one layer computed again, from the stream that enters it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import PAGE, Batch, PageTable, StepLimits, pages_for
from edgeinfer.errors import InvalidRequestError
from edgeinfer.graph import Attention, Segment, inputs
from edgeinfer.kernels.reference.numerics import Floats
from edgeinfer.kernels.reference.program import ReferenceProgram
from edgeinfer.kernels.reference.quantised import Quantised

_MOST_COLUMNS = 512  # of weights at a time: a row of 2,048 positions else takes 0.5 GB


def attention_weights(segment: Segment, layer: int, x: Floats, rows: Collection[int]) -> Floats:
    """What the queries at `rows` give to each position: (rows, H, T), from the stream x (T, D).

    By the law, so as every device has them. Behind a window, and in the future, they are 0; with
    sinks they add up to less than 1. InvalidRequestError for a layer without attention of its own.
    """
    part, attention = _until_attention(segment, layer)
    n_rows = len(x)
    n_pages = pages_for(n_rows)
    limits = StepLimits({attention.cache.window: n_pages}, n_rows, 1, 1, 1)
    weights = np.zeros((len(rows), attention.n_heads, n_rows), np.float32)
    numerics = _Weighing(attention.cache.v_dim, dict(zip(rows, weights, strict=True)))
    table = PageTable(np.arange(n_pages, dtype=np.int32), 0, n_pages)
    step = Batch(
        ids=np.zeros(0, np.int32),
        pos=np.arange(n_rows),
        seq=np.zeros(n_rows, np.int32),
        tables=[(table,)],
        wanted=np.zeros(0, np.int32),
        output="hidden",
        hidden=x,
    )
    with ReferenceProgram(part, limits, numerics, None) as program:
        program.submit(step).wait()
    return weights


def _until_attention(segment: Segment, layer: int) -> tuple[Segment, Attention]:
    """The ops of a layer up to its attention, which is what they yield."""
    ops = [op for op in segment.ops if op.layer == layer]
    at = next((i for i, op in enumerate(ops) if isinstance(op, Attention)), -1)
    attention = ops[at] if ops else None
    if not isinstance(attention, Attention) or attention.source is not None:
        raise InvalidRequestError(
            f"layer {layer} has no attention with keys of its own; choose another layer",
            param="layer",
        )
    stream, needed = segment.residuals[layer], {attention.out}
    kept = []
    for op in reversed(ops[: at + 1]):
        if op.out in needed:
            kept.append(op)
            needed.update(inputs(op))
    others = needed - {op.out for op in kept} - {stream}
    if others:
        raise InvalidRequestError(
            f"layer {layer} reads more than the stream that enters it; its weights can't be shown",
            param="layer",
        )
    out = attention.out
    part = Segment(segment.graph, tuple(reversed(kept)), stream, out, out, False)
    return part, attention


class _Weighing(Quantised):
    """Attends as the law does, to see what each position counts."""

    def __init__(self, v_dim: int, rows: Mapping[int, Floats]) -> None:
        """`rows` are filled: (H, T) by row, of zeros."""
        self._v_dim, self._rows, self._n_calls = v_dim, rows, 0

    def attend(
        self,
        q: Floats,
        k: NDArray[Any],
        v: NDArray[Any],
        pages: NDArray[np.int64],
        is_visible: NDArray[np.bool_],
        *rest: Any,
    ) -> Floats:
        """With the positions as values, some at a time: a result is a weight then."""
        row, self._n_calls = self._n_calls, self._n_calls + 1
        n_pages, n_heads = k.shape[:2]
        if (weights := self._rows.get(row)) is not None:
            n_columns = min(PAGE * (int(pages[-1]) + 1), weights.shape[1])
            positions = (PAGE * pages[:, None] + np.arange(PAGE))[:, None, :, None]
            for start in range(0, n_columns, _MOST_COLUMNS):
                columns = np.arange(start, min(start + _MOST_COLUMNS, n_columns))
                values = np.broadcast_to(
                    positions == columns, (n_pages, n_heads, PAGE, len(columns))
                ).astype(np.float32)
                weights[:, columns] = super().attend(q, k, values, pages, is_visible, *rest)
        return np.zeros((n_heads, self._v_dim), np.float32)
