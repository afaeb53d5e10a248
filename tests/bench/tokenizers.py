"""Writes tokenizers into GGUF files: one of bytes and few words, or another file's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf

from edgeinfer.gguf import Array, GGUFFile
from edgeinfer.text.tokenizer import Tokenizer

N_CONTROL = 2  # <|bos|> and <|eos|>, after the 256 bytes


def add_byte_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    """A byte-level BPE: 256 bytes, two control tokens, a few merges, fillers up to `vocab`."""
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "o n", "Ġa n"]
    tokens = [*byte_letters(), "<|bos|>", "<|eos|>"]
    tokens += [merge.replace(" ", "") for merge in merges]
    if vocab < len(tokens):
        raise ValueError(f"vocab is {vocab}, the byte tokenizer needs at least {len(tokens)}")
    tokens += [f"tok{i}" for i in range(len(tokens), vocab)]
    kinds = [gguf.TokenType.NORMAL] * vocab
    kinds[256 : 256 + N_CONTROL] = [gguf.TokenType.CONTROL] * N_CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(True)


def byte_letters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE vocabulary."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, extra = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else extra))
        extra += byte not in printable
    return letters


def copy_tokenizer(writer: gguf.GGUFWriter, source: Path) -> int:
    """Copy all tokenizer keys of a GGUF file; returns the number of tokens."""
    with GGUFFile.open(source) as file:
        for key, value in file.metadata.items():
            if key.startswith("tokenizer."):
                if isinstance(value, Array):
                    kind = value.item_type.upper()
                    items = value.bytes() if kind == "STRING" else value.tolist()
                    sub_type = gguf.GGUFValueType[kind]
                    writer.add_key_value(key, items, gguf.GGUFValueType.ARRAY, sub_type=sub_type)
                else:
                    add_value(writer, key, value)
        return len(file.metadata.get_array("tokenizer.ggml.tokens"))


def words_of(source: Path) -> list[int]:
    """Tokens of a space and letters, as which alone their text is read.

    A text of such words is read as the tokens it was made of, by tokenizers that split at spaces.
    """
    with GGUFFile.open(source) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    texts = ((id, tokenizer.decode([id])) for id in range(tokenizer.n_vocab))
    words = [(id, text) for id, text in texts if text[:1] == " " and text[1:].isalpha()]
    return [id for id, text in words if tokenizer.encode_middle(text) == [id]]


def add_value(
    writer: gguf.GGUFWriter, key: str, value: bool | int | float | str | Sequence[int]
) -> None:
    """Add one key with the GGUF type that fits the Python type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        is_far = 0 < abs(value) < 1e-37 or 3e38 < abs(value) < float("inf")  # of a float32
        writer.add_float64(key, value) if is_far else writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
