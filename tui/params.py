"""The sampling parameters that can be changed during a chat.

Knows nothing of widgets.
"""

from __future__ import annotations

from typing import Any

from edgeinfer import ANSWER

PARAMS = tuple(
    ANSWER[name]
    for name in (
        "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "max_tokens", "seed",
        "overflow", "logprobs",
    )
)  # fmt: skip


def parse_param(name: str, text: str) -> Any:
    """The value of a parameter, None for an empty text; ValueError says what is possible."""
    param = next((param for param in PARAMS if param.name == name), None)
    if param is None:
        raise ValueError(f"no parameter {name}; there are {', '.join(p.name for p in PARAMS)}")
    text = text.strip()
    return param.parse(text, in_form=True) if text.lower() not in ("", "default") else None
