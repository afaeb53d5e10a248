"""JSON as models write it, to JSON as it must be, character by character.

What is valid passes unchanged. What is not is mended, and nothing of it is lost: Python's words
and quotes, quotes and line ends inside strings, spare commas, brackets that nobody closed. Half of
a surrogate pair, which no encoding can take, becomes U+FFFD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from edgeinfer.text.reader import Reader, Steps, Write

_DEEPEST = 64  # values deeper than this are taken as words
_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPED = '"\\/bfnrt'
_CODE = re.compile("u[0-9a-fA-F]{4}")
_FIRST_HALF, _SECOND_HALF = re.compile("u[dD][89abAB]"), re.compile("u[dD][c-fC-F]")


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


def mended(text: str) -> str:
    """The JSON value that a text is meant to be; what follows it is left out."""
    reader, found = Reader(), list[str]()
    reader.push(text)
    reader.end(was_cut=False)
    for _ in copy_value(reader, found.append):
        pass
    return "".join(found)


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
    n = yield from reader.n_spaces()
    last = (yield from reader.look(n + 1))[n:]
    if last in ("", ",", ":", "}", "]"):
        return True
    return bool(ends) and (yield from _is_next(reader, ends, n))


def _escape(reader: Reader) -> Steps[str]:
    """What stands behind a backslash, with it."""
    character = yield from reader.peek()
    if character == "u":
        code = yield from reader.peek(5)
        if _CODE.fullmatch(code):
            reader.skip(5)
            return (yield from _whole_character(reader, code))
    elif character and character in _ESCAPED:
        reader.skip(1)
        return "\\" + character
    elif character == "'":
        reader.skip(1)
        return "'"
    return "\\\\"


def _whole_character(reader: Reader, code: str) -> Steps[str]:
    """The escape of a code, with that of its other half."""
    if _FIRST_HALF.match(code):
        other = yield from reader.peek(6)
        if other[:1] == "\\" and _CODE.fullmatch(other[1:]) and _SECOND_HALF.match(other[1:]):
            reader.skip(6)
            return f"\\{code}{other}"
    elif not _SECOND_HALF.match(code):
        return f"\\{code}"
    return "\\ufffd"


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
    """Whether a text is a JSON value, of whole characters."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def as_json(value: object) -> str:
    """JSON of a value of Python; ValueError where there is none."""
    return clean_text(json.dumps(value, ensure_ascii=False, allow_nan=False))


def clean_text(text: str) -> str:
    """Text that every encoding can take: half of a surrogate pair becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
