"""JSON as models write it, to JSON as it must be, character by character.

What is valid passes unchanged. What is not is mended, and nothing of it is lost: Python's words
and quotes, quotes and line ends inside strings, spare commas, brackets that nobody closed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from edgeinfer.text.reader import Reader, Steps, Write

_DEEPEST = 64  # values deeper than this are taken as words
_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPED = '"\\/bfnrt'
_HEX = set("0123456789abcdefABCDEF")


def copy_value(
    reader: Reader, write: Write, ends: Sequence[str] = (), depth: int = 0
) -> Steps[None]:
    """Copy the value that comes next; one of `ends` in place of a comma or a bracket ends all."""
    first = yield from reader.peek()
    if first in ("{", "[") and depth < _DEEPEST:
        yield from _copy_items(reader, write, ends, depth)
    elif first in ('"', "'"):
        yield from _copy_string(reader, write, ends)
    else:
        yield from _copy_word(reader, write, ends)


def read_string(reader: Reader) -> Steps[str]:
    """The text of the string that comes next, in quotes."""
    found: list[str] = []
    yield from _copy_string(reader, found.append, ())
    return str(json.loads("".join(found)))


def _copy_items(reader: Reader, write: Write, ends: Sequence[str], depth: int) -> Steps[None]:
    """An object or an array."""
    opened = yield from reader.peek()
    closed = "}" if opened == "{" else "]"
    reader.skip(1)
    write(opened)
    is_first = True
    while True:
        # A comma is written once another item comes after it.
        gap = yield from reader.space()
        while (yield from reader.peek()) == ",":
            reader.skip(1)
            gap += "," + (yield from reader.space())
        following = yield from reader.peek()
        if following in ("}", "]", ""):
            reader.skip(len(following))
            write(gap.replace(",", ""))
            break
        if ends and (yield from _is_next(reader, ends)):
            break
        write(_separator(gap, is_first))
        is_first = False
        if opened == "{":
            yield from _copy_key(reader, write, ends)
        yield from copy_value(reader, write, ends, depth + 1)
    write(closed)


def _separator(gap: str, is_first: bool) -> str:
    if is_first:
        return gap.replace(",", "")
    before, comma, after = gap.partition(",")
    return before + "," + after.replace(",", "") if comma else "," + gap


def _copy_key(reader: Reader, write: Write, ends: Sequence[str]) -> Steps[None]:
    if (yield from reader.peek()) in ('"', "'"):
        yield from _copy_string(reader, write, ends)
    else:
        key = yield from reader.until(":", "}", "]", ",", *ends)
        write(json.dumps(key.strip(), ensure_ascii=False))
    write((yield from reader.space()))
    yield from reader.take(":")
    write(":")
    write((yield from reader.space()))


def _copy_string(reader: Reader, write: Write, ends: Sequence[str]) -> Steps[None]:
    quote = yield from reader.peek()
    reader.skip(1)
    write('"')
    while True:
        character = yield from reader.peek()
        if not character:
            break
        reader.skip(1)
        if character == quote:
            if (yield from _ends_string(reader, ends)):
                break
            character = '\\"' if quote == '"' else quote
        elif character == "\\":
            character = yield from _escape(reader)
        elif character == '"' or character < " ":
            character = json.dumps(character)[1:-1]
        write(character)
    write('"')


def _ends_string(reader: Reader, ends: Sequence[str]) -> Steps[bool]:
    """Whether a quote that was just taken is the last: a quote inside is followed by words."""
    n = 1
    while (following := (yield from reader.look(n)))[n - 1 :].isspace():
        n += 1
    last = following[n - 1 :]
    if last in ("", ",", ":", "}", "]"):
        return True
    return bool(ends) and (yield from _is_next(reader, ends, n - 1))


def _escape(reader: Reader) -> Steps[str]:
    """What stands behind a backslash, with it."""
    character = yield from reader.peek()
    if character == "u":
        digits = (yield from reader.peek(5))[1:]
        if len(digits) == 4 and _HEX.issuperset(digits):
            reader.skip(5)
            return "\\u" + digits
    elif character and character in _ESCAPED:
        reader.skip(1)
        return "\\" + character
    elif character == "'":
        reader.skip(1)
        return "'"
    return "\\\\"


def _copy_word(reader: Reader, write: Write, ends: Sequence[str]) -> Steps[None]:
    """A number or a word; what JSON has no such word for becomes a string."""
    word = yield from reader.until(",", "}", "]", *ends)
    if reader.is_at_end:
        yield from reader.peek()  # a cut number is no other number
    kept = word.rstrip()
    kept = _WORDS.get(kept, kept)
    write(
        (kept if is_json(kept) else json.dumps(kept, ensure_ascii=False))
        + word[len(word.rstrip()) :]
    )


def is_json(text: str) -> bool:
    """Whether a text is a JSON value."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _is_next(reader: Reader, literals: Sequence[str], skipped: int = 0) -> Steps[bool]:
    """Whether one of the literals comes next, behind `skipped` characters."""
    for literal in literals:
        for n in range(1, len(literal) + 1):
            if (yield from reader.look(skipped + n))[skipped:] != literal[:n]:
                break
        else:
            return True
    return False
