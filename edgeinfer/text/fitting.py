"""Messages as a chat template takes them, and what it can take, found by rendering some.

Knows nothing of template engines or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from edgeinfer.text.call_ids import with_naming_ids, with_short_ids
from edgeinfer.text.messages import plain, reminder_of, spelled_calls
from edgeinfer.text.turns import SYSTEM

_MOST_MENDED = 1 << 16  # characters of arguments, which are read one by one


class Capabilities(NamedTuple):
    """What a template can do with a conversation."""

    system_role: bool
    several_systems: bool  # at the front, and behind other messages
    system_before_results: bool  # which some show with the user's last message alone
    user_names: bool
    string_content: bool
    typed_content: bool
    tools: bool
    tool_calls: bool
    tool_results: bool
    object_arguments: bool
    several_calls: bool  # in one message
    text_with_calls: bool
    call_names: bool  # else it shows the ids of calls alone
    calls_first: bool  # where it is told of tools: some take what comes first for the user's
    empty_with_calls: bool  # else a text of no letters beside calls is shown as a turn


def probe(attempt: Callable[..., str]) -> Capabilities:
    """What comes of conversations that hold a needle; `attempt` gives "" where one fails."""
    needle, found, second, name = "needle-7f3a", "found-5c1e", "second-9d2b", "look-b80d"
    user = {"role": "user", "content": "hello"}
    said = attempt([{"role": "user", "content": needle, "name": name}])
    part = {"type": "text", "text": needle}
    typed = attempt([{"role": "user", "content": [part]}])
    systems = [{"role": "system", "content": word} for word in (needle, found, second)]
    answer = {"role": "assistant", "content": "hi"}
    told = attempt([*systems[:2], user, answer, systems[2], user])

    def turns(
        words: Sequence[str], *, as_object: bool, text: str | None = ""
    ) -> list[dict[str, Any]]:
        """A question, calls with these words beside a text, and their results."""
        ids = [f"call{i:05}" for i, _ in enumerate(words, 1)]
        arguments: list[Any] = [{"word": word} for word in words]
        given = arguments if as_object else map(json.dumps, arguments)
        calls = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": each}}
            for id, each in zip(ids, given, strict=True)
        ]
        turn = {"role": "assistant", "content": text, "tool_calls": calls}
        results = [
            {"role": "tool", "tool_call_id": id, "name": name, "content": found} for id in ids
        ]
        return [user, turn, *results]

    called = attempt(turns([needle], as_object=True))
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    tool = {"name": needle, "description": "looks", "parameters": schema}
    # A template that prints Python's own form of a value has not understood it.
    by_object = needle in called and "{'word'" not in called
    by_text = attempt(turns([needle], as_object=False))
    # Of what fails for another reason nothing is known.
    beside = attempt([*turns([needle], as_object=by_object, text=second), answer, user])
    before = attempt([systems[2], *turns([needle], as_object=by_object)])
    named = attempt(turns([needle], as_object=by_object)[:2])
    tools = [{"type": "function", "function": tool}]
    first = attempt(turns([second], as_object=by_object)[1:], tools)
    without = attempt(turns([needle], as_object=by_object, text=None)[:2])
    return Capabilities(
        system_role=needle in attempt([{"role": "system", "content": needle}, user]),
        several_systems=all(word in told for word in (needle, found, second)),
        system_before_results=not before or second in before,
        user_names=name in said,
        string_content=needle in said,
        typed_content=needle in typed and "'text'" not in typed and '"text"' not in typed,
        tools=needle in attempt([user], tools),
        tool_calls=by_object or needle in by_text,
        tool_results=found in called or found in by_text,
        object_arguments=by_object,
        several_calls=second in attempt(turns([needle, second], as_object=by_object)),
        text_with_calls=not beside or second in beside,
        call_names=not named or name in named,
        calls_first=not first or second in first,
        empty_with_calls=needle not in without or len(without) >= len(named),
    )


def fit(
    messages: list[dict[str, Any]], can: Capabilities, source: str, *, tells_odd_calls: bool = False
) -> list[dict[str, Any]]:
    """The messages as a template of such capabilities takes them.

    Where it `tells_odd_calls`, those with arguments that are no object are text.
    """
    messages = [dict(message) for message in messages]
    if not can.user_names:
        _tell_users_apart(messages)
    for message in messages:
        if message["role"] == "developer" and "developer" not in source:
            message["role"] = "system"
        if message["role"] == "tool" and not can.tool_results:
            message["role"] = "user"
        if "reasoning_content" in message and _calls_it_thinking(source):
            message["thinking"] = message["reasoning_content"]
        if calls := message.get("tool_calls"):
            calls = [_with_arguments(c, can.object_arguments or not can.tool_calls) for c in calls]
            message["tool_calls"] = calls
            is_told = tells_odd_calls and any(map(_is_odd, calls))
            if is_told or not can.tool_calls:
                told = [message["content"], *spelled_calls(calls)]
                message["content"] = "\n".join(filter(None, told))
            if is_told:
                del message["tool_calls"]
    if can.tool_calls and not can.text_with_calls:
        messages = _text_apart(messages)
    if can.tool_calls and not can.several_calls:
        messages = _calls_apart(messages)
    if can.tool_calls and not can.call_names:
        messages = with_naming_ids(messages)
    hides_system = messages[-1]["role"] != "user" and not can.system_before_results
    if hides_system or not can.system_role:
        messages = _system_folded(messages)
    elif not can.several_systems:
        messages = _one_system(messages)
    if can.typed_content and not can.string_content:
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
    if not can.empty_with_calls:
        for message in messages:
            if message.get("tool_calls"):
                message["content"] = message["content"] or None
    return messages


def _tell_users_apart(messages: Sequence[dict[str, Any]]) -> None:
    """Put the names of users before what they say, where there are several."""
    named = [m for m in messages if m["role"] == "user" and isinstance(m.get("name"), str)]
    if len({message["name"] for message in named}) > 1:
        for message in named:
            message["content"] = f"{message['name']}: {message['content']}"


def _calls_it_thinking(source: str) -> bool:
    """Whether a template looks for reasoning by another name than most."""
    return "message.thinking" in source and "reasoning_content" not in source


def described(tools: Sequence[Any]) -> list[Any]:
    """Tools with a description each, which some templates take for granted."""
    found = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and "description" not in function:
            tool = {**tool, "function": {**function, "description": ""}}
        found.append(tool)
    return found


# -- calls -----------------------------------------------------------------------------------------


def _with_arguments(call: Mapping[str, Any], as_object: bool) -> dict[str, Any]:
    if "function" in call:
        function = _with_arguments(call["function"], as_object)
        return {"type": "function", **call, "function": function}
    arguments = call.get("arguments")
    if arguments is None:  # some clients leave out what would be empty
        arguments = {}
    if as_object and isinstance(arguments, str):
        arguments = _value_of(arguments)
    elif not as_object and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "arguments": arguments}


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


def _is_odd(call: Mapping[str, Any]) -> bool:
    """Whether a call has arguments that are no object."""
    return not isinstance(call.get("function", call).get("arguments"), Mapping)


def _text_apart(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The text of a message that has calls, too, as a message of its own before them."""
    apart: list[dict[str, Any]] = []
    for message in messages:
        if message.get("tool_calls") and message["content"]:
            apart.append({"role": message["role"], "content": message["content"]})
            message = {**message, "content": ""}
        apart.append(message)
    return apart


def _calls_apart(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of one message as messages of their own, each with its results behind it.

    Some templates refuse several, others show the first alone.
    """
    apart: list[list[dict[str, Any]]] = []  # a message, with the results behind it if it calls
    called: dict[str, list[dict[str, Any]]] = {}  # those of the last that calls, by id
    for message, named in zip(messages, with_short_ids(messages), strict=True):
        if message["role"] == "tool" and called:
            called.get(named["tool_call_id"], apart[-1]).append(message)
            continue
        calls = message.get("tool_calls") or ()
        called = {}
        for i, call in enumerate(calls):
            begun = message if i == 0 else {"role": message["role"], "content": ""}
            apart.append([{**begun, "tool_calls": [call]}])
            called[named["tool_calls"][i]["id"]] = apart[-1]
        if not calls:
            apart.append([message])
    return [message for group in apart for message in group]


# -- turns -----------------------------------------------------------------------------------------


def late_system_folded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System messages behind others as the user's, in their places: what is before them stays."""
    n_front = _n_front(messages)
    return messages[:n_front] + [
        {**m, "role": "user", "content": reminder_of(m["content"])}
        if m["role"] in SYSTEM and isinstance(m["content"], str)
        else m
        for m in messages[n_front:]
    ]


def _n_front(messages: list[dict[str, Any]]) -> int:
    """Of the system's, before any other."""
    return next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM), len(messages))


def _one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One system message at the front, where templates look for it; others leave out the rest."""
    messages = late_system_folded(messages)
    n_front = _n_front(messages)
    if n_front < 2:
        return messages
    content = "\n\n".join(m["content"] for m in messages[:n_front])
    return [{**messages[0], "content": content}, *messages[n_front:]]


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


def by_turns(
    messages: list[dict[str, Any]], *, joins_calls: bool = True, answers_tools: bool = False
) -> list[dict[str, Any]]:
    """User and assistant by turns; neighbours of one role as one that has all that they have.

    Unless it `joins_calls`, between an answer's text and calls behind it a user says nothing. Where
    it `answers_tools`, an answer without text stands before who speaks right after them.
    """
    messages = [m if m["content"] is not None else {**m, "content": ""} for m in messages]
    if any(not isinstance(m["content"], str) for m in messages):
        return messages
    turns: list[dict[str, Any]] = []
    for message in _system_folded(messages):
        last = turns[-1] if turns else {"role": ""}
        if message["role"] == last["role"] != "tool":
            if joins_calls or ("tool_calls" in last) == ("tool_calls" in message):
                turns[-1] = _joined(last, message)
                continue
            if "tool_calls" in message:
                turns.append({"role": "user", "content": ""})
        is_interrupted = last["role"] == "tool" or "tool_calls" in last
        if answers_tools and is_interrupted and message["role"] == "user":
            turns.append({"role": "assistant", "content": ""})
        turns.append(dict(message))
    return after_user(turns)


def after_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same behind a user who says nothing, where one has not begun: clients cut what is old."""
    n_front = _n_front(messages)
    if messages[n_front:] and messages[n_front]["role"] == "user":
        return messages
    return [*messages[:n_front], {"role": "user", "content": ""}, *messages[n_front:]]


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    joined = {**first, **second, "content": f"{first['content']}\n\n{second['content']}"}
    if "tool_calls" in joined:
        joined["tool_calls"] = [
            call for message in (first, second) for call in message.get("tool_calls", ())
        ]
    thoughts = [message.get("reasoning_content") for message in (first, second)]
    if all(isinstance(each, str) for each in thoughts):
        joined["reasoning_content"] = "\n\n".join(map(str, thoughts))
    return joined
