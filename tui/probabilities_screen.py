"""How sure the model was of each token of an answer, and what else it considered.

Knows nothing of models.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from edgeinfer import printable
from edgeinfer.tui.dialog import Modal
from edgeinfer.tui.palette import Palette

_BAR = 12
_MOST_ROWS = 2000


class ProbabilitiesScreen(Modal[None]):
    """A row per token: its text, its probability as a bar, the alternatives."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,p", "dismiss", "Back"),
        Binding("n", "next_doubt", "Next doubt"),
    ]

    def __init__(self, logprobs: list[Any]) -> None:
        super().__init__()
        self._logprobs = logprobs[:_MOST_ROWS]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog tall"):
            yield OptionList(id="tokens", compact=True)
            yield Static("n next doubtful token   ↑↓ move   esc back", classes="hint")

    def on_mount(self) -> None:
        sure = [math.exp(p) for _, p, _ in self._logprobs if not math.isnan(p)]
        mean = sum(sure) / len(sure) if sure else 0.0
        title = f"Token probabilities · {len(self._logprobs):,} tokens · {mean:.0%} on average"
        self.query_one(".dialog").border_title = title
        palette = Palette.of(self.app.current_theme)
        shown = self.query_one(OptionList)
        shown.add_options(Option(_row(*each, palette=palette)) for each in self._logprobs)
        shown.highlighted = 0 if self._logprobs else None
        shown.focus()

    def action_next_doubt(self) -> None:
        """Go to the next token that was less likely than not."""
        shown = self.query_one(OptionList)
        start = -1 if shown.highlighted is None else shown.highlighted
        for i in range(start + 1, len(self._logprobs)):
            if math.exp(self._logprobs[i][1]) < 0.5:
                shown.highlighted = i
                return


def _row(text: str, logprob: float, top: list[Any], *, palette: Palette) -> Text:
    share = 0.0 if math.isnan(logprob) else math.exp(logprob)
    color = palette.good if share >= 0.7 else palette.warn if share >= 0.3 else palette.bad
    full = max(1, round(share * _BAR))
    row = Text(f"{_visible(text)[:18]:18} ", no_wrap=True, overflow="ellipsis")
    row.append("█" * full, color)
    row.append("·" * (_BAR - full), palette.faint)
    row.append(f" {share:4.0%}  ", palette.text)
    others = [f"{_visible(other)} {math.exp(p):.0%}" for other, p in top if other != text]
    row.append("  ".join(others[:4]), palette.muted)
    return row


def _visible(text: str) -> str:
    return printable(text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")) or "∅"
