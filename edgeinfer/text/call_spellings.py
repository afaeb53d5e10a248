"""How models want calls of tools to be spelled, family by family, for grammars that make them.

`call_formats` has the parsers, which take more than this.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from edgeinfer.text.call_tags import DSML


class Member(NamedTuple):
    """An argument in tags of its own: `before` KEY `after` VALUE `close`.

    Behind the key of a text comes `after_text`; a text holds none of `ends`.
    """

    before: str
    after_text: str
    after: str
    close: str
    gap: str
    ends: tuple[str, ...]


class Spelling(NamedTuple):
    """Calls: `begin`, then `before` NAME `after` ARGUMENTS `close` each, then `end`.

    `between` two of them; None where a reply has one alone.
    """

    before: str
    after: str
    close: str
    begin: str = ""
    end: str = ""
    between: str | None = ""
    has_quotes: bool = False  # around the name
    arguments: Literal["json", "members", "bare", "python"] = "json"
    member: Member | None = None
    quote: str = ""  # around texts, where words of their own are "bare"


def spelling(family: str, template: str) -> Spelling:
    """The one that a template's model was trained on; families with several tell by the template.

    Harmony and Functionary are none of them: their calls are messages.
    """
    if family == "tags":
        return _tags(template)
    if family == "mistral":
        return _mistral(template)
    if family == "deepseek":
        return _deepseek(template)
    return _OTHERS[family]


def _tags(template: str) -> Spelling:
    if "<arg_key>" in template:
        return _GLM
    if "<parameter=" in template:
        return _CODER
    if "<function=" in template and "<tool_call>" not in template:
        return Spelling("<function=", ">", "</function>", between="\n")
    return _json_object("<tool_call>\n", "\n</tool_call>", "arguments")._replace(between="\n")


def _json_object(before: str, close: str, key: str) -> Spelling:
    return Spelling(f'{before}{{"name": ', f', "{key}": ', "}" + close, has_quotes=True)


def _mistral(template: str) -> Spelling:
    if "[ARGS]" not in template:
        listed = _json_object("", "", "arguments")
        return listed._replace(begin="[TOOL_CALLS][", end="]", between=", ")
    return Spelling("[TOOL_CALLS]", "[ARGS]", "")


def _deepseek(template: str) -> Spelling:
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call, separator, close = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    if "```json" not in template:
        return Spelling(call, separator, close, begin, end)
    before = f"{call}function{separator}"
    return Spelling(before, "\n```json\n", f"\n```{close}", begin, end, between="\n")


_CODER_ENDS = ("</parameter>", "\n<parameter=", "\n</function>")
_CODER = Spelling(
    "<tool_call>\n<function=",
    ">\n",
    "</function>\n</tool_call>",
    between="\n",
    arguments="members",
    member=Member(
        "<parameter=",
        ">\n",
        ">\n",
        "\n</parameter>",
        "\n",
        _CODER_ENDS,
    ),
)
_GLM = Spelling(
    "<tool_call>",
    "\n",
    "</tool_call>",
    between="\n",
    arguments="members",
    member=Member(
        "<arg_key>",
        "</arg_key>\n<arg_value>",
        "</arg_key>\n<arg_value>",
        "</arg_value>",
        "\n",
        ("</tool_call>",),
    ),
)
_OTHERS = {
    "dsml": Spelling(
        f'<{DSML}invoke name="',
        '">\n',
        f"</{DSML}invoke>\n",
        f"<{DSML}function_calls>\n",
        f"</{DSML}function_calls>",
        arguments="members",
        member=Member(
            f'<{DSML}parameter name="',
            '" string="true">',
            '" string="false">',
            f"</{DSML}parameter>",
            "\n",
            (),
        ),
    ),
    "lfm2": Spelling(
        "", "(", ")", "<|tool_call_start|>[", "]<|tool_call_end|>", ", ", arguments="python"
    ),
    "gemma": Spelling("<|tool_call>call:", "", "<tool_call|>", arguments="bare", quote='<|"|>'),
    "functiongemma": Spelling(
        "<start_function_call>call:", "", "<end_function_call>", arguments="bare", quote="<escape>"
    ),
    "granite": _json_object("", "", "arguments")._replace(
        begin="<|tool_call|>[", end="]", between=", "
    ),
    "phi": _json_object("<|tool_call|>", "<|/tool_call|>", "arguments"),
    "apertus": Spelling(
        "{", ": ", "}", "<|tools_prefix|>[", "]<|tools_suffix|>", ", ", has_quotes=True
    ),
    "cohere": _json_object("", "", "parameters")._replace(
        before='{"tool_call_id": "0", "tool_name": ',
        begin="<|START_ACTION|>[",
        end="]<|END_ACTION|>",
        between=", ",
    ),
    "kimi": Spelling(
        "<|tool_call_begin|>functions.",
        ":0<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
    ),
    "minimax": Spelling(
        '<invoke name="',
        '">\n',
        "</invoke>\n",
        "<minimax:tool_call>\n",
        "</minimax:tool_call>",
        arguments="members",
        member=Member('<parameter name="', '">', '">', "</parameter>", "\n", ()),
    ),
    "seed": Spelling(
        "<seed:tool_call>\n<function=",
        ">\n",
        "</function>\n</seed:tool_call>",
        between="\n",
        arguments="members",
        member=Member("<parameter=", ">", ">", "</parameter>", "\n", _CODER_ENDS),
    ),
    "nemotron": _json_object("", "", "arguments")._replace(
        begin="<TOOLCALL>[", end="]</TOOLCALL>", between=", "
    ),
    "olmo": Spelling(
        "", "(", ")", "<function_calls>\n", "\n</function_calls>", "\n", arguments="python"
    ),
    "listed": _json_object("", "", "arguments")._replace(
        begin="<tool_calls>\n[", end="]\n</tool_calls>", between=", "
    ),
    # Several are written only behind a token that these models keep for other tools.
    "llama": _json_object("", "", "parameters")._replace(between=None),
}
