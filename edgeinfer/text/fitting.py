"""Messages as a chat template takes them, and what it can take, found by rendering some.

Knows nothing of template engines or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any, NamedTuple

from edgeinfer.text.messages import plain, reminder_of, spelled_calls
from edgeinfer.text.turns import SYSTEM

_MOST_MENDED = 1 << 16  # characters of arguments, which are read one by one
ID_LENGTH = 9  # letters of a call's id: some templates refuse others
_ID_PREFIXES = ("call_", "toolu_")


class Capabilities(NamedTuple):
    """What a template can do with a conversation."""

    system_role: bool
    several_systems: bool  # at the front, and behind other messages
    string_content: bool
    typed_content: bool
    tools: bool
    tool_calls: bool
    tool_results: bool
    object_arguments: bool
    several_calls: bool  # in one message


def probe(attempt: Callable[..., str]) -> Capabilities:
    """What comes of conversations that hold a needle; `attempt` gives "" where one fails."""
    needle, found, second = "needle-7f3a", "found-5c1e", "second-9d2b"
    user = {"role": "user", "content": "hello"}
    part = {"type": "text", "text": needle}
    typed = attempt([{"role": "user", "content": [part]}])
    systems = [{"role": "system", "content": word} for word in (needle, found, second)]
    answer = {"role": "assistant", "content": "hi"}
    told = attempt([*systems[:2], user, answer, systems[2], user])

    def turns(words: Sequence[str], *, as_object: bool) -> list[dict[str, Any]]:
        """A question, calls with these words, and their results."""
        ids = [f"call{i:05}" for i, _ in enumerate(words, 1)]
        arguments: list[Any] = [{"word": word} for word in words]
        given = arguments if as_object else map(json.dumps, arguments)
        calls = [
            {"id": id, "type": "function", "function": {"name": "look", "arguments": each}}
            for id, each in zip(ids, given, strict=True)
        ]
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        results = [
            {"role": "tool", "tool_call_id": id, "name": "look", "content": found} for id in ids
        ]
        return [user, turn, *results]

    called = attempt(turns([needle], as_object=True))
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    tool = {"name": needle, "description": "looks", "parameters": schema}
    # A template that prints Python's own form of a value has not understood it.
    by_object = needle in called and "{'word'" not in called
    by_text = attempt(turns([needle], as_object=False))
    return Capabilities(
        system_role=needle in attempt([{"role": "system", "content": needle}, user]),
        several_systems=all(word in told for word in (needle, found, second)),
        string_content=needle in attempt([{"role": "user", "content": needle}]),
        typed_content=needle in typed and "'text'" not in typed and '"text"' not in typed,
        tools=needle in attempt([user], [{"type": "function", "function": tool}]),
        tool_calls=by_object or needle in by_text,
        tool_results=found in called or found in by_text,
        object_arguments=by_object,
        several_calls=second in attempt(turns([needle, second], as_object=by_object)),
    )


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
        if calls := message.get("tool_calls"):
            calls = [_with_arguments(c, can.object_arguments or not can.tool_calls) for c in calls]
            message["tool_calls"] = calls
            is_told = tells_odd_calls and any(map(_is_odd, calls))
            if is_told or not can.tool_calls:
                told = [message["content"], *spelled_calls(calls)]
                message["content"] = "\n".join(filter(None, told))
            if is_told:
                del message["tool_calls"]
    if can.tool_calls and not can.several_calls:
        messages = _calls_apart(messages)
    if not can.system_role:
        messages = _system_folded(messages)
    elif not can.several_systems:
        messages = _one_system(messages)
    if can.typed_content and not can.string_content:
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


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


def _calls_apart(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of one message as messages of their own, each with its results behind it.

    Some templates refuse several, others show the first alone.
    """
    apart: list[dict[str, Any]] = []
    rest = list(messages)
    while rest:
        message, *rest = rest
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            apart.append(message)
            continue
        results = list(takewhile(lambda each: each["role"] == "tool", rest))
        del rest[: len(results)]
        ids = [call.get("id") for call in calls]
        for i, call in enumerate(calls):
            begun = message if i == 0 else {"role": message["role"], "content": ""}
            apart.append({**begun, "tool_calls": [call]})
            apart += [each for n, each in enumerate(results) if _caller(each, n, ids) == i]
    return apart


def _caller(result: Mapping[str, Any], n: int, ids: Sequence[Any]) -> int:
    """Which call the nth result is of: by its id, else by its place."""
    id = result.get("tool_call_id")
    return ids.index(id) if id is not None and id in ids else min(n, len(ids) - 1)


def with_short_ids(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls, and their results, with ids of the one length that some templates take.

    Who has none gets one; a result without is that of the first call that waits for one.
    """
    found, waiting = [], list[str]()
    for i, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            waiting = [short_id(str(call.get("id") or f"{i}.{n}")) for n, call in enumerate(calls)]
            named = [{**call, "id": id} for call, id in zip(calls, waiting, strict=True)]
            message = {**message, "tool_calls": named}
        elif message["role"] == "tool":
            given = message.get("tool_call_id")
            id = short_id(str(given or i)) if given or not waiting else waiting[0]
            waiting = [each for each in waiting if each != id]
            message = {**message, "tool_call_id": id}
        found.append(message)
    return found


def short_id(id: str) -> str:
    """The id of a call as nine letters and digits, always the same of the same."""
    bare = next((id[len(p) :] for p in _ID_PREFIXES if id.startswith(p)), id)
    if len(bare) == ID_LENGTH and bare.isascii() and bare.isalnum():
        return bare
    import hashlib  # of calls alone

    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:ID_LENGTH]


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
    messages: list[dict[str, Any]], *, answers_tools: bool = False
) -> list[dict[str, Any]]:
    """User and assistant by turns; neighbours of one role as one that has all that they have.

    Where it `answers_tools`, an answer without text stands before who speaks right after them.
    """
    if any(not isinstance(m["content"], str) for m in messages):
        return messages
    turns: list[dict[str, Any]] = []
    for message in _system_folded(messages):
        last = turns[-1] if turns else {"role": ""}
        if message["role"] == last["role"] != "tool":
            turns[-1] = _joined(last, message)
            continue
        is_interrupted = last["role"] == "tool" or "tool_calls" in last
        if answers_tools and is_interrupted and message["role"] == "user":
            turns.append({"role": "assistant", "content": ""})
        turns.append(dict(message))
    return turns


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
