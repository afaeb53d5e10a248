"""The report of a self-test as lines to print.

Knows nothing of how it came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MOST_LINES = 12  # of what differs in a step
_MANY = ("differ", "failed", "left_out")


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A line for each step, and what went wrong in it."""
    for name, step in report["steps"].items():
        yield f"{name:10} {step['state']:8} {step['seconds']:7.1f} s  {_counts(step)}".rstrip()
        wrong = [*step.get("differ", ()), *step.get("failed", ())]
        for each in wrong[:_MOST_LINES]:
            yield f"  {each['case']} {each.get('what', '')}: {each['why']}"
        if wrong[_MOST_LINES:]:
            yield f"  and {len(wrong) - _MOST_LINES} more"
    yield from _speed(report["steps"].get("speed", {}))
    if report["not_run"]:
        yield f"not run: {', '.join(report['not_run'])}"
    if "ok" in report:
        yield f"{report['device']}: {'all that has run is right' if report['ok'] else 'NOT right'}"


def _speed(step: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, and its share of what copying reads and writes."""
    most = step.get("copy", {}).get("gb_s", float("nan"))
    for name, part in step.items():
        if isinstance(part, dict):
            share = f"  {part['gb_s'] / most:4.0%} of a copy" if "step_us" in part else ""
            figures = {key: value for key, value in part.items() if key != "decode"}
            yield f"  {name:15} {_figures(figures)}{share}"
            for n_rows, row in part.get("decode", {}).items():
                share = f"{row['gb_s'] / most:4.0%} of a copy"
                yield f"  {n_rows:>2} sequences    {_figures(row)}  {share}"


def _figures(part: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in part.items())


def _counts(step: Mapping[str, Any]) -> str:
    """What a step has counted, and why it was skipped."""
    counts = [f"{len(step[name])} {name}" for name in _MANY if step.get(name)]
    facts = [f"{step[name]} {name}" for name in ("cases", "kernels") if name in step]
    return ", ".join([*facts, *counts, *([step["why"]] if "why" in step else [])])
