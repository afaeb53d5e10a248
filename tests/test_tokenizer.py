"""Tokens against published vectors, special tokens, streams, stop strings and hostile metadata.

Knows nothing of models: every vocabulary is a file's metadata or made up here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.errors import InvalidModelError, InvalidRequestError, UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.text.pretokenizers import PRE_TOKENIZERS, portions
from edgeinfer.text.tokenizer import StreamDecoder, Tokenizer, TooManyTokens

from .models_for_tests import metadata_of

DataFile = Callable[[str], Path]

VOCABULARIES = ("deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder")
CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6

MIXED = "Grüße, 12345 x²!\n\n\t'S it's don'T  你好 नमस्ते 🦙👩‍👩‍👧 \u3000 end  "


@cache
def load(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_metadata(file.metadata)


@pytest.fixture(scope="session")
def vocabulary(data_file: DataFile) -> Callable[[str], Tokenizer]:
    return lambda name: load(data_file(f"vocab/ggml-vocab-{name}.gguf"))


@pytest.fixture(scope="session")
def smollm(data_file: DataFile) -> Tokenizer:
    return load(data_file("models/SmolLM2-135M-Instruct.Q4_1.gguf"))


def tokenizer_of(meta: dict[str, Any], *, pre: str | None = None) -> Tokenizer:
    return Tokenizer.from_metadata(metadata_of(meta), pre=pre)


def byte_chars() -> list[str]:
    """The 256 characters of byte-level vocabularies, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def byte_pair(extra: tuple[str, ...] = (), **keys: Any) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: 256 bytes, the merge "ab", and `extra` tokens."""
    tokens = [*byte_chars(), "ab", *extra]
    meta: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [CONTROL] * len(extra),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    return meta | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def sentence_piece(**keys: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a"]
    kinds = [2, CONTROL, CONTROL] + [BYTE] * 256 + [1] * 4
    meta: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259 + [-4.0, -2.0, -3.0, -1.0],
        "tokenizer.ggml.token_type": kinds,
    }
    return meta | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


# Vectors


@pytest.mark.parametrize("name", VOCABULARIES)
def test_published_vectors(
    name: str, vocabulary: Callable[[str], Tokenizer], data_file: DataFile
) -> None:
    texts = data_file(f"vocab/ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    lines = data_file(f"vocab/ggml-vocab-{name}.gguf.out").read_text().splitlines()
    cases = texts.split("\n__ggml_vocab_test__\n")[: len(lines)]
    assert len(cases) == len(lines) >= 46
    tokenizer = vocabulary(name)
    for text, line in zip(cases, lines, strict=True):
        ids = tokenizer.encode(text, bos=False)
        assert ids == [int(id) for id in line.split()], text
        assert tokenizer.decode(ids) == text


BYTE_LEVEL = sorted(name for name, row in PRE_TOKENIZERS.items() if row.byte_level)


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_every_pre_tokenizer_keeps_every_byte(name: str) -> None:
    tokenizer = tokenizer_of(byte_pair(), pre=name)
    assert tokenizer.pre == name
    assert tokenizer.decode(tokenizer.encode(MIXED, bos=False)) == MIXED


def test_raw_utf8_vocabulary() -> None:
    tokens = ["▁", "a", "▁a", "\n", "\n\n", *(f"<0x{b:02X}>" for b in range(256)), "<bos>"]
    tokenizer = tokenizer_of(
        {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 5 + [BYTE] * 256 + [CONTROL],
            "tokenizer.ggml.merges": ["▁ a", "\n \n"],
            "tokenizer.ggml.bos_token_id": 261,
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    ids = tokenizer.encode("a a\n\né")
    assert ids == [261, 1, 2, 4, 5 + 0xC3, 5 + 0xA9]
    assert tokenizer.decode(ids) == "a a\n\né"


# Special tokens


def test_bos_once(vocabulary: Callable[[str], Tokenizer]) -> None:
    llama = vocabulary("llama-bpe")
    assert llama.bos_id == 128000
    assert llama.encode("Hi")[0] == 128000
    assert llama.encode("Hi", bos=False)[0] != 128000
    assert llama.encode("<|begin_of_text|>Hi", parse_special=True).count(128000) == 1
    assert vocabulary("qwen2").encode("", bos=None) == []
    assert vocabulary("llama-spm").encode("") == [1]


@pytest.mark.parametrize(
    ("name", "eog"),
    [
        ("llama-bpe", {"<|end_of_text|>", "<|eot_id|>"}),
        ("phi-3", {"</s>", "<|endoftext|>", "<|end|>"}),
        ("qwen2", {"</s>", "<|endoftext|>", "<|im_end|>"}),
        ("llama-spm", {"</s>"}),
    ],
)
def test_end_of_generation(
    name: str, eog: set[str], vocabulary: Callable[[str], Tokenizer]
) -> None:
    tokenizer = vocabulary(name)
    assert {tokenizer.text(id) for id in tokenizer.eog_ids} == eog


def test_fim_pad_and_repo_end_a_generation(smollm: Tokenizer) -> None:
    assert "<reponame>" in {smollm.text(id) for id in smollm.eog_ids}


def test_special_tokens_are_parsed_only_on_request(smollm: Tokenizer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>"
    parsed = smollm.encode(text, parse_special=True)
    assert (parsed[0], parsed[-1]) == (smollm.special_id("<|im_start|>"), smollm.eos_id)
    plain = smollm.encode(text)
    assert not smollm.eog_ids & set(plain)
    assert smollm.decode(plain) == text
    assert smollm.decode(parsed) == "user\nHi"
    assert smollm.decode(parsed, special=True) == text


def test_normal_token_with_the_spelling_of_an_end_is_control() -> None:
    meta = byte_pair(("<|im_end|>",))
    meta["tokenizer.ggml.token_type"][257] = 1
    tokenizer = tokenizer_of(meta)
    assert tokenizer.eog_ids == {0, 257}
    assert tokenizer.encode("a<|im_end|>", parse_special=True) == [97, 257]
    assert 257 not in tokenizer.encode("a<|im_end|>")


def test_harmony_tokens() -> None:
    extra = ("<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|start|>")
    tokenizer = tokenizer_of(byte_pair(extra))
    texts = {tokenizer.text(id) for id in tokenizer.eog_ids}
    assert texts >= {"<|return|>", "<|call|>"} and "<|end|>" not in texts
    # They are shown and split from plain text, but a marked message never makes them.
    assert tokenizer.decode([260, 257]) == "<|channel|><|end|>"
    assert tokenizer.encode("<|start|>") == [261]
    assert 261 not in tokenizer.encode_marked("<\ue000|start|>", {0xE000: None})


def test_longest_special_wins_over_the_whole_text() -> None:
    tokenizer = tokenizer_of(byte_pair(("<x>", "<x><y>", "y><z>")))
    assert tokenizer.encode("<x><y><z>", parse_special=True) == [258, *b"<z>"]
    assert tokenizer.encode("<x><x><y>", parse_special=True) == [257, 258]
    # As long in characters, but longer in bytes: cut first.
    tokenizer = tokenizer_of(byte_pair(("[ab", "b]é")))
    assert tokenizer.encode("[ab]é", parse_special=True) == [91, 97, 258]


def test_user_defined_tokens_are_always_parsed() -> None:
    meta = byte_pair(("\n\n", "<c>"))
    meta["tokenizer.ggml.token_type"][257] = USER_DEFINED
    tokenizer = tokenizer_of(meta)
    assert tokenizer.encode("a\n\n<c>")[:2] == [97, 257]
    assert 258 not in tokenizer.encode("a\n\n<c>")
    assert tokenizer.special_texts == ("<c>",)


def test_control_token_never_comes_from_merging() -> None:
    meta = byte_pair(("abab",), merges=["a b", "ab ab"])
    tokenizer = tokenizer_of(meta)
    assert tokenizer.encode("abab") == [256, 256]
    whole = tokenizer_of(byte_pair(("word",)), pre="llama3")
    assert 257 not in whole.encode("word") and whole.encode("word", parse_special=True) == [257]


def test_phi3_specials_swallow_the_space_after_them(
    vocabulary: Callable[[str], Tokenizer],
) -> None:
    phi = vocabulary("phi-3")
    end = phi.special_id("<|end|>")
    ids = phi.encode("<|end|> \n hi", bos=False, parse_special=True)
    assert ids == [end, *phi.encode("hi", bos=False)]
    kept = phi.encode("<s> hi", bos=False, parse_special=True)
    assert kept == [1, *phi.encode(" hi", bos=False)]


def test_space_prefix_follows_specials() -> None:
    tokenizer = tokenizer_of(sentence_piece())
    a = 262
    assert tokenizer.encode("a") == [1, a]
    assert tokenizer.encode("a</s>a", parse_special=True) == [1, a, 2, a]
    assert tokenizer.decode([1, a, a]) == "a a"
    without = tokenizer_of(sentence_piece(add_space_prefix=False, add_bos_token=False))
    assert without.encode("a a") == [260, a]
    assert without.decode([a]) == " a"


def test_two_unknown_tokens_and_a_merged_user_token() -> None:
    meta = sentence_piece()
    meta["tokenizer.ggml.token_type"][261] = 2
    tokenizer = tokenizer_of(meta)
    assert tokenizer.decode(tokenizer.encode("aé")) == "aé"


# Streams


@pytest.mark.parametrize("name", ["llama-spm", "qwen2"])
def test_stream_never_splits_a_character(name: str, vocabulary: Callable[[str], Tokenizer]) -> None:
    tokenizer = vocabulary(name)
    text = "🦙 é 𐍈 नमस्ते 👩‍👩‍👧 ﷽"
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(id) for id in tokenizer.encode(text)]
    assert "" in parts, "a character that takes several tokens should be there"
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + stream.flush() == text


def test_unfinished_character_shows_at_the_end_only() -> None:
    stream = StreamDecoder(tokenizer_of(byte_pair()))
    assert [stream.push(b) for b in "🦙".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_stream_keeps_the_space_of_a_continued_text() -> None:
    tokenizer = tokenizer_of(sentence_piece())
    assert StreamDecoder(tokenizer).push(262) == "a"
    assert StreamDecoder(tokenizer, strip_space=False).push(262) == " a"


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_any_text_survives(text: str, vocabulary: Callable[[str], Tokenizer]) -> None:
    for name in ("llama-spm", "gpt-2"):
        tokenizer = vocabulary(name)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & tokenizer.eog_ids


def test_lone_surrogates_are_replaced(smollm: Tokenizer) -> None:
    assert smollm.decode(smollm.encode("a\ud800b")) == "a\ufffdb"


def test_ids_outside_the_vocabulary() -> None:
    tokenizer = tokenizer_of(byte_pair())
    for id in (-1, 257, 1 << 40):
        with pytest.raises(InvalidRequestError, match="vocabulary of 257"):
            tokenizer.piece(id)


# Files that are wrong


def test_unknown_pre_tokenizer_names_its_neighbours() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'qwen22'.*qwen2.*--pre NAME"):
        tokenizer_of(byte_pair(pre="qwen22"))
    assert tokenizer_of(byte_pair(pre="qwen22"), pre="qwen2").pre == "qwen2"
    with pytest.raises(InvalidRequestError, match="smolm"):
        tokenizer_of(byte_pair(), pre="smolm")
    with pytest.raises(InvalidRequestError, match="SentencePiece"):
        tokenizer_of(sentence_piece(), pre="qwen2")


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "none", "nonsense"])
def test_other_vocabularies_are_refused_by_name(model: str) -> None:
    with pytest.raises(UnsupportedModelError, match=model):
        tokenizer_of({"tokenizer.ggml.model": model})


def test_missing_pre_tokenizer_is_the_default_one() -> None:
    meta = byte_pair()
    del meta["tokenizer.ggml.pre"]
    assert tokenizer_of(meta).pre == "default"


DELETE = object()
BROKEN_BYTE_PAIR: list[tuple[str, Any]] = [
    ("model", DELETE),
    ("model", 7),
    ("tokens", DELETE),
    ("tokens", []),
    ("tokens", "abc"),
    ("tokens", 5),
    ("tokens", [1, 2, 3]),
    ("tokens", ["a", "b", "a"]),
    ("token_type", [1, 1]),
    ("token_type", ["x"] * 257),
    ("token_type", [0.5] * 257),
    ("token_type", [[1]] * 257),
    ("token_type", 3),
    ("token_type", [BYTE] * 257),
    ("merges", DELETE),
    ("merges", [3]),
    ("eos_token_id", "0"),
    ("eos_token_id", 1.5),
    ("eos_token_ids", "0"),
    ("eos_token_ids", [0.5]),
    ("eos_token_ids", [[1]]),
    ("fim_pad_token_id", True),
    ("add_bos_token", "yes"),
    ("pre", 3),
]
BROKEN_SENTENCE_PIECE: list[tuple[str, Any]] = [
    ("scores", [0.0]),
    ("scores", [float("nan")] * 263),
    ("scores", "high"),
    ("token_type", [1]),
    ("token_type", [BYTE] * 263),
    ("add_space_prefix", 7),
]


@pytest.mark.parametrize(("key", "value"), BROKEN_BYTE_PAIR)
def test_broken_byte_pair_file(key: str, value: Any) -> None:
    check_refused(byte_pair(), key, value)


@pytest.mark.parametrize(("key", "value"), BROKEN_SENTENCE_PIECE)
def test_broken_sentence_piece_file(key: str, value: Any) -> None:
    check_refused(sentence_piece(), key, value)


def check_refused(meta: dict[str, Any], key: str, value: Any) -> None:
    name = f"tokenizer.ggml.{key}"
    if value is DELETE:
        del meta[name]
    else:
        meta[name] = value
    with pytest.raises(InvalidModelError, match="tokenizer.ggml") as caught:
        tokenizer_of(meta)
    assert caught.value.field in (name, "tokenizer.ggml.tokens")


_WHOLE = st.integers(-(1 << 63), (1 << 63) - 1)  # what a file can hold


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(["tokens", "token_type", "merges", "scores", "eos_token_id", "pre"]),
    value=st.one_of(
        _WHOLE, st.floats(), st.text(), st.booleans(), st.lists(st.text(max_size=3)),
        st.lists(_WHOLE), st.lists(st.floats()), st.lists(st.booleans()),
        st.lists(st.lists(_WHOLE)),
    ),
    meta=st.sampled_from([byte_pair, sentence_piece]),
)  # fmt: skip
def test_random_metadata_is_read_or_refused(key: str, value: Any, meta: Any) -> None:
    try:
        tokenizer_of(meta() | {f"tokenizer.ggml.{key}": value})
    except (InvalidModelError, UnsupportedModelError):
        pass


def test_importing_loads_no_library() -> None:
    heavy = ["numpy", "sentencepiece", "tokenizers", "jinja2"]
    code = (
        "import sys, edgeinfer.text.tokenizer, edgeinfer.text.chat\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- long texts ----------------------------------------------------------------------------------

# What the patterns treat apart: letters, marks, numbers, spaces, punctuation, contractions.
_PIECES = [
    *"aZ09'st.,!?/-<([{$^~_…。，、！字漢ひカ가дЖß²٣😀", "IMGIMGAZ", "<sentinel:12>", "'LL", "'re",
    "   ", " ", " ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u0308", "\u200d",
]  # fmt: skip


def all_pairs(pre: str) -> Tokenizer:
    """A vocabulary that joins any two neighbours in a word: where words end, its ids tell."""
    chars = [byte_chars()[byte] for byte in sorted({*"".join(_PIECES).encode()})]
    pairs = [(a, b) for a in chars for b in chars]
    meta = byte_pair(pre=pre, merges=[f"{a} {b}" for a, b in pairs])
    tokens = [*byte_chars(), *(a + b for a, b in pairs)]
    meta["tokenizer.ggml.tokens"] = tokens
    meta["tokenizer.ggml.token_type"] = [1] * len(tokens)
    return tokenizer_of(meta)


def check_portions(names: list[str], n_texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(1)
    for name in names:
        tokenizer = all_pairs(name)
        for _ in range(n_texts):
            text = "".join(random.choices(_PIECES, k=random.randint(2, 40)))
            monkeypatch.setattr("edgeinfer.text.pretokenizers._PORTION", 1 << 13)
            whole = tokenizer.encode(text)
            monkeypatch.setattr("edgeinfer.text.pretokenizers._PORTION", 1)
            assert tokenizer.encode(text) == whole, (name, text)


_ONE_OF_EACH = list(
    {id(row): name for name, row in PRE_TOKENIZERS.items() if row.byte_level}.values()
)


def test_a_long_text_is_cut_where_a_word_ends_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    check_portions(_ONE_OF_EACH, 12, monkeypatch)


@pytest.mark.slow
def test_a_long_text_is_cut_where_a_word_ends_anyway_10000(monkeypatch: pytest.MonkeyPatch) -> None:
    check_portions(_ONE_OF_EACH, 10_000, monkeypatch)


def test_portions_are_the_text() -> None:
    text = "some words, 天气。" * 5000
    parts = list(portions(text, PRE_TOKENIZERS["qwen2"].ends))
    assert "".join(parts) == text
    assert len(parts) > 5 and max(map(len, parts)) < 8300
    assert list(portions(text, "")) == [text]


@settings(max_examples=50)
@given(st.text(max_size=200), st.integers(0, 40))
def test_what_has_more_tokens_than_asked_for_is_told_truly(text: str, most: int) -> None:
    for tokenizer in (BYTES, PIECES):
        n_tokens = len(tokenizer.encode(text, bos=False))
        assert tokenizer._least_tokens(text, 0) <= n_tokens
        if n_tokens <= most:
            assert len(tokenizer.encode(text, bos=False, most=most)) == n_tokens
            continue
        with pytest.raises(TooManyTokens) as caught:
            tokenizer.encode(text, bos=False, most=most)
        assert most < caught.value.at_least <= n_tokens


BYTES = tokenizer_of(byte_pair())
PIECES = tokenizer_of(sentence_piece())


def test_a_text_that_can_not_fit_is_not_read(smollm: Tokenizer) -> None:
    words, letters = "some words " * 1_000_000, "x" * 10_000_000
    for text in (words, letters, "<|im_end|>" * 1_000_000):
        begun = time.thread_time()
        with pytest.raises(TooManyTokens):
            smollm.encode(text, parse_special=True, most=50_000)
        assert time.thread_time() - begun < 3  # before: 4 to 30 s


def test_where_characters_may_have_no_token_no_length_is_too_long() -> None:
    meta = byte_pair()
    kept = [i for i, text in enumerate(meta["tokenizer.ggml.tokens"]) if text != "x"]
    meta["tokenizer.ggml.tokens"] = [meta["tokenizer.ggml.tokens"][i] for i in kept]
    meta["tokenizer.ggml.token_type"] = [1] * len(kept)
    tokenizer = tokenizer_of(meta)
    assert tokenizer.encode("x" * 10_000 + "ab", most=5) == tokenizer.encode("ab")
