"""What the server counts, as Prometheus reads it; the names after the prefix are vLLM's.

Knows nothing of requests but their numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from edgeinfer import platform
from edgeinfer.results import Completion

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class _Histogram:
    """Counts of values by upper bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts = bounds, [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, label: str) -> Iterable[str]:
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{label},le="{bound}"}} {total}'
        yield f"{name}_sum{{{label}}} {self._sum:.6f}"
        yield f"{name}_count{{{label}}} {total}"


class ModelMetrics:
    """Of one model, since the server was started."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()  # requests by reason
        self.n_running = 0
        self._tokens: Counter[str] = Counter()
        self._histograms = {
            "time_to_first_token_seconds": _Histogram(_SECONDS),
            "e2e_request_latency_seconds": _Histogram(_SECONDS),
            "inter_token_latency_seconds": _Histogram(_GAPS),
            "request_prompt_tokens": _Histogram(_TOKENS),
            "request_generation_tokens": _Histogram(_TOKENS),
        }

    def add(self, answer: Completion) -> None:
        """Count a finished answer."""
        usage, timings = answer.usage, answer.timings
        self.finished[answer.finish_reason] += 1
        self._tokens["prompt"] += usage.prompt_tokens
        self._tokens["prompt_cached"] += usage.cached_tokens
        self._tokens["generation"] += usage.completion_tokens
        values = {
            "e2e_request_latency_seconds": timings.total_s,
            "request_prompt_tokens": usage.prompt_tokens,
            "request_generation_tokens": usage.completion_tokens,
        }
        if usage.completion_tokens:
            values["time_to_first_token_seconds"] = timings.first_token_s
        if timings.decode_tok_s:
            values["inter_token_latency_seconds"] = 1 / timings.decode_tok_s
        for name, value in values.items():
            self._histograms[name].add(value)

    def add_prompt(self, n_tokens: int) -> None:
        """Count tokens that were read for no answer."""
        self._tokens["prompt"] += n_tokens

    def lines(self, model: str) -> Iterable[tuple[str, str, str]]:
        """Metric, kind, line."""
        label = f'model_name="{_escaped(model)}"'
        yield "num_requests_running", "gauge", f"{{{label}}} {self.n_running}"
        for name in ("prompt", "prompt_cached", "generation"):
            yield f"{name}_tokens_total", "counter", f"{{{label}}} {self._tokens[name]}"
        for reason, count in sorted(self.finished.items()):
            line = f'{{{label},finished_reason="{reason}"}} {count}'
            yield "request_success_total", "counter", line
        for name, histogram in self._histograms.items():
            for line in histogram.lines("", label):
                yield name, "histogram", line


class Exposition(NamedTuple):
    """The page of metrics."""

    models: Mapping[str, ModelMetrics]
    n_waiting: int

    def text(self) -> str:
        found: dict[tuple[str, str], list[str]] = {
            ("num_requests_waiting", "gauge"): [f" {self.n_waiting}"],
            ("process_rss_bytes", "gauge"): [f" {platform.rss()}"],
        }
        for model, metrics in self.models.items():
            for name, kind, line in metrics.lines(model):
                found.setdefault((name, kind), []).append(line)
        parts = []
        for (name, kind), lines in found.items():
            parts.append(f"# TYPE edgeinfer_{name} {kind}")
            parts += [f"edgeinfer_{name}{line}" for line in lines]
        return "\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
