"""What the engine is asked for, from a prompt and the keywords of an answer.

Knows nothing of how a prompt was made or how a reply is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from edgeinfer import watching
from edgeinfer.batch import PAGE
from edgeinfer.engine.cache import LEAST_SLIDING, most_pinned
from edgeinfer.engine.generation import check_length
from edgeinfer.engine.sequence import Request
from edgeinfer.errors import InvalidRequestError, Keyword
from edgeinfer.parameters import REQUEST, id_list
from edgeinfer.runtime import Runtime
from edgeinfer.sampling.params import SamplingParams, breaker_tokens
from edgeinfer.text.prompt import Prompt
from edgeinfer.text.tokenizer import TooManyTokens

if TYPE_CHECKING:
    from edgeinfer.engine.constraint import Constraint

_STOP_BYTES = 110  # measured, CPython 3.11: of a stop string beside its letters
COUNTED_BEYOND = 1 << 16  # tokens that an error may count beyond the context: 0.2 s


def prompt_ids(opened: Runtime, prompt: str | Sequence[int], given: Mapping[str, Any]) -> list[int]:
    """The tokens of a text, or those that are given, checked."""
    most = most_tokens(opened, given)
    if isinstance(prompt, str):
        with counting(opened):
            return opened.tokenizer.encode(prompt, parse_special=True, most=most)
    if most is None:
        return id_list(prompt, "prompt")
    n_answer = int(given.get("max_tokens") != 0)
    fits = partial(check_length, n_ctx=opened.plan.n_ctx, n_answer=n_answer, may_slide=True)
    return id_list(prompt, "prompt", fits)


def most_tokens(opened: Runtime, given: Mapping[str, Any]) -> int | None:
    """How far a prompt is counted: what can't fit is refused before all of it is tokens."""
    return None if given.get("overflow") == "slide" else opened.plan.n_ctx + COUNTED_BEYOND


@contextmanager
def counting(opened: Runtime) -> Iterator[None]:
    """What has more tokens than are counted does not fit."""
    try:
        yield
    except TooManyTokens as error:
        check_length(error.at_least, opened.plan.n_ctx, is_least=True, may_slide=True)


def request_of(
    opened: Runtime, prompt: Prompt, given: Mapping[str, Any], constraint: Constraint | None
) -> Request:
    return Request(
        ids=prompt.ids,
        params=_params(opened, given),
        max_tokens=given.get("max_tokens"),
        overflow=_cache_overflow(opened.plan.n_ctx, prompt, given),
        stop_ids=_stop_ids(opened, given.get("stop_token_ids", frozenset())),
        n_pinned=given.get("n_keep", prompt.n_pinned),
        borders=prompt.borders,
        n_stable=prompt.n_stable,
        priority=given.get("priority", 0),
        hook=watching.hook_of(given, opened),
        speculation=given.get("speculation", opened.plan.limits.row_cost < 1),
        constraint=constraint,
        n_beside=sum(_STOP_BYTES + len(stop) for stop in given.get("stop", ())),
    )


def _stop_ids(opened: Runtime, given: frozenset[int]) -> frozenset[int]:
    tokenizer = opened.tokenizer
    unknown = [id for id in given if id >= tokenizer.n_vocab]
    if unknown:
        raise InvalidRequestError(
            f"stop_token_ids names {min(unknown)}; the vocabulary has 0 .. {tokenizer.n_vocab - 1}",
            param="stop_token_ids",
        )
    return given | frozenset(tokenizer.eog_ids)


def _cache_overflow(
    n_ctx: int, prompt: Prompt, given: Mapping[str, Any]
) -> Literal["error", "slide"]:
    """What the cache does when it is full; turns were dropped before, where that was asked.

    Of what comes before the first question none is forgotten, unless `n_keep` says how much stays.
    """
    overflow, most = given.get("overflow", "error"), most_pinned(n_ctx)
    stays = "n_keep" in given or prompt.n_pinned <= most
    if overflow == "slide":
        if n_ctx >= LEAST_SLIDING and not stays:
            raise InvalidRequestError(
                f"{prompt.n_pinned} tokens come before the first question and are to stay when the "
                f"context slides; one of {n_ctx} tokens has room for {most} of them",
                advice=("raise ", Keyword("n_ctx"), ", shorten them, or use ",
                        Keyword("n_keep", most), ", which forgets the rest"),
                param="overflow",
            )  # fmt: skip
        return "slide"
    # What slides holds whole pages: a prompt that it would cut short does not slide.
    can_slide = n_ctx >= LEAST_SLIDING and len(prompt.ids) < n_ctx // PAGE * PAGE
    return "slide" if overflow == "drop-turns" and can_slide and stays else "error"


def _params(opened: Runtime, given: Mapping[str, Any]) -> SamplingParams:
    sampling = {name: value for name, value in given.items() if name not in REQUEST}
    params = SamplingParams.resolve(sampling, opened.model.sampling)
    if not params.has_dry:
        return params
    tokenizer = opened.tokenizer
    pieces = [tokenizer.piece(id) for id in range(tokenizer.n_vocab)]
    found = breaker_tokens(params.dry_sequence_breakers, pieces, tokenizer.encode)
    return params.with_breakers(found)
