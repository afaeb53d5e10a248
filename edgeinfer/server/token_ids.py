"""Whether token ids that a client sends are the model's own.

Some clients send the ids of the tokenizer that the API's first vendor has, whatever the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeinfer.server.errors import ApiError
from edgeinfer.text.tokenizer import Tokenizer

_EDGE = 2  # tokens at each end of a part of a text, which the whole may have cut elsewhere


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
    if not all(0 <= id < tokenizer.n_vocab for id in ids):
        return False
    text = tokenizer.decode(ids, special=True)
    made = tokenizer.encode(text, bos=False, parse_special=True)
    if made == ids:
        return True
    inner = ids[_EDGE:-_EDGE]
    starts = range(min(4 * _EDGE, len(made)))
    return bool(inner) and any(made[i : i + len(inner)] == inner for i in starts)
