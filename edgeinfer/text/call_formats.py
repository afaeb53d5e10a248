"""How each family of models spells calls of tools, and which family a chat template belongs to.

Knows nothing of where in a reply calls are looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

from edgeinfer.text.call_json import (
    HARMONY_ENDS,
    closed_json,
    deepseek,
    functionary,
    harmony,
    json_calls,
    keyed_calls,
    kimi,
    mistral,
    python_tag,
    wrapper,
)
from edgeinfer.text.call_python import python_list
from edgeinfer.text.call_tags import (
    DSML,
    TOOL_CALL_END,
    dsml,
    function_tag,
    gemma,
    minimax,
    tool_call_tag,
)
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
    has_wrappers: bool = False  # around replies without calls, too

    @property
    def controls(self) -> frozenset[str]:
        return frozenset([*self.markers, *self.inside])


_GEMMA_3_END = "<end_function_call>"
_SEED_END, _LIST_END = "</seed:tool_call>", "</tool_calls>"
# Cohere's, around what is said.
_COHERE_WRAPPERS = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
_PHI_END, _APERTUS_END = "<|/tool_call|>", "<|tools_suffix|>"
_PHI = CallFormat("phi", {"<|tool_call|>": partial(closed_json, close=_PHI_END)}, (_PHI_END,))
_TAGS = CallFormat(
    "tags",
    {"<tool_call>": tool_call_tag, "<function=": function_tag},
    (TOOL_CALL_END,),
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
    (
        "<|START_ACTION|>",
        CallFormat(
            "cohere",
            {
                "<|START_ACTION|>": partial(closed_json, close="<|END_ACTION|>"),
                **dict.fromkeys(_COHERE_WRAPPERS, wrapper),
            },
            ("<|END_ACTION|>",),
            has_wrappers=True,
        ),
    ),
    (
        "<|tool_call_argument_begin|>",
        CallFormat(
            "kimi",
            {"<|tool_calls_section_begin|>": wrapper, "<|tool_call_begin|>": kimi},
            ("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
        ),
    ),
    (
        "<minimax:tool_call>",
        CallFormat("minimax", {"<minimax:tool_call>": minimax}, ("</minimax:tool_call>",)),
    ),
    (
        "<seed:tool_call>",
        CallFormat(
            "seed",
            {"<seed:tool_call>": partial(tool_call_tag, close=_SEED_END)},
            (_SEED_END,),
        ),
    ),
    (
        "<TOOLCALL>",
        CallFormat("nemotron", {"<TOOLCALL>": partial(closed_json, close="</TOOLCALL>")}),
    ),
    (
        "<function_calls>",
        CallFormat("olmo", {"<function_calls>": partial(python_list, close="</function_calls>")}),
    ),
    (
        "<tool_calls>",
        CallFormat(
            "listed",
            {"<tool_calls>": partial(closed_json, close=_LIST_END)},
            may_be_bare=True,
        ),
    ),
    (
        "<|tools_prefix|>",
        CallFormat(
            "apertus",
            {"<|tools_prefix|>": partial(keyed_calls, close=_APERTUS_END)},
            (_APERTUS_END,),
        ),
    ),
    (">>>all", CallFormat("functionary", {}, whole_reply=functionary)),
    ("<tool_call>", _TAGS),
    (_PHI_END, _PHI),
    ("<|/tool|>", _PHI),  # of Phi 4, which shows no call in its template
    ("<|tool_call|>", CallFormat("granite", {"<|tool_call|>": json_calls})),
    ("<function=", _TAGS),
    (
        '{"name": function name, "parameters"',
        CallFormat("llama", {"<|python_tag|>": python_tag}, may_be_bare=True),
    ),
)


def call_format(template: str) -> CallFormat:
    """The spelling of the model that a chat template belongs to.

    What a template does not tell of tools we tell, in a spelling that is read beside its own.
    """
    found = next((format for sign, format in _SIGNS if sign in template), _TAGS)
    if found.whole_reply is not None or "<tool_call>" in found.markers:
        return found
    markers = {**found.markers, "<tool_call>": tool_call_tag}
    return found._replace(markers=markers, inside=(*found.inside, TOOL_CALL_END))
