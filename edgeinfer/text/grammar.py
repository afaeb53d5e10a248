"""What an answer must be: a JSON schema, a grammar (Lark, GBNF) or a regular expression.

Made here, and checked without a model; llguidance, which reads them, is imported only then.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType, UnionType
from typing import Any

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.closed_schema import BY_NAME, VALUES, closed
from edgeinfer.text.grammar_limits import (
    check_counts,
    check_flags,
    check_repeats,
    check_schema,
    deeply,
    narrowed,
)
from edgeinfer.text.pattern_size import patterns_of
from edgeinfer.text.schema_ends import check_ends
from edgeinfer.values import shown

MOST_TEXT = 1 << 17  # characters; what reads the worst of so many takes seconds
_MOST_DEPTH = 96  # of objects in one another; llguidance's JSON reader stops at 128
_ANSWER = "answer"
_REPLY = "reply"
# One way to write a value: what is certain need not be guessed, and no model fills it with space.
_ONE_WAY = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords of old drafts, which llguidance takes for annotations.
_OF_TYPES = ("__origin__", "__supertype__", "json_schema")  # list[int], NewType, TypeAdapter
_OLD_KEYWORDS = ("divisibleBy", "extends", "disallow")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A value; `text` is JSON as llguidance takes it, `param` the keyword that it came by."""

    text: str
    param: str = "grammar"

    @classmethod
    def of_schema(cls, schema: Any, param: str = "schema", *, lenient: bool = False) -> Grammar:
        """JSON that a schema allows: a mapping, its text, or a type.

        A type is a pydantic model, a dataclass, a TypedDict or what else msgspec describes. Objects
        have no other keys than are listed, unless the schema says otherwise. A keyword that can't
        be enforced is refused, or passed over where that is `lenient`.
        """
        found = _schema(schema, param)
        check_schema(found, param)
        check_ends(found, param)
        if not lenient:
            check_flags(found, param)
            for path, keyword in ((p, each) for each in _OLD_KEYWORDS for p in _paths(found, each)):
                raise _unsupported(keyword, path, param)
        if isinstance(found, dict):
            found = with_options(closed(narrowed(found)), lenient=lenient)
        try:
            return cls._of({"json_schema": found}, param)
        except _Refused as refused:
            raise _schema_error(str(refused), found, param) from None

    @classmethod
    def of_text(cls, text: str, param: str = "grammar") -> Grammar:
        """What a grammar allows: Lark as llguidance reads it, GBNF, or llguidance's own JSON."""
        if not isinstance(text, str):
            raise InvalidRequestError(
                f"{param} is {shown(text)}; it must be a text in Lark or GBNF", param=param
            )
        _check_length(text, param)
        check_repeats(text, param)
        check_counts(patterns_of(text), param)
        try:
            if text.lstrip().startswith("{"):
                return cls._checked(text, param)
            return cls._of({"lark_grammar": _lark(text)}, param)
        except _Refused as refused:
            raise InvalidRequestError(
                f"{param} can't be used: {refused}; Lark with a rule `start:` is read, and GBNF "
                "with a rule `root ::=`",
                param=param,
            ) from None

    @classmethod
    def of_regex(cls, regex: str, param: str = "regex") -> Grammar:
        """Text that a regular expression matches as a whole."""
        if not isinstance(regex, str):
            raise InvalidRequestError(
                f"{param} is {shown(regex)}; it must be a regular expression", param=param
            )
        _check_length(regex, param)
        check_repeats(regex, param)
        check_counts([regex], param)
        try:
            made = json.loads(_llguidance().LLMatcher.grammar_from_regex(regex))
            return cls._of({"lark_grammar": made["grammars"][0]["lark_grammar"]}, param)
        except (_Refused, UnicodeEncodeError) as refused:
            raise InvalidRequestError(
                f"{param} can't be used: {refused}; it must be a regular expression as Rust's "
                "crate regex reads it, without look-around and references",
                param=param,
            ) from None

    @classmethod
    def of_rules(cls, rules: str, param: str) -> Grammar:
        """Rules of our own making; they are checked when they are compiled."""
        return cls(_json({"grammars": [{"lark_grammar": rules}]}), param)

    def after(self, lead: str, name: str = _REPLY) -> Grammar:
        """With something before it: `lead` are Lark rules that refer to it as `@name`."""
        grammars = json.loads(self.text)["grammars"]
        grammars[0]["name"] = name
        return Grammar(_json({"grammars": [{"lark_grammar": lead}, *grammars]}), self.param)

    @classmethod
    def _of(cls, grammar: Mapping[str, Any], param: str) -> Grammar:
        return cls._checked(_json({"grammars": [{"name": _ANSWER, **grammar}]}), param)

    @classmethod
    def _checked(cls, text: str, param: str) -> Grammar:
        try:
            validate = partial(_llguidance().LLMatcher.validate_grammar, limits=limits())
            message = deeply(lambda: validate(text, None), param)
        except InvalidRequestError:  # of no room to read it, whatever it says
            raise
        except ValueError as error:
            raise _Refused(str(error)) from None
        if message and not message.startswith("WARNING"):
            raise _Refused(first_line(message))
        return cls(text, param)


def with_options(schema: Mapping[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """A schema, and how llguidance is to read it."""
    return {**schema, "x-guidance": {"lenient": lenient, "coerce_one_of": lenient, **_ONE_WAY}}


class _Refused(Exception):
    """llguidance's message."""


def limits() -> Any:
    """Of what a grammar may take, 30 MB of states and 20 MB of expressions; terse messages.

    A text whose letters are counted takes up to ten states a letter, as far as answers come.

    Schemas of 131,072 characters and patterns with counts of thousands take less than half of it.
    """
    return _llguidance().LLParserLimits(
        max_lexer_states=40_000,
        initial_lexer_fuel=300_000,
        step_lexer_fuel=50_000,
        verbose_errors=False,
    )


def check_installed() -> None:
    """InvalidRequestError where what reads grammars is missing."""
    _llguidance()


def first_line(message: str) -> str:
    """Of a message, and the lines below that say what is wrong with a regex in it."""
    first, *others = message.strip().split("\n")
    more = [line.removeprefix("error: ") for line in others if line.startswith("error: ")]
    return ": ".join([first.rstrip(": "), *more])


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise InvalidRequestError(
            "answers by a schema, grammar or regex need the package llguidance: "
            "pip install 'edgeinfer[grammar]'"
        ) from error
    return llguidance


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_length(text: str, param: str) -> None:
    if len(text) > MOST_TEXT:
        raise InvalidRequestError(
            f"{param} is {len(text):,} characters long; at most {MOST_TEXT:,} are read", param=param
        )


def _lark(text: str) -> str:
    """Lark, from that or from GBNF."""
    if "::=" not in text:
        return text
    _llguidance()
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        lark: str = gbnf_to_lark(text)
    except RecursionError:
        raise _Refused("GBNF: it is nested too deeply") from None
    except Exception as error:  # it raises what has no other name
        raise _Refused(f"GBNF: {error}") from None
    return lark


# -- schemas ---------------------------------------------------------------------------------------


def _schema(given: Any, param: str) -> dict[str, Any] | bool:
    """A schema as JSON has it; InvalidRequestError where it is none."""
    value = given
    if isinstance(given, (type, UnionType)) or any(hasattr(given, each) for each in _OF_TYPES):
        value = _schema_of_type(given, param)
    elif isinstance(given, Mapping):
        value = dict(given)
    try:
        if not isinstance(value, str):
            value = json.dumps(value, allow_nan=False)
        found = json.loads(value) if len(value) <= MOST_TEXT else None
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"{param} is {shown(given)}, which is no JSON ({error})", param=param
        ) from None
    except RecursionError:
        raise _too_deep(param) from None
    _check_length(value, param)
    if not isinstance(found, (dict, bool)):
        raise InvalidRequestError(
            f"{param} is {shown(given)}; it must be a JSON schema, or a pydantic model, "
            "a dataclass or a TypedDict",
            param=param,
        )
    if _depth(value) > _MOST_DEPTH:
        raise _too_deep(param)
    return found


def _too_deep(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param} is nested more than {_MOST_DEPTH} levels deep; give parts of it names in $defs",
        param=param,
    )


def _depth(text: str) -> int:
    """How many objects and lists of a JSON text are in one another at most."""
    depth = most = 0
    for bracket in re.findall(r"[\[{}\]]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        most = max(most, depth)
    return most


def _schema_of_type(given: Any, param: str) -> Any:
    try:
        for name in ("model_json_schema", "json_schema"):
            if callable(make := getattr(given, name, None)):
                return make()
        if hasattr(given, "__fields__") and callable(make := getattr(given, "schema", None)):
            return make()  # pydantic 1
        if dataclasses.is_dataclass(given) and hasattr(given, "__pydantic_core_schema__"):
            return sys.modules["pydantic"].TypeAdapter(given).json_schema()
        import msgspec

        try:
            return msgspec.json.schema(given)
        except TypeError:  # a list of pydantic's models, a union of dataclasses
            if (pydantic := sys.modules.get("pydantic")) is None:
                raise
            return pydantic.TypeAdapter(given).json_schema()
    except Exception as error:  # whatever a model's own code raises
        reason = first_line(str(error)) or type(error).__name__
        if reason.startswith("Generating JSON schema for custom types"):
            reason = "a class in it is none that has one, as dataclasses have"
        raise InvalidRequestError(
            f"{param} is {shown(given)}, of which no schema can be made: {reason}", param=param
        ) from error


def _schema_error(message: str, schema: Any, param: str) -> InvalidRequestError:
    """llguidance's message, with where the keyword is that it names."""
    if named := re.match(r"Unimplemented keys: \[(.*)\]", message):
        for keyword in re.findall(r'"([^"]+)"', named[1]):
            for path in _paths(schema, keyword):
                return _unsupported(keyword, path, param)
    if named := re.match(r"Unknown format: (.*)", message):
        for path in _paths(schema, "format", named[1]):
            return _unsupported(f"format: {named[1]}", path, param)
    return InvalidRequestError(f"{param} can't be used: {message}", param=param)


def _unsupported(keyword: str, path: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param} has {keyword!r} at {path}, which can't be enforced; leave it out, and check "
        "answers for it",
        param=param,
    )


def _paths(schema: Any, keyword: str, value: Any = None, path: str = "$") -> Iterator[str]:
    """Where a keyword stands in a schema, or those of its places that have this value."""
    if isinstance(schema, list):
        for i, each in enumerate(schema):
            yield from _paths(each, keyword, value, f"{path}[{i}]")
    elif isinstance(schema, dict):
        if keyword in schema and value in (None, schema[keyword]):
            yield path
        for key, each in schema.items():
            if key in BY_NAME and isinstance(each, dict):
                for name, inner in each.items():
                    yield from _paths(inner, keyword, value, f"{path}.{key}.{name}")
            elif key not in VALUES:
                yield from _paths(each, keyword, value, f"{path}.{key}")
