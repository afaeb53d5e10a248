"""How each family of models spells calls of tools, and which family a chat template belongs to.

Knows nothing of where in a reply calls are looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

from edgeinfer.text.call_json import (
    HARMONY_ENDS,
    deepseek,
    harmony,
    json_calls,
    mistral,
    python_tag,
    wrapper,
)
from edgeinfer.text.call_python import python_list
from edgeinfer.text.call_tags import DSML, dsml, function_tag, gemma, tool_call_tag
from edgeinfer.text.reader import Reader, Steps
from edgeinfer.text.tools import Calls

Parse: TypeAlias = Callable[[Reader, Calls], Steps[None]]


class CallFormat(NamedTuple):
    """A spelling: the markers that open a call, and what reads on from each.

    Of control tokens, parsers see the markers and those `inside` calls.
    """

    family: str
    markers: dict[str, Parse]
    inside: tuple[str, ...] = ()
    may_be_bare: bool = False  # a reply that begins with a JSON object may be a call
    whole_reply: Parse | None = None  # reads everything, replies without calls too

    @property
    def controls(self) -> frozenset[str]:
        return frozenset([*self.markers, *self.inside])


_GEMMA_3_END = "<end_function_call>"
_TAGS = CallFormat(
    "tags",
    {"<tool_call>": tool_call_tag, "<function=": function_tag},
    ("</tool_call>",),
    may_be_bare=True,
)
_LFM2 = CallFormat("lfm2", {"<|tool_call_start|>": python_list}, ("<|tool_call_end|>",))
# A text in the template that tells the spelling, the most telling first.
_SIGNS: tuple[tuple[str, CallFormat], ...] = (
    (
        "<|channel|>",
        CallFormat(
            "harmony",
            {},
            ("<|channel|>", "<|message|>", "<|constrain|>", *HARMONY_ENDS),
            whole_reply=harmony,
        ),
    ),
    (
        DSML,
        CallFormat(
            "dsml", {f'<{DSML}invoke name="': dsml, f"<{DSML}function_calls>": wrapper}, (DSML,)
        ),
    ),
    (
        "<｜tool▁call▁begin｜>",
        CallFormat(
            "deepseek",
            {"<｜tool▁call▁begin｜>": deepseek, "<｜tool▁calls▁begin｜>": wrapper},
            ("<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        ),
    ),
    ("<|tool_call_start|>", _LFM2),
    ("List of tools: [", _LFM2),  # of LFM2.5, which shows no call in its template
    (
        "[TOOL_CALLS]",
        CallFormat("mistral", {"[TOOL_CALLS]": mistral}, ("[ARGS]", "[CALL_ID]")),
    ),
    (
        "<|tool_call>",
        CallFormat(
            "gemma",
            {"<|tool_call>": partial(gemma, quote='<|"|>', close="<tool_call|>")},
            ('<|"|>', "<tool_call|>"),
        ),
    ),
    (
        "<start_function_call>",
        CallFormat(
            "functiongemma",
            {"<start_function_call>": partial(gemma, quote="<escape>", close=_GEMMA_3_END)},
            ("<escape>", _GEMMA_3_END),
        ),
    ),
    ("<tool_call>", _TAGS),
    ("<|tool_call|>", CallFormat("granite", {"<|tool_call|>": json_calls})),
    ("<function=", _TAGS),
    (
        '{"name": function name, "parameters"',
        CallFormat("llama", {"<|python_tag|>": python_tag}, may_be_bare=True),
    ),
)


def call_format(template: str) -> CallFormat:
    """The spelling of the model that a chat template belongs to."""
    return next((format for sign, format in _SIGNS if sign in template), _TAGS)
