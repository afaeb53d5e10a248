"""What a search looks for: words without case and accents, and the places where they are.

What is written without spaces between words, as Chinese is, counts by the character; so do emoji.
Where no text has the words, those are found that hold what was typed as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from unicodedata import normalize

_MOST_SOUGHT = 300  # characters
_MOST_SCANNED = 20_000  # messages, the latest
_BEFORE, _LENGTH = 24, 90  # characters of an excerpt
# Accents of letters, and points of Hebrew and Arabic, which people write or leave out.
_MARKS = re.compile("[\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u064b-\u0655\u0670]")
# Thai to Khmer, kana, Han and Hangul; then symbols, and what lies beyond the letters.
_ALONE = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3041-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua000-\ua4cf\uac00-\ud7a3\uf900-\ufaff\u2190-\u2bff\U0001f000-\U0001faff"
    "\U00020000-\U0003ffff]"
)
# Marks of Indic and Thai scripts are part of words; Python's \\w knows letters only.
_BETWEEN = re.compile(
    "(?:[^\\w\u0900-\u0eff\u1000-\u109f\u1780-\u17ff\u2190-\u2bff\U0001f000-\U0001faff]|_)+"
)
# Columns of a summary of conversation `c`.
SUMMARY = (
    "c.id, c.title, c.updated, c.model, c.tags, "
    "(SELECT count(*) FROM message WHERE conversation = c.id) AS n"
)
_INDEXED = (
    "WITH hit AS (SELECT rowid AS id, rank FROM found WHERE found MATCH ? ORDER BY rank LIMIT 1000)"
    f" SELECT {SUMMARY}, m.content, min(hit.rank + (hit.id < 0)) "
    "FROM hit LEFT JOIN message AS m ON m.id = hit.id "
    "JOIN conversation AS c ON c.id = coalesce(m.conversation, -hit.id) "
    "GROUP BY c.id ORDER BY min(hit.rank + (hit.id < 0)), c.updated DESC LIMIT ?"
)


def tokens(text: str) -> str:
    """The words of a text, apart by one space."""
    if text.isascii():
        folded = text.lower()
    else:
        bare = _MARKS.sub("", normalize("NFKD", text).casefold())
        folded = _ALONE.sub(r" \g<0> ", normalize("NFKC", bare))
    return _BETWEEN.sub(" ", folded).strip()


def typed(words: str) -> str:
    """As much of what was typed as is looked for."""
    return words[:_MOST_SOUGHT].replace("\0", " ").strip()


def queries(words: str) -> Iterator[tuple[str, ...]]:
    """Queries with their values, but for the limit: the second where the first finds nothing."""
    phrases = [f'"{each}"' for each in _phrases(words)]
    if phrases:
        yield _INDEXED, " ".join(phrases) + "*"
    terms = [f"%{_LIKE.sub(_ESCAPED, term)}%" for term in words.split()]
    in_message = " AND ".join(["content LIKE ? ESCAPE '!'"] * len(terms))
    in_title = " AND ".join(["title LIKE ? ESCAPE '!'"] * len(terms))
    query = (
        f"WITH m AS (SELECT * FROM message ORDER BY id DESC LIMIT {_MOST_SCANNED}), "
        f"hit AS (SELECT conversation AS id, content FROM m WHERE {in_message} UNION ALL "
        f"SELECT id, '' FROM conversation WHERE {in_title}) "
        f"SELECT {SUMMARY}, hit.content FROM hit JOIN conversation AS c ON c.id = hit.id "
        "GROUP BY c.id ORDER BY c.updated DESC LIMIT ?"
    )
    yield query, *terms, *terms


_LIKE, _ESCAPED = re.compile("([%_!])"), r"!\1"


def _phrases(words: str) -> list[str]:
    """What must all be in a text: the tokens of each word that has some."""
    return [found for word in words.split() if (found := " ".join(tokens(word).split()))]


def holds(text: str, words: str) -> bool:
    """Whether a text has all words, as the index would find; or as they are, where it has none."""
    sought = _phrases(words)
    if not sought:
        return is_literal(text, words)
    found = f" {' '.join(tokens(text).split())} "
    return all(f" {each} " in found for each in sought[:-1]) and f" {sought[-1]}" in found


def is_literal(text: str, words: str) -> bool:
    """Whether all words are in a text as they are typed, but for their case."""
    return all(word in text.lower() for word in words.lower().split())


def excerpt(text: str, words: str) -> str:
    """The part of a text where the first of some words is, or its beginning."""
    at = next((i for word in words.split() if (i := _find(text, word)) >= 0), 0)
    start = max(0, at - _BEFORE)
    if start:
        start = next((i + 1 for i in range(start, at) if text[i].isspace()), start)
    part = text[start : start + _LENGTH]
    return ("…" if start else "") + part + ("…" if start + _LENGTH < len(text) else "")


def _find(text: str, word: str) -> int:
    """Where a word is, whatever its case and accents; -1 where it is not to be found so."""
    at = text.lower().find(word.lower())
    if at >= 0 or text.isascii():
        return at
    apart = normalize("NFD", text).lower()
    at = _MARKS.sub("", apart).find(_MARKS.sub("", normalize("NFD", word).lower()))
    if at < 0:
        return at
    for mark in _MARKS.finditer(apart):
        if mark.start() > at:
            break
        at += 1
    return len(normalize("NFC", apart[:at]))
