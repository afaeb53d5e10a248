"""How many token ids are made of a text, and whether those that a client sends are the model's own.

Some clients send the ids of the tokenizer that the API's first vendor has, whatever the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from edgeinfer.server.errors import ApiError
from edgeinfer.text.tokenizer import Tokenizer, TooManyTokens

MOST_MADE = 1 << 20  # tokens of a text that is only counted: seconds of a processor

_EDGE = 3  # tokens at each end of a part of a text: of a character cut in bytes, or cut elsewhere
_WHOLE = 4 * _EDGE  # tokens up to which a text is no part, unless it comes with longer ones


@contextmanager
def limited() -> Iterator[None]:
    """ApiError for a text of more tokens than are made."""
    try:
        yield
    except TooManyTokens:
        raise ApiError(
            413, f"the text has more than {MOST_MADE:,} tokens; send it in parts"
        ) from None


def check_origin(tokenizer: Tokenizer, texts: Sequence[str | list[int]]) -> None:
    """ApiError for ids that the tokenizer does not make of the text that they stand for."""
    given = [ids for ids in texts if not isinstance(ids, str) and ids]
    has_parts = any(len(ids) > _WHOLE for ids in given)
    for ids in given:
        if _is_own(tokenizer, ids, is_part=has_parts or len(ids) > _WHOLE):
            continue
        raise ApiError(
            400,
            "input holds token ids that the tokenizer of this model does not make: they seem to be "
            "those of another one. Send text, with LangChain by "
            "OpenAIEmbeddings(check_embedding_ctx_length=False)",
            param="input",
            code="unsupported",
        )


def _is_own(tokenizer: Tokenizer, ids: list[int], *, is_part: bool) -> bool:
    """Of one id nobody can tell: a vocabulary's tokens stand for themselves."""
    if not all(0 <= id < tokenizer.n_vocab for id in ids):
        return False
    text = tokenizer.decode(ids, special=True)
    inner = ids[_EDGE:-_EDGE] if is_part else ids
    for parse_special in (True, False):  # a text may spell a control token, and mean the spelling
        made = tokenizer.encode(text, bos=False, parse_special=parse_special)
        if any(made[i : i + len(inner)] == inner for i in range(_WHOLE)):
            return True
    return False
