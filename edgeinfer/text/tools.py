"""The tools of a request, and how the calls of them in a reply become deltas.

Knows nothing of how models spell calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from edgeinfer.results import CallDelta, Delta, ToolCall


class NotACall(Exception):
    """What looked like a call is none: it is text."""


class Enough(Exception):
    """There is a call, and no more are wanted."""


class Tool(NamedTuple):
    """A function that a model may call; `properties` are the schemas of its parameters."""

    name: str
    properties: Mapping[str, Any]

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> Tool | None:
        """From the form that templates take, None where that has no name."""
        function = tool.get("function", tool)
        function = function if isinstance(function, Mapping) else {}
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not name:
            return None
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        return cls(name, properties if isinstance(properties, Mapping) else {})

    def takes_text(self, parameter: str) -> bool:
        """Whether a parameter is text and nothing else."""
        schema = self.properties.get(parameter)
        return isinstance(schema, Mapping) and schema.get("type") == "string"


class Calls:
    """The deltas of a reply. A call is told of when its arguments begin, up to `most` calls.

    `on_done` is called after each that is whole: what it was read from must not be read again.
    Where a reply `has_text` not, what would be is the beginning of a call that was cut off.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        most: int | None = None,
        on_done: Callable[[], None] = lambda: None,
        has_text: bool = True,
    ) -> None:
        found = filter(None, map(Tool.of, tools))
        self.tools = {tool.name: tool for tool in found}
        self._most, self._on_done, self._has_text = most, on_done, has_text
        self.done: list[ToolCall] = []
        self._deltas: list[Delta] = []
        self._name = ""
        self._arguments: list[str] = []

    @property
    def is_open(self) -> bool:
        return bool(self._name)

    @property
    def is_full(self) -> bool:
        return self._most is not None and len(self.done) >= self._most

    def find(self, name: str) -> Tool:
        """A tool by the name that a model gives it; NotACall if there is none."""
        name = name.strip()
        if name not in self.tools:
            name = name.removeprefix("functions.")
        if name not in self.tools:
            raise NotACall
        return self.tools[name]

    def begin(self, tool: Tool) -> None:
        if self.is_full:
            raise Enough
        self._name, self._arguments = tool.name, []
        self._deltas.append(Delta(call=CallDelta(index=len(self.done), name=tool.name)))

    def write(self, arguments: str) -> None:
        """More of the JSON of the open call's arguments."""
        if arguments:
            self._arguments.append(arguments)
            delta = CallDelta(index=len(self.done), arguments=arguments)
            self._deltas.append(Delta(call=delta))

    def finish(self) -> None:
        """The call that is open, if one is, has all it will have."""
        if self._name:
            self.done.append(ToolCall(name=self._name, arguments="".join(self._arguments)))
            self._name = ""
            self._on_done()

    def text(self, text: str) -> None:
        if text and self._has_text and not self.is_full:
            self._deltas.append(Delta(text=text))

    def reasoning(self, text: str) -> None:
        if text:
            self._deltas.append(Delta(reasoning=text))

    def take(self) -> list[Delta]:
        """The deltas since the last time; neighbours of one kind are one."""
        found: list[Delta] = []
        for delta in self._deltas:
            if found and (joined := _joined(found[-1], delta)) is not None:
                found[-1] = joined
            else:
                found.append(delta)
        self._deltas = []
        return found


def _joined(a: Delta, b: Delta) -> Delta | None:
    if a.call is not None and b.call is not None and a.call.index == b.call.index:
        arguments = a.call.arguments + b.call.arguments
        return Delta(call=CallDelta(index=a.call.index, name=a.call.name, arguments=arguments))
    if a.text and b.text:
        return Delta(text=a.text + b.text)
    if a.reasoning and b.reasoning:
        return Delta(reasoning=a.reasoning + b.reasoning)
    return None


class Members:
    """Writes the arguments of a call whose format gives them one by one, not as JSON."""

    def __init__(self, calls: Calls, tool: Tool) -> None:
        self._calls, self._tool = calls, tool
        self._separator = "{"
        calls.begin(tool)

    def begin(self, name: str) -> bool:
        """Start a member; whether its value is text, to be written as it comes."""
        key = json.dumps(name, ensure_ascii=False)
        self._calls.write(f"{self._separator}{key}: ")
        self._separator = ", "
        return self._tool.takes_text(name)

    def write_text(self, text: str) -> None:
        """More of a text, which the caller puts between quotes."""
        self._calls.write(json.dumps(text, ensure_ascii=False)[1:-1])

    def write(self, json_text: str) -> None:
        self._calls.write(json_text)

    def finish(self) -> None:
        self._calls.write("{}" if self._separator == "{" else "}")
        self._calls.finish()
