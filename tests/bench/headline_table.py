"""What the runs of the headline come to: a table, the ratios that are asked for, a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: a line per run, then the ratios that are asked for."""
    lines = [
        f"{found['model']}, {found['threads']} threads, {found['slots']} slots",
        "",
        "| load | requests/s asked | answered | per core-hour | tokens/s | p50 | p95 | cached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in found.items():
        if not isinstance(run, dict) or "(" in name:
            continue
        seconds = run["end_to_end_s"] or {"p50": float("nan"), "p95": float("nan")}
        asked = f"{run['users']} users" if run["users"] else f"{run['requests_per_s']:.2f}"
        cached = "" if run["cached_share"] is None else f"{run['cached_share']:.0%}"
        lines.append(
            f"| {name} | {asked} | {run['answered_per_s']:.2f} | {_per_core_hour(found, run):,.0f} "
            f"| {run['answer_tok_s']:.0f} | {seconds['p50']:.2f} s | {seconds['p95']:.2f} s "
            f"| {cached} |"
        )
    ratios = [*_ratios(found)]
    return [*lines, "", "| ratio | measured | asked |", "|---|---|---|", *ratios]


def _per_core_hour(found: dict[str, Any], run: dict[str, Any]) -> float:
    return float(3600 * run["answered_per_s"] / found["threads"])


def _ratios(found: dict[str, Any]) -> Iterator[str]:
    def p95(run: dict[str, Any]) -> float:
        return float(run["end_to_end_s"]["p95"])

    def tokens(run: dict[str, Any]) -> float:
        return float(run["answer_tok_s"])

    def cost(run: dict[str, Any]) -> float:
        return _per_core_hour(found, run)

    for what, of, over, value, asked in (
        ("p95 of naive, at its load", "naive loaded", "ours at naive's load", p95, ">= 4"),
        ("requests per core-hour, at equal p95", "ours at equal p95", "naive loaded", cost,
         ">= 5.6"),
        ("p95 of naive, nothing shared", "naive loaded, nothing shared",
         "ours at naive's load, nothing shared", p95, ""),
        ("requests per core-hour, nothing shared", "ours at equal p95, nothing shared",
         "naive loaded, nothing shared", cost, ""),
        ("throughput saturated, of llama-server's", "ours saturated", "llama-server saturated",
         tokens, ">= 2.4"),
        ("p95 of llama-server's, at its best load", "ours at llama-server's best load",
         "llama-server at its best load", p95, "<= 0.4"),
    ):  # fmt: skip
        if all(name in found and found[name]["end_to_end_s"] for name in (of, over)):
            yield f"| {what} | {value(found[of]) / value(found[over]):.2f}x | {asked} |"


def draw(path: Path, found: dict[str, Any]) -> None:
    """p95 by requests answered a second, of all loads that are no saturation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind in ("naive", "ours", "llama-server"):
        for suffix, style in (("", "o-"), (", nothing shared", "x:")):
            runs = [
                run for name, run in found.items()
                if isinstance(run, dict) and name.startswith(kind) and not run["users"]
                and ("nothing shared" in name) == bool(suffix) and run["end_to_end_s"]
            ]  # fmt: skip
            points = sorted((run["answered_per_s"], run["end_to_end_s"]["p95"]) for run in runs)
            if points:
                axes.plot(*zip(*points, strict=True), style, label=kind + suffix)
    axes.set(
        xlabel="requests answered a second", ylabel="p95 of whole answers, s", yscale="log",
        title=f"{found['model']}, {found['threads']} threads",
    )  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
