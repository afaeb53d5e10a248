"""The numbers of the status line, and the small drawings made of them.

Knows nothing of widgets or of where the numbers come from.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer import one_line

if TYPE_CHECKING:
    from edgeinfer import ChatModel, Completion

_WINDOW_SECONDS = 1.0
_LEAST_SECONDS = 0.2  # two tokens that come together have no rate
_N_SAMPLES = 16
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Readings:
    """What the machine does, as numbers. Counts are tokens."""

    state: str = "no model"
    is_busy: bool = False
    n_ctx: int = 0
    n_prompt: int = 0
    n_read: int = 0
    n_cached: int = 0
    n_answer: int = 0
    rate: float = 0.0
    planned_bytes: int = 0
    is_reading: bool = False
    first_s: float = 0.0
    prefill_tok_s: float = 0.0
    n_guessed: int = 0  # ahead of the model, by speculation
    n_guessed_right: int = 0
    history: deque[float] = field(default_factory=lambda: deque(maxlen=_N_SAMPLES))
    _times: deque[float] = field(default_factory=deque)
    _sampled_at: float = 0.0
    _started_at: float = 0.0

    def start_loading(self, path: str) -> None:
        self.state, self.is_busy = f"opening {one_line(Path(path).name)}".rstrip(), True

    def fail_loading(self) -> None:
        self.state, self.is_busy = "no model", False

    def start_model(self, model: ChatModel) -> None:
        self.state, self.is_busy = "ready", False
        self.n_ctx = model.n_ctx or 0
        self.planned_bytes = model.plan.host.total_bytes if model.plan is not None else 0
        self.clear_context()

    def clear_context(self) -> None:
        self.n_prompt = self.n_read = self.n_cached = self.n_answer = 0
        self.n_guessed = self.n_guessed_right = 0

    def start_turn(self) -> None:
        self.state, self.is_busy, self.is_reading = "thinking", True, False
        self.n_answer, self.rate = 0, 0.0
        self._started_at = time.perf_counter()
        self._times.clear()
        self.history.clear()

    def take_prompt(self, done: int, total: int) -> None:
        """The first report of a turn says how much was still in the cache."""
        if not self.is_reading:
            self.n_cached = done
        self.n_prompt, self.n_read, self.is_reading = total, done, True
        self.state = "reading"

    def take_token(self, now: float) -> None:
        self.take_text(now)
        self.n_answer += 1
        self._times.append(now)

    def take_text(self, now: float) -> None:
        """Of an answer that nobody says the number of tokens of."""
        if self.state != "writing":
            self.state, self.n_read = "writing", self.n_prompt
            self.first_s = now - self._started_at

    def sample_rate(self, now: float) -> None:
        """Tokens per second over the last second, and its course over the last ones."""
        if not self.is_busy:
            return
        while self._times and now - self._times[0] > _WINDOW_SECONDS:
            self._times.popleft()
        span = self._times[-1] - self._times[0] if self._times else 0.0
        if span >= _LEAST_SECONDS:
            self.rate = (len(self._times) - 1) / span
        if self.rate and now - self._sampled_at >= 0.25:
            self.history.append(self.rate)
            self._sampled_at = now

    def end_turn(self, completion: Completion | None, state: str) -> None:
        self.is_busy = self.is_reading = False
        self.state = {"stopped": "stopped", "failed": "failed"}.get(state, "ready")
        if completion is not None:
            self.n_answer = completion.usage.completion_tokens
            self.n_prompt = self.n_read = completion.usage.prompt_tokens
            self.n_cached = completion.usage.cached_tokens
            timings = completion.timings
            self.prefill_tok_s = timings.prefill_tok_s
            self.rate = timings.decode_tok_s or self.rate
            self.n_guessed = timings.proposed_tokens
            self.n_guessed_right = timings.accepted_tokens

    @property
    def n_used(self) -> int:
        return self.n_prompt + self.n_answer


def sparkline(values: list[float]) -> str:
    """One bar per value, the highest one full."""
    top = max(values, default=0.0)
    if top <= 0:
        return ""
    return "".join(_BARS[min(7, int(8 * value / top))] for value in values)


def context_bar(readings: Readings, width: int) -> list[tuple[str, str]]:
    """(glyphs, kind) runs: cached, new, answer and free; each kind has a glyph of its own."""
    total = max(1, readings.n_ctx)
    new = max(0, readings.n_prompt - readings.n_cached)
    ends, at = [], 0
    for count in (readings.n_cached, new, readings.n_answer):
        at += count
        ends.append(min(width, -(-at * width // total) if at else 0))
    runs, start = [], 0
    for end, glyph, kind in zip(ends, "█▓▒", ("cached", "new", "answer"), strict=True):
        if end > start:
            runs.append((glyph * (end - start), kind))
        start = max(start, end)
    if start < width:
        runs.append(("·" * (width - start), "free"))
    return runs


def progress_bar(share: float, width: int) -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "━" * full + "─" * (width - full)


def size_text(n_bytes: int) -> str:
    """Bytes as people read them."""
    if n_bytes >= 1 << 30:
        return f"{n_bytes / (1 << 30):.1f} GB"
    if n_bytes >= 1 << 20:
        return f"{n_bytes / (1 << 20):.0f} MB"
    return f"{n_bytes / 1024:.0f} kB"
