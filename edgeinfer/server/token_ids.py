"""Whether token ids that a client sends are the model's own.

Some clients send the ids of the tokenizer that the API's first vendor has, whatever the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeinfer.server.errors import ApiError
from edgeinfer.text.tokenizer import Tokenizer

_EDGE = 3  # tokens at each end of a part of a text: of a character cut in bytes, or cut elsewhere
_WHOLE = 4 * _EDGE  # tokens up to which a text is no part


def check_origin(tokenizer: Tokenizer, texts: Sequence[str | list[int]]) -> None:
    """ApiError for ids that the tokenizer does not make of the text that they stand for."""
    for ids in texts:
        if isinstance(ids, str) or not ids or _is_own(tokenizer, ids):
            continue
        raise ApiError(
            400,
            "input holds token ids that the tokenizer of this model does not make: they seem to be "
            "those of another one. Send text, with LangChain by "
            "OpenAIEmbeddings(check_embedding_ctx_length=False)",
            param="input",
            code="unsupported",
        )


def _is_own(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Of one id nobody can tell: a vocabulary's tokens stand for themselves."""
    if not all(0 <= id < tokenizer.n_vocab for id in ids):
        return False
    text = tokenizer.decode(ids, special=True)
    inner = ids if len(ids) <= _WHOLE else ids[_EDGE:-_EDGE]
    for parse_special in (True, False):  # a text may spell a control token, and mean the spelling
        made = tokenizer.encode(text, bos=False, parse_special=parse_special)
        if any(made[i : i + len(inner)] == inner for i in range(_WHOLE)):
            return True
    return False
