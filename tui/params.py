"""The sampling parameters that can be changed during a chat.

Knows nothing of widgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Param:
    """A keyword of the API, and the range it makes sense in."""

    name: str
    type: Callable[[str], Any]
    least: float
    most: float
    help: str


def _overflow(text: str) -> str:
    if text not in ("drop-turns", "slide", "error"):
        raise ValueError("overflow is drop-turns, slide (forget the oldest tokens) or error")
    return text


PARAMS = (
    Param("temperature", float, 0, 5, "0 always takes the likeliest word, 1 is lively"),
    Param("top_k", int, 0, 1_000_000, "choose among the k likeliest; 0: all"),
    Param("top_p", float, 0, 1, "choose among those that make up this share"),
    Param("min_p", float, 0, 1, "leave out what is less likely than this share of the first"),
    Param("repeat_penalty", float, 0, 10, "above 1 makes repetition less likely"),
    Param("max_tokens", int, 1, 10_000_000, "end an answer after so many tokens"),
    Param("seed", int, 0, 2**63, "the same number gives the same answer"),
    Param("overflow", _overflow, 0, 0, "drop-turns, slide or error, when the context is full"),
    Param("logprobs", int, 0, 20, "keep the n likeliest tokens; p shows them"),
)


def parse_param(name: str, text: str) -> Any:
    """The value of a parameter, None for an empty text; ValueError says what is possible."""
    param = next((param for param in PARAMS if param.name == name), None)
    if param is None:
        raise ValueError(f"no parameter {name}; there are {', '.join(p.name for p in PARAMS)}")
    if not text.strip() or text.strip().lower() == "default":
        return None
    try:
        value = param.type(text.strip())
    except ValueError:
        if param.type is _overflow:
            raise
        kind = "a whole number" if param.type is int else "a number"
        raise ValueError(f"{name} is {kind}, {text!r} is not") from None
    if isinstance(value, (int, float)) and not param.least <= value <= param.most:
        raise ValueError(f"{name} is between {param.least:g} and {param.most:g}")
    return value
