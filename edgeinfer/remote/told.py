"""What servers tell, by all the names that they have for it; anything malformed is not told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeinfer.text.lenient_json import clean_text

_REASONING = ("reasoning_content", "reasoning", "thinking")
_LENGTHS = ("max_model_len", "context_length", "context_window", "max_context_length")
_MOST = 1 << 40


def count(value: Any) -> int:
    """A number of tokens, 0 where it is none."""
    return value if type(value) is int and 0 < value < _MOST else 0


def number(value: Any) -> float:
    """A rate, 0 where it is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < _MOST and math.isfinite(value) else 0.0


class WholeCharacters:
    """Text that comes in parts, between which some servers cut characters in half."""

    def __init__(self) -> None:
        self._half = ""

    def push(self, text: str) -> str:
        """What is whole by now."""
        text = self._half + text
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return clean_text(text[:-1] if self._half else text)

    def flush(self) -> str:
        """What is left of one that was never completed."""
        half, self._half = self._half, ""
        return clean_text(half)


def parts_of(message: Mapping[str, Any]) -> tuple[str, str]:
    """Reasoning and text as they came; who knows several names for reasoning sends it by each."""
    thoughts = (message.get(name) for name in _REASONING)
    reasoning = next((each for each in thoughts if isinstance(each, str) and each), "")
    content = message.get("content") or message.get("refusal")
    if isinstance(content, list):
        reasoning += "".join(_thought(part) for part in content)
        content = "".join(_text(part) for part in content)
    return reasoning, content if isinstance(content, str) else ""


def _thought(part: Any) -> str:
    thought = part.get("thinking") if isinstance(part, Mapping) else None
    if isinstance(thought, list):
        return "".join(map(_text, thought))
    return thought if isinstance(thought, str) else ""


def _text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else ""


def counts_of(usage: Mapping[str, Any], timings: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Tokens of the prompt, of the answer, of the cache, and of reasoning inside the answer."""
    n_cached = count(_within(usage, "prompt_tokens_details", "cached_tokens"))
    n_cached = n_cached or count(timings.get("cache_n"))
    n_prompt = count(usage.get("prompt_tokens"))
    n_prompt = n_prompt or (count(timings.get("prompt_n")) + n_cached)
    n_new = count(usage.get("completion_tokens")) or count(timings.get("predicted_n"))
    n_reasoning = count(_within(usage, "completion_tokens_details", "reasoning_tokens"))
    return n_prompt, n_new, min(n_cached, n_prompt), min(n_reasoning, n_new)


def context_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    """The context length of a listed model, and the one that it was trained for."""
    n_ctx = count(_within(entry, "meta", "n_ctx"))
    found = n_ctx or next(filter(None, (count(entry.get(name)) for name in _LENGTHS)), 0)
    return found, count(_within(entry, "meta", "n_ctx_train"))


def _within(outer: Mapping[str, Any], name: str, inner: str) -> Any:
    value = outer.get(name)
    return value.get(inner) if isinstance(value, Mapping) else None
