"""How much of a lexer a regular expression takes at least that counts, before an answer begins.

Reads what Rust's crate regex reads, and says nothing of what that would refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# States of a letter of a class: those between the bytes of its letters, and the next one. Measured
# with 49,152 tokens; of \w there are thrice as many with 151,936, of others a few more.
_OF_CLASSES = {"w": 60, "W": 60, "p": 33, "P": 60, "D": 18, "S": 15, "d": 13, "s": 8}
_OF_ANY = 9
_FLAGS = re.compile(r"\(\?[a-zA-Z-]+\)")
_GROUP = re.compile(r"\((?:\?(?:P?<\w*>|[a-zA-Z-]*:))?")
_ESCAPE = re.compile(r"\\(?:[pP](?:\{[^}]*\}|.)|[xuU](?:\{[^}]*\}|[0-9A-Fa-f]+)|.)", re.DOTALL)
_COUNT = re.compile(r"\{\s*(\d{0,9})\s*,?\s*(\d{0,9})\s*\}")
_IN_LARK = re.compile(r'"(?:[^"\\]|\\.)*"|/(?!/)((?:[^/\\\n]|\\.)*)/')


def n_counted(pattern: str) -> int:
    """About how many states a lexer comes to have where an answer is as long as its counts."""
    sums, last, at, counted = [0], 0, 0, 0  # of each group that is open; of what was read last
    while at < len(pattern):
        letter, end = pattern[at], at + 1
        if flags := _FLAGS.match(pattern, at):
            end = flags.end()
        elif letter == "(" and (group := _GROUP.match(pattern, at)):
            end = group.end()
            sums.append(0)
        elif letter == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
        elif letter == "{" and (count := _COUNT.match(pattern, at)):
            end, n = count.end(), max(1, *(int(each or 0) for each in count.groups()))
            counted += last * (n - 1)
            sums[-1] += last * (n - 1)
            last *= n
        elif letter not in "?*+|^$":
            end, last = _atom(pattern, at)
            sums[-1] += last
        at = end
    return counted


def patterns_of(grammar: str) -> Iterator[str]:
    """Those of a grammar in Lark."""
    return (found[1] for found in _IN_LARK.finditer(grammar) if found[1])


def _atom(pattern: str, at: int) -> tuple[int, int]:
    """Where a letter, or a class of them, ends, and its states."""
    letter = pattern[at]
    if letter == ".":
        return at + 1, _OF_ANY
    if letter == "[":
        end = _class_end(pattern, at)
        inside = pattern[at:end]
        usual = 1 if inside.isascii() and inside[1:2] != "^" else _OF_ANY
        found = (_OF_CLASSES.get(each[0][1:2], 1) for each in _ESCAPE.finditer(inside))
        return end, max(usual, *found, 1)
    if letter == "\\" and (escape := _ESCAPE.match(pattern, at)):
        return escape.end(), _OF_CLASSES.get(escape[0][1:2], 1)
    return at + 1, len(letter.encode("utf-8", "surrogatepass"))


def _class_end(pattern: str, at: int) -> int:
    """Behind the bracket that closes a class; others may stand in it."""
    depth = 0
    while at < len(pattern):
        letter, at = pattern[at], at + 1
        if letter == "\\":
            at += 1
        elif letter == "[":
            depth += 1
            at += pattern.startswith("^", at)
            at += pattern.startswith("]", at)  # one at the start is a letter of it
        elif letter == "]":
            depth -= 1
            if not depth:
                break
    return at
