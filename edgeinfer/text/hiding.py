"""Marks that keep text from being read as control tokens while a chat template passes it on.

Knows nothing of templates or tokenizers but the spelling of special tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edgeinfer.errors import InvalidRequestError

# A tag that replies hold and templates look for.
_THINK_TAGS = ("<think>", "</think>")
# Of a longer special token, its first and its last characters stand for the whole.
_LONGEST = 256
_PRIVATE = ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))
_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{4}")


class Hiding:
    """Puts a mark inside whatever is spelled like a special token, and says how to undo it.

    Marks are private-use characters that occur nowhere in the conversation or the template.
    """

    def __init__(self, specials: Sequence[str], conversation: Any) -> None:
        free = _unused_characters(conversation)
        self._mark = next(free)
        longer = [s for s in specials if len(s) > 1]
        self._all = _Specials(longer)
        in_replies = [s for s in longer if s not in _THINK_TAGS]
        self._in_replies = self._all if len(in_replies) == len(longer) else _Specials(in_replies)
        self._stand_ins = {ord(s): next(free) for s in specials if len(s) == 1}
        self.restore: dict[int, str | None] = {ord(self._mark): None}
        self.restore |= {ord(c): chr(s) for s, c in self._stand_ins.items()}

    def __call__(self, value: Any, role: str) -> Any:
        specials = self._in_replies if role == "assistant" else self._all
        return map_strings(
            value,
            lambda text: self._edges(self._inside(text, specials)),
            lambda key: self._inside(key, specials),
        )

    def without_escapes(self, text: str) -> str:
        """A template that writes JSON in ASCII has spelled the marks out."""
        if "\\u" in text:
            for character in map(chr, self.restore):
                text = text.replace(_escape(character), character)
        return text

    def _inside(self, text: str, specials: _Specials) -> str:
        text = text.translate(self._stand_ins) if self._stand_ins else text
        kept, end = [], 0
        for at in specials.places(text):
            kept.append(text[end : at + 1])
            end = at + 1
        return self._mark.join([*kept, text[end:]]) if kept else text

    def _edges(self, text: str) -> str:
        """Break the ends that the template's own text next to them could complete."""
        core = text.strip()
        if not core:
            return text
        before, _, after = text.partition(core)
        for n in self._all.begun_at_end(core):
            at = len(core) - n + 1
            core = core[:at] + self._mark + core[at:]
        for n in self._all.ended_at_begin(core):
            core = core[: n - 1] + self._mark + core[n - 1 :]
        return before + core + after


class _Specials:
    """Where special tokens, of two characters or more, stand in a text or could be completed.

    Takes memory for the tokens, not for all that they begin with.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        short = [s for s in texts if len(s) <= _LONGEST]
        heads = [s[:_LONGEST] for s in texts if len(s) > _LONGEST]
        tails = [s[-_LONGEST:] for s in texts if len(s) > _LONGEST]
        self._begins = sorted({*short, *heads})
        self._ends = sorted({s[::-1] for s in (*short, *tails)})
        self._begin_with = frozenset(s[0] for s in self._begins)
        self._end_with = frozenset(s[0] for s in self._ends)
        self._found = _without_longer(sorted({*short, *heads, *tails}))
        self._pairs = {s[:2] for s in self._found}
        first = "".join(map(re.escape, sorted({s[0] for s in self._found})))
        self._first = re.compile(f"[{first}]") if first else None

    def places(self, text: str) -> Iterator[int]:
        """Where a special token begins, overlapping ones included."""
        if self._first is None:
            return
        for match in self._first.finditer(text):
            at = match.start()
            if text[at : at + 2] in self._pairs:
                rest = text[at : at + _LONGEST]
                # None begins with another, so only the last one before `rest` can begin it.
                i = bisect_right(self._found, rest) - 1
                if i >= 0 and rest.startswith(self._found[i]):
                    yield at

    def begun_at_end(self, text: str) -> list[int]:
        """How many characters at the end of `text` begin a longer special token; least first."""
        return _prefixes_at_end(text[-_LONGEST:], self._begins, self._begin_with)

    def ended_at_begin(self, text: str) -> list[int]:
        """How many characters at its begin end one; most first."""
        return _prefixes_at_end(text[:_LONGEST][::-1], self._ends, self._end_with)[::-1]


def _prefixes_at_end(text: str, ordered: list[str], begin_with: frozenset[str]) -> list[int]:
    found = []
    for n in range(1, len(text) + 1):
        if text[-n] in begin_with:
            part = text[-n:]
            i = bisect_right(ordered, part)
            if i < len(ordered) and ordered[i].startswith(part):
                found.append(n)
    return found


def _without_longer(ordered: list[str]) -> list[str]:
    """Sorted texts less those that begin with another of them: breaking that one breaks both."""
    kept: list[str] = []
    for text in ordered:
        if not (kept and text.startswith(kept[-1])):
            kept.append(text)
    return kept


def _unused_characters(conversation: Any) -> Iterator[str]:
    texts: list[str] = []

    def note(text: str) -> str:
        texts.append(text)
        return text

    map_strings(conversation, note)
    used: set[str] = set().union(*(text for text in texts if not text.isascii()))
    escapes = {escape.lower() for text in texts for escape in _ESCAPE.findall(text)}
    for start, stop in _PRIVATE:
        for character in map(chr, range(start, stop)):
            if character not in used and not escapes.issuperset(_spelled(character)):
                yield character
    raise InvalidRequestError(
        "the messages use every private-use character of Unicode, so none is left to protect "
        "them with",
        param="messages",
    )


def _escape(character: str) -> str:
    return json.dumps(character)[1:-1]


def _spelled(character: str) -> list[str]:
    return _ESCAPE.findall(_escape(character))


def map_strings(
    value: Any, change: Callable[[str], str], change_key: Callable[[str], str] | None = None
) -> Any:
    """`value` with its strings changed, at any depth; tuples become lists."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        keys = [(change_key or change)(k) if isinstance(k, str) else k for k in value]
        values = [map_strings(v, change, change_key) for v in value.values()]
        return dict(zip(keys, values, strict=True))
    if isinstance(value, (list, tuple)):
        return [map_strings(v, change, change_key) for v in value]
    return value
