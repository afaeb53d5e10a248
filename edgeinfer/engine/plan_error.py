"""What to tell of a plan that does not fit: how much is short, and which settings would fit.

Of settings that fit each by itself up to two are named, else some that do together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeinfer.batch import HOST, PAGE
from edgeinfer.engine.plan_rows import LEAST_N_CTX, Pool, size_text
from edgeinfer.errors import Advice, Keyword, PlanError

if TYPE_CHECKING:
    from edgeinfer.engine.memory_plan import KVTypes, MemoryPlan, PlanRequest

    Room = Callable[[PlanRequest], int]

_MiB = 1 << 20
_MOST_GUESSES = 12  # then it is halved: the line was none
_LESS_TYPES: tuple[KVTypes, ...] = (("q8_0", "q8_0"), ("q4_0", "q4_0"))


def does_not_fit(plan: MemoryPlan, request: PlanRequest, room: Room) -> PlanError:
    """The error for a request none of whose plans fits, `plan` the one that lacks least.

    `room` tells of other requests how many bytes they leave, below 0 where they do not fit.
    """
    pool = next(pool for pool in plan.pools if not pool.fits)
    n_ctx = _longest(plan, request, room)
    advice: Advice = ("no context length would fit; take a smaller file",)
    if pool.is_for_building:
        advice = (
            "give it that once: `edgeinfer warmup` builds the kernels that later starts take",
        )
    elif settings := _settings(plan, request, n_ctx, room):
        advice = would_fit(settings, " or ")
    elif settings := _together(plan, request, room):
        advice = would_fit(settings, " and ", " together" if len(settings) > 1 else "")
    slots = f" in {plan.slots} slots" if plan.slots > 1 else ""
    are = "is" if pool.available == 1 else "are"
    return PlanError(
        f"the model needs {_needed(pool)} for {plan.n_ctx} tokens of context{slots}, "
        f"{size_text(pool.available)} {are} available (most of it is {pool.largest}, "
        f"{size_text(pool.rows[pool.largest])})",
        advice=advice,
        needed=pool.total_bytes,
        available=pool.available,
        memory=pool.name,
        n_ctx=n_ctx,
    )


def _needed(pool: Pool) -> str:
    where = "" if pool.name == HOST else f" on {pool.name}"
    short = pool.total_bytes - pool.available
    needed, available = size_text(pool.total_bytes), size_text(pool.available)
    return needed + where + (f", {size_text(short)} more than there are," * (needed == available))


def _longest(plan: MemoryPlan, request: PlanRequest, room: Room) -> int | None:
    """The longest context that would fit, in whole pages."""
    n_pages = _most((plan.n_ctx - 1) // PAGE, lambda n: room(request._replace(n_ctx=n * PAGE)))
    return n_pages * PAGE or None


def _settings(
    plan: MemoryPlan, request: PlanRequest, n_ctx: int | None, room: Room
) -> list[Keyword]:
    """Settings each of which would fit by itself, up to two."""
    settings = [] if n_ctx is None else [Keyword("n_ctx", n_ctx)]
    if request.kept_tokens and room(request._replace(kept_tokens=0)) >= 0:
        most = request.kept_tokens // PAGE
        n_pages = _most(most, lambda n: room(request._replace(kept_tokens=n * PAGE)))
        settings.insert(0, Keyword("kept_tokens", n_pages * PAGE))
    if n_slots := _most(request.slots - 1, lambda n: room(request._replace(slots=n))):
        settings.append(Keyword("slots", n_slots))
    if request.kv_types is not None:
        for types in _LESS_TYPES:
            if room(request._replace(kv_types=types)) >= 0:
                settings.append(Keyword("kv_type", types[0]))
                break
    needed = -(-plan.host.total_bytes // _MiB)
    others_fit = all(pool.fits for pool in plan.pools[1:])
    if others_fit and request.available < needed * _MiB <= request.most_available:
        settings.append(Keyword("memory", f"{needed}M"))
    return settings[:2]


def _together(plan: MemoryPlan, request: PlanRequest, room: Room) -> list[Keyword]:
    """Settings that fit together, where none does by itself.

    The longest context is among them; where none fits, a short one, and more of the memory that
    there is than the user allows.
    """
    alone = request._replace(slots=1, kept_tokens=request.kept_tokens and 0)
    types = (request.kv_types, *(_LESS_TYPES if request.kv_types else ()))
    short = request.n_ctx and min(request.n_ctx, LEAST_N_CTX)
    more = alone._replace(n_ctx=short, available=request.most_available // _MiB * _MiB)
    for found in (*(alone._replace(kv_types=each) for each in types), more):
        if room(found) >= 0:
            return _changed(request, found, room)
        if (n_ctx := _longest(plan, found, room)) is not None:
            return _changed(request, found._replace(n_ctx=n_ctx), room)
    return []


def _changed(request: PlanRequest, found: PlanRequest, room: Room) -> list[Keyword]:
    """What one that fits has of other settings."""
    names = ("kept_tokens", "slots", "n_ctx")
    settings = [
        Keyword(n, getattr(found, n)) for n in names if getattr(found, n) != getattr(request, n)
    ]
    if found.kv_types is not None and found.kv_types != request.kv_types:
        settings.append(Keyword("kv_type", found.kv_types[0]))
    if found.available != request.available:  # of which a plan lacks what it takes beyond it
        lacking = room(found._replace(available=request.available))
        settings.append(Keyword("memory", f"{-(-(request.available - lacking) // _MiB)}M"))
    return settings


def _most(high: int, room: Callable[[int], int]) -> int:
    """The largest of 1 to `high` that leaves `room`, where all below one that does do too; else 0.

    A reckoning takes long, of a large model 50 ms: as memory grows about in a line, the place where
    it ends is guessed from both sides, by regula falsi with half of what an end that stays lacks.
    """
    if high < 1 or (at_low := room(1)) < 0:
        return 0
    if (at_high := room(high)) >= 0:
        return high
    low, n_tries, was_low = 1, 0, None
    while high - low > 1:
        guess = (low + high) // 2
        if (n_tries := n_tries + 1) <= _MOST_GUESSES:
            guess = low + (high - low) * at_low // (at_low - at_high)
            guess = min(max(guess, low + 1), high - 1)
        if is_low := (found := room(guess)) >= 0:
            low, at_low = guess, found
            at_high //= 2 if was_low else 1
        else:
            high, at_high = guess, found
            at_low //= 2 if was_low is False else 1
        was_low = is_low
    return low


def would_fit(settings: list[Keyword], joint: str, how: str = "") -> Advice:
    """Such as "slots=1, n_ctx=512 and kv_type=q8_0 together would fit"."""
    joints = [*[", "] * (len(settings) - 2), joint]
    further = (part for each in zip(joints, settings[1:], strict=False) for part in each)
    return (settings[0], *further, f"{how} would fit")
