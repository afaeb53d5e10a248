"""Byte-pair vocabularies: text cut into words, and words merged by the ranks of a file's merges.

Knows nothing of special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any

from edgeinfer.gguf import Metadata
from edgeinfer.text.pretokenizers import in_threes
from edgeinfer.text.vocabulary import CONTROL, MAX_TEXT, Vocabulary

_MAX_MERGES = 5 << 17  # the largest vocabularies in use have 580,604
_KEPT_WORDS = 1 << 13
_LONGEST_KEPT = 64  # characters; longer words hardly come twice


def byte_pair_encoder(vocab: Vocabulary, meta: Metadata) -> Callable[[str], list[int]]:
    """What gives the ids of a text: it cuts words, and merges each."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Steps

    assert vocab.row is not None
    row = vocab.row
    # Without the control tokens raw text can't become one, whatever the merges say.
    tokens = dict(vocab.ids)
    for i in vocab.of_kinds(CONTROL):
        del tokens[vocab.texts[i]]
    pairs = BytePair(
        tokens,
        _merge_ranks(meta),
        ignore_merges=row.ignore_merges,
        byte_fallback=not row.byte_level,
    )
    # NOTE: the library is asked for words only. Merging in Python costs little beside a model,
    # and handing it a vocabulary costs a fifth of a second.
    steps: list[Any] = [Split(Regex(pattern), "isolated") for pattern in row.patterns]
    if row.byte_level:
        steps.append(ByteLevel(add_prefix_space=False, use_regex=False))
    words = Steps(steps).pre_tokenize_str

    def encode(text: str) -> list[int]:
        if not row.byte_level:
            text = text.replace(" ", "▁")
        return [id for word, _ in words(text) for id in pairs.encode(word)]

    if row.threes is None:
        return encode
    numbers, digits = row.threes
    runs = Split(Regex(numbers), "isolated").pre_tokenize_str

    def encode_in_threes(text: str) -> list[int]:
        pieces = [piece for run, _ in runs(text) for piece in in_threes(run, digits)]
        return [id for piece in pieces for id in encode(piece)]

    return encode_in_threes


def _merge_ranks(meta: Metadata) -> dict[bytes, int]:
    """The rank of every merge, by its spelling "left right" in UTF-8: most are never decoded.

    One that names no tokens is harmless: what is no token never comes up in merging.
    """
    merges = meta.get_strings("tokenizer.ggml.merges", most=_MAX_MERGES, most_bytes=MAX_TEXT)
    ranks = dict(zip(merges, range(len(merges)), strict=True))
    if len(ranks) < len(merges):  # the first of equals counts
        ranks = dict(zip(reversed(merges), reversed(range(len(merges))), strict=True))
    return ranks


class BytePair:
    """Merges words of one vocabulary.

    `ranks` are the merges as files spell them, b"left right", the lower the sooner. With
    `ignore_merges` a word that is a token is taken whole; with `byte_fallback` a character that is
    none becomes its <0xXX> tokens.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        ranks: Mapping[bytes, int],
        *,
        ignore_merges: bool = False,
        byte_fallback: bool = False,
    ) -> None:
        self._tokens, self._ranks = tokens, ranks
        self._ignore_merges, self._byte_fallback = ignore_merges, byte_fallback
        self._kept = lru_cache(_KEPT_WORDS)(self._encode)

    def encode(self, word: str) -> Sequence[int]:
        """Token ids of a word; characters that no token has are left out."""
        return self._kept(word) if len(word) <= _LONGEST_KEPT else self._encode(word)

    def _encode(self, word: str) -> tuple[int, ...]:
        tokens = self._tokens
        if self._ignore_merges and word in tokens:
            return (tokens[word],)
        return tuple([tokens[part] for part in self._merge(self._symbols(word))])

    def _symbols(self, word: str) -> list[str]:
        """What merging starts from: the characters, as far as tokens have them."""
        if not self._byte_fallback:
            return [character for character in word if character in self._tokens]
        symbols: list[str] = []
        for character in word:
            spelled = [character]
            if character not in self._tokens:
                spelled = [f"<0x{byte:02X}>" for byte in character.encode()]
            if all(each in self._tokens for each in spelled):
                symbols += spelled
        return symbols

    def _merge(self, symbols: list[str]) -> list[str]:
        """Join neighbours, the lowest rank first and the leftmost of equals, while any may."""
        n = len(symbols)
        # Neighbours by position; a symbol that was joined to its left one is empty.
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        heap: list[tuple[int, int]] = []
        for left in range(n - 1):
            rank = self._rank(symbols[left], symbols[left + 1])
            if rank is not None:
                heappush(heap, (rank, left))
        while heap:
            rank, left = heappop(heap)
            right = after[left]
            # An entry is out of date once either symbol has been joined to another.
            if right == n or self._rank(symbols[left], symbols[right]) != rank:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[left] < n:
                before[after[left]] = left
            for i, j in ((before[left], left), (left, after[left])):
                if i >= 0 and j < n:
                    rank = self._rank(symbols[i], symbols[j])
                    if rank is not None:
                        heappush(heap, (rank, i))
        return [symbol for symbol in symbols if symbol]

    def _rank(self, left: str, right: str) -> int | None:
        """The rank of a merge, None where there is none or it makes no token."""
        rank = self._ranks.get(f"{left} {right}".encode())
        return rank if rank is not None and left + right in self._tokens else None
