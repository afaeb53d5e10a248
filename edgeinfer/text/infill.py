"""A prompt to fill in what stands between two texts, for models that have tokens for that."""

from __future__ import annotations

from collections.abc import Sequence

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.tokenizer import Tokenizer


def infill_prompt(tokenizer: Tokenizer, before: str | Sequence[int], after: str) -> list[int]:
    """What is before, what is after, then what asks for the text between.

    InvalidRequestError where the vocabulary has no tokens for it.
    """
    if not tokenizer.infill_ids:
        raise InvalidRequestError(
            "suffix is not supported: this model has no tokens to fill in text with; leave it out, "
            "or serve a model of code that has them",
            param="suffix",
        )
    prefix, suffix, middle = tokenizer.infill_ids
    ids = tokenizer.encode_middle(before) if isinstance(before, str) else list(before)
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return [*begin, prefix, *ids, suffix, *tokenizer.encode_middle(after), middle]
