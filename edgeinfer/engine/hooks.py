"""What the callers of requests are shown of their steps, before tokens are picked.

Nothing is asked of a program, and nothing done, for requests that watch nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeinfer.batch import Batch, Outputs
from edgeinfer.engine.sequence import Rows


class Step(NamedTuple):
    """What `on_step` is called with: a request's rows of one step, T of them, as it is watched.

    All arrays are views that the next step overwrites. What is written to `logits` counts: the
    token is picked from them afterwards. Rows that came out of the cache were never computed.
    """

    position: int  # of the first row
    token_ids: NDArray[np.int32]  # (T,)
    logits: NDArray[np.float32] | None  # (V,) of the last row, None while the prompt is read
    hidden: NDArray[np.float32] | None  # (D,) of the last row, as the head reads it, alike
    residuals: Mapping[int, NDArray[np.float32]]  # (T, D), the stream that enters each layer


class Hook(NamedTuple):
    """Who is called after each step that computes rows of a request, and what is shown.

    `residuals` are layers: the streams that enter them.
    """

    call: Callable[[Step], object]
    logits: bool = False
    hidden: bool = False
    residuals: tuple[int, ...] = ()


def ask(batch: Batch, parts: SequenceOf[Rows]) -> None:
    """Have a step yield what is watched of it; logits before tokens are picked of them."""
    hooked = [(part.work.hook, part.n_wanted) for part in parts if part.work.hook is not None]
    if any(hook.logits and n_wanted for hook, n_wanted in hooked):
        batch.output, batch.samples = "logits", None
    batch.with_hidden = any(hook.hidden and n_wanted for hook, n_wanted in hooked)
    layers = {layer for hook, _ in hooked for layer in hook.residuals}
    batch.residuals = tuple(sorted({*batch.residuals, *layers}))


def show(
    batch: Batch, outputs: Outputs, parts: SequenceOf[Rows]
) -> Iterator[tuple[Rows, BaseException]]:
    """Call who watches; the parts whose callers raise, with what they raised."""
    row = output = 0
    for part in parts:
        if part.work.hook is not None:
            try:
                part.work.hook.call(_step(part.work.hook, batch, outputs, part, row, output))
            except BaseException as error:
                yield part, error
        row += part.n
        output += part.n_wanted


def _step(hook: Hook, batch: Batch, outputs: Outputs, part: Rows, row: int, output: int) -> Step:
    """A part's rows of what a step yields; `row` and `output` are its first ones."""
    rows = slice(row, row + part.n)
    is_picked = part.n_wanted > 0
    return Step(
        position=int(batch.pos[row]),
        token_ids=batch.ids[rows],
        logits=outputs.logits[output] if hook.logits and is_picked else None,
        hidden=outputs.hidden[output] if hook.hidden and is_picked else None,
        residuals={layer: outputs.residuals[layer][rows] for layer in hook.residuals},
    )
