"""A file's vocabulary: its `tokenizer.ggml.*` metadata, every value checked before it is used.

Knows nothing of how text is cut or joined.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgeinfer.errors import InvalidModelError, InvalidRequestError, UnsupportedModelError
from edgeinfer.gguf import Array, Metadata
from edgeinfer.terminal import one_line
from edgeinfer.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_KEY = "tokenizer.ggml."

# Above what the largest vocabularies in use have: 262,144 tokens.
_MAX_TOKENS = 1 << 19
MAX_TEXT = 1 << 25
_MAX_NAME = 60  # characters of a name that are looked at

# Metadata that changes what text becomes. Without effect on these vocabularies are
# `remove_extra_whitespaces`, `precompiled_charsmap`, `add_sep_token` and the ids that go with them;
# `add_eos_token` acts on embeddings alone, since what else is encoded is to be continued.
_UNSUPPORTED = {
    "suppress_tokens": "tokens that are never generated",
    "normalizer.lowercase": "text in lower case",
    "normalizer.strip_accents": "text without accents",
}

# Tokens that end a generation, whatever type the file gives them.
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
_N_INFILL = 3  # the first of these keys
_FIM_THAT_ENDS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_NOT_RSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(slots=True)
class Vocabulary:
    """What the metadata say, checked."""

    model: str
    pre: str
    row: PreTokenizer | None
    texts: list[str]
    is_utf8: bool
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
    infill_ids: tuple[int, ...] = ()  # before, after, between; none or all three
    rstrip_ids: frozenset[int] = frozenset()

    @property
    def byte_level(self) -> bool:
        return self.row is not None and self.row.byte_level

    def of_kinds(self, *kinds: int) -> list[int]:
        """Ids of the tokens of these kinds, ascending."""
        # Nearly all tokens are of other kinds: a loop over all took 3 ms.
        return [found.start() for found in re.finditer(b"[%s]" % bytes(kinds), self.kinds)]


def read_vocabulary(meta: Metadata, pre: str | None) -> Vocabulary:
    model = meta.get_str(_KEY + "model")
    if model not in ("llama", "gpt2", "gemma4"):
        raise UnsupportedModelError(
            f"the file's tokenizer is {_shown(model)}; generation runs with llama (SentencePiece), "
            "gpt2 and gemma4 (byte-pair) vocabularies",
            missing=(f"tokenizer {one_line(model)}",),
        )
    name, row = pre_tokenizer(meta, pre)
    texts, is_utf8 = _token_texts(meta)
    ids = dict(zip(texts, range(len(texts)), strict=True))
    if len(ids) != len(texts):
        i, text = next((i, t) for i, t in enumerate(texts) if ids[t] != i)
        raise InvalidModelError(
            f"tokens {i} and {ids[text]} are both {_shown(text)}", field=_KEY + "tokens"
        )
    _check_neutral(meta)
    kinds = bytearray(_token_types(meta, len(texts)))
    vocab = Vocabulary(model, name, row, texts, is_utf8, ids, bytes(kinds), kinds)
    _override_kinds(vocab, meta)
    _find_bytes(vocab)
    _read_special_ids(vocab, meta)
    is_spm = row is None
    vocab.add_space_prefix = meta.get_bool(_KEY + "add_space_prefix", is_spm)
    vocab.add_bos = meta.get_bool(
        _KEY + "add_bos_token", is_spm or (row is not None and row.add_bos)
    )
    vocab.add_eos = meta.get_bool(_KEY + "add_eos_token", False)
    if row is not None:
        vocab.add_bos = vocab.add_bos or name == "gemma4"
        vocab.add_space_prefix = False
    if "phi-3" in (title := meta.get_str("general.name", "").lower()) or "phi3" in title:
        special = set(vocab.of_kinds(CONTROL, UNKNOWN, USER_DEFINED))
        keep = {ids[t] for t in _NOT_RSTRIPPED if t in ids}
        vocab.rstrip_ids = frozenset(special | {ids.get("</s>", -1)}) - keep
    return vocab


def pre_tokenizer(meta: Metadata, override: str | None) -> tuple[str, PreTokenizer | None]:
    """The name and the row of the file's, or of the `override`; none of SentencePiece."""
    model = meta.get_str(_KEY + "model")
    if model == "llama":
        if override is not None:
            raise InvalidRequestError(
                "the file's tokenizer is SentencePiece, which has no pre-tokenizer: drop --pre",
                param="pre",
            )
        return "", None
    found = "gemma4" if model == "gemma4" else meta.get_str(_KEY + "pre", "") or "default"
    name = found if override is None else override
    if row := PRE_TOKENIZERS.get(name):
        return name, row
    import difflib  # 2 ms that starts don't need

    name = one_line(name, _MAX_NAME)
    near = difflib.get_close_matches(name, PRE_TOKENIZERS, n=5, cutoff=0.4)
    names = ", ".join(near or sorted(PRE_TOKENIZERS)[:8])
    message = f"unknown pre-tokenizer {name!r}; near names: {names}"
    if override is not None:
        raise InvalidRequestError(message, param="pre")
    raise UnsupportedModelError(
        f"{_KEY}pre: {message}; --pre NAME chooses one of them", missing=(f"pre-tokenizer {name}",)
    )


def _check_neutral(meta: Metadata) -> None:
    for name, operation in _UNSUPPORTED.items():
        value = meta.get(_KEY + name)
        if len(value) if isinstance(value, Array) else value:
            raise UnsupportedModelError(
                f"{_KEY}{name} asks for {operation}, which edgeinfer lacks; take a file of "
                "another publisher",
                missing=(operation,),
            )


def _find_bytes(vocab: Vocabulary) -> None:
    """A byte is a token spelled <0xXX>: some files call them normal, or have no types."""
    if not vocab.byte_level:
        for text in BYTE_TEXTS:
            if (id := vocab.ids.get(text)) is not None:
                vocab.kinds[id] = BYTE
    for id in vocab.of_kinds(BYTE):
        byte_value(vocab.texts[id])


def _override_kinds(vocab: Vocabulary, meta: Metadata) -> None:
    """Some files call control tokens normal ones: the spelling decides, then the exceptions."""
    ids, kinds = vocab.ids, vocab.kinds
    eog = {ids[text] for text in _EOG_TEXTS if text in ids}
    control, infill = set(eog), list[int]()
    for key, texts in _FIM_TEXTS.items():
        id = _token_id(meta, key, len(kinds))
        if id is None and key in _DEPRECATED_FIM_KEYS:
            id = _token_id(meta, _DEPRECATED_FIM_KEYS[key], len(kinds))
        found = {id} if id is not None else {ids[text] for text in texts if text in ids}
        if id is None:
            control |= found
        if key in _FIM_THAT_ENDS:
            eog |= found
        elif found:
            infill.append(min(found))
    vocab.infill_ids = tuple(infill) if len(infill) == _N_INFILL else ()
    for i in control:
        kinds[i] = CONTROL
    for text in _ALWAYS_SHOWN:
        if text in ids:
            kinds[ids[text]] = USER_DEFINED
    eog |= _end_ids(meta, len(kinds))
    has_call = "<|call|>" in ids or "<|calls|>" in ids
    if "<|end|>" in ids and has_call and ("<|return|>" in ids or "<|flush|>" in ids):
        eog.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = USER_DEFINED
    plamo_eos = ids.get("<|plamo:eos|>")
    if "</s>" in ids and ("<|tool_response>" in ids or plamo_eos in eog):
        eog.discard(ids["</s>"])
        kinds[ids["</s>"]] = NORMAL
    vocab.eog_ids = frozenset(eog)


def _read_special_ids(vocab: Vocabulary, meta: Metadata) -> None:
    n = len(vocab.texts)
    bos = _token_id(meta, "bos_token_id", n)
    eos = _token_id(meta, "eos_token_id", n)
    unknown = _token_id(meta, "unknown_token_id", n)
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


def _token_texts(meta: Metadata) -> tuple[list[str], bool]:
    """The tokens, and whether all are UTF-8; of others each wrong byte is a lone surrogate."""
    key = _KEY + "tokens"
    items, is_utf8 = meta.get_strings(key, most=_MAX_TOKENS, most_bytes=MAX_TEXT), True
    try:
        texts = list(map(bytes.decode, items))
    except UnicodeDecodeError:
        texts, is_utf8 = [item.decode(errors="surrogateescape") for item in items], False
    if not texts:
        raise InvalidModelError("the vocabulary is empty", field=key)
    if not all(texts):
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
    return texts, is_utf8


def _token_types(meta: Metadata, n_vocab: int) -> bytes:
    key = _KEY + "token_type"
    if key not in meta:
        return bytes([NORMAL]) * n_vocab
    types = meta.get_numbers(key, n_vocab, integers=True)
    # A type that this table lacks is kept as 0: never matched, never shown.
    known = (types >= NORMAL) & (types <= BYTE)
    return bytes((types * known).astype("uint8"))


def _end_ids(meta: Metadata, n_vocab: int) -> set[int]:
    """Tokens that the file says end a generation; some have several."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [_token_id(meta, name, n_vocab) for name in names]
    key = _KEY + "eos_token_ids"
    more = meta.get_ints(key, low=_LEAST_INT, high=_MOST_INT) if key in meta else ()
    return {id for id in (*ids, *more) if id is not None and 0 <= id < n_vocab}


def _token_id(meta: Metadata, name: str, n_vocab: int) -> int | None:
    """None for a number that is no token's: -1, or one past the end, is how files write "none"."""
    id = meta.get_int(_KEY + name, -1, low=_LEAST_INT, high=_MOST_INT)
    return id if 0 <= id < n_vocab else None


_LEAST_INT, _MOST_INT = -(1 << 63), (1 << 64) - 1


BYTE_TEXTS = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_value(text: str) -> int:
    if (byte := BYTE_TEXTS.get(text)) is not None:
        return byte
    if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        raise InvalidModelError(f"{_shown(text)} is not a byte token <0xXX>", field=_KEY + "tokens")
    return int(text[3:5], 16)


def utf8(text: str) -> bytes:
    """A token's bytes as the file has them."""
    return text.encode(errors="surrogateescape")


def _shown(text: str) -> str:
    return repr(one_line(text, _MAX_NAME))
