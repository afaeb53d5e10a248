"""Looking into a model while it runs: who is shown steps, and what a whole text leaves in layers.

Knows nothing of prompts or answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer import platform
from edgeinfer.backend import attention_weights
from edgeinfer.engine.generation import check_length
from edgeinfer.engine.hooks import Hook, Step
from edgeinfer.errors import Advice, InvalidRequestError, Keyword, PlanError
from edgeinfer.graph import Attention
from edgeinfer.parameters import LOOK, checked, id_list
from edgeinfer.runtime import Runtime

FEWER_ROWS = ("ask for the last ones with ", Keyword("last"))


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
    layer = _layer(opened, layer)
    return _residuals(opened, _ids(opened, token_ids), layer)


def attention(
    opened: Runtime, token_ids: Sequence[int], layer: int, last: int | None
) -> NDArray[np.float32]:
    """See `LLM.attention`."""
    given = checked("attention", {"last": last}, LOOK)
    layer, ids = _layer(opened, layer), _ids(opened, token_ids)
    n_rows = given.get("last", len(ids))
    if n_rows > len(ids):
        raise InvalidRequestError(f"last is {last}, need 1 to {len(ids)}", param="last")
    ops = [op for op in opened.segment.ops if isinstance(op, Attention) and op.layer == layer]
    n_heads = sum(op.n_heads for op in ops)
    what = f"the weights of {n_rows} rows of {n_heads} heads"
    check_room(4 * n_rows * n_heads * len(ids), what, FEWER_ROWS)
    x = _residuals(opened, ids, layer)
    return attention_weights(opened.segment, layer, x, range(len(ids) - n_rows, len(ids)))


def check_room(n_bytes: int, what: str, advice: Advice) -> None:
    """PlanError where what a caller asks for is more than the memory that there is."""
    available = platform.available_memory()
    if n_bytes > available:
        raise PlanError(
            f"{what} are {n_bytes >> 20} MiB, {available >> 20} MiB are available",
            advice=advice,
            needed=n_bytes,
            available=available,
        )


def _layer(opened: Runtime, layer: int) -> int:
    found: int = LOOK["layer"].check(layer)
    _check_kept([found], opened, "layer")
    return found


def _ids(opened: Runtime, token_ids: Sequence[int]) -> list[int]:
    return id_list(token_ids, "token_ids", partial(check_length, n_ctx=opened.plan.n_ctx))


def _residuals(opened: Runtime, ids: list[int], layer: int) -> NDArray[np.float32]:
    opened.engine.check_waiting()
    dim = opened.segment.residuals[layer].dim
    check_room(4 * len(ids) * dim, f"the streams of {len(ids)} tokens", ("shorten the text",))
    rows = np.empty((len(ids), dim), np.float32)

    def take(step: Step) -> None:
        rows[step.position : step.position + len(step.token_ids)] = step.residuals[layer]

    job = opened.engine.job(ids, Hook(take, residuals=(layer,)))
    opened.engine.run(job)
    return rows


def _check_kept(layers: Sequence[int], opened: Runtime, param: str) -> None:
    """The streams that enter layers are kept only where a load has planned memory for them."""
    n_layers = opened.model.hparams.n_layers
    if layers and (most := max(layers)) > n_layers:
        raise InvalidRequestError(
            f"{param} names layer {most}; the model has 0 to {n_layers - 1}, and {n_layers} is "
            "what enters the head",
            param=param,
        )
    kept = [each for each in opened.segment.residuals if each <= n_layers]  # a draft has its own
    if missing := sorted(set(layers) - set(kept)):
        raise InvalidRequestError(
            f"{param} names layers {missing}; the model was loaded with residuals={kept}; load it "
            f"with residuals={sorted({*kept, *missing})}",
            param=param,
        )
