"""The keywords of the public API as types; their ranges and defaults are in `parameters`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:
    from typing_extensions import Unpack as Unpack

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
    memory: int | str | None  # the host's: bytes, "2G" or "80%" of what is free
    threads: int | None
    kv_type: str | tuple[str, str] | None  # of K and V: "f16", "q8_0", "q4_0"; f16
    device: str | None  # "auto", "cpu", "cuda", "cuda:1", "cuda:0,cuda:1", "reference", "law"
    gpu_layers: int | str | None  # the last ones; -1: all; "auto": as many as fit
    numerics: str | None  # "exact", every device's bits; "fast": of GPUs, rounded more; "exact"
    slots: int | None  # full-length contexts that the cache holds, 1
    kept_tokens: int | None  # of earlier prompts, beside those contexts; a quarter of one
    chat_template: str | None  # a name or a file
    pre: str | None  # pre-tokenizer, for a file that names none or an unknown one
    pooling: str | None  # how `embed` makes one row of a text's: "mean", "last"; as the file says
    drafts: bool | None  # load the block that guesses tokens (MTP) which some files hold, False
    naive: bool | None  # one answer at a time, nothing reused: to measure against; False
    residuals: Sequence[int] | None  # layers whose entering stream may be watched; n_layers: head
    download: bool
    progress: Callable[[Progress], None] | None


class Sampling(TypedDict, total=False):
    """How a request is answered; None is the same as leaving a keyword out."""

    max_tokens: int | None  # None: to the end of generation or context
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None  # beside those that end a generation anyway
    overflow: Overflow | None
    n_keep: int | None  # tokens at the start that stay when it slides; unset: system text, tools
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
    n_stable: int | None  # leading messages, or tokens, that later prompts share: kept longest, 0
    schema: Any  # the answer is JSON by it: a JSON schema, pydantic model, dataclass, TypedDict
    grammar: str | None  # the answer follows it: Lark, GBNF
    regex: str | None  # the answer matches it
    reasoning_budget: int | None  # most tokens of reasoning in a chat; then it is closed
    continue_last: bool | None  # go on with the assistant's message that ends a chat, False
    priority: int | None  # larger ones run first, 0
    on_step: Callable[[Any], object] | None  # gets a Step, in the engine's thread: it can't wait
    watch: Sequence[str | int] | None  # what it is shown: "logits" alone, "hidden", layers
    speculation: bool | None  # guess tokens ahead where that is faster: on; never changes them
