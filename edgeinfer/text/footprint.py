"""How much memory a file's vocabulary takes, reckoned from its counts before it is built."""

from __future__ import annotations

import sys
from typing import NamedTuple

from edgeinfer.gguf import Array, Metadata

_MiB = 1 << 20


class TextBytes(NamedTuple):
    """Bytes that a tokenizer and the header that it was read from hold, and hold while it is built.

    `building` counts all of `kept`.
    """

    kept: int
    building: int


def text_bytes(meta: Metadata) -> TextBytes:
    """Of the tokenizer that `Tokenizer.from_metadata` makes; a few MiB where there is none.

    Measured by VmHWM and VmRSS on x86-64 Linux, CPython 3.11, over vocabularies of 32,000 to
    262,144 tokens: never less than that took, and at most 12 MiB more.
    """
    tokens, merges = _array(meta, "tokens"), _array(meta, "merges")
    n_tokens, n_merges = (0 if each is None else len(each) for each in (tokens, merges))
    spellings = sum(each.n_bytes for each in (tokens, merges) if each is not None)
    spellings -= 8 * (n_tokens + n_merges)  # of each a length in the file
    header = _HEADER + 3 * meta.n_bytes // 2
    if meta.get("tokenizer.ggml.model") == "llama":
        # The library's own trie and pieces; while it is handed them, their protocol buffer too.
        kept, building = (_LIBRARY + n * n_tokens + spellings for n in (_KEPT_PIECE, _PIECE))
        return TextBytes(header + kept, header + building)
    tables = 2 * _dictionary(n_tokens, _TEXT_SLOT) + _dictionary(n_merges, _SLOT)
    kept = _LIBRARY + _TOKEN * n_tokens + _MERGE * n_merges + spellings + tables
    return TextBytes(header + kept, header + kept)


# Of a token: its text, of wider characters mostly, its places in lists, its id, and what reading
# it from the file leaves in pieces. Of a merge: the same as bytes.
_TOKEN, _MERGE = 160, 96
_PIECE, _KEPT_PIECE = 620, 350
_LIBRARY = 7 * _MiB  # the code of the library that cuts words, mapped, and the words kept
_HEADER = 1 * _MiB
_SLOT = 24  # of a dictionary: hash, key and value
_TEXT_SLOT = _SLOT if sys.version_info < (3, 11) else 16  # without the hash, which a text has


def _dictionary(n: int, slot: int) -> int:
    """Bytes of a CPython dictionary that has grown to n entries: two thirds of 2**k places."""
    places = 8
    while places * 2 // 3 < n:
        places *= 2
    return places * (2 if places <= 1 << 16 else 4) + places * 2 // 3 * slot


def _array(meta: Metadata, name: str) -> Array | None:
    value = meta.get("tokenizer.ggml." + name)
    return value if isinstance(value, Array) else None
