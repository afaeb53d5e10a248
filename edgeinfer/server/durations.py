"""How long a model is to stay loaded, as Ollama's clients say it: seconds, or "1h30m"."""

from __future__ import annotations

import math
import re

from edgeinfer.server.fields import Fields

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_MOST = 1e9  # seconds: as good as for ever, and what clocks can still add


def keep_alive(body: Fields) -> float | None:
    """Seconds; None where the model is to stay until its memory is needed.

    Whoever calls has seen that the field is there.
    """
    given = body.get("keep_alive")
    seconds = given
    if isinstance(given, str):
        seconds = _seconds(given)
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or seconds != seconds:
        raise body.wrong("keep_alive", 'seconds or a duration such as "5m", "1h30m", -1 (for ever)')
    return None if seconds < 0 or seconds > _MOST else float(seconds)


def _seconds(text: str) -> float:
    """NaN where it is no duration."""
    bare = text.strip()
    sign = -1.0 if bare.startswith("-") else 1.0
    bare = bare[1:] if bare.startswith(("+", "-")) else bare
    if re.fullmatch(r"[0-9]{1,12}", bare):
        return sign * int(bare)
    parts = _PART.findall(bare)
    if not parts or "".join(number + unit for number, unit in parts) != bare:
        return math.nan
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
