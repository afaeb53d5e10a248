"""Calls of tools in replies: every family's spelling, broken ones, and any way to cut a reply."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.results import ToolCall
from edgeinfer.text.call_finder import CallFinder, call_finder
from edgeinfer.text.call_formats import call_format
from edgeinfer.text.lenient_json import copy_value
from edgeinfer.text.reader import CutOff, Reader

from .call_signs import DSML, SIGNS


def tool(name: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    tool("weather", city="string", days="integer", exact="boolean", tags="array"),
    tool("now"),
    tool("functions_write", path="string", text="string"),
]
ROME = {"city": "Rome", "days": 2}


class Reply(NamedTuple):
    text: str
    reasoning: str
    calls: list[tuple[str, Any]]


def read(family: str, pieces: Iterable[str], *, was_cut: bool = False, parse: bool = True) -> Reply:
    """What comes of a reply in pieces; the deltas are checked against the whole."""
    finder = CallFinder(call_format(SIGNS[family]), TOOLS)
    deltas = [delta for piece in pieces for delta in finder.push(piece)]
    deltas += finder.end(was_cut)
    calls: list[list[str]] = []
    for delta in deltas:
        if delta.call is not None:
            if delta.call.name:
                assert delta.call.index == len(calls)
                calls.append([delta.call.name, ""])
            calls[delta.call.index][1] += delta.call.arguments
    assert finder.done == tuple(ToolCall(name=n, arguments=a) for n, a in calls)
    found = [(name, json.loads(text) if parse else text) for name, text in calls]
    json.dumps(found, ensure_ascii=False).encode()  # no API can send half of a surrogate pair
    return Reply("".join(d.text for d in deltas), "".join(d.reasoning for d in deltas), found)


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>"
)
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)
MINIMAX = (
    '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>'
)
WHOLE = {"harmony", "functionary"}  # of which a parser reads all
BARE = '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}'
ARGS = '{"city": "Rome", "days": 2}'
SPELLED = [
    ("hermes", HERMES),
    ("hermes", f"<tool_call>{BARE}</tool_call>"),
    ("hermes", BARE),
    ("hermes", '<tool_call>{"arguments": {"city": "Rome", "days": 2}, "name": "weather"}'),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {json.dumps(json.dumps(ROME))}}}'),
    ("hermes", f'<tool_call>{{"type": "function", "function": {BARE}}}</tool_call>'),
    ("hermes", CODER),
    ("hermes", CODER.removeprefix("<tool_call>\n")),
    ("hermes", GLM),
    ("hermes", f"<function=weather>{ARGS}</function>"),
    ("llama", BARE),
    ("llama", "<|python_tag|>" + BARE),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGS}}}]'),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{ARGS}"),
    ("mistral", f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{ARGS}"),
    ("harmony", f" to=functions.weather<|channel|>commentary json<|message|>{ARGS}<|call|>"),
    (
        "harmony",
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + ARGS,
    ),
    (
        "deepseek",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGS}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
    ),
    (
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{ARGS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        "dsml",
        f'<{DSML}function_calls>\n<{DSML}invoke name="weather">\n<{DSML}parameter name="city" '
        f'string="true">Rome</{DSML}parameter>\n<{DSML}parameter name="days" string="false">2'
        f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}function_calls>",
    ),
    ("lfm2", '<|tool_call_start|>[weather(city="Rome", days=2)]<|tool_call_end|>'),
    ("gemma", '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>'),
    (
        "functiongemma",
        "<start_function_call>call:weather{city:<escape>Rome<escape>,days:2}<end_function_call>",
    ),
    ("granite", f'<|tool_call|>[{{"name": "weather", "arguments": {ARGS}}}]'),
    ("cohere", f'<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "weather", '
     f'"parameters": {ARGS}}}\n]<|END_ACTION|>'),
    ("kimi", "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
     f"<|tool_call_argument_begin|>{ARGS}<|tool_call_end|><|tool_calls_section_end|>"),
    ("minimax", MINIMAX), ("minimax", MINIMAX.replace("\n", "")),
    ("seed", "<seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n"
     "<parameter=days>2</parameter>\n</function>\n</seed:tool_call>"),
    ("nemotron", f'<TOOLCALL>[{{"name": "weather", "arguments": {ARGS}}}]</TOOLCALL>'),
    ("olmo", '<function_calls>\nweather(city="Rome", days=2)\n</function_calls>'),
    ("listed", f'<tool_calls>\n[{{"name": "weather", "arguments": {ARGS}}}]\n</tool_calls>'),
    ("phi", f'<|tool_call|>[{{"name": "weather", "arguments": {ARGS}}}]<|/tool_call|>'),
    ("phi", f'<|tool_call|>{{"name": "weather", "arguments": {ARGS}}}<|/tool_call|>'),
    ("apertus", f'<|tools_prefix|>[{{"weather": {ARGS}}}]<|tools_suffix|>'),
    ("apertus", f'<|tools_prefix|>\n[ {{ "weather" : {ARGS} }} ]'),
    ("functionary", f"weather\n{ARGS}"),
    ("functionary", f">>>weather\n{ARGS}"),
    # What we tell of calls where a template does not is read beside its own.
    *((family, HERMES) for family in sorted(set(SIGNS) - WHOLE - {"hermes"})),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text"), SPELLED)
def test_each_spelling_is_the_same_call(family: str, text: str) -> None:
    assert read(family, [text]) == ("", "", [("weather", ROME)])
    assert read(family, text) == ("", "", [("weather", ROME)])


TWO = [
    ("hermes", HERMES + "\n" + HERMES.replace("Rome", "Bonn")),
    ("hermes", CODER + CODER.replace("Rome", "Bonn")),
    ("llama", f"{BARE}".join(["<|python_tag|>", "; "]) + BARE.replace("Rome", "Bonn")),
    ("mistral", f"[TOOL_CALLS][{BARE}, {BARE.replace('Rome', 'Bonn')}]"),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{ARGS}[TOOL_CALLS]weather{ARGS.replace('R', 'B')}"),
    (
        "lfm2",
        "<|tool_call_start|>[weather(city='Rome', days=2), weather(city='Bonn', days=2)]"
        "<|tool_call_end|>",
    ),
    ("cohere", f"<|START_ACTION|>[{BARE}, {BARE.replace('Rome', 'Bonn')}]<|END_ACTION|>"),
    ("minimax", MINIMAX + MINIMAX.replace("Rome", "Bonn")),
    ("minimax", MINIMAX.replace("</invoke>", "</invoke>" + MINIMAX.replace("Rome", "Bonn")
                                [len("<minimax:tool_call>"):-len("</minimax:tool_call>")])),
    ("olmo", "<function_calls>\nweather(city='Rome', days=2)\n  weather(city='Bonn', days=2)\n"
     "</function_calls>"),
    ("kimi", "".join(["<|tool_calls_section_begin|>", *(
        f"<|tool_call_begin|>functions.weather:{i}<|tool_call_argument_begin|>{ARGS}<|tool_call_end|>"
        .replace("Rome", city) for i, city in enumerate(("Rome", "Bonn")))])),
    ("nemotron", f"<TOOLCALL>[{BARE}, {BARE.replace('Rome', 'Bonn')}]</TOOLCALL>"),
    ("phi", f"<|tool_call|>{BARE}<|/tool_call|><|tool_call|>{BARE.replace('Rome', 'Bonn')}"),
    ("apertus", f'<|tools_prefix|>[{{"weather": {ARGS}}}, {{"weather": '
     f'{ARGS.replace("Rome", "Bonn")}}}]<|tools_suffix|>'),
    ("functionary", f"weather\n{ARGS}>>>weather\n{ARGS.replace('Rome', 'Bonn')}"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text"), TWO)
def test_several_calls(family: str, text: str) -> None:
    (first, second) = read(family, text).calls
    assert first == ("weather", ROME)
    assert second[1]["days"] == 2 and second[1]["city"] in ("Bonn", "Bome")


def test_no_more_calls_than_are_wanted() -> None:
    """What follows the last one that is wanted is dropped, however it comes."""
    for family, text in TWO:
        for pieces in ([text + " more"], list(text + " more")):
            finder = CallFinder(call_format(SIGNS[family]), TOOLS, most=1)
            deltas = [delta for piece in pieces for delta in finder.push(piece)]
            deltas += finder.end(was_cut=True)
            (call,) = finder.done
            assert finder.is_full and json.loads(call.arguments) == ROME
            assert not any(delta.text for delta in deltas)


def test_a_template_that_shows_no_call_tells_its_family_otherwise() -> None:
    assert call_format('system_prompt + "List of tools: ["') == call_format(SIGNS["lfm2"])


@pytest.mark.parametrize("was_cut", [False, True])
@pytest.mark.parametrize("end", ['"', "}", '}, "', '}, "x" 1}', "} x"])
def test_a_call_inside_an_object_is_read_once(end: str, was_cut: bool) -> None:
    """What follows a call that is whole may be no call, or be cut off."""
    text = f'<tool_call>{{"function": {BARE}{end}'
    assert read("hermes", [text], was_cut=was_cut).calls == [("weather", ROME)]
    assert read("hermes", text, was_cut=was_cut).calls == [("weather", ROME)]


LOOPS = [
    ("hermes", '{"function": '),
    ("hermes", '<tool_call>{"function": '),
    ("hermes", '<tool_call>{"id":"'),
    ("hermes", '<tool_call>{"arguments": {"a":"'),
    ("hermes", '<function=weather><parameter=tags>["</parameter>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": ['),
    ("mistral", '[TOOL_CALLS][{"id":"'),
    ("granite", '<|tool_call|>{"id":"'),
    ("gemma", "<|tool_call>call:weather{a:["),
    ("dsml", f'<{DSML}invoke name="weather"'),
    ("deepseek", '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"a":"'),
    ("harmony", "<|start|>assistant to=functions.weather<|channel|>x<|message|>{"),
    ("lfm2", "<|tool_call_start|>[weather(a=-"),
    ("olmo", "<function_calls>weather(a=-"),
    ("minimax", '<minimax:tool_call><invoke name="weather"'),
    ("minimax", '<minimax:tool_call><invoke name="weather"><parameter name="a">['),
    ("kimi", '<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"a":"'),
    ("cohere", '<|START_ACTION|>[{"tool_call_id":"'),
    ("nemotron", '<TOOLCALL>[{"id":"'),
    ("apertus", '<|tools_prefix|>[{"weather": {"a":"'),
    ("apertus", '<|tools_prefix|>[{"'),
    ("functionary", ">>>weather\n"),
    ("functionary", 'weather\n{"a":'),
    ("seed", '<seed:tool_call><function=weather><parameter=tags>["'),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text"), LOOPS)
def test_whatever_a_model_loops_on_is_read(family: str, text: str) -> None:
    """Not in the square of its length, nor as deep as it goes."""
    looped = text * (12_000 // len(text))
    found = read(family, [looped], parse=False)
    assert found.calls or found.text == looped
    assert read(family, [looped[:5000], looped[5000:]], parse=False) == found


BESIDE = [
    ("gemma", '<|tool_call>call:weather{city:<|"|>Rome<|"|> days:2} x <|tool_call>call:now{}', "x"),
    ("harmony", f"x<|channel|>commentary to=functions.weather<|message|>{ARGS}<|call|>", "x"),
    ("harmony", f" to=functions.weather<|channel|>c<|message|>{ARGS}\nx<|call|>", "x"),
    ("harmony", f"<|channel|>c<|message|><|end|>x<|channel|>c to=weather<|message|>{ARGS}", "x"),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {json.dumps(ARGS[:-1])}}}x', "x"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "beside"), BESIDE)
def test_what_stands_beside_a_call_is_kept(family: str, text: str, beside: str) -> None:
    found = read(family, text)
    assert found.calls[0] == ("weather", ROME) and found.text.strip() == beside


@pytest.mark.parametrize("arguments", ['"Rome"', "Rome", "[1]", '"[1]"', "2", "True"])
def test_arguments_that_are_no_object_make_no_call(arguments: str) -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>'
    assert read("hermes", [text]) == read("hermes", text) == (text, "", [])
    for nothing in ("null", "None", '""', "[]", "{}", '"{}"'):
        said = text.replace(arguments, nothing)
        assert read("hermes", said).calls == [("weather", {})]


def test_names_with_hyphens_and_dots() -> None:
    for name in ("get-it", "a.b-c.d", "x-1"):
        finder = CallFinder(call_format(SIGNS["lfm2"]), [tool(name)])
        finder.push(f"<|tool_call_start|>[{name}(n=1 - 1 if 0 else 2), {name}()]<|tool_call_end|>")
        assert finder.done == ()
        finder.push(f"<|tool_call_start|>[{name}(n=[-1]), {name}()]<|tool_call_end|>")
        assert [call.name for call in finder.done] == [name, name]


PYTHON: list[tuple[str, Any]] = [
    ('from="Rome", class=1, in=True', {"from": "Rome", "class": 1, "in": True}),
    ('user-id=5, a.b=[true, null, {"x": false}], $c = {1: 2}',
     {"user-id": 5, "a.b": [True, None, {"x": False}], "$c": {"1": 2}}),
    ('ﬁle="ﬁ", größe=1', {"ﬁle": "ﬁ", "größe": 1}),
    (r'path="C:\users\data", re="\d+\.", raw=r"\d", x="\x4"',
     {"path": "C:\\users\\data", "re": "\\d+\\.", "raw": "\\d", "x": "\\x4"}),
    ('text="two\n\r\tlines", more=1', {"text": "two\n\r\tlines", "more": 1}),
    ("text='say, from=1 (now', x=(1, 2)", {"text": "say, from=1 (now", "x": [1, 2]}),
    ('**{"from": "x"}, n=-1', {"from": "x", "n": -1}),
    (r"""a='it\'s', b="\"", c="\x41\u00e9\101" """, {"a": "it's", "b": '"', "c": "AéA"}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "meant"), PYTHON)
def test_python_is_read_as_models_write_it(arguments: str, meant: Any) -> None:
    for text in (f"[weather({arguments})]", f"weather({arguments})"):
        reply = f"<|tool_call_start|>{text}<|tool_call_end|>"
        assert read("lfm2", [reply]) == read("lfm2", reply) == ("", "", [("weather", meant)])


def test_json_in_tags_may_hold_them() -> None:
    value = ["</parameter>", '\\"</arg_value>', "<parameter=a>"]
    coder = f"<function=weather>\n<parameter=tags>\n{json.dumps(value)}\n</parameter>\n</function>"
    glm = f"<tool_call>weather\n<arg_key>tags</arg_key><arg_value>{json.dumps(value)}</arg_value>"
    for text in (coder, glm + "</tool_call>"):
        assert (
            read("hermes", text)
            == read("hermes", [text])
            == ("", "", [("weather", {"tags": value})])
        )
    broken = '<function=weather>\n<parameter=tags>\n["open\n</parameter>\n</function> on'
    assert read("hermes", broken) == ("on", "", [("weather", {"tags": '["open'})])


def test_a_reply_in_wrappers_is_what_is_in_them() -> None:
    """Cohere's, also where no tools are given."""
    reply = "<|START_RESPONSE|>Hi {there}.<|END_RESPONSE|>"
    for tools in ([], TOOLS):
        for pieces in ([reply], list(reply)):
            finder = call_finder(SIGNS["cohere"], tools)
            assert finder is not None
            deltas = [delta for piece in pieces for delta in finder.push(piece)]
            deltas += finder.end(was_cut=False)
            assert "".join(delta.text for delta in deltas) == "Hi {there}."
    assert call_finder(SIGNS["hermes"], []) is None


def test_a_call_that_is_none_behind_one_is_text() -> None:
    unknown = '<invoke name="unknown">\n</invoke>'
    text = MINIMAX.replace("</minimax", f"{unknown}</minimax")
    found = read("minimax", text)
    assert found.calls == [("weather", ROME)] and found.text.strip().startswith(unknown)
    assert read("minimax", [text]) == found


def test_text_around_calls_stays() -> None:
    reply = read("hermes", f"\n\nI look.  \n\n{HERMES}\n\nAnd on.")
    assert reply == ("\n\nI look.And on.", "", [("weather", ROME)])
    assert read("hermes", "  a \n b  ").text == "  a \n b  "


def test_harmony_has_reasoning_and_text() -> None:
    text = (
        "<|channel|>analysis<|message|>Let me <see>.<|end|><|start|>assistant<|channel|>final"
        "<|message|>It is {sunny}.<|return|>"
    )
    assert read("harmony", text) == ("It is {sunny}.", "Let me <see>.", [])
    assert read("harmony", "just text") == ("just text", "", [])
    call = f"<|start|>assistant to=functions.weather<|channel|>commentary<|message|>{ARGS}<|call|>"
    thought = "<|channel|>analysis<|message|>Hm.<|end|>"
    assert read("harmony", thought + call) == ("", "Hm.", [("weather", ROME)])


def test_functionary_tells_whom_each_part_is_to() -> None:
    said = "all\nLet me see: >>> 1\n>>>weather is\n"
    assert read("functionary", said).text == said[4:]
    text = f"{said}>>>weather\n{ARGS}\n>>>all\nDone."
    assert read("functionary", text) == (said[4:] + "Done.", "", [("weather", ROME)])
    for head in (">>>all\n", "all\n", "weather\n"):
        for n in range(len(head)):  # who it is to is no text, also where it is cut off
            assert read("functionary", head[:n], was_cut=True).text == ""
    assert read("functionary", "al", was_cut=False).text == "al"


@pytest.mark.parametrize(
    "head",
    ["<|channel|>anal", "<|channel|>commentary to=functions.wea", " to=functions.wea",
     " to=x<|chan",
     "<|channel|>analysis<|message|>Hm.<|end|><|start|>assis",
     "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>fin"],
)  # fmt: skip
def test_a_head_that_is_cut_off_is_no_text(head: str) -> None:
    reasoning = "Hm." if "Hm." in head else ""
    for pieces in ([head], list(head)):
        assert read("harmony", pieces, was_cut=True) == ("", reasoning, [])
    assert read("harmony", "just text", was_cut=True).text == "just text"


NO_CALLS = [
    ("hermes", "a <tool_call> is a tag"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather"'[:-2]),
    ("hermes", "<tool_call>\nno JSON</tool_call>"),
    ("hermes", '{"answer": 42, "name": "weather"}'),
    ("hermes", '{"name": "Ada", "age": 36}'),
    ("hermes", "<function=unknown>\n</function>"),
    ("hermes", "<tool_call>" * 50),
    ("llama", '<|python_tag|>brave_search.call(query="x")'),
    ("llama", "{not JSON"),
    ("mistral", "[TOOL_CALLS]unknown[ARGS]{}"),
    ("mistral", "[TOOL_CALLS]" + "x" * 5000),
    ("deepseek", "<｜tool▁call▁begin｜>unknown<｜tool▁sep｜>{}"),
    ("dsml", f'<{DSML}invoke name="unknown">'),
    ("lfm2", "<|tool_call_start|>[weather(city=__import__('os'))]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[weather('Rome')]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[now(), unknown()]<|tool_call_end|>"),
    ("gemma", "<|tool_call>call:unknown{}<tool_call|>"),
    ("gemma", "<|tool_call>weather<tool_call|>"),
    ("cohere", '<|START_ACTION|>[{"tool_name": "unknown", "parameters": {}}]<|END_ACTION|>'),
    ("minimax", "<minimax:tool_call>\n</minimax:tool_call>"),
    ("minimax", '<minimax:tool_call>\n<invoke name="unknown">\n</invoke>\n</minimax:tool_call>'),
    ("kimi", "<|tool_call_begin|>functions.unknown:0<|tool_call_argument_begin|>{}"),
    ("nemotron", "<TOOLCALL>[]</TOOLCALL>"),
    ("olmo", "<function_calls>\n</function_calls>"),
    ("olmo", "<function_calls>\nimport os\nweather()\n</function_calls>"),
    ("olmo", "<function_calls>\nweather('Rome')\n</function_calls>"),
    ("listed", "<tool_calls>\nnone\n</tool_calls>"),
    ("seed", "<seed:tool_call>\n<function=unknown>\n</function>\n</seed:tool_call>"),
    ("phi", "<|tool_call|>[]<|/tool_call|>"),
    ("apertus", '<|tools_prefix|>[{"unknown": {}}]<|tools_suffix|>'),
    ("apertus", '<|tools_prefix|>[{"weather": 5}]<|tools_suffix|>'),
    ("functionary", "unknown\n{}"),
    ("functionary", "weather\nis fine"),
    ("functionary", "weather\n>>>unknown\n{}"),
    ("functionary", "just text\n>>>x = 1\n>>>all is well"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text"), NO_CALLS)
def test_what_is_no_call_is_text(family: str, text: str) -> None:
    assert read(family, [text]) == (text, "", [])
    assert read(family, text) == (text, "", [])


MENDED = [
    ('{"city": "Rome", "days": 2,}', ROME),
    ("{'city': 'Rome', 'days': 2}", ROME),
    ('{city: "Rome", days: 2}', ROME),
    ('{"tags": [[1] [2]], "days": 2}', {"tags": [[1], [2]], "days": 2}),
    ('{"city": "Rome", "days": 2', ROME),
    ('{"city": "Rome", "exact": True, "days": None}', {**ROME, "exact": True, "days": None}),
    ('{"city": "say "hi" now", "days": 2}', {"city": 'say "hi" now', "days": 2}),
    ('{"city": "two\nlines\ttab"}', {"city": "two\nlines\ttab"}),
    ('{"city": "C:\\dir"}', {"city": "C:\\dir"}),
    ('{"city": "\\u12"}', {"city": "\\u12"}),
    ('{"city": "\\ud83d\\ude00\\ud800x\\udc00"}', {"city": "\U0001f600\ufffdx\ufffd"}),
    ('{"city": "\\uD83D\\u0041"}', {"city": "\ufffdA"}),
    ('{"city": Rome}', {"city": "Rome"}),
    ('{"tags": [1, 2, [3, {"a": }], 4}', {"tags": [1, 2, [3, {"a": ""}], 4]}),
    ('{"days": NaN}', {"days": "NaN"}),
    ("{" + '"a":[' * 200, None),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "meant"), MENDED)
def test_broken_arguments_are_mended(arguments: str, meant: Any) -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call> after'
    found = read("hermes", text)
    assert [name for name, _ in found.calls] == ["weather"]
    if meant is not None:
        assert found.calls[0][1] == meant
    assert read("hermes", [text]) == found


def test_arguments_come_as_they_are_written() -> None:
    finder = CallFinder(call_format(SIGNS["hermes"]), TOOLS)
    begun = '<tool_call>{"name": "functions_write", "arguments": {"path": "a", "text": "'
    finder.push(begun)
    for word in ("one ", "two "):
        (delta,) = finder.push(word)
        assert delta.call is not None and delta.call.arguments == word


def test_what_was_cut_stays_open() -> None:
    text = '<tool_call>{"name": "functions_write", "arguments": {"path": "a", "text": "one tw'
    cut = read("hermes", text, was_cut=True, parse=False)
    assert cut.calls == [("functions_write", '{"path": "a", "text": "one tw')]
    coder = "<function=functions_write>\n<parameter=text>\none\ntwo"
    assert read("hermes", coder, was_cut=True, parse=False).calls[0][1] == '{"text": "one\\ntwo'
    assert read("hermes", '<tool_call>{"name": "wea', was_cut=True).calls == []
    assert read("hermes", '<tool_call>{"name": "wea', was_cut=True).text.endswith("wea")
    number = '<tool_call>{"name": "weather", "arguments": {"days": 1'
    assert read("hermes", number, was_cut=True, parse=False).calls == [("weather", '{"days": ')]


def test_a_value_that_holds_markers() -> None:
    text = 'say "</tool_call>" and\n<function=now>, "}\\u00e9'
    arguments = json.dumps({"text": text})
    reply = f'<tool_call>{{"name": "functions_write", "arguments": {arguments}}}</tool_call>'
    assert read("hermes", reply).calls == [("functions_write", {"text": text})]


# -- any way to cut a reply -----------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)
BITS = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "', "weather", "now", '", "arguments": ', "{", "}",
     "[TOOL_CALLS]", "[ARGS]", "<function=", ">", "\n", " ", '"', "'", "a", "é", "[", "]", ",", ":",
     "<parameter=city>", "</parameter>", "<|channel|>", "<|message|>", "<|end|>", "analysis",
     "call:", '<|"|>', "<|tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "\\", "2", "to=",
     "<|tool_call_start|>", "(", ")", "=", "<|tool_call_end|>", "<|python_tag|>", ";",
     '{"function": ', '{"name": "now", "arguments": {}}', '"parameters": ',
     "\\ud83d", "\\ude00", "\x00", "\x1c", "\x85", "\u2028", "\U0010ffff", "null", "<|start|>",
     "<escape>",
     "<start_function_call>", "[CALL_ID]", f'<{DSML}invoke name="', f'<{DSML}parameter name="',
     "<minimax:tool_call>", '<invoke name="', '<parameter name="', "</invoke>", "<TOOLCALL>",
     "<function_calls>", "</function_calls>", "<seed:tool_call>", "<tool_calls>",
     "<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", '{"tool_name": "',
     "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "functions.", ":0",
     "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```json", "<|tool_call|>", "[TOOL_CALLS][", "}}"]
)  # fmt: skip


# A busy machine is slow.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def cut(text: str, at: list[int]) -> list[str]:
    places = sorted({min(place, len(text)) for place in at} | {0, len(text)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@settings(max_examples=150, **PATIENT)
@given(OBJECTS, st.sampled_from([None, 1, "\t"]), st.booleans(), st.lists(st.integers(0, 200)))
def test_valid_json_passes_unchanged(
    value: Any, indent: Any, is_ascii: bool, at: list[int]
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
    reader, found = Reader(), list[str]()
    steps = copy_value(reader, found.append)
    for piece in cut(text, at):
        reader.push(piece)
        next(steps, None)
    reader.end(was_cut=False)
    next(steps, None)
    assert "".join(found) == text


@settings(max_examples=150, **PATIENT)
@given(
    st.lists(BITS, max_size=40),
    st.sampled_from(sorted(SIGNS)),
    st.booleans(),
    st.lists(st.integers(0, 300)),
)
def test_any_cut_gives_the_same_reply(
    bits: list[str], family: str, was_cut: bool, at: list[int]
) -> None:
    """And whatever comes is a reply: it never fails, and calls that were not cut off are JSON."""
    text = "".join(bits)
    whole = read(family, [text], was_cut=was_cut, parse=not was_cut)
    assert len(whole.calls) <= len(bits)
    assert read(family, cut(text, at), was_cut=was_cut, parse=not was_cut) == whole
    assert all(name in ("weather", "now") for name, _ in whole.calls)


@pytest.mark.parametrize(("family", "text"), SPELLED)
@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ud83d\\ud83d", "\\\\ud83d"])
def test_half_of_a_pair_is_a_character(family: str, text: str, half: str) -> None:
    for found in ("Rome", "days", "2"):
        said = text.replace(found, half)
        for end in range(said.index(half) + 1, len(said) + 1):
            read(family, [said[:end]], was_cut=False)
            read(family, [said[:end]], was_cut=True, parse=False)


@settings(max_examples=60, **PATIENT)
@given(st.text(max_size=60), st.lists(st.integers(0, 90)))
def test_a_text_comes_through_the_tags(value: str, at: list[int]) -> None:
    """Of Qwen's form, which has no quotes; a line end at either end belongs to the form."""
    if "<parameter=" in value or "</" in value:
        return
    text = f"<function=functions_write>\n<parameter=text>\n{value}\n</parameter>\n</function>"
    assert read("hermes", cut(text, at)).calls == [("functions_write", {"text": value})]


def test_nothing_follows_a_cut() -> None:
    reader = Reader()
    reader.push("ab")
    reader.end(was_cut=True)
    with pytest.raises(CutOff):
        next(reader.peek(3))


@pytest.mark.parametrize("family", ["hermes", "mistral"])
def test_a_long_text_is_not_read_again(family: str) -> None:
    """With each token all before it was copied: 14 s of a processor for 600 kB."""
    finder = CallFinder(call_format(SIGNS[family]), TOOLS)
    found = [delta.text for _ in range(2000) for delta in finder.push("a < word ")]
    assert finder._reader.n_taken < 100
    found += [delta.text for delta in finder.end(was_cut=False)]
    assert "".join(found) == "a < word " * 2000


KEYS = st.text("abz_é-.$09ﬁ", min_size=1, max_size=6)


@settings(max_examples=150, **PATIENT)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_values_of_python_come_as_they_are(value: dict[str, Any]) -> None:
    said = ", ".join(f"{key}={each!r}" for key, each in value.items())
    reply = f"<|tool_call_start|>[weather({said})]<|tool_call_end|>"
    assert read("lfm2", [reply]).calls == [("weather", value)]


@pytest.mark.parametrize(
    ("family", "begun", "end"),
    [
        ("lfm2", '<|tool_call_start|>[weather(a="', "<|tool_call_end|>"),
        ("hermes", '<function=weather><parameter=tags>["', "</parameter>"),
    ],
)
def test_quotes_that_nobody_closes_are_read_once(family: str, begun: str, end: str) -> None:
    """Each was followed to the end, in the square of their number."""
    started = time.thread_time()
    read(family, [begun + '\\"' * 60_000 + end], parse=False)
    assert time.thread_time() - started < 5
