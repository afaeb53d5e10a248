"""What a server adds to how a model is loaded, and to what is advised where that fails.

Knows nothing of other models.
"""

from __future__ import annotations

from pathlib import Path

from edgeinfer.engine.memory_plan import MemoryPlan
from edgeinfer.engine.plan_error import would_fit
from edgeinfer.errors import Advice, Keyword, PlanError
from edgeinfer.inspect_file import plan
from edgeinfer.options import LoadOptions
from edgeinfer.parameters import parse_memory

_USUAL_SLOTS = (4, 2, 1)  # contexts at full length, as many as need no shorter ones
_MiB = 1 << 20
_KEPT_SHARE = 4  # of what a plan leaves free: a quarter is for earlier prompts


def usual_options(path: Path, options: LoadOptions, *, is_alone: bool) -> LoadOptions:
    """The options, with what they leave open as a server wants it.

    Slots: as many contexts as memory holds without making them shorter. Tokens of earlier prompts,
    where the model `is_alone`: as many as all contexts have, in a quarter of what is left.
    """
    is_naive, slots = options.get("naive"), options.get("slots")
    if is_naive and slots is None:
        slots = 1
    for tried in _USUAL_SLOTS if slots is None else (slots,):
        usual: LoadOptions = {**options, "slots": tried}
        try:
            found = plan(path, **usual)
        except PlanError:
            continue
        if slots is None and found.note and tried > 1:
            continue
        if is_alone and not is_naive and options.get("kept_tokens") is None:
            usual["kept_tokens"] = _usual_kept(path, usual, found)
        return usual
    return {**options, "slots": slots or 1}


def _usual_kept(path: Path, options: LoadOptions, least: MemoryPlan) -> int | None:
    """None leaves it to the plan: where a GPU has the cache, or memory is short."""
    kept = least.slots * least.n_ctx
    asked: LoadOptions = {**options, "kept_tokens": kept}
    try:
        most = plan(path, **asked)
    except PlanError:
        return None
    room, taken = (least.available - least.total_bytes) // _KEPT_SHARE, most.kept_bytes
    if len(least.pools) > 1 or taken <= least.kept_bytes or room <= least.kept_bytes:
        return None
    return min(kept, kept * room // taken)


def advice_beside(error: PlanError, others: int, most: int) -> Advice:
    """What an error advises, with the memory for all: none where that is above `most` bytes."""
    settings = [each for each in error.advice if isinstance(each, Keyword)]
    asked = next((each for each in settings if each.name == "memory"), None)
    if asked is None:
        return error.advice
    n_mib = -(-(others + parse_memory(str(asked.value), 0)) // _MiB)
    if n_mib * _MiB <= most:
        beside = Keyword("memory", f"{n_mib}M")
        return tuple(beside if each is asked else each for each in error.advice)
    settings.remove(asked)
    if settings and " or " in error.advice:
        return would_fit(settings, " or ")
    return ("serve fewer models at a time, or take a smaller file",)
