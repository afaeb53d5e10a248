"""What a run comes to: throughput, percentiles, failures, energy; as a JSON object and as a table.

What was cut off, by its deadline or by the end of the run, counts with the time it had taken: left
out it would make a server that answers nothing look quick.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from edgeinfer.load.generator import RUNNING, Measured, Record

Json: TypeAlias = "dict[str, Any]"
PERCENTS = (50, 90, 95, 99)
_TAKES_TIME = ("", "deadline", RUNNING)  # failures whose time tells something
_USERS_TAKE = ("", "deadline")  # without pauses each has one that the end cuts off


def summary(measured: Measured) -> Json:
    """All that was measured after the warm-up."""
    settings = measured.settings
    begin = measured.begun + settings.warmup
    end = min(measured.begun + settings.seconds, measured.ended)
    seconds = max(end - begin, 1e-9)
    records = [each for each in measured.records if each.due >= begin]
    done = [each for each in records if not each.failure]
    failed = Counter(each.failure for each in records if each.failure not in ("", RUNNING))
    in_time = [each for each in measured.records if not each.failure and begin <= each.ended < end]
    n_tokens = sum(_tokens_within(each, begin, end) for each in measured.records)
    counted = _USERS_TAKE if settings.n_users else _TAKES_TIME
    timed = [each for each in records if each.failure in counted]
    return {
        "seconds": seconds,
        "users": settings.n_users or None,
        "asked_conversations_per_s": None if settings.n_users else settings.rate,
        "requests": len(records),
        "answered": len(done),
        "failed": dict(failed),
        "messages": {each.failure: each.message for each in records if each.message},
        "still_running": sum(each.failure == RUNNING for each in records),
        "retried": sum(each.n_retried for each in records),
        "due_per_s": len(records) / seconds,
        "answered_per_s": len(in_time) / seconds,
        "answer_tok_s": n_tokens / seconds,
        "prompt_tok_s": sum(each.n_prompt for each in in_time) / seconds,
        "prompt_tokens": _mean([each.n_prompt for each in done]),
        "answer_tokens": _mean([each.n_answer for each in done]),
        "cached_share": _cached_share(done),
        "first_token_s": percentiles(first_token_seconds(timed, measured.ended)),
        "gap_s": percentiles(gaps(done)),
        "end_to_end_s": percentiles(end_to_end_seconds(timed, measured.ended)),
        "joules": measured.joules,
        "joules_per_token": _joules_per_token(measured),
        "client": _client(measured),
    }


def end_to_end_seconds(records: Iterable[Record], now: float) -> list[float]:
    return [(each.ended or now) - each.due for each in records if each.failure in _TAKES_TIME]


def first_token_seconds(records: Iterable[Record], now: float) -> list[float]:
    """Until the first text; of what has none yet so far."""
    return [
        (each.times[0] if each.times else each.ended or now) - each.due
        for each in records
        if each.failure in _TAKES_TIME
    ]


def gaps(records: Iterable[Record]) -> list[float]:
    """Between pieces of text that came one after the other."""
    pairs = (zip(each.times, each.times[1:], strict=False) for each in records)
    return [b - a for each in pairs for a, b in each]


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """By nearest rank: each is a value that was measured; None where there is none."""
    if not values:
        return None
    found = sorted(values)
    ranks = {f"p{p}": found[max(0, math.ceil(p / 100 * len(found)) - 1)] for p in PERCENTS}
    return {**ranks, "mean": sum(found) / len(found), "max": found[-1]}


def _tokens_within(record: Record, begin: float, end: float) -> float:
    """Tokens of an answer that came between two times; pieces of one answer count alike."""
    times = record.times
    if not times:
        return 0.0
    n = sum(begin <= at < end for at in times)
    return n * (record.n_answer / len(times) if record.n_answer else 1.0)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _cached_share(records: Sequence[Record]) -> float | None:
    """Of the prompts' tokens; None where the server does not tell."""
    told = [each for each in records if each.n_cached is not None]
    n_prompt = sum(each.n_prompt for each in told)
    return sum(each.n_cached or 0 for each in told) / n_prompt if n_prompt else None


def _client(measured: Measured) -> Json:
    """What makes figures doubtful: a client that takes processors, or comes late."""
    wall = max(measured.ended - measured.begun, 1e-9)
    cpu_share = measured.cpu_seconds / wall
    return {"cpu_share": cpu_share, "late_s": measured.latest, "held": measured.n_held}


def _joules_per_token(measured: Measured) -> float | None:
    n_tokens = sum(each.n_answer or len(each.times) for each in measured.records)
    return sum(measured.joules.values()) / n_tokens if measured.joules and n_tokens else None


# -- for people -----------------------------------------------------------------------------------

HEADER = (
    "load", "asked/s", "done/s", "tok/s", "first p50", "p95", "gap p50", "p95", "answer p50",
    "p95", "p99", "cached", "failed",
)  # fmt: skip


def row(found: Json) -> list[str]:
    """Cells below HEADER; seconds, gaps in milliseconds."""
    users = found["users"]
    n_failed = sum(found["failed"].values())
    return [
        f"{users} users" if users else f"{found['asked_conversations_per_s']:.3g} talks/s",
        f"{found['due_per_s']:.2f}",
        f"{found['answered_per_s']:.2f}",
        f"{found['answer_tok_s']:.1f}",
        *_seconds(found["first_token_s"], "p50", "p95"),
        *(f"{cell} ms" if cell else "" for cell in _seconds(found["gap_s"], "p50", "p95", per=1e3)),
        *_seconds(found["end_to_end_s"], "p50", "p95", "p99"),
        "" if found["cached_share"] is None else f"{found['cached_share']:.0%}",
        str(n_failed),
    ]


def _seconds(values: dict[str, float] | None, *names: str, per: float = 1.0) -> list[str]:
    if values is None:
        return [""] * len(names)
    return [f"{values[name] * per:.3g}" for name in names]


def notes(found: Json) -> list[str]:
    """What a table has no room for, and what makes its figures doubtful."""
    client, lines = found["client"], []
    for kind, n in found["failed"].items():
        said = found["messages"].get(kind, "")
        lines.append(f"failed: {n} x {kind}" + (f" ({said})" if said else ""))
    if found["still_running"] and not found["users"]:
        lines.append(f"still running at the end: {found['still_running']}, with their time so far")
    if found["retried"]:
        lines.append(f"asked again because the server said so: {found['retried']}")
    if client["held"]:
        lines.append(f"made to wait by --max-in-flight: {client['held']}, from when they were due")
    if found["joules_per_token"] is not None:
        sources = ", ".join(found["joules"])
        lines.append(f"{found['joules_per_token']:.3g} J a token of answers ({sources})")
    lines.append(
        f"this client took {client['cpu_share']:.1%} of a processor and sent at most "
        f"{1e3 * client['late_s']:.1f} ms late"
    )
    return lines
