"""Looking into a model while it runs: who is shown steps, and what a whole text leaves in layers.

Knows nothing of prompts or answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.backend import attention_weights
from edgeinfer.engine.generation import check_length
from edgeinfer.engine.hooks import Hook, Step
from edgeinfer.errors import InvalidRequestError
from edgeinfer.parameters import LOOK, checked, id_list
from edgeinfer.runtime import Runtime


def hook_of(given: Mapping[str, Any], opened: Runtime) -> Hook | None:
    """Who watches the steps of a request with these keywords, and what of them."""
    watch = given.get("watch", ("logits",))
    layers = tuple(each for each in watch if isinstance(each, int))
    _check_kept(layers, opened, "watch")
    if "on_step" not in given:
        if "watch" in given:
            raise InvalidRequestError("watch is given and on_step is not", param="watch")
        return None
    return Hook(given["on_step"], "logits" in watch, "hidden" in watch, layers)


def residuals(opened: Runtime, token_ids: Sequence[int], layer: int) -> NDArray[np.float32]:
    """See `LLM.residuals`."""
    layer = LOOK["layer"].check(layer)
    _check_kept([layer], opened, "layer")
    ids = id_list(token_ids, "token_ids", partial(check_length, n_ctx=opened.plan.n_ctx))
    rows = np.empty((len(ids), opened.segment.residuals[layer].dim), np.float32)

    def take(step: Step) -> None:
        rows[step.position : step.position + len(step.token_ids)] = step.residuals[layer]

    opened.engine.check_waiting()
    opened.engine.begin_job(ids, Hook(take, residuals=(layer,))).wait(opened.engine)
    return rows


def attention(
    opened: Runtime, token_ids: Sequence[int], layer: int, last: int | None
) -> NDArray[np.float32]:
    """See `LLM.attention`."""
    given = checked("attention", {"last": last}, LOOK)
    x = residuals(opened, token_ids, layer)
    first = len(x) - given.get("last", len(x))
    if first < 0:
        raise InvalidRequestError(f"last is {last}, need 1 to {len(x)}", param="last")
    return attention_weights(opened.segment, layer, x, range(first, len(x)))


def _check_kept(layers: Iterable[int], opened: Runtime, param: str) -> None:
    """The streams that enter layers are kept only where a load has planned memory for them."""
    kept = list(opened.segment.residuals)
    if missing := sorted(set(layers) - set(kept)):
        raise InvalidRequestError(
            f"{param} names layers {missing}; the model was loaded with residuals={kept}; load it "
            f"with residuals={sorted({*kept, *missing})}",
            param=param,
        )
