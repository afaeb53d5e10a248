"""Arguments in words of their own, as Gemma and LFM2 write them, as rules of a grammar by schema.

What such a rule accepts is valid under its schema; not all that is valid can be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from edgeinfer.text.call_spellings import Spelling
from edgeinfer.text.call_values import (
    OF_NUMBERS,
    OF_TYPES,
    Parameters,
    Schema,
    Unwritable,
    either,
    listed,
    members,
)
from edgeinfer.text.lark import Rules, json_of, quoted, text_without

_INTEGER = r"/-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?/"
_DEEPEST = 3  # of values that a schema says nothing about
_PLAIN = r"[^\"\\\x00-\x1f\x7f]"  # what needs no backslash


class Words(NamedTuple):
    """How values are written: literals, keys, what joins them, and the rule of a text."""

    literal: Callable[[Any], str]
    key: Callable[[str], str]
    can_name: Callable[[str], bool]
    any_key: str
    pair: str
    comma: str
    text: Callable[[str], str]


def bare(rules: Rules, spelling: Spelling, parameters: Parameters) -> str:
    """Gemma's: keys without quotes, texts between quotes that are tokens."""
    quote = spelling.quote
    unwritable = (":", "}", quote, spelling.close)
    words = Words(
        literal=partial(_bare_literal, unwritable, quote),
        key=str,
        can_name=partial(_is_bare_key, unwritable),
        any_key="/[A-Za-z_][A-Za-z0-9_]{0,30}/",
        pair=":",
        comma=",",
        text=lambda body: f"{rules.say(quote)} {rules.until(quote, (), body)}",
    )
    return _Values(rules, words, parameters).object(parameters.object)


def python(
    rules: Rules, spelling: Spelling, parameters: Parameters, can_name: Callable[[str], bool]
) -> str:
    """Python's: keyword arguments, and values as its literals."""
    ends = (spelling.end.lstrip("])\n"),)

    def text(body: str) -> str:
        if body == "/(?s:.*)/":
            body = rf"/({_PLAIN}|\\[\"\\nrt])*/"
        elif '"' in body or r"\\" in body:  # what would need a backslash before it
            if parameters.is_strict:
                raise Unwritable("a pattern with a quote or a backslash")
            body = f"/{_PLAIN}*/"
        else:  # of characters that are written as they are, so that they are counted
            body = f"{body} & /{_PLAIN}*/"
        return rules.terminal(f'"\\"" ({text_without(ends, body)}) "\\""')

    words = Words(
        literal=_python_literal,
        key=quoted,
        can_name=lambda key: True,
        any_key=f'/"{_PLAIN}{{0,30}}"/',
        pair=": ",
        comma=", ",
        text=text,
    )
    values = _Values(rules, words, parameters)
    found = [
        (rules.rule(f"{rules.say(name + '=')} {values.value(schema)}"), is_required)
        for name, schema, is_required in members(parameters.object, can_name)
    ]
    return values.joined(found)


def _is_bare_key(unwritable: Sequence[str], key: str) -> bool:
    return key == key.strip(' "').strip() and not any(text in key for text in unwritable)


def _bare_literal(unwritable: Sequence[str], quote: str, value: Any) -> str:
    inner = partial(_bare_literal, unwritable, quote)
    if isinstance(value, str):
        if quote in value:
            raise Unwritable(f"the text {value!r}")
        return f"{quote}{value}{quote}"
    if isinstance(value, Mapping):
        if not all(_is_bare_key(unwritable, key) for key in value):
            raise Unwritable(f"the object {value!r}")
        return "{" + ",".join(f"{key}:{inner(each)}" for key, each in value.items()) + "}"
    return "[" + ",".join(map(inner, value)) + "]" if isinstance(value, list) else json.dumps(value)


def _python_literal(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{quoted(k)}: {_python_literal(v)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python_literal, value)) + "]"
    return quoted(value) if isinstance(value, str) else repr(value)


class _Values:
    """Rules for values by their schemas."""

    def __init__(self, rules: Rules, words: Words, parameters: Parameters) -> None:
        self._rules, self._words, self._parameters = rules, words, parameters
        self._of_refs: dict[str, str] = {}
        self._any: list[str] = []

    def value(self, schema: Schema) -> str:
        """The name of a rule, or its body."""
        if not isinstance(schema, Mapping):
            if schema is False:
                raise Unwritable("a schema that nothing is valid under")
            return self.any()
        if isinstance(schema.get("$ref"), str):
            return self._referred(schema)
        choices = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(choices, list):
            self._parameters.check(schema, ("anyOf",))
            return self._rules.rule(either(self.value(each) for each in choices))
        if (values := listed(schema)) is not None:
            self._parameters.check(schema, ("type", "enum", "const"))
            return self._rules.rule(either(self._literals(schema, values)))
        types = schema.get("type")
        if isinstance(types, str):
            return self._of_type(types, schema)
        if isinstance(types, list) and types:
            parts = [
                {"type": each, **{k: schema[k] for k in OF_TYPES.get(each, ()) if k in schema}}
                for each in types
            ]
            known = [keyword for each in types for keyword in OF_TYPES.get(each, ())]
            self._parameters.check(schema, ("type", *known))
            return self._rules.rule(either(self.value(each) for each in parts))
        self._parameters.check(schema, ())
        return self.any()

    def _literals(self, schema: Mapping[str, Any], listed: list[Any]) -> list[str]:
        """Those of an enum that can be written."""
        found = []
        for each in listed:
            if not _is_of(schema.get("type"), each):
                continue
            try:
                found.append(self._rules.say(self._words.literal(each)))
            except Unwritable:
                pass
        if not found:
            raise Unwritable("an enum without a value that can be written")
        return found

    def _referred(self, schema: Mapping[str, Any]) -> str:
        found: Schema = schema
        seen: set[str] = set()
        while isinstance(found, Mapping) and isinstance(ref := found.get("$ref"), str):
            self._parameters.check(found, ("$ref",))
            found, last = self._parameters.followed(ref, seen), ref
        if last not in self._of_refs:
            name = self._of_refs[last] = self._rules.reserve()
            self._rules.define(name, self.value(found))
        return self._of_refs[last]

    def _of_type(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind not in OF_TYPES:
            raise Unwritable(f"the type {kind!r}")
        self._parameters.check(schema, ("type", *OF_TYPES[kind]))
        if kind == "string":
            return self._words.text(self._parameters.text(schema))
        if kind in ("integer", "number"):
            limits = {key: schema[key] for key in OF_NUMBERS if key in schema}
            if limits:
                return json_of({"type": kind, **limits})
            return self._rules.terminal(_INTEGER if kind == "integer" else _NUMBER)
        if kind == "boolean":
            return either(self._rules.say(self._words.literal(each)) for each in (True, False))
        if kind == "null":
            return self._rules.say(self._words.literal(None))
        return self.array(schema) if kind == "array" else self.object(schema)

    def array(self, schema: Mapping[str, Any]) -> str:
        item = self._rules.rule(self.value(schema.get("items", True)))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        return self._rules.rule(f'"[" {self._repeated(item, least, most)} "]"')

    def _repeated(self, item: str, least: int, most: int | None) -> str:
        """That many, with commas between."""
        if most == 0:
            return ""
        more = f"{max(least - 1, 0)},{'' if most is None else most - 1}"
        some = f"{item} ({self._rules.say(self._words.comma)} {item}){{{more}}}"
        return some if least else f"({some})?"

    def object(self, schema: Mapping[str, Any]) -> str:
        known = members(schema, self._words.can_name)
        others = schema.get("additionalProperties", True)
        if not known and others is not False:
            pair = self._pair(self._rules.terminal(self._words.any_key), others)
            return self._rules.rule(f'"{{" {self._repeated(pair, 0, None)} "}}"')
        pairs = []
        for name, each, is_required in known:
            key = self._rules.say(self._words.key(name))
            pairs.append((self._pair(key, each), is_required))
        return self._rules.rule(f'"{{" {self.joined(pairs)} "}}"')

    def _pair(self, key: str, schema: Schema) -> str:
        return self._rules.rule(f"{key} {self._rules.say(self._words.pair)} {self.value(schema)}")

    def joined(self, pairs: Sequence[tuple[str, bool]]) -> str:
        """Pairs in their order, those not required or not, with commas between."""
        comma = self._rules.say(self._words.comma)
        first, later = "", ""  # what may follow: nothing yet written, something
        for name, is_required in reversed(pairs):
            with_it = self._rules.rule(f"{name} {later}")
            after_it = f"{comma} {with_it}"
            if is_required:
                first, later = with_it, after_it
            else:
                first = f"({with_it} | {first})" if first else f"{with_it}?"
                later = f"({after_it} | {later})" if later else f"({after_it})?"
                first, later = self._rules.rule(first), self._rules.rule(later)
        return first

    def any(self, depth: int = _DEEPEST) -> str:
        """Whatever there is, as deep as that."""
        if not self._any:
            kinds = ("string", "number", "boolean", "null")
            self._any.append(self._rules.rule(either(self._of_type(k, {}) for k in kinds)))
        while len(self._any) <= depth:
            inner = self._any[-1]
            key = self._rules.terminal(self._words.any_key)
            pair = self._rules.rule(f"{key} {self._rules.say(self._words.pair)} {inner}")
            many = [self._repeated(each, 0, None) for each in (inner, pair)]
            body = f'{inner} | "[" {many[0]} "]" | "{{" {many[1]} "}}"'
            self._any.append(self._rules.rule(body))
        return self._any[depth]


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value is of a type, or one of several, that a schema names."""
    kinds = kind if isinstance(kind, list) else [kind]
    return kind is None or any(_is_one(each, value) for each in kinds)


def _is_one(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and kind == "integer":
        return value.is_integer()
    python_types: dict[str, Any] = {
        "string": str, "number": (int, float), "integer": int, "array": list, "object": Mapping,
        "null": type(None),
    }  # fmt: skip
    return isinstance(value, python_types.get(kind, ()))
