"""An answer as the blocks that some APIs make of it: reasoning, text and calls, in their order.

Knows nothing of how an API spells them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from edgeinfer.results import Delta
from edgeinfer.text.lenient_json import mended

Kind: TypeAlias = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """A run of one kind; `name` is that of a tool, and the text its arguments."""

    kind: Kind
    index: int
    name: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Change(NamedTuple):
    """What becomes of a block: it is begun, has more text, or is whole."""

    kind: Literal["begin", "more", "end"]
    block: Block
    text: str = ""


class Blocks:
    """The blocks of one answer, from its deltas."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._is_open = False

    def add(self, delta: Delta) -> list[Change]:
        changes: list[Change] = []
        if delta.reasoning:
            changes += self._more("reasoning", delta.reasoning)
        if delta.text:
            changes += self._more("text", delta.text)
        if delta.call is not None:
            if delta.call.name:
                changes += [*self.finish(), self._begin("call", delta.call.name)]
            if delta.call.arguments:
                changes += self._more("call", delta.call.arguments)
        return changes

    def finish(self) -> list[Change]:
        """The last block, if one is open, is whole."""
        if not self._is_open:
            return []
        self._is_open = False
        return [Change("end", self.all[-1])]

    def _more(self, kind: Kind, text: str) -> list[Change]:
        changes: list[Change] = []
        if not (self._is_open and self.all[-1].kind == kind):
            changes = [*self.finish(), self._begin(kind)]
        block = self.all[-1]
        block.parts.append(text)
        return [*changes, Change("more", block, text)]

    def _begin(self, kind: Kind, name: str = "") -> Change:
        self.all.append(Block(kind, len(self.all), name))
        self._is_open = True
        return Change("begin", self.all[-1])


def arguments_object(text: str) -> dict[str, Any]:
    """The arguments of a call as an object, also of one that was cut off."""
    value = json.loads(mended(text or "{}"))
    return value if isinstance(value, dict) else {}
