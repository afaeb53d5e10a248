"""Calls of tools, and values, that models spell as Python does.

Python's own parser reads them, once they are spelled as it wants them: models name parameters
`from` and `user-id`, write lines into strings, and backslashes that escape nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from edgeinfer.text.lenient_json import as_json
from edgeinfer.text.reader import Reader, Steps
from edgeinfer.text.tools import Calls, NotACall

# One that nobody closed has all that follows: each quote in it would be tried again.
_STRING = (
    r"""(?P<string>(?:\b(?P<kind>[A-Za-z]{1,2}))?"""
    r"""(?:"(?:\\.|[^"\\])*(?:"|\\?\Z)|'(?:\\.|[^'\\])*(?:'|\\?\Z)))"""
)
_NAME = r"""(?:^|(?<=[\[,\n]))\s*(?P<name>[^\s"'()\[\]{},=]+)\s*(?=\()"""
_KEY = r"""(?<=[(,])\s*(?P<key>[^\s"'()\[\]{},=:<>!]+)\s*=(?!=)"""
_STRINGS = re.compile(_STRING, re.DOTALL)
_PARTS = re.compile(f"{_STRING}|{_NAME}|{_KEY}", re.DOTALL)
# What Python reads as escapes without complaint; then what has to become one.
_ESCAPES = re.compile(
    r"\\(?:[\n'\"\\abfnrtv]|[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}"
    r"|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})|[\\\n\r]"
)
_MEANT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_WORDS = {"true": True, "false": False, "null": None}


def python_list(reader: Reader, calls: Calls, close: str = "<|tool_call_end|>") -> Steps[None]:
    """LFM2: [name(key=value, ...), ...] as Python spells it; OLMo 3 has one below the other."""
    text = (yield from reader.until(close)).strip()
    yield from reader.peek()
    yield from reader.take(close)
    found = [(calls.find(name), arguments) for name, arguments in python_calls(text)]
    for tool, arguments in found:
        calls.begin(tool)
        calls.write(arguments)
        calls.finish()


def python_calls(text: str) -> list[tuple[str, str]]:
    """Names and arguments, as JSON; NotACall for anything but calls with keywords."""
    names: dict[str, str] = {}

    def plain(found: re.Match[str]) -> str:
        spelled = found["name"] or found["key"]
        if spelled is None:
            return _plain_string(found)
        stand_in = f"n{len(names)}"
        names[stand_in] = spelled
        return found[0].replace(spelled, stand_in, 1)

    try:
        lines = map(str.lstrip, _PARTS.sub(plain, text).split("\n"))
        return [_call(node, names) for node in _expressions(ast.parse("\n".join(lines)))]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise NotACall from None


def _expressions(parsed: ast.Module) -> list[ast.expr]:
    """Those of a list, or of lines."""
    found = [each.value for each in parsed.body if isinstance(each, ast.Expr)]
    if not found or len(found) < len(parsed.body):
        raise NotACall
    first = found[0]
    if len(found) == 1 and isinstance(first, (ast.List, ast.Tuple)):
        return first.elts
    return found


def python_value(text: str) -> Any:
    """A literal; ValueError, SyntaxError, TypeError, MemoryError or RecursionError for others."""
    return ast.literal_eval(_STRINGS.sub(_plain_string, text))


def _plain_string(found: re.Match[str]) -> str:
    """A string that Python reads, in which no line ends and each backslash is an escape."""
    if "r" in (found["kind"] or "").lower():
        return found[0]
    return _ESCAPES.sub(lambda escape: _MEANT.get(escape[0], escape[0]), found[0])


def _call(node: ast.expr, names: Mapping[str, str]) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise NotACall
    given: dict[Any, Any] = {}
    for keyword in node.keywords:
        value = _value(keyword.value)
        if keyword.arg is not None:
            given[names.get(keyword.arg, keyword.arg)] = value
        elif isinstance(value, dict):  # **{...}
            given |= value
        else:
            raise NotACall
    return names.get(node.func.id, node.func.id), as_json(given)


def _value(node: ast.expr | None) -> Any:
    """A value; JSON's words may stand among Python's."""
    if isinstance(node, ast.Name):
        return _WORDS.get(node.id, node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(key): _value(each) for key, each in pairs}
    return ast.literal_eval(node)  # type: ignore[arg-type]
