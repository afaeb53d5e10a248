"""The line at the top, and the one at the bottom: what the model does, how fast, how full it is.

Knows nothing of sessions: it draws readings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.text import Text
from textual.widgets import Static

from edgeinfer import one_line
from edgeinfer.tui.downloads import Download
from edgeinfer.tui.gauge import Readings, context_bar, progress_bar, size_text, sparkline
from edgeinfer.tui.loader import ModelLoader
from edgeinfer.tui.palette import Palette

_NEARLY_FULL = 0.85
_DOTS = {"ready": "●", "writing": "●", "stopped": "○", "failed": "×", "no model": "○"}


class _Bar(Static):
    """One row, made anew for every width."""

    _row: Callable[[int], Text] | None = None

    def on_resize(self) -> None:
        if self._row is not None:
            self.update(self._row(max(10, self.size.width)), layout=False)

    def _show(self, row: Callable[[int], Text]) -> None:
        self._row = row
        self.on_resize()


class TitleBar(_Bar):
    """The model and the conversation; the title gives way first."""

    def draw(self, model: str, title: str, note: str, palette: Palette) -> None:
        """`note` is what is special about this chat, such as that nothing is kept."""
        self._show(partial(_title_row, model, title, note, palette))


class StatusBar(_Bar):
    """Parts are left out, least important first, until the rest fits."""

    def draw(
        self,
        readings: Readings,
        loader: ModelLoader | None,
        download: Download | None,
        memory: int,
        palette: Palette,
    ) -> None:
        """Show the numbers as they are now."""
        self._show(partial(_status_row, readings, loader, download, memory, palette))


def _title_row(model: str, title: str, note: str, palette: Palette, width: int) -> Text:
    left = Text.assemble((one_line(model) or "edgeinfer", f"bold {palette.accent}"))
    if note:
        left.append(f"   {note}", palette.warn)
    left.truncate(width, overflow="ellipsis")
    right = Text(one_line(title), palette.muted)
    right.truncate(max(0, width - left.cell_len - 3), overflow="ellipsis")
    return _apart(left, right, width)


def _status_row(
    readings: Readings,
    loader: ModelLoader | None,
    download: Download | None,
    memory: int,
    palette: Palette,
    width: int,
) -> Text:
    left = _loading(loader, palette) if loader else _activity(readings, palette)
    if download is not None:
        left.append(f"   ↓ {one_line(download.name, 30)} {download.share:.0%}", palette.accent)
    parts = _facts(readings, memory, palette)
    while len(parts) > 1 and left.cell_len + sum(part.cell_len + 3 for part in parts) > width:
        parts.pop()
    if parts and left.cell_len + parts[0].cell_len + 3 > width:
        share = readings.n_used / max(1, readings.n_ctx)
        parts = [Text(f"context {share:.0%}", palette.muted)]
    row = _apart(left, Text("   ").join(parts), width)
    row.truncate(width)
    return row


def _apart(left: Text, right: Text, width: int) -> Text:
    return Text.assemble(left, " " * max(1, width - left.cell_len - right.cell_len), right)


def _loading(loader: ModelLoader, palette: Palette) -> Text:
    text = Text.assemble(("◌ ", palette.accent), (loader.text, palette.text))
    if loader.share:
        text.append(f"  {progress_bar(loader.share, 16)}", palette.accent)
        text.append(f"  {loader.share:.0%}", palette.muted)
    return text


def _activity(readings: Readings, palette: Palette) -> Text:
    color = {"failed": palette.bad, "stopped": palette.warn}.get(readings.state, palette.accent)
    dot = (
        "◌" if readings.is_busy and readings.state != "writing" else _DOTS.get(readings.state, "●")
    )
    text = Text.assemble((f"{dot} ", color), (readings.state, palette.text))
    if readings.is_reading and readings.state == "reading":
        share = readings.n_read / max(1, readings.n_prompt)
        text.append(f"  {progress_bar(share, 16)}", palette.accent)
        text.append(f"  {readings.n_read:,} of {readings.n_prompt:,}", palette.muted)
    elif readings.rate:
        bars = sparkline(list(readings.history))
        text.append(f"  {readings.rate:.1f} tok/s", palette.text)
        text.append(f"  {bars}" if bars else "", palette.accent)
    return text


def _facts(readings: Readings, memory: int, palette: Palette) -> list[Text]:
    """Most important first."""
    if not readings.n_ctx:  # a server may not tell it
        n = readings.n_used
        return [Text(f"{n:,} tokens", palette.muted)] if n else []
    share = readings.n_used / readings.n_ctx
    if share >= _NEARLY_FULL:
        count = Text(f"{share:.0%} full, oldest turns will go", palette.warn)
    else:
        count = Text(f"{readings.n_used:,} of {readings.n_ctx:,}", palette.muted)
    colors = {
        "cached": palette.muted,
        "new": palette.accent,
        "answer": palette.good,
        "free": palette.faint,
    }
    bar = Text()
    for glyphs, kind in context_bar(readings, 16):
        bar.append(glyphs, colors[kind])
    context = Text.assemble(("context ", palette.muted), bar, " ", count)
    facts = [context]
    if readings.n_cached:
        facts.append(Text(f"{readings.n_cached:,} cached", palette.muted))
    if memory:
        plan = f" of {size_text(readings.planned_bytes)}" if readings.planned_bytes else ""
        over = bool(readings.planned_bytes) and memory > 1.1 * readings.planned_bytes
        facts.append(Text(f"{size_text(memory)}{plan}", palette.warn if over else palette.muted))
    if readings.n_guessed:
        right = readings.n_guessed_right / readings.n_guessed
        facts.append(Text(f"{right:.0%} guessed right", palette.muted))
    return facts
