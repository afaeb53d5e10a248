"""A grammar for llguidance while it is written: rules of its dialect of Lark, one by one.

Knows nothing of calls or schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from edgeinfer.text.grammar import with_options

ControlId: TypeAlias = Callable[[str], "int | None"]

_ANY = "/(?s:.*)/"


class Rules:
    """Rules and terminals. `controls` are texts that may be control tokens, `control_id` says it.

    No regular expression matches a control token: texts are told from those, literals split at
    them.
    """

    def __init__(self, controls: Iterable[str], control_id: ControlId) -> None:
        known = {text: id for text in controls if (id := control_id(text)) is not None}
        self._ids = known
        longest_first = sorted(known, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._lines: list[str] = []

    def rule(self, body: str, *, lazy: bool = False) -> str:
        """The name of a new rule."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def terminal(self, body: str) -> str:
        name = f"T{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def reserve(self) -> str:
        """The name of a rule that may name itself; `define` says what it is."""
        self._lines.append("")
        return f"r{len(self._lines) - 1}"

    def define(self, name: str, body: str) -> None:
        self._lines[int(name[1:])] = f"{name}: {body}"

    def text(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {start}", *self._lines, ""])

    def is_control(self, text: str) -> bool:
        return text in self._ids

    def say(self, text: str) -> str:
        """A literal."""
        said, end = [], 0
        for match in self._controls.finditer(text):
            if text[end : match.start()]:
                said.append(quoted(text[end : match.start()]))
            said.append(f"<[{self._ids[match[0]]}]>")
            end = match.end()
        if text[end:]:
            said.append(quoted(text[end:]))
        return " ".join(said)

    def until(self, close: str, without: Sequence[str] = (), body: str = _ANY) -> str:
        """Text that a terminal's `body` matches, then `close`, which it does not hold.

        Nor does it hold any of `without`; what is spelled like a control token counts, too.
        """
        match = self._controls.search(close)
        if match is None:
            kept = text_without(without, body)
            return self.rule(self.terminal(f"({kept}) {quoted(close)}"), lazy=True)
        before = close[: match.start()]
        kept = text_without([close, *without], body)
        begun = self.terminal(f"({kept}) {quoted(before)}" if before else kept)
        return f"{begun} {self.say(close[match.start() :])}"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def text_without(without: Sequence[str], body: str = _ANY) -> str:
    """A terminal's body: what `body` matches and holds none of some texts."""
    if not without:
        return body
    found = "|".join(map(exactly, without))
    return f"{body} & ~/(?s:.*)({found})(?s:.*)/"


def exactly(text: str) -> str:
    """The regular expression of a text."""
    return re.sub(r"[^0-9A-Za-z_]", lambda match: f"\\x{{{ord(match[0]):x}}}", text)


def json_of(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """JSON by a schema; `lenient` leaves out what llguidance does not know of it."""
    return "%json " + json.dumps(with_options(schema, lenient=lenient))
