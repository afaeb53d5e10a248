"""What every API makes of a request: a conversation or a text to continue, and how.

Knows nothing of APIs or of models.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeinfer.server.errors import Json
from edgeinfer.server.fields import Fields
from edgeinfer.server.structure import Structure
from edgeinfer.text.call_ids import ID_LENGTH, with_short_ids

# Sampling keywords that APIs agree on; what is ours alone goes by the same name everywhere.
SAMPLING = {
    name: name
    for name in (
        "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "repeat_penalty",
        "repeat_last_n", "presence_penalty", "frequency_penalty", "top_n_sigma", "xtc_probability",
        "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
        "dry_sequence_breakers", "dynatemp_range", "dynatemp_exponent", "mirostat", "mirostat_tau",
        "mirostat_eta", "min_keep", "stop_token_ids",
    )
}  # fmt: skip
SAMPLING["repetition_penalty"] = "repeat_penalty"
SAMPLING["random_seed"] = "seed"
# What changes answers elsewhere, and what to ask for here instead.
NOT_HERE = {
    "min_tokens": "an answer ends where its model ends it; ignore_eos has it go on to max_tokens",
    "bad_words": "logit_bias keeps tokens out of an answer",
    "allowed_token_ids": "a regex or a grammar says what an answer may hold",
    "use_beam_search": "answers are drawn one by one",
    "truncate_prompt_tokens": "what does not fit is refused; send less",
    "prompt_logprobs": "logprobs are those of an answer",
    "prompt_embeds": "send text",
    "logits_processors": "logit_bias, a regex or a grammar says what an answer may hold",
    "include_stop_str_in_output": "an answer ends before its stop string",
    "return_token_ids": "tokenize makes them of a text",
    "return_tokens_as_token_ids": "tokenize makes them of a text",
    "guided_whitespace_pattern": "JSON is written in one way",
    "top_a": "min_p leaves out what is below a share of the likeliest",
    "t_max_predict_ms": "max_tokens limits an answer",
    "lora": "a model is served as it was loaded",
}
MOST_BUDGET = 2**31 - 1  # tokens of reasoning
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation, as `LLM.stream_chat` takes it."""

    messages: list[Json]
    tools: list[Json] = field(default_factory=list)
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool = True
    template_args: dict[str, Any] = field(default_factory=dict)
    continues: bool = False  # whether the answer goes on with the last message


@dataclass(frozen=True, kw_only=True)
class Request:
    """Answers that a client wants: `n` of them to a chat or to each of the prompts.

    `structure` is what they must be. Requests of one `session`, a client's own name for it, go on
    from each other.
    """

    model: str
    chat: Chat | None = None
    prompts: Sequence[str | list[int]] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    structure: Structure = Structure()
    n: int = 1
    suffix: str = ""  # what follows the text that is asked for
    ignores_eos: bool = False  # whether answers are as long as they may be
    session: str = ""


_SESSION_HEADERS = ("session-id", "session_id", "x-session-id", "x-session-affinity", "thread-id")


def session_of(headers: Mapping[str, str], given: Any) -> str:
    """The session that a request says it belongs to, in its body or else in a header."""
    if isinstance(given, str) and given:
        return given
    return next((headers[name] for name in _SESSION_HEADERS if headers.get(name)), "")


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def new_call_id(prefix: str) -> str:
    return prefix + secrets.token_hex(ID_LENGTH)[:ID_LENGTH]


def conversation(messages: Sequence[Json]) -> list[Json]:
    """Messages as templates want them: one system message at the front, calls with short ids."""
    found: list[Json] = []
    for message in with_short_ids(messages):
        is_system = message["role"] in _SYSTEM
        if is_system and len(found) == 1 and found[0]["role"] in _SYSTEM:
            told = filter(None, (found[0]["content"], message["content"]))
            found[0] = {"role": "system", "content": "\n\n".join(told)}
        else:
            found.append(message)
    return found


def function_tool(function: Fields, schema: str = "parameters") -> Json:
    """A tool in the form that templates take; it is called by its schema if it is strict."""
    name = function.text("name")
    if not name:
        raise function.wrong("name", "the name of a function")
    parameters = function.object(schema).values or {"type": "object", "properties": {}}
    told: Json = {"name": name, "description": function.text("description")}
    told["parameters"] = parameters
    if function.flag("strict"):
        told["strict"] = True
    return {"type": "function", "function": told}
