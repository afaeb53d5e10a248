"""What the help and statistics pages say.

Knows nothing of screens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgeinfer import printable
from edgeinfer.tui.commands import COMMANDS
from edgeinfer.tui.gauge import Readings, size_text
from edgeinfer.tui.keys import Keys
from edgeinfer.tui.palette import Palette
from edgeinfer.tui.session import Session

_MORE = {
    "Writing": [
        ("", "/", "commands"),
        ("", "@", "attach a file, with its token count"),
        ("", "↑ ↓", "earlier prompts, at the edge of the text"),
        ("", "backspace", "in an empty prompt: the last attachment or waiting message back"),
    ]
}
_OTHER_KEYS = """\
Other keys: /settings opens {path}

[keys]
retry = ctrl+r, f5, r

Keys that write or move in the prompt count while a message is marked."""


def help_page(
    keys: Keys, complaints: list[str], settings: Path, palette: Palette
) -> RenderableType:
    """Commands and their keys, by what one is doing; then how to have others."""
    parts: list[RenderableType] = []
    for group in dict.fromkeys(command.group for command in COMMANDS):
        rows = [
            (f"/{each.name} {each.argument}" if each.is_typed else each.name,
             keys.labels(each.name), each.help)
            for each in COMMANDS if each.group == group
        ]  # fmt: skip
        parts += [Text(group, f"bold {palette.accent}")]
        parts += [_table([*rows, *_MORE.get(group, [])], palette, (20, 18)), Text()]
    parts.append(Text(_OTHER_KEYS.format(path=printable(str(settings))), palette.muted))
    parts += [Text(printable(each), palette.warn) for each in complaints]
    return Group(*parts)


def stats_page(session: Session, memory: int, palette: Palette) -> RenderableType:
    """The last answer and the machine, in numbers."""
    readings: Readings = session.readings
    held = f"{size_text(memory)} of {size_text(readings.planned_bytes)} planned"
    # Each with whether a server, too, would have told it, were it so.
    rows = [
        ("prompt", f"{readings.n_prompt:,} tokens, {readings.n_cached:,} of them cached",
         readings.n_prompt),
        ("answer", f"{readings.n_answer:,} tokens", readings.n_answer),
        ("first token", f"{readings.first_s:.2f} s", readings.first_s),
        ("prompt speed", f"{readings.prefill_tok_s:,.0f} tok/s", readings.prefill_tok_s),
        ("answer speed", f"{readings.rate:.1f} tok/s", readings.rate),
        ("guessed ahead", _guessed(readings), readings.n_guessed),
        ("context", f"{readings.n_used:,} of {readings.n_ctx:,} tokens", readings.n_ctx),
        ("when full", "the oldest turns go, the system message stays", True),
        ("memory", held, False),
    ]  # fmt: skip
    shown = [(name, text) for name, text, is_told in rows if is_told or not session.is_served]
    parts: list[RenderableType] = [_table(shown, palette)]
    if session.model is not None and session.model.plan is not None:
        plan = [(name, size_text(size)) for name, size in session.model.plan.rows.items()]
        parts += [Text(), Text("Planned", f"bold {palette.accent}"), _table(plan, palette)]
    return Group(*parts)


def _guessed(readings: Readings) -> str:
    """How well speculation did in the last answer."""
    n, n_right = readings.n_guessed, readings.n_guessed_right
    return f"{n:,} tokens, {n_right:,} of them right ({n_right / n:.0%})" if n else "no tokens"


def _table(
    rows: Sequence[tuple[str, ...]], palette: Palette, widths: tuple[int, ...] = (22,)
) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for width in widths:
        table.add_column(width=width, style=palette.text or None)
    table.add_column(style=palette.muted)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
