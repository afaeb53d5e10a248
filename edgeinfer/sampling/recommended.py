"""Sampling that a model's file recommends: the values under `general.sampling.`."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from edgeinfer.errors import InvalidModelError, InvalidRequestError
from edgeinfer.parameters import SAMPLING

# Names under `general.sampling.` that differ from ours. The order of samplers is fixed here.
_FILE_NAMES = {
    "temp": "temperature",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
}
_FILE_PREFIX = "general.sampling."


def recommended(model_defaults: Mapping[str, Any], *, but: Container[str] = ()) -> dict[str, Any]:
    """A file's `general.sampling.*` values, with or without that prefix, by our names.

    Those named in `but` are neither read nor checked; raises InvalidModelError for others.
    """
    values = {}
    for key, value in model_defaults.items():
        bare = key.removeprefix(_FILE_PREFIX)
        name = _FILE_NAMES.get(bare, bare)
        if name in SAMPLING and name not in but:
            try:
                values[name] = SAMPLING[name].check(value)
            except InvalidRequestError as error:
                raise InvalidModelError(str(error), field=_FILE_PREFIX + bare) from None
    return values
