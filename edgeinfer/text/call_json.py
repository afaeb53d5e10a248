"""Calls of tools that models spell as JSON, alone or behind a name: one parser per spelling.

A parser begins behind the marker that its format opens with, and raises NotACall where what comes
is no call.
"""

from __future__ import annotations

import re

from edgeinfer.text.lenient_json import copy_value, is_json, mended, read_string
from edgeinfer.text.reader import Reader, Steps
from edgeinfer.text.tools import Calls, NotACall, Tool

MOST_NAME = 256  # characters of a name; what has more is none


# -- JSON: {"name": ..., "arguments": {...}} ------------------------------------------------------


def json_call(
    reader: Reader, calls: Calls, ends: tuple[str, ...] = (), *, is_inner: bool = False
) -> Steps[None]:
    """One object; its keys in any order, and nested in "function" once, as in requests."""
    yield from reader.space()
    if not (yield from reader.take("{")):
        raise NotACall
    name, held, is_done = "", "", False
    while True:
        yield from reader.space()
        if (yield from reader.take(",")):
            continue
        if (yield from reader.peek()) != '"':
            break
        key = yield from _json_key(reader)
        first = yield from reader.peek()
        if key == "function" and first == "{" and not (name or is_inner):
            yield from json_call(reader, calls, ends, is_inner=True)
            is_done = True
        elif key in ("name", "function", "tool_name") and first == '"' and not name:
            name = yield from read_string(reader)
            calls.find(name)
        elif key in ("arguments", "parameters") and not calls.is_open:
            held = yield from _held_arguments(reader, calls, name, ends)
        elif key in ("id", "type", "index", "tool_call_id") or calls.is_open or is_done:
            yield from copy_value(reader, lambda text: None, ends)
        else:
            raise NotACall
    yield from reader.take("}")
    if not (calls.is_open or is_done):
        calls.begin(calls.find(name))
        calls.write(held or "{}")
    calls.finish()


_NO_ARGUMENTS = ("", "null", '""', "[]")


def _json_key(reader: Reader) -> Steps[str]:
    key = yield from read_string(reader)
    yield from reader.space()
    if not (yield from reader.take(":")):
        raise NotACall
    yield from reader.space()
    return key


def _held_arguments(reader: Reader, calls: Calls, name: str, ends: tuple[str, ...]) -> Steps[str]:
    """Write an object as it comes; what comes before the name, or in a string, is given back."""
    held: list[str] = []
    first = yield from reader.peek()
    if first == "{" and name:
        calls.begin(calls.find(name))
        yield from copy_value(reader, calls.write, ends)
        return ""
    if first == '"':
        text = (yield from read_string(reader)).strip()
        text = text if is_json(text) or text[:1] != "{" else mended(text)
    else:
        yield from copy_value(reader, held.append, ends)
        text = "".join(held).strip()
    if text not in _NO_ARGUMENTS and text[:1] != "{":
        raise NotACall
    return text if text[:1] == "{" else "{}"


def json_calls(reader: Reader, calls: Calls, ends: tuple[str, ...] = ()) -> Steps[None]:
    """One object, or an array of them."""
    yield from reader.space()
    if not (yield from reader.take("[")):
        yield from json_call(reader, calls, ends)
        return
    while True:
        yield from json_call(reader, calls, ends)
        yield from reader.space()
        if not (yield from reader.take(",")):
            break
    yield from reader.take("]")


def closed_json(reader: Reader, calls: Calls, close: str) -> Steps[None]:
    """One object, or an array of them, and a text that closes it."""
    yield from json_calls(reader, calls, (close,))
    yield from reader.space()
    yield from reader.take(close)


def python_tag(reader: Reader, calls: Calls) -> Steps[None]:
    """Llama 3: objects with ; between them."""
    yield from json_call(reader, calls)
    while True:
        yield from reader.space()
        if not (yield from reader.take(";")):
            return
        yield from json_call(reader, calls)


# -- names and JSON -------------------------------------------------------------------------------


def mistral(reader: Reader, calls: Calls) -> Steps[None]:
    """An array of objects; since 2025 name[CALL_ID]id[ARGS]{...}."""
    yield from reader.space()
    if (yield from reader.peek()) in ("[", "{"):
        yield from json_calls(reader, calls)
        return
    ends = ("[ARGS]", "[CALL_ID]", "{")
    name = yield from reader.until(*ends, most=MOST_NAME)
    tool = calls.find(name)
    if (yield from reader.take("[CALL_ID]")):
        yield from reader.until("[ARGS]", "{", most=MOST_NAME)
    yield from reader.take("[ARGS]")
    yield from copy_arguments(reader, calls, tool, ("[TOOL_CALLS]",))


def kimi(reader: Reader, calls: Calls) -> Steps[None]:
    """functions.NAME:NUMBER, and JSON behind a marker."""
    opened, close = "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    name = yield from reader.until(opened, close, most=MOST_NAME)
    if not (yield from reader.take(opened)):
        raise NotACall
    tool = calls.find(_NUMBER.sub("", name))
    yield from copy_arguments(reader, calls, tool, (close,))
    yield from reader.space()
    yield from reader.take(close)
    yield from reader.space()
    yield from reader.take("<|tool_calls_section_end|>")


_NUMBER = re.compile(r":[0-9]+\s*\Z")


def deepseek(reader: Reader, calls: Calls) -> Steps[None]:
    """Name and JSON between markers; at first also a type, and the JSON in a fence."""
    separator, close = "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    name = yield from reader.until(separator, close, most=MOST_NAME)
    if not (yield from reader.take(separator)):
        raise NotACall
    is_fenced = name.strip() == "function"
    if is_fenced:
        name = yield from reader.until("\n", close, most=MOST_NAME)
        yield from reader.space()
        yield from reader.take("```json")
    yield from copy_arguments(reader, calls, calls.find(name), (close,))
    if is_fenced:
        yield from reader.space()
        yield from reader.take("```")
        yield from reader.space()
    yield from reader.take(close)
    yield from reader.space()
    yield from reader.take("<｜tool▁calls▁end｜>")


def keyed_calls(reader: Reader, calls: Calls, close: str) -> Steps[None]:
    """An array of objects, each of which has the arguments of a call by its name."""
    yield from reader.space()
    if not (yield from reader.take("[")):
        raise NotACall
    while True:
        yield from reader.space()
        if not (yield from reader.take("{")):
            raise NotACall
        yield from reader.space()
        if (yield from reader.peek()) != '"':
            raise NotACall
        tool = calls.find((yield from _json_key(reader)))
        yield from copy_arguments(reader, calls, tool, (close,))
        yield from reader.space()
        yield from reader.take("}")
        yield from reader.space()
        if not (yield from reader.take(",")):
            break
    yield from reader.take("]")
    yield from reader.space()
    yield from reader.take(close)


def wrapper(reader: Reader, calls: Calls) -> Steps[None]:
    """A marker around the calls, which says nothing by itself."""
    yield from reader.space()


def copy_arguments(reader: Reader, calls: Calls, tool: Tool, ends: tuple[str, ...]) -> Steps[None]:
    """Arguments as JSON, of a call whose tool is known."""
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        raise NotACall
    calls.begin(tool)
    yield from copy_value(reader, calls.write, ends)
    calls.finish()


def harmony(reader: Reader, calls: Calls) -> Steps[None]:
    """A whole reply of messages: ROLE to=WHOM<|channel|>NAME<|message|>BODY<|end|><|start|>.

    The prompt ends with the role of the first. Whom it is to may also stand behind the channel.
    """
    has_role = False  # a role was announced, not only what the prompt ends with
    while not reader.is_at_end:
        role = yield from reader.until("<|channel|>", "<|message|>", *HARMONY_ENDS)
        header = ""
        if (yield from reader.take("<|channel|>")):
            header = yield from reader.until("<|message|>", *HARMONY_ENDS)
        if (yield from reader.take("<|message|>")):
            if not has_role:
                calls.text(_TO.sub("", role.removeprefix("assistant")).lstrip())
            recipient = f"{role} {header}".partition("to=")[2].replace("<|", " ").split()
            yield from _harmony_body(reader, calls, header.split()[:1], recipient[:1])
        else:
            if has_role or header or _TO.fullmatch(role.removeprefix("assistant")):
                yield from reader.peek()  # a head that is cut off is no text
            calls.text(role.removeprefix("assistant") + header)
        yield from reader.take_any(*HARMONY_ENDS)
        has_role = yield from reader.take("<|start|>")
        reader.mark()


_TO = re.compile(r"\s*\bto=\S*\s*")
HARMONY_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>")


def _harmony_body(
    reader: Reader, calls: Calls, channel: list[str], recipient: list[str]
) -> Steps[None]:
    if recipient and recipient[0].removeprefix("functions.") in calls.tools:
        yield from reader.space()
        if (yield from reader.look()) == "{":
            yield from copy_arguments(reader, calls, calls.find(recipient[0]), HARMONY_ENDS)
            calls.text((yield from reader.until(*HARMONY_ENDS)).strip())
            return
    write = calls.reasoning if channel == ["analysis"] else calls.text
    yield from reader.copy_until(HARMONY_ENDS, write)


FUNCTIONARY, TO_ALL = ">>>", "all"  # before whom a part is to; who that is for text


def functionary(reader: Reader, calls: Calls) -> Steps[None]:
    """A whole reply of parts: >>>WHOM, a line's end and BODY. The prompt ends with the first mark.

    Text may hold such marks as well, so only those of who is known count.
    """
    parts = tuple(f"{FUNCTIONARY}{whom}\n" for whom in (TO_ALL, *calls.tools))
    heads = (*parts, *(part.removeprefix(FUNCTIONARY) for part in parts))
    whom = yield from reader.take_any(*heads)
    if any(head.startswith(reader.rest) for head in heads if not whom):
        yield from reader.peek(len(reader.rest) + 1)  # a head that is cut off is no text
    while not reader.is_at_end:
        name = whom.removeprefix(FUNCTIONARY).removesuffix("\n")
        if name in calls.tools and (yield from reader.look()) == "{":
            yield from copy_arguments(reader, calls, calls.find(name), (FUNCTIONARY,))
            yield from reader.space()
        elif name != TO_ALL:
            calls.text(whom)
        yield from reader.copy_until(parts, calls.text)
        whom = yield from reader.take_any(*parts)
        reader.mark()
