"""Chat messages: their form, checked once where they come in.

Knows nothing of template engines or tokens.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypedDict, cast

from edgeinfer.errors import InvalidRequestError
from edgeinfer.parameters import shown

_DEEPEST = 100
_MOST_VALUES = 1 << 20  # of a message, or of all tools; bodies of requests have no more
_MOST_BITS = 4096  # of an integer: Python writes none of over 4,300 digits


class _Turn(TypedDict):
    role: str
    content: str | Sequence[Mapping[str, Any]] | None


class Message(_Turn, total=False):
    """One turn, in the form that chat APIs share."""

    reasoning_content: str
    name: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str


class Conversation(NamedTuple):
    """What a template gets: plain copies, checked once where they come in, never what was given."""

    messages: list[dict[str, Any]]  # each with a role, and text as its content
    tools: list[Any]
    arguments: dict[str, Any]  # what else a template is told, by name
    continues: bool = False  # whether an answer goes on with the last message, the assistant's

    def first(self, n: int) -> Conversation:
        """Its first n messages."""
        continues = self.continues and n >= len(self.messages)
        return self._replace(messages=self.messages[:n], continues=continues)

    def with_last_ending(self, mark: str) -> Conversation:
        """The same with a mark where an answer is to go on, as a conversation that is whole."""
        *before, last = self.messages
        last = {**last, "content": last["content"] + mark}
        return self._replace(messages=[*before, last], continues=False)

    @classmethod
    def of(
        cls,
        messages: Iterable[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        continues: bool = False,
    ) -> Conversation:
        """InvalidRequestError says what they lack."""
        found = _messages(messages)
        if continues and not can_go_on(found):
            raise _wrong("the last message is not the assistant's text, which could be continued")
        return cls(found, _tools(tools), _arguments(arguments), continues)

    def with_tools_told(self) -> Conversation:
        """The same with tools in a system message, for a template that does not tell of them."""
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in self.tools)
        told = {"role": "system", "content": _TOLD.format(listed)}
        first, *rest = self.messages
        if first["role"] in ("system", "developer"):
            told["content"] = f"{first['content']}\n\n{told['content']}"
        else:
            rest = self.messages
        return self._replace(messages=[told, *rest], tools=[])


def can_go_on(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is the assistant's, and text that an answer may continue."""
    last = messages[-1] if messages else {}
    return last.get("role") == "assistant" and not last.get("tool_calls")


_TOLD = """\
You may call functions. These are their signatures, one JSON object a line:
{}
To call one, reply with nothing but its name and its arguments as JSON, in this form:
<tool_call>
{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}
</tool_call>"""


def _messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    listed = _listed(messages)
    if listed is None:
        raise _wrong(
            f"messages is of type {_kind(messages)}; a list with at least one message is needed"
        )
    found = [_checked(message, i) for i, message in enumerate(listed)]
    if not found:
        raise _wrong("messages are empty; a chat needs at least one message")
    return found


def _tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any]:
    listed = _listed(() if tools is None else tools)
    if listed is None:
        raise _wrong("tools are not a list of objects", "tools")
    found = []
    for tool in listed:  # however many there are: the first that is none is enough
        if not isinstance(tool, Mapping):
            raise _wrong("a tool is not an object", "tools")
        found.append(tool)
    return cast("list[Any]", plain(found, "tools"))


def _listed(given: Any) -> Iterator[Any] | None:
    """What to go through, None for what is no list; of no dimension, NumPy's arrays are none."""
    if isinstance(given, (str, bytes, Mapping)):
        return None
    try:
        items: Iterator[Any] = iter(given)
    except TypeError:
        return None
    return items


_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


def _arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise _wrong(
            f"template_args is {shown(given)}; it must be a mapping of names to values",
            "template_args",
        )
    for name in given:
        if name in _RESERVED:
            raise _wrong(f"{name!r} can't be a template argument", "template_args")
    return cast("dict[str, Any]", plain(given, "template_args"))


def _checked(message: Any, i: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(
            f"message {i} is of type {_kind(message)}; a mapping with role and content is needed"
        )
    if not isinstance(message.get("role"), str):
        raise _wrong(f"message {i} has no role; it is text, such as 'user'")
    said = {key: each for key, each in message.items() if not _is_nothing(key, each)}
    known = plain({**said, "content": _joined(message.get("content"), i)}, "messages")
    calls = known.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, (list, tuple))
        and all(isinstance(c, dict) and isinstance(c.get("function", c), dict) for c in calls)
    ):
        raise _wrong(
            f"message {i} has tool_calls that are no list of objects, each of a function that is "
            "an object"
        )
    return cast("dict[str, Any]", known)


def _is_nothing(key: Any, value: Any) -> bool:
    """What clients write where a message has no such thing: templates look whether it is there."""
    is_empty = isinstance(value, (list, tuple)) and not value
    return value is None or (key == "tool_calls" and is_empty)


def plain(value: Any, param: str) -> Any:
    """A copy of dicts, lists, tuples, text, numbers, booleans and None: what a template can get."""
    return _Copy(param).of(value)


class _Copy:
    """Of one value: what it holds twice is in the copy twice, and counts as often."""

    def __init__(self, param: str) -> None:
        self._param, self._n_left = param, _MOST_VALUES

    def of(self, value: Any, depth: int = 0) -> Any:
        param, deeper = self._param, depth + 1
        self._n_left -= 1
        if self._n_left < 0:
            raise _wrong(f"{param} hold over {_MOST_VALUES:,} values", param)
        if value is None or type(value) in (str, float, bool):
            return value
        if type(value) is int:
            if value.bit_length() > _MOST_BITS:
                raise _wrong(f"{param} hold an integer of over {_MOST_BITS} bits", param)
            return value
        if depth > _DEEPEST:
            raise _wrong(f"{param} are nested over {_DEEPEST} deep", param)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, Mapping):
            keys = [self.of(key, deeper) for key in value]
            if any(isinstance(key, (dict, list, tuple)) for key in keys):
                raise _wrong(f"{param} hold an object with a key that is no text", param)
            items = [self.of(item, deeper) for item in value.values()]
            return dict(zip(keys, items, strict=True))
        if isinstance(value, tuple):
            return tuple(self.of(item, deeper) for item in value)
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
            return [self.of(item, deeper) for item in value]
        for convert in (operator.index, float):
            with suppress(TypeError, ValueError, OverflowError):
                return self.of(convert(value), depth)
        raise _wrong(
            f"{param} hold a value of type {_kind(value)}; text, numbers, lists and objects work",
            param,
        )


def _wrong(message: str, param: str = "messages") -> InvalidRequestError:
    return InvalidRequestError(message, param=param)


def _kind(value: object) -> str:
    return type(value).__name__


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a checked message, its calls of tools included."""
    return "\n".join([message["content"], *spelled_calls(message.get("tool_calls") or ())])


def _joined(content: Any, i: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"message {i} has content of type {kind!r}; text is supported", param="messages"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def spelled_calls(calls: Sequence[Any]) -> list[str]:
    """Calls as text, for a template that would leave them out."""
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    kept = [{k: f[k] for k in ("name", "arguments") if k in f} for f in functions]
    return [f"<tool_call>{json.dumps(f, ensure_ascii=False)}</tool_call>" for f in kept]


def reminder_of(text: str) -> str:
    """What the system says in the middle of a conversation, told apart from its user's words."""
    return f"<system-reminder>\n{text}\n</system-reminder>"
