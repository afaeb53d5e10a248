"""What a vocabulary's metadata may be: bytes by spelling, ends, ids of nothing, merges, limits.

Knows nothing of the published vectors; those are in test_tokenizer.py.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from array import array
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.pre_tokenizers import Split

from edgeinfer.errors import EdgeInferError, InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import Array, GGUFFile, Metadata
from edgeinfer.gguf.metadata import Entry, Origin
from edgeinfer.gguf.source import FileBytes
from edgeinfer.text import byte_pair as byte_pair_module
from edgeinfer.text import vocabulary
from edgeinfer.text.pretokenizers import PRE_TOKENIZERS, in_threes
from edgeinfer.text.tokenizer import Tokenizer

from .models_for_tests import metadata_of, tiny_model
from .test_tokenizer import BYTE_LEVEL, byte_pair, sentence_piece, tokenizer_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTES = [f"<0x{b:02X}>" for b in range(256)]
TEXT = "a\nb 🦙é\t\x00"


def spm(tokens: list[str | bytes], kinds: list[int] | None = None, **keys: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    if kinds is not None:
        meta["tokenizer.ggml.token_type"] = kinds
    return meta | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


# -- bytes ---------------------------------------------------------------------------------------

HEAD: list[str | bytes] = ["<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("kind", [NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, 0, None])
def test_bytes_are_found_by_their_spelling(kind: int | None) -> None:
    kinds = None if kind is None else [2, 3, 3, *[kind] * 256, 1, 1]
    tokenizer = tokenizer_of(spm([*HEAD, *BYTES, "a", "▁"], kinds))
    ids = tokenizer.encode(TEXT, bos=False)
    assert 0 not in ids
    assert tokenizer.decode(ids, special=True) == TEXT
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.piece(3 + 0x0A) == b"\n"


def test_bytes_of_raw_utf8_vocabularies_too() -> None:
    meta = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": ["a", "▁", *BYTES],
        "tokenizer.ggml.merges": [],
    }
    tokenizer = tokenizer_of(meta)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 255), max_size=256), st.text(max_size=20), st.booleans())
def test_a_byte_without_token_is_unknown_and_costs_no_other(
    present: set[int], text: str, typed: bool
) -> None:
    tokens: list[str | bytes] = [*HEAD, *(BYTES[b] for b in sorted(present))]
    kinds = [2, 3, 3, *[BYTE] * len(present)] if typed else None
    tokenizer = tokenizer_of(spm(tokens, kinds, add_space_prefix=False))
    ids = tokenizer.encode(text, bos=False)
    raw = text.replace(" ", "▁").encode(errors="replace") if text else b""
    if present:
        wanted = [tokens.index(BYTES[b]) if b in present else 0 for b in raw]
        assert ids == wanted
    else:
        assert set(ids) <= {0}


def test_a_second_spelling_of_a_byte_is_read_but_never_made() -> None:
    tokens: list[str | bytes] = [*HEAD, *BYTES, "<0xab>", "a"]
    tokenizer = tokenizer_of(spm(tokens, [2, 3, 3, *[BYTE] * 257, 1]))
    assert tokenizer.piece(259) == b"\xab"
    assert 259 not in tokenizer.encode("«a")
    lower: list[str | bytes] = [*HEAD, "<0x0a>", "a"]
    tokenizer = tokenizer_of(spm(lower, [2, 3, 3, BYTE, 1], add_space_prefix=False))
    assert tokenizer.encode("a\n", bos=False) == [4, 0]


def test_the_unknown_token_may_be_a_byte() -> None:
    tokens: list[str | bytes] = [*BYTES, "a", "▁", "<unk>"]
    tokenizer = tokenizer_of(spm(tokens, add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode(TEXT, bos=False)) == TEXT
    partial: list[str | bytes] = ["<0x00>", "a"]
    tokenizer = tokenizer_of(spm(partial, add_space_prefix=False))
    assert tokenizer.encode("a\x00b", bos=False) == [1, 0, 0]


# -- tokens that are not UTF-8 -------------------------------------------------------------------


def test_tokens_that_are_not_utf8_are_kept_apart() -> None:
    raw = [b"\xff", b"\xfe", b"\xc3", b"a\xff", "\ufffd".encode()]
    tokenizer = tokenizer_of(spm([*HEAD, *raw, "a"]))
    assert [tokenizer.piece(3 + i) for i in range(5)] == raw
    assert tokenizer.decode([5, 5]) == "\ufffd\ufffd"
    assert tokenizer.encode("\ufffd", bos=False)[-1] == 7
    for id in range(tokenizer.n_vocab):
        tokenizer.text(id).encode()
    # A byte's own token stands for it where there are <0xXX> of others.
    tokenizer = tokenizer_of(spm([*HEAD, "<0xA9>", b"\xc3"], add_space_prefix=False))
    assert tokenizer.encode("é", bos=False) == [4, 3]


def test_special_tokens_that_are_not_utf8() -> None:
    meta = byte_pair()
    meta["tokenizer.ggml.tokens"] = [*meta["tokenizer.ggml.tokens"], b"<\xff>"]
    meta["tokenizer.ggml.token_type"] = [1] * 257 + [CONTROL]
    tokenizer = tokenizer_of(meta | {"tokenizer.ggml.bos_token_id": 257})
    assert tokenizer.bos_text == "<\ufffd>" and tokenizer.piece(257) == b"<\xff>"
    for text in tokenizer.special_texts:
        text.encode()
    assert 257 not in tokenizer.encode("<\ufffd>", parse_special=True)


# -- special ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [[258, 259], (259, 258), [258, 259, 258, -1, 10**6]])
def test_every_end_that_the_file_names_ends(value: Any) -> None:
    meta = byte_pair(("<x>", "<stop>", "<halt>"), eos_token_ids=value)
    assert tokenizer_of(meta).eog_ids == {0, 258, 259}
    assert tokenizer_of(meta | {"tokenizer.ggml.eos_token_ids": 258}).eog_ids == {0, 258}


@pytest.mark.parametrize("id", [257, 1 << 31, -1, -2, 0xFFFFFFFF])
def test_an_id_of_no_token_is_no_special_one(id: int) -> None:
    names = ("bos", "eos", "eot", "eom", "unknown", "fim_pad", "fim_pre", "padding")
    keys = {f"{name}_token_id": id for name in names}
    tokenizer = tokenizer_of(byte_pair(**keys))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (None, None, frozenset())
    tokenizer = tokenizer_of(sentence_piece(**{k: id + 6 for k in keys if id > 9}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (1, 2, {2})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("suppress_tokens", [1, 2]),
        ("normalizer.lowercase", True),
        ("normalizer.strip_accents", True),
    ],
)
def test_settings_that_change_text_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        tokenizer_of(byte_pair(**{key: value}))
    tokenizer_of(byte_pair(**{key: type(value)()}))


# -- merges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 7, 1000, 1999])
@pytest.mark.parametrize("odd", ["a zzz", "zzz a", "ab", "", " ", "a b c", b"\xff a"])
def test_merges_of_no_tokens_are_left_out(odd: str | bytes, at: int) -> None:
    merges: list[str | bytes] = ["a b", *["x y"] * 1999]
    merges.insert(at, odd)
    tokenizer = tokenizer_of(byte_pair(merges=merges))
    assert tokenizer.encode("ab") == [256]


def test_the_first_of_equal_merges_counts() -> None:
    meta = byte_pair(("bc",), merges=["a b", "b c", "a b"])
    meta["tokenizer.ggml.token_type"] = [1] * 258
    tokenizer = tokenizer_of(meta)
    assert tokenizer.encode("abc") == [256, *tokenizer.encode("c")]


# -- limits and time -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["tokens", "merges"])
@pytest.mark.parametrize(("n", "n_bytes"), [(1 << 22, 1 << 24), (100, 1 << 28)])
def test_vocabularies_of_any_size_are_refused_unread(key: str, n: int, n_bytes: int) -> None:
    meta, name = metadata_of(byte_pair()), f"tokenizer.ggml.{key}"
    claim = cast("FileBytes", object())  # reading it fails in another way
    strings = Array(claim, "string", 0, n, n_bytes, array("I"), Origin(Path("x"), name, 0))
    meta = Metadata(Path("x"), {**meta._entries, name: Entry(strings, 0)})
    with pytest.raises(InvalidModelError, match="at most"):
        Tokenizer.from_metadata(meta)


@pytest.mark.parametrize("key", ["token_type", "eos_token_ids"])
def test_strings_where_numbers_belong_take_no_memory(key: str, tmp_path: Path) -> None:
    # As an array of one width, 300 strings of up to 1 MB would take 1.2 GB.
    strings = ["1"] * 299 + ["1" * 10**6]
    path = tiny_model(tmp_path, metadata={f"tokenizer.ggml.{key}": strings})
    tracemalloc.start()
    with GGUFFile.open(path) as file, pytest.raises(InvalidModelError, match=key):
        Tokenizer.from_metadata(file.metadata)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("key", ["pre", "model"])
def test_a_long_name_is_neither_compared_nor_shown_whole(key: str) -> None:
    start = time.thread_time()
    with pytest.raises(EdgeInferError) as caught:
        tokenizer_of(byte_pair(**{key: "qwen2\n\x1b[2J" + "x" * 10**6}))
    assert time.thread_time() - start < 0.5
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


RUNS = "7 \t\n\r aA!中가\u0301½٣🦙\u00a0'-_"


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_no_pre_tokenizer_takes_long_for_long_runs(name: str) -> None:
    tokenizer = tokenizer_of(byte_pair(), pre=name)
    rng = random.Random(name)
    runs = [*rng.sample(RUNS, 5), "7", "".join(rng.sample(RUNS, 2)), "".join(rng.sample(RUNS, 3))]
    start = time.thread_time()
    for run in runs:
        tokenizer.encode(run * (4000 // len(run)) + "x")
    assert time.thread_time() - start < 2


# The same cuts as patterns, whose time grows with the square of a number's length.
THREES = {
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*(?!\d))",),
    "afmoe": (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",),
}


@pytest.mark.parametrize("name", THREES)
@settings(max_examples=100, deadline=None)
@given(st.text("0123456789012345678901234567890½²Ⅷ一ab .\n٣७ é", min_size=1, max_size=30))
def test_numbers_in_threes(name: str, text: str) -> None:
    row = PRE_TOKENIZERS[name]
    assert row.threes is not None
    rest = [Split(Regex(pattern), "isolated") for pattern in row.patterns]
    patterns = [Split(Regex(pattern), "isolated") for pattern in THREES[name]]
    wanted = [word for word, _ in Steps([*patterns, *rest]).pre_tokenize_str(text)]
    runs = Split(Regex(row.threes[0]), "isolated").pre_tokenize_str(text)
    pieces = [piece for run, _ in runs for piece in in_threes(run, row.threes[1])]
    assert [w for piece in pieces for w, _ in Steps(rest).pre_tokenize_str(piece)] == wanted


def test_the_limits_leave_room_for_real_vocabularies() -> None:
    assert vocabulary._MAX_TOKENS >= 2 * 262_144 and byte_pair_module._MAX_MERGES > 580_604
