"""Benchmark results as lines of text.

Knows nothing of how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edgeinfer.bench.compare import Comparison
from edgeinfer.bench.steps import OpRow, SweepRow


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they need: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def compare_lines(rows: list[Comparison], depth: int) -> list[str]:
    """Tokens per second after a depth of context, and how many times ours are theirs."""
    unit = f"tok/s at depth {depth}" if depth else "tok/s"
    header = (unit, "edgeinfer", "llama.cpp", "ratio")
    cells = [(r.what, f"{r.edgeinfer:.1f}", f"{r.llama_cpp:.1f}", f"{r.ratio:.2f}x") for r in rows]
    return table(header, cells)


def sweep_lines(rows: list[SweepRow]) -> list[str]:
    """A line per thread count and depth, a column of milliseconds per number of rows."""
    counts = sorted({row.rows for row in rows})
    lines: dict[tuple[int | None, int], dict[int, float]] = {}
    for row in rows:
        lines.setdefault((row.threads, row.depth), {})[row.rows] = row.seconds
    header = ["threads", "depth", *(f"{n} rows, ms" for n in counts)]
    header += [f"tok/s of {n}" for n in counts]
    cells = [
        [str(threads or ""), str(depth)]
        + [f"{1e3 * seconds[n]:.2f}" for n in counts]
        + [f"{n / seconds[n]:.1f}" for n in counts]
        for (threads, depth), seconds in lines.items()
    ]
    return table(header, cells)


def op_lines(rows: list[OpRow]) -> list[str]:
    """A line per kind of op; rates only where weights are read."""
    header = ("op", "n", "ms", "% of step", "GB/s", "% of read", "GMAC/s", "kernels")
    cells = [
        [row.op, str(row.n), f"{1e3 * row.seconds:.3f}", f"{100 * row.share:.1f}"]
        + (
            [f"{row.gb_s:.1f}", f"{100 * row.read_fraction:.0f}", f"{row.gmac_s:.1f}"]
            if row.gmac_s
            else [""] * 3
        )
        + [row.kernels]
        for row in rows
    ]
    total = f"{1e3 * sum(row.seconds for row in rows):.3f}"
    return table(header, [*cells, ["all", str(sum(row.n for row in rows)), total, *[""] * 5]])
