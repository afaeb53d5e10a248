"""What can follow what is being typed: slash commands, their arguments, file names after @.

Knows nothing of widgets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from edgeinfer.tui.files import match

_WORD_AT_END = re.compile(r"(?:^|\s)@(\S*)$")


@dataclass(frozen=True, slots=True)
class Candidate:
    """`text` replaces what stands between `start` and the cursor on the cursor's line."""

    label: str
    help: str
    text: str
    start: int
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """Where candidates come from."""

    commands: tuple[tuple[str, str], ...]
    arguments: Callable[[str], list[tuple[str, str]]]
    files: Callable[[], list[str]]


def complete(line: str, is_first_line: bool, sources: Sources) -> list[Candidate]:
    """Candidates for a line up to the cursor."""
    if is_first_line and line.startswith("/"):
        name, space, argument = line[1:].partition(" ")
        if not space:
            return [
                Candidate(f"/{command}", help, f"/{command} ", 0)
                for command, help in sources.commands
                if command.startswith(name.lower())
            ]
        start = len(line) - len(argument)
        return [
            Candidate(value, help, value, start)
            for value, help in sources.arguments(name.lower())
            if argument.lower() in value.lower() and argument != value
        ][:8]
    found = _WORD_AT_END.search(line)
    if found is None:
        return []
    start = len(line) - len(found[1]) - 1
    names = match(found[1], sources.files())
    return [Candidate(f"@{name}", "", f"@{name} ", start, name) for name in names]
