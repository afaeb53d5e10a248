"""What can follow what is being typed: slash commands, their arguments, file names after @.

Knows nothing of widgets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edgeinfer.tui.files import FoundFile

# A name with spaces stands between quotes, where a backslash comes before each of its own.
_NAME_AT_END = re.compile(r"(?:^|\s)@(?:\"((?:[^\"\\]|\\.)*)|((?!\")\S*))$")
_NAME = re.compile(r"(?:^|\s)@(?:\"((?:[^\"\\]|\\.)+)\"|((?!\")\S+))(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Candidate:
    """`text` replaces what stands between `start` and the cursor on the cursor's line."""

    label: str
    help: str
    text: str
    start: int
    file: FoundFile | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """Where candidates come from; there may be more of them while files are looked for."""

    commands: tuple[tuple[str, str], ...]
    arguments: Callable[[str], list[tuple[str, str]]]
    files: Callable[[str], list[FoundFile]]
    was_early: Callable[[], bool] = lambda: False
    file: Callable[[str], FoundFile] = lambda name: FoundFile(name, name)


def complete(line: str, is_first_line: bool, sources: Sources) -> list[Candidate]:
    """Candidates for a line up to the cursor."""
    if is_first_line and line.startswith("/"):
        name, space, argument = line[1:].partition(" ")
        if not space:
            found = [each for each in sources.commands if each[0].startswith(name.lower())]
            found.sort(key=lambda each: each[0] != name.lower())  # Enter is for what is written
            return [Candidate(f"/{command}", help, f"/{command} ", 0) for command, help in found]
        start = len(line) - len(argument)
        values = sources.arguments(name.lower())
        if any(argument == value.strip() for value, _ in values):
            return []
        return [
            Candidate(value, help, value, start)
            for value, help in values
            if argument.lower() in value.lower()
        ][:8]
    at = _NAME_AT_END.search(line)
    if at is None:
        return []
    start = line.index("@", at.start())
    return [_file_candidate(file, start) for file in sources.files(_unquoted(at))]


def written_names(text: str) -> list[str]:
    """What stands after an @ as a name of a file does, a sentence's marks left off."""
    found = [(_unquoted(at), at[1] is None) for at in _NAME.finditer(text)]
    return [name.rstrip(".,;:!?)") if is_bare else name for name, is_bare in found]


def _unquoted(at: re.Match[str]) -> str:
    return at[2] if at[1] is None else re.sub(r'\\(["\\])', r"\1", at[1])


def _file_candidate(file: FoundFile, start: int) -> Candidate:
    """A file ends the name; what follows in a folder can be chosen next."""
    text = mention(file.name)
    if file.is_folder:
        return Candidate(text, "", text.removesuffix('"'), start)
    return Candidate(text, "", f"{text} ", start, file)


def mention(name: str) -> str:
    """How a file is named in a message: between quotes where it could not be told from the text."""
    if name and not re.search(r'[\s"]', name):
        return f"@{name}"
    escaped = re.sub(r'(["\\])', r"\\\1", name)
    return f'@"{escaped}"'


def mentioned(text: str, names: Iterable[str]) -> set[str]:
    """Those names that a message mentions; of two that begin alike, the longer one."""
    by_mention = {mention(name): name for name in names}
    if not by_mention:
        return set()
    longest_first = sorted(by_mention, key=len, reverse=True)
    found = re.findall("|".join(map(re.escape, longest_first)), text)
    return {by_mention[each] for each in found}
