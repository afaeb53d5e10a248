"""What a request yields: events while it runs, a completion at the end.

Knows nothing of how they come about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts; `cached_tokens` of the prompt had been computed for others, or before.

    `cache_miss` says why the rest was not: it is "new", or was given up ("evicted"), or is not kept
    that far back ("window", "state"), or is for another context or another way to slide
    ("settings").
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_miss: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds and tokens per second; 0 where there was nothing to measure.

    Of `proposed_tokens` guessed ahead (see `speculation`), `accepted_tokens` came true.
    """

    load_s: float
    first_token_s: float
    prefill_tok_s: float
    decode_tok_s: float
    total_s: float
    proposed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability, and those of the likeliest tokens at its place."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool that the model wants to be called; `arguments` is the JSON of an object.

    Where an answer was cut off, that of its last call may be too.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """More of a call, the `index`-th of its answer: its name first, then its arguments."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished generation. `stop` is the stop string or the token id that ended it."""

    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "cancelled"]
    stop: str | int | None
    logprobs: tuple[TokenLogprob, ...] | None
    usage: Usage
    timings: Timings
    seed: int
    model: str
    tool_calls: tuple[ToolCall, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptProgress:
    """`done` of `total` prompt tokens are read."""

    done: int
    total: int
    text: str = field(default="", init=False)
    type: Literal["prompt_progress"] = field(default="prompt_progress", init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New text of the answer, or of the reasoning before it, or of a call of a tool.

    It has the tokens that came with it. Text that may belong to a stop string, a longer character
    or a call waits for the next delta, its tokens too; so the last one may have tokens only.
    `logprobs` are as in a completion.
    """

    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    call: CallDelta | None = None
    type: Literal["delta"] = field(default="delta", init=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The last event of a stream."""

    completion: Completion
    text: str = field(default="", init=False)
    type: Literal["done"] = field(default="done", init=False)


Event: TypeAlias = PromptProgress | Delta | Done
