"""The keywords of the public API, and the check that no unknown one slips through.

Knows nothing of what they do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from edgeinfer.errors import InvalidRequestError

# "drop-turns" (chats only) leaves out the oldest turns before an answer and slides inside it.
Overflow: TypeAlias = Literal["error", "slide", "drop-turns"]


class Progress(NamedTuple):
    """How far loading is. Stages: "kernels" (builds), "weights" (bytes)."""

    stage: str
    done: int
    total: int


class LoadOptions(TypedDict, total=False):
    """How a model is loaded; None is the same as leaving a keyword out."""

    n_ctx: int | None  # min(trained length, 8192), smaller if memory is short
    memory: int | str | None  # bytes, "2G" or "80%" of what is free
    threads: int | None
    kv_type: str | tuple[str, str] | None  # "f16"
    device: str | None  # "auto", "cpu" or "reference"
    gpu_layers: int | None
    slots: int | None  # full-length contexts that the cache holds, 1
    chat_template: str | None  # a name or a file
    pre: str | None  # pre-tokenizer, for a file that names none or an unknown one
    download: bool
    progress: Callable[[Progress], None] | None


class Sampling(TypedDict, total=False):
    """How a request is answered; None is the same as leaving a keyword out."""

    max_tokens: int | None  # None: to the end of generation or context
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None  # beside those that end a generation anyway
    overflow: Overflow | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    repeat_last_n: int | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: Sequence[str] | None
    dynatemp_range: float | None
    dynatemp_exponent: float | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    min_keep: int | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    speculation: bool | None  # guess tokens ahead where that is faster: on; never changes them


def check_keywords(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for a keyword that `function` does not have, naming the nearest one."""
    names = list(known)
    for name in given:
        if name not in names:
            import difflib  # 2 ms that starts don't need

            near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() has no keyword {name!r}{hint}")


def parse_memory(value: int | str, available: int) -> int:
    """Bytes from a count, "512M", "2G" or "80%" of `available`."""
    text = str(value).strip().upper().removesuffix("IB").removesuffix("B")
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "")
    try:
        size = float(number)
    except ValueError:
        size = -1.0
    if not 0 < size < 2**60:
        raise InvalidRequestError(
            f"memory is {value!r}; give bytes, 512M, 2G, or a share such as 80%", param="memory"
        )
    return int(available * size / 100) if unit == "%" else int(size * _UNITS[unit])


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "%": 0}


def parse_stop(stop: Any) -> tuple[str, ...]:
    """Stop strings from one or several."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(s, str) and s for s in stops):
        raise InvalidRequestError(
            f"stop is {stop!r}; give a string or several, none empty", param="stop"
        )
    return stops


def parse_stop_token_ids(ids: Any, n_vocab: int) -> frozenset[int]:
    """Token ids that end an answer; raises where one is no token of the vocabulary."""
    given = () if ids is None else ids
    try:
        # NOTE: True counts as 1 everywhere, so it is refused by name.
        found = frozenset(-1 if isinstance(id, bool) else operator.index(id) for id in given)
    except TypeError:
        found = frozenset({-1})
    if not all(0 <= id < n_vocab for id in found):
        raise InvalidRequestError(
            f"stop_token_ids is {ids!r}; give token ids below {n_vocab}", param="stop_token_ids"
        )
    return found
