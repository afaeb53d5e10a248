"""Text to token ids and back, as the file's `tokenizer.ggml.*` metadata defines it.

Knows nothing of messages, templates or the reading of files.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from edgeinfer.errors import InvalidRequestError
from edgeinfer.gguf import Metadata
from edgeinfer.text.pretokenizers import portions
from edgeinfer.text.vocabulary import (
    BYTE,
    BYTE_TEXTS,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    byte_value,
    read_vocabulary,
    utf8,
)

_ASCII_SPACE = " \t\n\v\f\r"


class _Special(NamedTuple):
    text: str
    id: int
    rank: int  # the order of partition: longest first in UTF-8 bytes
    literal: bool  # cut out of text even when special tokens are not parsed
    guarded: bool  # user text must never become this token
    rstrip: bool


class TooManyTokens(Exception):
    """A text has `at_least` so many tokens, more than were asked for."""

    def __init__(self, at_least: int) -> None:
        self.at_least = at_least
        super().__init__(f"at least {at_least} tokens")


class Tokenizer:
    """The vocabulary of one model; build it with `from_metadata`.

    `encode_raw` gives the ids of a text; before `word_ends` it may be cut, see `portions`.
    """

    def __init__(
        self, vocab: Vocabulary, encode_raw: Callable[[str], list[int]], word_ends: str = ""
    ) -> None:
        self.model = vocab.model
        self.pre = vocab.pre
        self.n_vocab = len(vocab.texts)
        self.bos_id, self.eos_id = vocab.bos_id, vocab.eos_id
        self.add_bos, self.add_eos = vocab.add_bos, vocab.add_eos
        self.add_space_prefix = vocab.add_space_prefix
        self.eog_ids, self.infill_ids = vocab.eog_ids, vocab.infill_ids
        self._encode_raw, self._word_ends = encode_raw, word_ends
        self._byte_level = vocab.byte_level
        self._kinds = bytes(vocab.kinds)
        self._spellings = vocab.texts
        self.texts = vocab.texts if vocab.is_utf8 else [_sound(text) for text in vocab.texts]
        specials = _specials(vocab)
        self._special_ids = {s.text: s.id for s in specials}
        self.special_texts = tuple(s.text for s in specials if s.guarded)
        self._parsed = _by_first_two(specials)
        self._literal = _by_first_two(s for s in specials if s.literal)
        self._unguarded = _by_first_two(s for s in specials if s.literal and not s.guarded)

    @classmethod
    def from_metadata(cls, meta: Metadata, *, pre: str | None = None) -> Tokenizer:
        """Build from GGUF metadata; `pre` overrides the file's pre-tokenizer name."""
        vocab = read_vocabulary(meta, pre)
        if vocab.model == "llama":
            from edgeinfer.text.sentence_piece import sentence_piece_encoder

            return cls(vocab, sentence_piece_encoder(vocab, meta))
        from edgeinfer.text.byte_pair import byte_pair_encoder

        assert vocab.row is not None
        return cls(vocab, byte_pair_encoder(vocab, meta), vocab.row.ends)

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
        self,
        text: str,
        *,
        bos: bool | None = None,
        parse_special: bool = False,
        most: int | None = None,
    ) -> list[int]:
        """Token ids of `text`; `bos=None` does what the file asks, and never adds a second BOS.

        With `parse_special` the spelling of a control token becomes that token. Lone surrogates
        are read as U+FFFD. TooManyTokens as soon as there must be more than `most`.
        """
        fragments = _partition(_sound(text), self._parsed if parse_special else self._literal)
        return self._with_bos(self._encode_fragments(fragments, most), bos)

    def encode_middle(self, text: str) -> list[int]:
        """Token ids of a text that stands inside another: nothing is put before it."""
        ids: list[int] = []
        for fragment in _partition(_sound(text), self._literal):
            ids += [fragment] if isinstance(fragment, int) else self._encode_raw(fragment)
        return ids

    def encode_marked(
        self,
        text: str,
        restore: Mapping[int, str | None],
        *,
        bos: bool | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Parse special tokens first, then put marked text back by `str.translate(restore)`.

        What a mark has hidden stays text: it can't become a control token. TooManyTokens as soon
        as there must be more than `most`.
        """
        fragments: list[str | int] = []
        for fragment in _partition(_sound(text), self._parsed):
            if isinstance(fragment, int):
                fragments.append(fragment)
            elif restored := fragment.translate(restore):
                fragments += _partition(restored, self._unguarded)
        return self._with_bos(self._encode_fragments(fragments, most), bos)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self, special=special)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def text(self, id: int) -> str:
        """The vocabulary's own spelling of a token, with U+FFFD for what is not UTF-8."""
        self._check(id)
        return self.texts[id]

    def is_control(self, id: int) -> bool:
        """True for tokens that structure a prompt and are hidden from readers."""
        self._check(id)
        return self._kinds[id] in (CONTROL, UNKNOWN)

    def piece(self, id: int) -> bytes:
        """The bytes a token stands for; part of a character for some."""
        self._check(id)
        text, kind = self._spellings[id], self._kinds[id]
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return utf8(text)
        if kind == BYTE:
            return bytes([byte_value(text)])
        if kind != NORMAL:
            return b""
        if not self._byte_level:
            return utf8(text.replace("▁", " "))
        try:
            return bytes([_BYTE_OF_CHAR[c] for c in text])
        except KeyError:
            return utf8(text)

    def _check(self, id: int) -> None:
        if not 0 <= id < self.n_vocab:
            raise InvalidRequestError(
                f"token id {id} is outside the vocabulary of {self.n_vocab} tokens",
                param="token_ids",
            )

    def _with_bos(self, ids: list[int], bos: bool | None) -> list[int]:
        wanted = self.add_bos if bos is None else bos
        if wanted and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _encode_fragments(self, fragments: Iterable[str | int], most: int | None) -> list[int]:
        ids: list[int] = []
        after_special = True
        for fragment in fragments:
            if isinstance(fragment, int):
                ids.append(fragment)
                after_special = True
                continue
            if self.add_space_prefix and after_special:
                fragment = " " + fragment
            after_special = False
            _check_count(len(ids) + self._least_tokens(fragment, most), most)
            for portion in portions(fragment, self._word_ends):
                ids += self._encode_raw(portion)
                _check_count(len(ids), most)
        _check_count(len(ids), most)
        return ids

    def _least_tokens(self, text: str, most: int | None) -> int:
        """Tokens that a text has at least; 0 for one that is too short to be looked into."""
        if most is None or len(text) <= most:
            return 0
        if self._byte_level:
            n_units = len(text.encode().translate(None, self._lacking))
        else:
            n_units = 0 if self._lacking else len(text)
        return -(-n_units // self.longest_text)

    @cached_property
    def longest_text(self) -> int:
        """Characters that no token's text has more of."""
        return max(map(len, self._spellings))

    @cached_property
    def _lacking(self) -> bytes:
        """Bytes without a token: of text that has them, some may leave no token behind."""
        tokens = zip(self._spellings, self._kinds, strict=True)
        if self._byte_level:
            have = {text for text, kind in tokens if kind != CONTROL}
            return bytes(byte for text, byte in _BYTE_OF_CHAR.items() if text not in have)
        have = {text for text, kind in tokens if kind == BYTE}
        return bytes(byte for text, byte in BYTE_TEXTS.items() if text not in have)


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


def _check_count(n_tokens: int, most: int | None) -> None:
    if most is not None and n_tokens > most:
        raise TooManyTokens(n_tokens)


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _specials(vocab: Vocabulary) -> list[_Special]:
    ids = vocab.of_kinds(CONTROL, UNKNOWN, USER_DEFINED)
    if not vocab.is_utf8:  # no text has what is not UTF-8
        ids = [i for i in ids if _sound(vocab.texts[i]) == vocab.texts[i]]
    ids.sort(key=lambda i: -len(utf8(vocab.texts[i])))
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


def _char_bytes() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    return table | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHAR = _char_bytes()
