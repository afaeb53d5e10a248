"""Prompts of agents that begin alike: what changes with each request stands behind the history.

A system message with a counter in it would have every turn read all of the conversation again.
Knows nothing of APIs or of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgeinfer.server.errors import Json
from edgeinfer.text.messages import reminder_of

# Lines that say nothing to a model: a client's header of its own, with a number for each request.
_MEANINGLESS = re.compile(r"x-anthropic-billing-header:", re.IGNORECASE)
_LONGEST = 200  # characters of a line that tells a number; instructions are longer
_MOST_LINES = 20_000  # that are looked at: more would hold up other requests
_CHANGING = (
    # "Token usage: 1234/200000; 198766 remaining", "You have 1,234 tokens left."
    re.compile(r"(?=.*\d)(.*\b(token usage|tokens? (left|remaining)|remaining tokens?)\b)", re.I),
    # "Current time is 12:34:56."
    re.compile(r"\W*(the )?(current|local) (date and )?time\b.*\d:\d\d", re.I),
)


def steady(messages: Sequence[Json]) -> list[Json]:
    """The same conversation with the changing lines of its system message after its last turn."""
    found = list(messages)
    if not found or found[0]["role"] not in ("system", "developer"):
        return found
    kept, moved = _sorted_out(found[0].get("content"))
    if kept is None:
        return found
    if moved and (len(found) == 1 or found[-1]["role"] == "assistant"):
        return found  # there is no turn that it could follow
    if kept.strip():
        found[0] = {**found[0], "content": kept}
    elif len(found) > 1:
        del found[0]
    if moved:
        reminder = reminder_of("\n".join(moved))
        content = found[-1].get("content") or ""
        found[-1] = {**found[-1], "content": f"{content}\n\n{reminder}" if content else reminder}
    return found


def _sorted_out(content: object) -> tuple[str | None, list[str]]:
    """The text without such lines, None where it has none; and those to be told later."""
    if not isinstance(content, str) or content.count("\n") > _MOST_LINES:
        return None, []
    kept: list[str] = []
    moved: list[str] = []
    lines = content.split("\n")
    for line in lines:
        if _MEANINGLESS.match(line):
            continue
        if len(line) <= _LONGEST and any(each.match(line) for each in _CHANGING):
            moved.append(line.strip())
        else:
            kept.append(line)
    if len(kept) == len(lines):
        return None, []
    return "\n".join(kept).strip("\n"), moved
