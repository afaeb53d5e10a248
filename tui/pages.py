"""What the help and statistics pages say.

Knows nothing of screens.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgeinfer.tui.gauge import Readings, size_text
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.session import Session

_KEYS = (
    ("Writing", (
        ("enter", "send; while an answer runs: let it wait its turn"),
        ("ctrl+j, shift+enter", "new line"),
        ("↑ ↓", "earlier prompts, at the edge of the text"),
        ("@", "attach a file, with its token count"),
        ("/", "commands"),
        ("backspace", "in an empty prompt: take the last attachment or waiting message back"),
    )),
    ("Answers", (
        ("esc", "stop, and keep what there is"),
        ("ctrl+r", "answer again"),
        ("ctrl+y", "copy the last answer"),
        ("ctrl+b", "copy the last code block"),
        ("ctrl+t", "show or hide the thoughts"),
    )),
    ("A message (ctrl+↑ or a click marks one)", (
        ("↑ ↓", "the one before or after"),
        ("← →", "another branch"),
        ("e", "edit and ask anew, in a branch of its own"),
        ("r", "answer again"),
        ("c, b", "copy the message, its last code block"),
        ("p", "token probabilities, when logprobs are on"),
        ("t", "thoughts"),
    )),
    ("Everywhere", (
        ("ctrl+p", "command palette"),
        ("ctrl+n", "new conversation"),
        ("ctrl+o", "history and search"),
        ("ctrl+l", "switch model"),
        ("ctrl+g", "sampling"),
        ("pgup pgdn, ctrl+end", "scroll; follow the answer again"),
        ("f1", "this page"),
        ("ctrl+q", "quit"),
    )),
)  # fmt: skip


def help_page(commands: list[tuple[str, str, str]], palette: Palette) -> RenderableType:
    """Keys and commands, by what one is doing."""
    parts: list[RenderableType] = []
    for title, rows in _KEYS:
        parts += [Text(title, f"bold {palette.accent}"), _table(rows, palette), Text()]
    parts.append(Text("Commands", f"bold {palette.accent}"))
    rows_of = [(f"/{name} {hint}".strip(), help) for name, hint, help in commands]
    parts.append(_table(tuple(rows_of), palette))
    return Group(*parts)


def stats_page(session: Session, memory: int, palette: Palette) -> RenderableType:
    """The last answer and the machine, in numbers."""
    readings: Readings = session.readings
    rows = [
        ("prompt", f"{readings.n_prompt:,} tokens, {readings.n_cached:,} of them cached"),
        ("answer", f"{readings.n_answer:,} tokens"),
        ("first token", f"{readings.first_s:.2f} s"),
        ("prompt speed", f"{readings.prefill_tok_s:,.0f} tok/s"),
        ("answer speed", f"{readings.rate:.1f} tok/s"),
        ("guessed ahead", _guessed(readings)),
        ("context", f"{readings.n_used:,} of {readings.n_ctx:,} tokens"),
        ("when full", "the oldest turns go, the system message stays"),
        ("memory", f"{size_text(memory)} of {size_text(readings.planned_bytes)} planned"),
    ]
    parts: list[RenderableType] = [_table(tuple(rows), palette)]
    if session.model is not None:
        plan = [(name, size_text(size)) for name, size in session.model.plan.rows.items()]
        parts += [Text(), Text("Planned", f"bold {palette.accent}"), _table(tuple(plan), palette)]
    return Group(*parts)


def _guessed(readings: Readings) -> str:
    """How well speculation did in the last answer."""
    n, n_right = readings.n_guessed, readings.n_guessed_right
    return f"{n:,} tokens, {n_right:,} of them right ({n_right / n:.0%})" if n else "no tokens"


def _table(rows: tuple[tuple[str, str], ...], palette: Palette) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(width=22, style=palette.text or None)
    table.add_column(style=palette.muted)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table
