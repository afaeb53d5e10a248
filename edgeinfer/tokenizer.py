"""Text to token ids and back, as the file's `tokenizer.ggml.*` metadata defines it.

Knows nothing of messages, templates or the reading of files.
"""

from __future__ import annotations

import codecs
import difflib
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Protocol, runtime_checkable

from .errors import InvalidModelError, InvalidRequestError, UnsupportedModelError
from .pretokenizers import PRE_TOKENIZERS, PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_KEY = "tokenizer.ggml."

# Tokens that end a generation whatever type the file gives them; the first ones are end of turn.
_EOG_TEXTS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> "
    "<|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> "
    "<eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[".split()
)
_FIM_TEXTS: Mapping[str, frozenset[str]] = {
    "fim_pre_token_id": frozenset(
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> "
        "<|prefix|>".split()
    ),
    "fim_suf_token_id": frozenset(
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> "
        "<|suffix|>".split()
    ),
    "fim_mid_token_id": frozenset(
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> "
        "<|middle|>".split()
    ),
    "fim_pad_token_id": frozenset("<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split()),
    "fim_rep_token_id": frozenset(
        "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split()
    ),
    "fim_sep_token_id": frozenset(["<|file_sep|>"]),
}
_DEPRECATED_FIM_KEYS = {
    "fim_pre_token_id": "prefix_token_id",
    "fim_suf_token_id": "suffix_token_id",
    "fim_mid_token_id": "middle_token_id",
}
_FIM_THAT_ENDS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_NOT_RSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
_ASCII_SPACE = " \t\n\v\f\r"


@runtime_checkable
class LazyArray(Protocol):
    """An array that makes its items when asked: numpy's, or a file reader's own."""

    def tolist(self) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class _Special:
    text: str
    id: int
    rank: int  # the order of partition: longest first in UTF-8 bytes
    literal: bool  # cut out of text even when special tokens are not parsed
    guarded: bool  # user text must never become this token
    rstrip: bool


class Tokenizer:
    """The vocabulary of one model; build it with `from_metadata`."""

    def __init__(self, vocab: _Vocab, encode_raw: Callable[[str], list[int]]) -> None:
        self.model = vocab.model
        self.pre = vocab.pre
        self.n_vocab = len(vocab.texts)
        self.bos_id, self.eos_id = vocab.bos_id, vocab.eos_id
        self.add_bos, self.add_eos = vocab.add_bos, vocab.add_eos
        self.add_space_prefix = vocab.add_space_prefix
        self.eog_ids = vocab.eog_ids
        self._encode_raw = encode_raw
        self._byte_level = vocab.byte_level
        self._kinds = bytes(vocab.kinds)
        encoded = [text.encode() for text in vocab.texts]
        # One block and its offsets: a list of 150k short strings costs ten times the memory.
        self._blob = b"".join(encoded)
        self._ends = array("L", accumulate(map(len, encoded)))
        specials = _specials(vocab)
        self._special_ids = {s.text: s.id for s in specials}
        self.special_texts = tuple(s.text for s in specials if s.guarded)
        self._parsed = _by_first_two(specials)
        self._literal = _by_first_two(s for s in specials if s.literal)
        self._unguarded = _by_first_two(s for s in specials if s.literal and not s.guarded)

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any], *, pre: str | None = None) -> Tokenizer:
        """Build from GGUF metadata; `pre` overrides the file's pre-tokenizer name."""
        vocab = _read_vocab(meta, pre)
        if vocab.model == "llama":
            return cls(vocab, _build_spm(vocab, meta))
        return cls(vocab, _build_bpe(vocab, meta))

    @property
    def bos_text(self) -> str:
        return self.text(self.bos_id) if self.bos_id is not None else ""

    @property
    def eos_text(self) -> str:
        return self.text(self.eos_id) if self.eos_id is not None else ""

    def special_id(self, text: str) -> int | None:
        """The id of the special token spelled `text`, None when there is none."""
        return self._special_ids.get(text)

    def encode(
        self, text: str, *, bos: bool | None = None, parse_special: bool = False
    ) -> list[int]:
        """Token ids of `text`; `bos=None` does what the file asks, and never adds a second BOS.

        With `parse_special` the spelling of a control token becomes that token. Lone surrogates
        are read as U+FFFD.
        """
        fragments = _partition(_sound(text), self._parsed if parse_special else self._literal)
        return self._with_bos(self._encode_fragments(fragments), bos)

    def encode_marked(
        self, text: str, restore: Mapping[int, str | None], *, bos: bool | None = None
    ) -> list[int]:
        """Parse special tokens first, then put marked text back by `str.translate(restore)`.

        What a mark has hidden stays text: it can't become a control token.
        """
        fragments: list[str | int] = []
        for fragment in _partition(_sound(text), self._parsed):
            if isinstance(fragment, int):
                fragments.append(fragment)
            elif restored := fragment.translate(restore):
                fragments += _partition(restored, self._unguarded)
        return self._with_bos(self._encode_fragments(fragments), bos)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self, special=special)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def text(self, id: int) -> str:
        """The vocabulary's own spelling of a token."""
        return self._spelling(id).decode()

    def is_control(self, id: int) -> bool:
        """True for tokens that structure a prompt and are hidden from readers."""
        self._check(id)
        return self._kinds[id] in (CONTROL, UNKNOWN)

    def piece(self, id: int) -> bytes:
        """The bytes a token stands for; part of a character for some."""
        spelling = self._spelling(id)
        kind = self._kinds[id]
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return spelling
        if kind == BYTE:
            return bytes([_byte_value(spelling.decode())])
        if kind != NORMAL:
            return b""
        text = spelling.decode()
        if not self._byte_level:
            return text.replace("▁", " ").encode()
        try:
            return bytes([_BYTE_OF_CHAR[c] for c in text])
        except KeyError:
            return spelling

    def _check(self, id: int) -> None:
        if not 0 <= id < self.n_vocab:
            raise InvalidRequestError(
                f"token id {id} is outside the vocabulary of {self.n_vocab} tokens",
                param="token_ids",
            )

    def _spelling(self, id: int) -> bytes:
        self._check(id)
        return self._blob[self._ends[id - 1] if id else 0 : self._ends[id]]

    def _with_bos(self, ids: list[int], bos: bool | None) -> list[int]:
        wanted = self.add_bos if bos is None else bos
        if wanted and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _encode_fragments(self, fragments: Iterable[str | int]) -> list[int]:
        ids: list[int] = []
        after_special = True
        for fragment in fragments:
            if isinstance(fragment, int):
                ids.append(fragment)
            elif self.add_space_prefix and after_special:
                ids += self._encode_raw(" " + fragment)
            else:
                ids += self._encode_raw(fragment)
            after_special = isinstance(fragment, int)
        return ids


class StreamDecoder:
    """Turns token ids into text as they come, never splitting a character.

    `strip_space` drops the one space that the vocabulary put before the text; by default it does
    so where the file says it was added. Pass False when the ids continue a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, special: bool = False, strip_space: bool | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._strip = tokenizer.add_space_prefix if strip_space is None else strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that this token completes."""
        if not self._special and self._tokenizer.is_control(id):
            return ""
        piece = self._tokenizer.piece(id)
        if self._strip and piece:
            piece = piece.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopFinder:
    """Finds the first stop string in text that comes in parts.

    Text that might begin a stop string is held back: at most max(len(stop)) - 1 characters.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise InvalidRequestError("a stop string is empty", param="stop")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that can be shown, and the stop string that was completed or None.

        After a match the text before the stop string is all there is.
        """
        text = self._held + text
        matches = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if matches:
            _, start, stop = min(matches)
            self._held = ""
            return text[:start], stop
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], None

    def flush(self) -> str:
        """The text held back, once no more can come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


# Special tokens


def _specials(vocab: _Vocab) -> list[_Special]:
    ids = [i for i, kind in enumerate(vocab.kinds) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    ids.sort(key=lambda i: -len(vocab.texts[i].encode()))
    return [
        _Special(
            text=vocab.texts[i],
            id=i,
            rank=rank,
            literal=vocab.kinds[i] == USER_DEFINED,
            guarded=vocab.kinds[i] != USER_DEFINED or vocab.file_kinds[i] != USER_DEFINED,
            rstrip=i in vocab.rstrip_ids,
        )
        for rank, i in enumerate(ids)
    ]


def _by_first_two(specials: Iterable[_Special]) -> dict[str, list[_Special]]:
    groups: dict[str, list[_Special]] = {}
    for special in specials:
        groups.setdefault(special.text[:2], []).append(special)
    return groups


def _partition(raw: str, groups: Mapping[str, list[_Special]]) -> list[str | int]:
    """Cut every special out of `raw`, one special after the other.

    NOTE: the longest special wins over the whole text, not the leftmost one.
    """
    result: list[str | int] = [raw] if raw else []
    # Some vocabularies have 6,000 specials: two characters rule out nearly all of them.
    present = [s for start, group in groups.items() if start in raw for s in group]
    for special in sorted(present, key=lambda s: s.rank):
        if special.text not in raw:
            continue
        cut: list[str | int] = []
        for fragment in result:
            if isinstance(fragment, int) or special.text not in fragment:
                cut.append(fragment)
                continue
            for n, part in enumerate(fragment.split(special.text)):
                if n:
                    cut.append(special.id)
                    part = part.lstrip(_ASCII_SPACE) if special.rstrip else part
                if part:
                    cut.append(part)
        result = cut
    return result


# Metadata


@dataclass(slots=True)
class _Vocab:
    """What the metadata say, checked."""

    model: str
    pre: str
    row: PreTokenizer | None
    texts: list[str]
    ids: dict[str, int]
    file_kinds: bytes
    kinds: bytearray
    bos_id: int | None = None
    eos_id: int | None = None
    unknown_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    eog_ids: frozenset[int] = frozenset()
    rstrip_ids: frozenset[int] = frozenset()

    @property
    def byte_level(self) -> bool:
        return self.row is not None and self.row.byte_level


def _read_vocab(meta: Mapping[str, Any], pre: str | None) -> _Vocab:
    model = _string(meta, _KEY + "model")
    if model not in ("llama", "gpt2", "gemma4"):
        raise UnsupportedModelError(
            f"the file's tokenizer is {model!r}; generation runs with llama (SentencePiece), "
            "gpt2 and gemma4 (byte-pair) vocabularies",
            missing=(f"tokenizer {model}",),
        )
    name, row = _pre_tokenizer(meta, model, pre)
    texts = _token_texts(meta)
    ids = dict(zip(texts, range(len(texts)), strict=True))
    if len(ids) != len(texts):
        i, text = next((i, t) for i, t in enumerate(texts) if ids[t] != i)
        raise InvalidModelError(
            f"tokens {i} and {ids[text]} are both {text!r}", field=_KEY + "tokens"
        )
    kinds = bytearray(_token_types(meta, len(texts)))
    vocab = _Vocab(model, name, row, texts, ids, bytes(kinds), kinds)
    _override_kinds(vocab, meta)
    _read_special_ids(vocab, meta)
    is_spm = row is None
    vocab.add_space_prefix = _flag(meta, _KEY + "add_space_prefix", is_spm)
    vocab.add_bos = _flag(meta, _KEY + "add_bos_token", is_spm or (row is not None and row.add_bos))
    vocab.add_eos = _flag(meta, _KEY + "add_eos_token", False)
    if row is not None:
        vocab.add_bos = vocab.add_bos or name == "gemma4"
        vocab.add_space_prefix = False
    if "phi-3" in (title := _string(meta, "general.name", "").lower()) or "phi3" in title:
        special = {i for i, k in enumerate(kinds) if k in (CONTROL, UNKNOWN, USER_DEFINED)}
        keep = {ids[t] for t in _NOT_RSTRIPPED if t in ids}
        vocab.rstrip_ids = frozenset(special | {ids.get("</s>", -1)}) - keep
    return vocab


def _pre_tokenizer(
    meta: Mapping[str, Any], model: str, override: str | None
) -> tuple[str, PreTokenizer | None]:
    if model == "llama":
        if override is not None:
            raise InvalidRequestError(
                "the file's tokenizer is SentencePiece, which has no pre-tokenizer: drop --pre",
                param="pre",
            )
        return "", None
    found = "gemma4" if model == "gemma4" else _string(meta, _KEY + "pre", "") or "default"
    name = override or found
    if row := PRE_TOKENIZERS.get(name):
        return name, row
    near = difflib.get_close_matches(name, PRE_TOKENIZERS, n=5, cutoff=0.4)
    names = ", ".join(near or sorted(PRE_TOKENIZERS)[:8])
    message = f"unknown pre-tokenizer {name!r}; near names: {names}"
    if override is not None:
        raise InvalidRequestError(message, param="pre")
    raise UnsupportedModelError(
        f"{_KEY}pre: {message}; --pre NAME chooses one of them", missing=(f"pre-tokenizer {name}",)
    )


def _override_kinds(vocab: _Vocab, meta: Mapping[str, Any]) -> None:
    """Some files call control tokens normal ones: the spelling decides, then the exceptions."""
    ids, kinds = vocab.ids, vocab.kinds
    eog = {ids[text] for text in _EOG_TEXTS if text in ids}
    control = set(eog)
    for key, texts in _FIM_TEXTS.items():
        id = _special_id(meta, _KEY + key, len(kinds))
        if id is None and key in _DEPRECATED_FIM_KEYS:
            id = _special_id(meta, _KEY + _DEPRECATED_FIM_KEYS[key], len(kinds))
        found = {id} if id is not None else {ids[text] for text in texts if text in ids}
        if id is None:
            control |= found
        if key in _FIM_THAT_ENDS:
            eog |= found
    for i in control:
        kinds[i] = CONTROL
    for text in _ALWAYS_SHOWN:
        if text in ids:
            kinds[ids[text]] = USER_DEFINED
    for name in ("eos_token_id", "eot_token_id", "eom_token_id"):
        id = _special_id(meta, _KEY + name, len(kinds))
        if id is not None:
            eog.add(id)
    has_call = "<|call|>" in ids or "<|calls|>" in ids
    if "<|end|>" in ids and has_call and ("<|return|>" in ids or "<|flush|>" in ids):
        eog.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = USER_DEFINED
    plamo_eos = ids.get("<|plamo:eos|>")
    if "</s>" in ids and ("<|tool_response>" in ids or plamo_eos in eog):
        eog.discard(ids["</s>"])
        kinds[ids["</s>"]] = NORMAL
    vocab.eog_ids = frozenset(eog)


def _read_special_ids(vocab: _Vocab, meta: Mapping[str, Any]) -> None:
    n = len(vocab.texts)
    bos = _special_id(meta, _KEY + "bos_token_id", n)
    eos = _special_id(meta, _KEY + "eos_token_id", n)
    unknown = _special_id(meta, _KEY + "unknown_token_id", n)
    if vocab.row is None:
        bos = bos if bos is not None else (1 if n > 1 else None)
        eos = eos if eos is not None else (2 if n > 2 else None)
        unknown = unknown if unknown is not None else 0
    elif n > 11 and vocab.model == "gpt2" and vocab.kinds[11] == CONTROL:
        # Files from before the keys existed have both at 11; elsewhere 11 is a comma or the like.
        bos = bos if bos is not None or not vocab.row.has_bos else 11
        eos = eos if eos is not None else 11
    vocab.bos_id, vocab.eos_id, vocab.unknown_id = bos, eos, unknown
    if eos is not None:
        vocab.eog_ids |= {eos}


def _token_texts(meta: Mapping[str, Any]) -> list[str]:
    key = _KEY + "tokens"
    texts = _strings(meta, key)
    if not texts:
        raise InvalidModelError("the vocabulary is empty", field=key)
    if not all(texts):
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
    return texts


def _token_types(meta: Mapping[str, Any], n_vocab: int) -> bytes:
    key = _KEY + "token_type"
    if key not in meta:
        return bytes([NORMAL]) * n_vocab
    types = _numbers(meta, key, n_vocab, "iu")
    # A type that this table lacks is kept as 0: never matched, never shown.
    known = (types >= NORMAL) & (types <= BYTE)
    return bytes((types * known).astype("uint8"))


def _scores(meta: Mapping[str, Any], n_vocab: int) -> list[float]:
    key = _KEY + "scores"
    if key not in meta:
        return [0.0] * n_vocab
    scores = _numbers(meta, key, n_vocab, "iuf").astype("float32")
    if (scores != scores).any():
        raise InvalidModelError("a score is not a number", field=key)
    return scores.tolist()  # type: ignore[no-any-return]


def _numbers(meta: Mapping[str, Any], key: str, n: int, kinds: str) -> Any:
    import numpy as np

    try:
        numbers = np.asarray(_items(meta, key))
    except (ValueError, OverflowError) as error:
        raise InvalidModelError("not an array of numbers", field=key) from error
    if numbers.ndim != 1 or len(numbers) != n:
        raise InvalidModelError(f"{numbers.size} entries for a vocabulary of {n} tokens", field=key)
    if numbers.dtype.kind not in kinds:
        raise InvalidModelError(f"an array of {numbers.dtype} where numbers are needed", field=key)
    return numbers


def _strings(meta: Mapping[str, Any], key: str) -> list[str]:
    items = _items(meta, key)
    kinds = set(map(type, items))
    if kinds <= {str}:
        return items
    if not kinds <= {str, bytes}:
        raise InvalidModelError("an entry is not a string", field=key)
    try:
        return [item if isinstance(item, str) else item.decode() for item in items]
    except UnicodeDecodeError as error:
        raise InvalidModelError("an entry is not UTF-8", field=key) from error


def _items(meta: Mapping[str, Any], key: str) -> list[Any]:
    value = meta.get(key)
    if isinstance(value, LazyArray):
        return value.tolist()
    if value is None:
        raise InvalidModelError("the array is missing", field=key)
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidModelError(f"{type(value).__name__} where an array is needed", field=key)
    return list(value)


def _string(meta: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = meta.get(key, default)
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None:
        raise InvalidModelError("the key is missing", field=key)
    if not isinstance(value, str):
        raise InvalidModelError(f"{type(value).__name__} where a string is needed", field=key)
    return value


def _flag(meta: Mapping[str, Any], key: str, default: bool) -> bool:
    value = meta.get(key, default)
    if isinstance(value, (str, bytes)) or value not in (0, 1):
        raise InvalidModelError(f"{value!r} where true or false is needed", field=key)
    return bool(value)


def _special_id(meta: Mapping[str, Any], key: str, n_vocab: int) -> int | None:
    value = meta.get(key)
    if value is None:
        return None
    try:
        id = value.__index__()
    except (AttributeError, TypeError) as error:
        message = f"{type(value).__name__} where a token id is needed"
        raise InvalidModelError(message, field=key) from error
    # -1, also as the unsigned number it becomes, is how files write "none".
    if id in (-1, 0xFFFFFFFF):
        return None
    if isinstance(value, bool) or not 0 <= id < n_vocab:
        raise InvalidModelError(f"{value!r} in a vocabulary of {n_vocab} tokens", field=key)
    return int(id)


# SentencePiece


def _build_spm(vocab: _Vocab, meta: Mapping[str, Any]) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    proto = _spm_proto(vocab, _scores(meta, len(vocab.texts)))
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise InvalidModelError(
            f"the vocabulary can't be used: {error}", field=_KEY + "tokens"
        ) from error

    def encode(text: str) -> list[int]:
        return processor.EncodeAsIds(text)  # type: ignore[no-any-return]

    return encode


def _spm_proto(vocab: _Vocab, scores: list[float]) -> bytes:
    """A serialised sentencepiece.ModelProto; a ModelProto may have one unknown piece only."""
    unknown = vocab.unknown_id or 0
    # USER_DEFINED and UNUSED take part in merging like any other; specials are cut out before.
    proto_kind = (CONTROL, NORMAL, CONTROL, CONTROL, NORMAL, NORMAL, BYTE)
    pack_score = struct.Struct("<f").pack
    parts: list[bytes] = []
    for i, (text, score) in enumerate(zip(vocab.texts, scores, strict=True)):
        kind = UNKNOWN if i == unknown else proto_kind[vocab.kinds[i]]
        if kind == BYTE:
            _byte_value(text)
        name = text.encode()
        piece = b"\x0a" + _varint(len(name)) + name + b"\x15" + pack_score(score)
        piece += b"\x18" + _varint(kind)
        parts += (b"\x0a", _varint(len(piece)), piece)
    has_bytes = vocab.kinds.count(BYTE) == 256
    unknown_text = vocab.texts[unknown].encode()
    trainer = b"\x18\x02\x20" + _varint(len(vocab.texts)) + b"\x98\x02" + _varint(has_bytes)
    trainer += b"\xc0\x02" + _varint(unknown)
    trainer += b"\xea\x02" + _varint(len(unknown_text)) + unknown_text
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


def _byte_value(text: str) -> int:
    if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        raise InvalidModelError(f"{text!r} is not a byte token <0xXX>", field=_KEY + "tokens")
    return int(text[3:5], 16)


# Byte-pair


def _build_bpe(vocab: _Vocab, meta: Mapping[str, Any]) -> Callable[[str], list[int]]:
    from tokenizers import Regex
    from tokenizers import Tokenizer as BytePairTokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Steps

    assert vocab.row is not None
    row = vocab.row
    # Without the control tokens raw text can't become one, whatever the merges say.
    words = dict(vocab.ids)
    for i, kind in enumerate(vocab.kinds):
        if kind == CONTROL:
            del words[vocab.texts[i]]
    merges = _merges(meta)
    # NOTE: the library panics, past any except clause, on a merge longer than every token.
    names = words.__contains__
    if not all(map(names, chain.from_iterable(merges))) or not all(
        map(names, map("".join, merges))
    ):
        merges = _merges_without_control(vocab, words, merges)
    model = BPE(words, merges, ignore_merges=row.ignore_merges, byte_fallback=not row.byte_level)
    backend = BytePairTokenizer(model)
    steps: list[Any] = [Split(Regex(pattern), "isolated") for pattern in row.patterns]
    if row.byte_level:
        steps.append(ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = Steps(steps)
    encode_backend = backend.encode

    def encode(text: str) -> list[int]:
        if not row.byte_level:
            text = text.replace(" ", "▁")
        return encode_backend(text, add_special_tokens=False).ids

    return encode


def _merges(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    key = _KEY + "merges"
    merges = _strings(meta, key)
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    if set(map(len, pairs)) <= {2} and all(map(all, pairs)):
        return pairs
    for i, merge in enumerate(merges):
        # NOTE: a token may begin with a space, so the first character never separates.
        at = merge.find(" ", 1)
        if not 0 < at < len(merge) - 1:
            raise InvalidModelError(f"merge {i} is {merge!r}, not two tokens", field=key)
        pairs[i] = (merge[:at], merge[at + 1 :])
    return pairs


def _merges_without_control(
    vocab: _Vocab, words: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    kept: list[tuple[str, str]] = []
    for i, (left, right) in enumerate(merges):
        if left in words and right in words and left + right in words:
            kept.append((left, right))
        elif not {left, right, left + right} <= vocab.ids.keys():
            raise InvalidModelError(
                f"merge {i} ({left!r}, {right!r}) names a token that the vocabulary lacks",
                field=_KEY + "merges",
            )
    return kept


def _char_bytes() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    return table | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHAR = _char_bytes()
