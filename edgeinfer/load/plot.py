"""The latencies of runs as a picture: how long the quicker ones of any share took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgeinfer.errors import EdgeInferError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (10, 4.5)  # inches


class Series(NamedTuple):
    """One run: seconds to first tokens and to ends of answers."""

    label: str
    first_token: Sequence[float]
    end_to_end: Sequence[float]


def check_plot(path: Path) -> None:
    """Raise before anything is measured where no picture can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeInferError(
            "a plot needs matplotlib: python -m pip install 'edgeinfer[plot]'"
        ) from None
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise EdgeInferError(f"{path.name} is no name of a picture; end it with .png or .svg")
    if not path.absolute().parent.is_dir():
        raise EdgeInferError(f"there is no folder {path.absolute().parent} for the plot")


def write_plot(path: Path, runs: Sequence[Series], title: str) -> None:
    """Draw the runs' distributions side by side: first tokens, whole answers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for run in runs:
        _curve(left, run.first_token, run.label)
        _curve(right, run.end_to_end, run.label)
    for axes, what in ((left, "first token"), (right, "whole answer")):
        axes.set_xlabel("seconds from when the request was due")
        axes.set_title(what, fontsize="medium")
        axes.axhline(95, color="0.7", linewidth=0.8)
        axes.grid(alpha=0.3)
    left.set_ylabel("% of requests")
    right.legend(loc="lower right", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path)


def _curve(axes: Axes, values: Sequence[float], label: str) -> None:
    ordered = sorted(values)
    shares = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
    axes.step(ordered, shares, where="post", label=label)
    if ordered and ordered[0] > 0:
        axes.set_xscale("log")
