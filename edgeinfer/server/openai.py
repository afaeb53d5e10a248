"""What the OpenAI APIs share: the envelope of errors, usage, tools and contents of messages.

Knows nothing of endpoints.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from edgeinfer import __version__
from edgeinfer.parameters import shown
from edgeinfer.results import Completion, Usage
from edgeinfer.server.custom_tools import as_function
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.fields import Fields
from edgeinfer.server.requests import MOST_BUDGET, NOT_HERE, SAMPLING, function_tool

FINGERPRINT = f"edgeinfer-{__version__}"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_MOST_ANSWERS = 128
_EFFORTS_WITHOUT_THOUGHT = ("none", "minimal")
# As llama-server, vLLM and the makers of models call the most tokens that may be thought.
_BUDGETS = (
    "reasoning_budget",
    "thinking_budget",
    "thinking_budget_tokens",
    "thinking_token_budget",
)
_IDS = re.compile(r"0|-?[1-9][0-9]{0,18}")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def envelope(error: ApiError) -> Json:
    usual = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, usual),
            "param": error.param,
            "code": error.code,
            **error.facts,
        }
    }


def sampling_of(body: Fields, *most_tokens: str) -> dict[str, Any]:
    """Sampling keywords; the first of the fields `most_tokens` that is there limits an answer."""
    goes_on = body.flag("ignore_eos")  # however many tokens there must be at least
    body.refuse(
        {n: advice for n, advice in NOT_HERE.items() if not (goes_on and n == "min_tokens")}
    )
    if not body.flag("skip_special_tokens", True):
        raise body.wrong("skip_special_tokens", "true: tokens that control are no text")
    found = body.sampling({**SAMPLING, "stop": "stop"})
    limit = next((name for name in most_tokens if name in body), None)
    if limit is not None and body.get(limit) not in (-1, -2):
        found |= body.sampling({limit: "max_tokens"})
    if "logit_bias" in body:
        found["logit_bias"] = _logit_bias(body)
    return found | _budget(body)


def count_of(body: Fields) -> int:
    """How many answers are wanted of each prompt."""
    n = body.integer("n", 1, 1, _MOST_ANSWERS)
    if body.integer("best_of", n, 0, _MOST_ANSWERS) > n:
        raise body.wrong("best_of", f"no more than n, {n}: all that are drawn are given back")
    return n


def _budget(body: Fields) -> dict[str, Any]:
    """-1 is no limit."""
    reasoning = body.object("reasoning")
    n = reasoning.integer("max_tokens", -1, -1, MOST_BUDGET)
    n = _thinking(body).integer("budget_tokens", n, -1, MOST_BUDGET)
    for name in _BUDGETS:
        n = body.integer(name, n, -1, MOST_BUDGET)
    return {"reasoning_budget": n} if n >= 0 else {}


def _logit_bias(body: Fields) -> dict[int, Any]:
    """Ids are the names of members in JSON; what adds nothing may have any name."""
    given = {token: bias for token, bias in body.object("logit_bias").values.items() if bias != 0}
    if not all(map(_IDS.fullmatch, given)):  # `int` reads more, and then two may be one
        raise body.wrong("logit_bias", "numbers by token id")
    return {int(token): bias for token, bias in given.items()}


def template_args(body: Fields, effort: str | None = None) -> dict[str, Any]:
    """How much a model is to think, in the words that templates know; and what is meant for one."""
    found: dict[str, Any] = {}
    reasoning = body.object("reasoning")
    if effort is None and "effort" in reasoning:
        effort = reasoning.text("effort")
    if "enabled" in reasoning:
        found["enable_thinking"] = reasoning.flag("enabled")
    if effort is not None:
        found["reasoning_effort"] = effort
        found["enable_thinking"] = effort not in _EFFORTS_WITHOUT_THOUGHT
    if kind := _thinking(body).text("type"):
        found["enable_thinking"] = kind != "disabled"
    if "enable_thinking" in body:
        found["enable_thinking"] = body.flag("enable_thinking")
    return found | body.object("chat_template_kwargs").values


def _thinking(body: Fields) -> Fields:
    """What Anthropic, DeepSeek and Z.ai have of it beside chats: an object, for others a flag."""
    if isinstance(given := body.get("thinking"), bool):
        return Fields({"type": "enabled" if given else "disabled"})
    return body.object("thinking")


def text_content(content: Any, param: str) -> str | None:
    """A content's text; ApiError for parts that are none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(
            400,
            f"{param} has content {shown(content)}; it must be text or a list of parts",
            param=param,
        )
    return "\n".join(_part_text(part, param) for part in content)


def _part_text(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS:
        raise ApiError(
            400, f"{param} has a part of type {shown(kind)}; text is supported", param=param
        )
    if not isinstance(text, str):
        raise ApiError(400, f"{param} has a part of type {kind!r} with no text in it", param=param)
    return text


def tools_of(tools: Iterable[Fields]) -> list[Json]:
    """Functions, and custom tools as such; other kinds are the client's concern."""
    made: dict[str, Callable[[Fields], Json]] = {"function": function_tool, "custom": as_function}
    return [made[kind](_inner(each, kind)) for kind, each in _flat(tools)]


def custom_tools(tools: Iterable[Fields]) -> dict[str, Json]:
    """Custom tools by their names, as they were given."""
    found = (_inner(each, kind) for kind, each in _flat(tools) if kind == "custom")
    return {each.text("name"): each.values for each in found}


def _flat(tools: Iterable[Fields]) -> Iterator[tuple[str, Fields]]:
    """The tools of the kinds that a model is told of, also those inside of namespaces."""
    left = deque(tools)
    while left:
        tool = left.popleft()
        kind = tool.get("type") or "function"
        if kind == "namespace":
            left.extendleft(reversed(tool.objects("tools")))
        elif kind in ("function", "custom"):
            yield kind, tool


def _inner(tool: Fields, kind: str) -> Fields:
    """Chat completions have it a level deeper."""
    return tool.object(kind) if kind in tool else tool


def usage_json(usages: Iterable[Usage], n_reasoning: int = 0) -> Json:
    """Of several answers to one prompt, which was read once."""
    found = list(usages)
    n_prompt, n_new = found[0].prompt_tokens, sum(usage.completion_tokens for usage in found)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": found[0].cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": n_reasoning, "audio_tokens": 0},
    }


def timings_json(answer: Completion) -> Json:
    """As llama-server has them; front-ends show them."""
    usage, timings = answer.usage, answer.timings
    n_read = usage.prompt_tokens - usage.cached_tokens
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": n_read,
        "prompt_ms": _ms(n_read, timings.prefill_tok_s),
        "prompt_per_second": timings.prefill_tok_s,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": _ms(usage.completion_tokens, timings.decode_tok_s),
        "predicted_per_second": timings.decode_tok_s,
    }


def _ms(n: int, per_second: float) -> float:
    return 1000 * n / per_second if per_second else 0.0
