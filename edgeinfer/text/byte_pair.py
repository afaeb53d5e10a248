"""Byte-pair merging: a word to token ids, by the vocabulary and the ranks of its merges.

Knows nothing of how a text is cut into words, or of special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from heapq import heappop, heappush

_KEPT_WORDS = 1 << 13
_LONGEST_KEPT = 64  # characters; longer words hardly come twice


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
