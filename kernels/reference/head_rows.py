"""What the head of a model reads, computed again from the stream that enters it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from edgeinfer.batch import Batch, StepLimits
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.graph import Segment, inputs
from edgeinfer.kernels.reference.numerics import Floats
from edgeinfer.kernels.reference.program import ReferenceProgram
from edgeinfer.kernels.reference.quantised import Quantised
from edgeinfer.ops import Op
from edgeinfer.quant import Weight

_ROWS = 32  # at a time, so that what is in between stays small


def head_reader(segment: Segment) -> Callable[[Floats], Floats]:
    """A function that makes of rows x (n, D) of that stream what the head reads, (n, D).

    By the law, so as every device has it. The stream is among the segment's residuals;
    UnsupportedModelError where the head reads more.
    """
    program = ReferenceProgram(_before_head(segment), _LIMITS, Quantised(), None)
    no_ids, width = np.empty(0, np.int32), segment.hidden.dim

    def read(x: Floats) -> Floats:
        out = np.empty((len(x), width), np.float32)
        for start in range(0, len(x), _ROWS):
            rows = x[start : start + _ROWS]
            order = np.arange(len(rows), dtype=np.int32)
            step = Batch(
                no_ids, order.astype(np.int64), np.zeros_like(order), [()], order, "hidden", rows
            )
            out[start : start + _ROWS] = program.submit(step).wait().hidden
        return out

    return read


_LIMITS = StepLimits({}, _ROWS, _ROWS, 1, 1)


def _before_head(segment: Segment) -> Segment:
    """The ops between the stream that leaves the last layer and what the head reads."""
    stream, hidden = segment.residuals[segment.graph.hparams.n_layers], segment.hidden
    needed, kept = {hidden}, []
    for op in reversed(segment.ops):
        if op.out in needed and op.out != stream:
            kept.append(op)
            needed.update(inputs(op))
    if others := needed - {op.out for op in kept} - {stream}:
        raise UnsupportedModelError(
            "the head reads more than the stream that leaves the last layer: embeddings of this "
            "model can't be made",
            missing=[f"{len(others)} other values before the head"],
        )
    return Segment(segment.graph, tuple(map(_held, reversed(kept))), stream, hidden, hidden, False)


def _held(op: Op) -> Op:
    """The same with its weights in memory: whatever becomes of their file."""
    fields: dict[str, Any] = op._asdict()
    weights = {name: x for name, x in fields.items() if isinstance(x, Weight)}
    fields |= {name: replace(x, data=x.data[:]) for name, x in weights.items()}
    return type(op)(**fields)
