"""Calls of tools that models spell in tags or in words of their own: one parser per spelling.

A parser begins behind the marker that its format opens with, and raises NotACall where what comes
is no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress

from edgeinfer.text.call_json import MOST_NAME, copy_arguments, json_calls
from edgeinfer.text.call_python import python_value
from edgeinfer.text.lenient_json import as_json, is_json
from edgeinfer.text.reader import Reader, Steps
from edgeinfer.text.tools import Calls, Members, NotACall

DSML = "｜DSML｜"
TOOL_CALL_END = "</tool_call>"
_MOST_ENDS = 64  # inside a string: each has all before it looked at again
_STRINGS = re.compile(r'"(?:\\.|[^"\\\n])*("?)')


def tool_call_tag(reader: Reader, calls: Calls, close: str = TOOL_CALL_END) -> Steps[None]:
    """What stands in <tool_call>: JSON (Hermes, Qwen), <function=...> (Qwen Coder), or GLM's."""
    yield from reader.space()
    if (yield from reader.peek()) in ("{", "["):
        yield from json_calls(reader, calls, (close,))
    elif (yield from reader.take("<function=")):
        yield from function_tag(reader, calls, close)
    else:
        yield from _glm(reader, calls)
    yield from reader.space()
    yield from reader.take(close)


def function_tag(reader: Reader, calls: Calls, close: str = TOOL_CALL_END) -> Steps[None]:
    """<function=NAME>, then <parameter=NAME>VALUE</parameter> or JSON."""
    name = yield from reader.until(">", "<", "\n", most=MOST_NAME)
    tool = calls.find(name)
    if not (yield from reader.take(">")):
        raise NotACall
    yield from reader.space()
    if (yield from reader.peek()) == "{":
        yield from copy_arguments(reader, calls, tool, ("</function>",))
    else:
        members = Members(calls, tool)
        while (yield from reader.take("<parameter=")):
            key = yield from reader.until(">", most=MOST_NAME)
            yield from reader.take(">")
            yield from reader.take("\n")
            ends = ("\n</parameter>", "</parameter>", "\n<parameter=", "\n</function>")
            yield from _member(reader, members, key.strip(), ends)
            yield from reader.take_any("\n</parameter>", "</parameter>")
            yield from reader.space()
        members.finish()
    yield from reader.space()
    yield from reader.take("</function>")
    yield from reader.space()
    yield from reader.take(close)


def _glm(reader: Reader, calls: Calls) -> Steps[None]:
    """NAME, then <arg_key>KEY</arg_key><arg_value>VALUE</arg_value>."""
    name = yield from reader.until("<arg_key>", "</tool_call>", most=MOST_NAME)
    members = Members(calls, calls.find(name))
    while (yield from reader.take("<arg_key>")):
        key = yield from reader.until("</arg_key>", "<arg_value>", most=MOST_NAME)
        yield from reader.take("</arg_key>")
        yield from reader.space()
        yield from reader.take("<arg_value>")
        yield from _member(reader, members, key.strip(), ("</arg_value>", "</tool_call>"))
        yield from reader.take("</arg_value>")
        yield from reader.space()
    members.finish()


def dsml(reader: Reader, calls: Calls) -> Steps[None]:
    """DeepSeek 3.2: tags with a mark, behind the first of them."""
    yield from _invoked(reader, calls, DSML)
    yield from reader.space()
    yield from reader.take(f"</{DSML}function_calls>")


def minimax(reader: Reader, calls: Calls) -> Steps[None]:
    """The same tags without a mark, one or more of them inside of another."""
    n_before = len(calls.done)
    yield from reader.space()
    while (yield from reader.take('<invoke name="')):
        yield from _invoked(reader, calls, "")
        yield from reader.space()
    if len(calls.done) == n_before:
        raise NotACall
    yield from reader.take("</minimax:tool_call>")


def _invoked(reader: Reader, calls: Calls, mark: str) -> Steps[None]:
    """Invoke and parameter tags, where an attribute may say what is text."""
    name = yield from reader.until('"', ">", most=MOST_NAME)
    tool = calls.find(name)
    yield from reader.until(">", most=MOST_NAME)
    if not (yield from reader.take(">")):
        raise NotACall
    yield from reader.space()
    members = Members(calls, tool)
    while (yield from reader.take(f'<{mark}parameter name="')):
        key = yield from reader.until('"', ">", most=MOST_NAME)
        attributes = yield from reader.until(">", most=MOST_NAME)
        yield from reader.take(">")
        is_text = 'string="true"' in attributes or None
        yield from _member(reader, members, key, (f"</{mark}parameter>",), is_text)
        yield from reader.take(f"</{mark}parameter>")
        yield from reader.space()
    yield from reader.take(f"</{mark}invoke>")
    members.finish()  # what comes next is read from here, should it be no call


def _member(
    reader: Reader,
    members: Members,
    key: str,
    ends: tuple[str, ...],
    is_text: bool | None = None,
) -> Steps[None]:
    """A value without quotes: text as it comes, or JSON where it is that and may be."""
    takes_text = members.begin(key)
    if is_text or takes_text:
        members.write('"')
        yield from reader.copy_until(ends, members.write_text)
        yield from reader.peek()  # what is cut stays open
        members.write('"')
    else:
        value = (yield from _json_text(reader, ends)).strip()
        yield from reader.peek()
        members.write(_as_json(value))


def _json_text(reader: Reader, ends: tuple[str, ...]) -> Steps[str]:
    """What comes before the first of `ends` that is not inside a string of JSON."""
    text = yield from reader.until(*ends)
    for _ in range(_MOST_ENDS):
        if not _is_inside_string(text) or not (following := (yield from reader.look())):
            break
        reader.skip(1)
        text += following + (yield from reader.until(*ends))
    return text


def _is_inside_string(text: str) -> bool:
    """Whether JSON that begins like that has a string open; no line ends in one."""
    begun = text.lstrip()
    closed = _STRINGS.sub(lambda found: "" if found[1] else '"', begun)
    return begun[:1] in ("{", "[", '"') and '"' in closed.rpartition("\n")[2]


def _as_json(text: str) -> str:
    """A value that may be JSON, or Python's spelling of it, or text."""
    if is_json(text):
        return text
    for read in (json.loads, python_value):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return as_json(read(text))
    return json.dumps(text, ensure_ascii=False)


# -- formats of their own -------------------------------------------------------------------------


def gemma(reader: Reader, calls: Calls, quote: str, close: str) -> Steps[None]:
    """call:NAME{key:value,...} with a token of its own for quotes."""
    yield from reader.space()
    if not (yield from reader.take("call:")):
        raise NotACall
    name = yield from reader.until("{", close, most=MOST_NAME)
    tool = calls.find(name)
    if (yield from reader.peek()) != "{":
        raise NotACall
    calls.begin(tool)
    yield from _gemma_value(reader, calls, quote, close, 0)
    calls.finish()
    yield from reader.space()
    yield from reader.take(close)


def _gemma_value(reader: Reader, calls: Calls, quote: str, close: str, depth: int) -> Steps[None]:
    if (yield from reader.take(quote)):
        calls.write('"')
        end = yield from reader.copy_until((quote,), _escaped(calls))
        yield from reader.take(end)
        yield from reader.peek()
        calls.write('"')
        return
    opened = yield from reader.peek()
    if opened not in ("{", "[") or depth > 64:
        word = yield from reader.until(",", "}", "]", close)
        yield from reader.peek()
        calls.write(_as_json(word.strip()))
        return
    closed = "}" if opened == "{" else "]"
    reader.skip(1)
    separator = opened
    while (yield from reader.peek()) not in ("}", "]", ""):
        if (yield from reader.take(close)):
            break
        if opened == "{":
            key = yield from reader.until(":", "}", close)
            yield from reader.take(":")
            key = json.dumps(key.replace(quote, "").strip(' "'), ensure_ascii=False)
            calls.write(f"{separator}{key}: ")
        else:
            calls.write(separator)
        separator = ", "
        yield from _gemma_value(reader, calls, quote, close, depth + 1)
        yield from reader.space()
        yield from reader.take(",")
        yield from reader.space()
    calls.write(opened + closed if separator == opened else closed)
    yield from reader.take_any("}", "]")


def _escaped(calls: Calls) -> Callable[[str], None]:
    return lambda text: calls.write(json.dumps(text, ensure_ascii=False)[1:-1])
