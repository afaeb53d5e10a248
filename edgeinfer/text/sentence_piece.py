"""SentencePiece vocabularies: the library that cuts text, given the model that a file describes.

Knows nothing of special tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from edgeinfer.errors import InvalidModelError
from edgeinfer.gguf import Metadata
from edgeinfer.text.vocabulary import (
    BYTE,
    BYTE_TEXTS,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Vocabulary,
    utf8,
)


def sentence_piece_encoder(vocab: Vocabulary, meta: Metadata) -> Callable[[str], list[int]]:
    """What gives the ids of a text."""
    from sentencepiece import SentencePieceProcessor

    extra = _extra_pieces(vocab)
    proto = _spm_proto(vocab, _scores(meta, len(vocab.texts)), extra)
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise InvalidModelError(
            f"the vocabulary can't be used: {error}", field="tokenizer.ggml.tokens"
        ) from error
    if not extra:
        return processor.EncodeAsIds
    n_vocab, meant = len(vocab.texts), list(extra.values())

    def encode(text: str) -> list[int]:
        return [id if id < n_vocab else meant[id - n_vocab] for id in processor.EncodeAsIds(text)]

    return encode


def _scores(meta: Metadata, n_vocab: int) -> list[float]:
    key = "tokenizer.ggml.scores"
    if key not in meta:
        return [0.0] * n_vocab
    scores = meta.get_numbers(key, n_vocab).astype("float32")
    if (scores != scores).any():
        raise InvalidModelError("a score is not a number", field=key)
    return scores.tolist()  # type: ignore[no-any-return]


def _extra_pieces(vocab: Vocabulary) -> dict[str, int]:
    """Pieces that the library insists on, with the tokens they mean: every byte, an unknown last.

    A byte without token of its own means the token that is this byte alone, else the unknown one.
    """
    unknown = vocab.unknown_id or 0
    missing = [text for text in BYTE_TEXTS if text not in vocab.ids]
    if len(missing) == len(BYTE_TEXTS) or not (missing or vocab.kinds[unknown] == BYTE):
        return {}
    extra = {}
    for text in missing:
        alone = bytes([BYTE_TEXTS[text]]).decode(errors="surrogateescape")
        extra[text] = vocab.ids.get(alone, unknown)
    name = "<unk>"
    while name in vocab.ids:
        name += ">"
    return {**extra, name: unknown}


def _spm_proto(vocab: Vocabulary, scores: list[float], extra: Mapping[str, int]) -> bytes:
    """A serialised sentencepiece.ModelProto; a ModelProto may have one unknown piece only."""
    texts = [*vocab.texts, *extra]
    kinds = vocab.kinds + bytes([BYTE]) * len(extra)
    unknown = len(texts) - 1 if extra else vocab.unknown_id or 0
    # USER_DEFINED and UNUSED take part in merging like any other; specials are cut out before.
    proto_kind = (CONTROL, NORMAL, CONTROL, CONTROL, NORMAL, NORMAL, BYTE)
    pack_score = struct.Struct("<f").pack
    names = list(map(str.encode if vocab.is_utf8 else utf8, texts))
    scores = [*scores, *[0.0] * len(extra)]
    parts: list[bytes] = []
    for i, (name, score) in enumerate(zip(names, scores, strict=True)):
        kind = UNKNOWN if i == unknown else proto_kind[kinds[i]]
        if kind == BYTE and texts[i] not in BYTE_TEXTS:  # a second spelling of a byte
            kind = CONTROL
        piece = b"\x0a" + _varint(len(name)) + name + b"\x15" + pack_score(score)
        piece += b"\x18" + _varint(kind)
        parts += (b"\x0a", _varint(len(piece)), piece)
    has_bytes = bool(extra) or "<0x00>" in vocab.ids
    trainer = b"\x18\x02\x20" + _varint(len(texts)) + b"\x98\x02" + _varint(has_bytes)
    trainer += b"\xc0\x02" + _varint(unknown)
    trainer += b"\xea\x02" + _varint(len(names[unknown])) + names[unknown]
    normalizer = b"\x0a\x08identity\x18\x00\x20\x00\x28\x01"
    parts += (b"\x12", _varint(len(trainer)), trainer)
    parts += (b"\x1a", _varint(len(normalizer)), normalizer)
    return b"".join(parts)


def _varint(n: int) -> bytes:
    if n < 128:
        return _SMALL_VARINTS[n]
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


_SMALL_VARINTS = [bytes([n]) for n in range(128)]
