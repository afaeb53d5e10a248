"""Byte-pair merging against the `tokenizers` library, which is given the same vocabulary."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import BPE

from edgeinfer.text.byte_pair import BytePair

BYTES = [f"<0x{b:02X}>" for b in range(256)]
LETTERS = "abcé"
# Tokens of up to four letters, so that merges overlap and compete in every way.
POSSIBLE = ["".join(each) for n in (2, 3, 4) for each in product("abc", repeat=n)]


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens, and merges of them in some order; some merges come twice."""
    texts = [*draw(st.permutations(LETTERS)), *draw(st.lists(st.sampled_from(POSSIBLE)))]
    texts += draw(st.sampled_from([[], BYTES, BYTES[:200]]))
    known = set(texts)
    splits = [(t[:i], t[i:]) for t in sorted(known) for i in range(1, len(t)) if t[0] != "<"]
    pairs = [pair for pair in splits if known.issuperset(pair)]
    merges = draw(st.lists(st.sampled_from(pairs))) if pairs else []
    return {text: i for i, text in enumerate(dict.fromkeys(texts))}, merges


@settings(max_examples=400, deadline=None)
@given(
    vocabulary=vocabularies(),
    words=st.lists(st.text(LETTERS + "d\n😀", max_size=20), max_size=5),
    ignore_merges=st.booleans(),
    byte_fallback=st.booleans(),
)
def test_equals_the_library(
    vocabulary: tuple[dict[str, int], list[tuple[str, str]]],
    words: list[str],
    ignore_merges: bool,
    byte_fallback: bool,
) -> None:
    tokens, merges = vocabulary
    library = BPE(tokens, merges, ignore_merges=ignore_merges, byte_fallback=byte_fallback)
    ranks = {f"{left} {right}".encode(): rank for rank, (left, right) in enumerate(merges)}
    ours = BytePair(tokens, ranks, ignore_merges=ignore_merges, byte_fallback=byte_fallback)
    for word in words:
        assert list(ours.encode(word)) == [token.id for token in library.tokenize(word)]


def test_a_long_word_takes_no_longer_than_its_length_asks() -> None:
    tokens = {"a" * (1 << n): n for n in range(16)}
    ranks = {b"%s %s" % (b"a" * (1 << n), b"a" * (1 << n)): n for n in range(15)}
    pairs = BytePair(tokens, ranks)
    assert list(pairs.encode("a" * 100_000)) == [15, 15, 15, 10, 9, 7, 5]
