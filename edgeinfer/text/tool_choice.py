"""Which of the tools of a request may be called, and whether one of them must be.

Knows nothing of how models spell calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from edgeinfer.errors import InvalidRequestError
from edgeinfer.parameters import shown
from edgeinfer.text.tools import Tool

Tools: TypeAlias = "Sequence[Mapping[str, Any]]"

_WORDS = {"auto": False, "required": True, "any": True}


class ToolChoice(NamedTuple):
    """`told` are the tools that the model is told of, `callable` those that it may call.

    One must be called where that `is_required`, and no second one where it `is_single`, as the
    choice of one tool by its name is.
    """

    told: list[dict[str, Any]]
    callable: list[Mapping[str, Any]]
    is_required: bool
    is_single: bool

    @classmethod
    def of(cls, tools: Tools, choice: Any = None, parallel: bool | None = None) -> ToolChoice:
        """`choice` is "auto", "none", "required", or an object with the name of a tool."""
        if parallel is not None and not isinstance(parallel, bool):
            raise InvalidRequestError(
                f"parallel_tool_calls is {shown(parallel)}; it must be True or False",
                param="parallel_tool_calls",
            )
        if isinstance(choice, str) and choice == "none":
            return cls([], [], False, False)
        names, is_required = _read(choice)
        callable = [t for t in tools if _name(t) and (names is None or _name(t) in names)]
        for name in names or ():
            if name not in map(_name, callable):
                raise InvalidRequestError(
                    f"tool_choice names {shown(name)}, which is no tool", param="tool_choice"
                )
        if is_required and not callable:
            raise InvalidRequestError(
                "tool_choice asks for a call, and there is no function to call; give tools",
                param="tool_choice",
            )
        is_single = parallel is False or (is_required and names is not None and len(names) == 1)
        return cls([_told(tool) for tool in tools], callable, is_required, is_single)

    @property
    def is_strict(self) -> bool:
        """Whether what is called must be called by its schema."""
        return any(is_strict(tool) for tool in self.callable)

    @property
    def is_free(self) -> bool:
        """Whether the model may write what it likes."""
        is_narrowed = len(self.callable) < len(self.told)
        return not (self.is_required or self.is_strict or is_narrowed)


def is_strict(tool: Mapping[str, Any]) -> bool:
    function = tool.get("function")
    inner = function.get("strict") if isinstance(function, Mapping) else None
    return bool(inner or tool.get("strict"))


def _read(choice: Any) -> tuple[list[str] | None, bool]:
    """The names of the tools, None for all, and whether one is called in any case."""
    if choice is None:
        return None, False
    if isinstance(choice, str) and choice in _WORDS:
        return None, _WORDS[choice]
    if isinstance(choice, Mapping):
        kind = choice.get("type", "function")
        inner = choice.get(kind) if isinstance(kind, str) else None
        inner = inner if isinstance(inner, Mapping) else choice
        if kind == "allowed_tools":
            return _allowed(inner), inner.get("mode") == "required"
        if kind in ("function", "custom", "tool") and isinstance(inner.get("name"), str):
            return [inner["name"]], True
    raise InvalidRequestError(
        f"tool_choice is {shown(choice)}; it must be 'auto', 'none', 'required', or an object "
        "with the name of a function",
        param="tool_choice",
    )


def _allowed(choice: Mapping[str, Any]) -> list[str]:
    """The names of those that `allowed_tools` lists; hosted ones, which have none, are no tools."""
    if (mode := choice.get("mode")) not in ("auto", "required"):
        raise InvalidRequestError(
            f"tool_choice.mode is {shown(mode)}; it must be 'auto' or 'required'",
            param="tool_choice.mode",
        )
    tools = choice.get("tools")
    if not isinstance(tools, list) or not tools or not all(isinstance(t, Mapping) for t in tools):
        raise InvalidRequestError(
            f"tool_choice.tools is {shown(tools)}; it must be a list of tools, such as "
            "{'type': 'function', 'name': NAME}",
            param="tool_choice.tools",
        )
    named = (each["custom"] if isinstance(each.get("custom"), Mapping) else each for each in tools)
    return [name for each in named if (name := _name(each))]


def _name(tool: Mapping[str, Any]) -> str:
    found = Tool.of(tool)
    return found.name if found is not None else ""


def _told(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What a template is told of a tool: no model was taught what `strict` means."""
    told = {key: value for key, value in tool.items() if key != "strict"}
    if isinstance(function := tool.get("function"), Mapping):
        told["function"] = {key: value for key, value in function.items() if key != "strict"}
    return told
