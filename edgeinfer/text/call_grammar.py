"""Grammars of replies that call tools: every call that one accepts is one by the tools' schemas.

Text for llguidance, which is not needed to write them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from edgeinfer.errors import InvalidRequestError
from edgeinfer.results import ToolCall
from edgeinfer.text.call_finder import CallFinder
from edgeinfer.text.call_formats import CallFormat, call_format
from edgeinfer.text.call_json import FUNCTIONARY, HARMONY_ENDS, TO_ALL
from edgeinfer.text.call_spellings import Spelling, spelling
from edgeinfer.text.call_values import Parameters, Unwritable, tagged
from edgeinfer.text.call_words import bare, python
from edgeinfer.text.closed_schema import closed
from edgeinfer.text.lark import ControlId, Rules, json_of, quoted, text_without
from edgeinfer.text.tools import Tool

ANSWER = "answer"  # the name of the grammar that a reply without calls follows
_GAP = r"/[ \n]{0,4}/"
# A reply that begins like this would be looked at as a call without a marker.
_LIKE_BARE_CALL = (
    r"/\s*\{\s*\"([^\"\\]*\\|(name|function|arguments|parameters|id|type|index)\")(?s:.*)/"
)


class OfferedTool(NamedTuple):
    """A tool that may be called, by a schema that is followed to the letter if `is_strict`."""

    tool: Tool
    parameters: Mapping[str, Any]
    is_strict: bool

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> OfferedTool | None:
        """From the form that templates take, None where that has no name."""
        tool = Tool.of(given)
        if tool is None:
            return None
        function = given.get("function", given)
        schema = function.get("parameters")
        parameters = _of_object(tool.name, schema if isinstance(schema, Mapping) else {})
        return cls(tool, closed(parameters), bool(function.get("strict") or given.get("strict")))


def _of_object(name: str, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same for objects alone, which arguments are."""
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequestError(
            f"the parameters of tool {name!r} are of type {kind!r}; arguments are an object",
            param="tools",
        )
    return {**schema, "type": "object"}


def call_grammar(
    template: str,
    offered: Sequence[OfferedTool],
    control_id: ControlId,
    *,
    is_required: bool,
    is_single: bool = False,
    has_answer: bool = False,
) -> str:
    """A grammar of replies, by the model's chat template; `control_id` finds control tokens.

    Calls alone if they are required; else text, too, or by the grammar ANSWER if one `has_answer`.
    `is_single`: one call at most. InvalidRequestError for tools that it can't be written for.
    """
    format = call_format(template)
    rules = Rules(format.controls, control_id)
    writer: _Harmony | _Functionary | _Calls
    if format.family == "harmony":
        writer = _Harmony(rules, format)
    elif format.family == "functionary":
        writer = _Functionary(rules, format)
    else:
        writer = _Calls(rules, format, spelling(format.family, template))
    calls = [writer.call(each) for each in offered]
    if is_required:
        return rules.text(writer.calls(calls, is_single))
    if has_answer:
        return rules.text(writer.calls_or_answer(calls, is_single))
    return rules.text(writer.calls_and_text(calls, is_single))


class _Calls:
    """Calls as most families spell them: behind markers, or bare."""

    def __init__(self, rules: Rules, format: CallFormat, spelling: Spelling) -> None:
        self._rules, self._format, self._spelling = rules, format, spelling

    def call(self, offered: OfferedTool) -> str:
        """From the name to the end."""
        how, name = self._spelling, offered.tool.name
        said = quoted(name) if how.has_quotes else name
        if not _is_read_back(self._format, name, self._sample(name)):
            raise _unwritable(name, "its name")
        try:
            arguments = self._arguments(offered)
        except Unwritable as error:
            raise _unwritable(name, str(error)) from None
        body = [self._rules.say(said + how.after), arguments, self._rules.say(how.close)]
        return self._rules.rule(" ".join(body))

    def _sample(self, name: str, key: str | None = None) -> str:
        """A call without arguments, or with one."""
        how, member = self._spelling, self._spelling.member
        arguments = "{}" if how.arguments in ("json", "bare") else ""
        if key is not None and member is not None:
            arguments = f"{member.before}{key}{member.after}null{member.close}"
        elif key is not None:
            arguments = f"{key}=None"
        name = quoted(name) if how.has_quotes else name
        return f"{how.begin}{how.before}{name}{how.after}{arguments}{how.close}{how.end}"

    def _can_name(self, name: str, key: str) -> bool:
        return _is_read_back(
            self._format, name, self._sample(name, key), f"{{{quoted(key)}: null}}"
        )

    def _arguments(self, offered: OfferedTool) -> str:
        how, parameters = self._spelling, Parameters(offered.parameters, offered.is_strict)
        can_name = partial(self._can_name, offered.tool.name)
        if how.arguments == "members":
            return tagged(self._rules, how, offered.tool, parameters, can_name)
        if how.arguments == "bare":
            return bare(self._rules, how, parameters)
        if how.arguments == "python":
            return python(self._rules, how, parameters, can_name)
        return json_of(offered.parameters, lenient=not offered.is_strict)

    def calls(self, calls: Sequence[str], is_single: bool) -> str:
        how = self._spelling
        return f"{_GAP} {self._rules.say(how.begin + how.before)} {self._rest(calls, is_single)}"

    def _rest(self, calls: Sequence[str], is_single: bool) -> str:
        """What follows the text before the first name."""
        how, one = self._spelling, self._rules.rule(" | ".join(calls))
        between = None if is_single else how.between
        if between is None:
            more = ""
        else:
            more = f"({self._rules.say(between + how.before)} {one})*"
        return f"{one} {more} {self._rules.say(how.end)}"

    def calls_or_answer(self, calls: Sequence[str], is_single: bool) -> str:
        if not calls:
            return f"@{ANSWER}"
        how = self._spelling
        if not (how.begin + how.before).startswith(tuple(self._format.markers)):
            # NOTE: what begins like an answer would always be one: llguidance does not go back.
            self._spelling = how._replace(begin=next(iter(self._format.markers)) + how.begin)
        return f"{self.calls(calls, is_single)} | {_GAP} @{ANSWER}"

    def calls_and_text(self, calls: Sequence[str], is_single: bool) -> str:
        """Text that only calls by the grammar stand in."""
        how, rules = self._spelling, self._rules
        opening = how.begin + how.before
        marker = next((m for m in self._format.markers if opening.startswith(m)), "")
        others = [m for m in self._format.markers if m != marker]
        text = text_without(others)
        first = f"({text}) & ~{_LIKE_BARE_CALL}" if self._format.may_be_bare else text
        if not marker:  # a call begins the reply, or there is none
            return f"{self.calls(calls, is_single)} | {rules.terminal(first)}"
        called = self._called(opening[len(marker) :], calls, is_single)
        after = rules.terminal(text_without([marker], text))
        begun = self._up_to(marker, others, first)
        if is_single:
            return f"{rules.terminal(text_without([marker], first))} | {begun} {called} {after}"
        again = self._up_to(marker, others, text)
        more = rules.rule(f"({again} {called})* {after}")
        alone = rules.terminal(text_without([marker], first))
        return f"{alone} | {begun} {called} {more}"

    def _called(self, rest_of_opening: str, calls: Sequence[str], is_single: bool) -> str:
        rest = self._rest(calls, is_single or not self._spelling.end)
        said = self._rules.say(rest_of_opening)
        return self._rules.rule(f"{said} {rest}")

    def _up_to(self, marker: str, others: Sequence[str], text: str) -> str:
        """Text up to a marker, be that a control token or only spelled like one."""
        rules = self._rules
        spelled = rules.rule(rules.terminal(f"({text}) {quoted(marker)}"), lazy=True)
        if not rules.is_control(marker):
            return spelled
        plain = rules.terminal(text_without([marker], text))
        return rules.rule(f"{plain} {rules.say(marker)} | {spelled}")


class _Harmony:
    """Messages, of which some are calls, some reasoning, and the last one is the answer."""

    def __init__(self, rules: Rules, format: CallFormat) -> None:
        self._rules, self._format = rules, format
        self._close = "<|end|><|start|>assistant"

    def call(self, offered: OfferedTool) -> str:
        name = f"functions.{offered.tool.name}"
        spelled = (
            f" to={name}<|channel|>commentary json<|message|>",
            f"<|channel|>commentary to={name} <|constrain|>json<|message|>",
        )
        for each in spelled:
            if not _is_read_back(self._format, offered.tool.name, each + "{}<|call|>"):
                raise _unwritable(offered.tool.name, "its name")
        head = self._rules.rule(" | ".join(map(self._rules.say, spelled)))
        arguments = json_of(offered.parameters, lenient=not offered.is_strict)
        return self._rules.rule(f"{head} {arguments} ({self._rules.say('<|call|>')})?")

    def calls(self, calls: Sequence[str], is_single: bool) -> str:
        thought = self._message("analysis", self._close)
        return f"{thought}? {self._rules.rule(' | '.join(calls))}"

    def calls_or_answer(self, calls: Sequence[str], is_single: bool) -> str:
        final = f"{self._rules.say('<|channel|>final<|message|>')} @{ANSWER}"
        return self._before([*calls, final], ["analysis"])

    def calls_and_text(self, calls: Sequence[str], is_single: bool) -> str:
        text = self._rules.terminal(text_without(HARMONY_ENDS))
        final = f"{self._rules.say('<|channel|>final<|message|>')} {text}"
        return self._before([*calls, final], ["analysis", "commentary"])

    def _before(self, last: Sequence[str], channels: Sequence[str]) -> str:
        """Messages to other channels, then one of the last."""
        kinds = [self._message(each, self._close) for each in channels]
        return f"({' | '.join(kinds)})* {self._rules.rule(' | '.join(last))}"

    def _message(self, channel: str, close: str) -> str:
        said = self._rules.say(f"<|channel|>{channel}<|message|>")
        others = [end for end in HARMONY_ENDS if not close.startswith(end)]
        return self._rules.rule(f"{said} {self._rules.until(close, others)}")


class _Functionary:
    """Parts: text first, if there is any, then calls."""

    def __init__(self, rules: Rules, format: CallFormat) -> None:
        self._rules, self._format = rules, format
        self._head = rules.say(f"{TO_ALL}\n")

    def call(self, offered: OfferedTool) -> str:
        head = f"{offered.tool.name}\n"
        if not _is_read_back(self._format, offered.tool.name, head + "{}"):
            raise _unwritable(offered.tool.name, "its name")
        arguments = json_of(offered.parameters, lenient=not offered.is_strict)
        return self._rules.rule(f"{self._rules.say(head)} {arguments}")

    def calls(self, calls: Sequence[str], is_single: bool) -> str:
        one = self._rules.rule(" | ".join(calls))
        return one if is_single else f"{one} ({self._rules.say(FUNCTIONARY)} {one})*"

    def calls_or_answer(self, calls: Sequence[str], is_single: bool) -> str:
        answer = f"{self._head} @{ANSWER}"
        return f"{self.calls(calls, is_single)} | {answer}" if calls else answer

    def calls_and_text(self, calls: Sequence[str], is_single: bool) -> str:
        text = f"{self._head} {self._rules.terminal(text_without([FUNCTIONARY]))}"
        if not calls:
            return text
        called = self._rules.rule(self.calls(calls, is_single))
        return f"{called} | {text} | {self._head} {self._rules.until(FUNCTIONARY)} {called}"


def _is_read_back(format: CallFormat, name: str, sample: str, arguments: str = "{}") -> bool:
    """Whether a call is: not every name can be told from what stands around it."""
    finder = CallFinder(format, [{"name": name}])
    finder.push(sample)
    finder.end(was_cut=False)
    return finder.done == (ToolCall(name=name, arguments=arguments),)


def _unwritable(name: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"tool {name!r}: the way this model spells calls has no room for {what}; choose another, "
        "or call the tool neither strictly nor by tool_choice",
        param="tools",
    )
