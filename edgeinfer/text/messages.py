"""Chat messages: their form, and how to fit them to what a template can do.

Knows nothing of template engines or tokens.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypedDict, cast

from edgeinfer.errors import InvalidRequestError
from edgeinfer.parameters import shown

_DEEPEST = 100
_MOST_MENDED = 1 << 16  # characters of arguments, which are read one by one
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


class Capabilities(NamedTuple):
    """What a template can do with a conversation, found by rendering some."""

    system_role: bool
    string_content: bool
    typed_content: bool
    tools: bool
    tool_calls: bool
    tool_results: bool
    object_arguments: bool


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
    known = plain({**message, "content": _joined(message.get("content"), i)}, "messages")
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
    return "\n".join([message["content"], *_spelled(message.get("tool_calls") or ())])


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


def fit(
    messages: list[dict[str, Any]], can: Capabilities, source: str, *, tells_odd_calls: bool = False
) -> list[dict[str, Any]]:
    """The messages as a template of such capabilities takes them.

    Where it `tells_odd_calls`, those with arguments that are no object are text.
    """
    messages = [dict(message) for message in messages]
    for message in messages:
        if message["role"] == "developer" and "developer" not in source:
            message["role"] = "system"
        if message["role"] == "tool" and not can.tool_results:
            message["role"] = "user"
        calls = message.get("tool_calls")
        if isinstance(calls, Sequence) and calls:
            calls = [_with_arguments(c, can.object_arguments or not can.tool_calls) for c in calls]
            message["tool_calls"] = calls
            is_told = tells_odd_calls and any(map(_is_odd, calls))
            if is_told or not can.tool_calls:
                message["content"] = "\n".join(filter(None, [message["content"], *_spelled(calls)]))
            if is_told:
                del message["tool_calls"]
    if not can.system_role:
        messages = _system_folded(messages)
    if can.typed_content and not can.string_content:
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


def _with_arguments(call: Any, as_object: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], as_object)}
    arguments = call.get("arguments")
    if as_object and isinstance(arguments, str):
        return {**call, "arguments": _value_of(arguments)}
    if not as_object and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def _value_of(arguments: str) -> Any:
    """The value that a text is, or was meant to be; what can be no object stays text.

    A call that was cut off comes back with each request that follows.
    """
    with suppress(ValueError, RecursionError):
        return plain(json.loads(arguments or "{}"), "messages")
    if arguments.lstrip().startswith("{") and len(arguments) <= _MOST_MENDED:
        from edgeinfer.text.lenient_json import mended  # most calls need none

        with suppress(ValueError, RecursionError):  # of no sane depth
            return plain(json.loads(mended(arguments)), "messages")
    return arguments


def _is_odd(call: Any) -> bool:
    """Whether a call has arguments that are no object."""
    return not isinstance(call.get("function", call).get("arguments"), Mapping)


def _spelled(calls: Sequence[Any]) -> list[str]:
    """Calls as text, for a template that would leave them out."""
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    kept = [{k: f[k] for k in ("name", "arguments") if k in f} for f in functions]
    return [f"<tool_call>{json.dumps(f, ensure_ascii=False)}</tool_call>" for f in kept]


def reminder_of(text: str) -> str:
    """What the system says in the middle of a conversation, told apart from its user's words."""
    return f"<system-reminder>\n{text}\n</system-reminder>"


def late_system_folded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System messages behind others as the user's, in their places: what is before them stays."""
    n_front = _n_front(messages)
    return messages[:n_front] + [
        {**m, "role": "user", "content": reminder_of(m["content"])}
        if m["role"] == "system" and isinstance(m["content"], str)
        else m
        for m in messages[n_front:]
    ]


def _n_front(messages: list[dict[str, Any]]) -> int:
    """Of the system's, before any other."""
    return next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))


def _system_folded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system text moved to the front of the first user message."""
    messages = late_system_folded(messages)
    n_front = _n_front(messages)
    system = [m["content"] for m in messages[:n_front]]
    rest = [dict(m) for m in messages[n_front:]]
    if not system:
        return rest
    user = next((m for m in rest if m["role"] == "user"), None)
    if user is None:
        return [{"role": "user", "content": "\n".join(system)}, *rest]
    user["content"] = "\n".join([*system, user["content"]])
    return rest


def by_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if any(not isinstance(m["content"], str) for m in messages):
        return messages
    turns: list[dict[str, Any]] = []
    for message in _system_folded(messages):
        if turns and message["role"] == turns[-1]["role"] and message["role"] != "tool":
            content = f"{turns[-1]['content']}\n\n{message['content']}"
            turns[-1] = {**turns[-1], **message, "content": content}
        else:
            turns.append(dict(message))
    return turns


def probe(attempt: Callable[..., str]) -> Capabilities:
    needle, found = "needle-7f3a", "found-5c1e"
    user = {"role": "user", "content": "hello"}
    part = {"type": "text", "text": needle}
    typed = attempt([{"role": "user", "content": [part]}])
    function = {"name": "look", "arguments": {"word": needle}}
    call = {"id": "call00001", "type": "function", "function": function}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call00001", "name": "look", "content": found}
    called = attempt([user, turn, result])
    as_text = {**call, "function": {**function, "arguments": json.dumps({"word": needle})}}
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    tool = {"name": needle, "description": "looks", "parameters": schema}
    # A template that prints Python's own form of a value has not understood it.
    by_object = needle in called and "{'word'" not in called
    by_text = attempt([user, {**turn, "tool_calls": [as_text]}, result])
    return Capabilities(
        system_role=needle in attempt([{"role": "system", "content": needle}, user]),
        string_content=needle in attempt([{"role": "user", "content": needle}]),
        typed_content=needle in typed and "'text'" not in typed and '"text"' not in typed,
        tools=needle in attempt([user], [{"type": "function", "function": tool}]),
        tool_calls=by_object or needle in by_text,
        tool_results=found in called or found in by_text,
        object_arguments=by_object,
    )
