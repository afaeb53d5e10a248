"""Arguments that models write otherwise than as one JSON object, as rules of a grammar by schema.

What such a rule accepts is valid under its schema; not all that is valid can be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

from edgeinfer.text.call_spellings import Spelling
from edgeinfer.text.lark import Rules, json_of, text_without
from edgeinfer.text.tools import Tool

Schema: TypeAlias = "Mapping[str, Any] | bool"

# Keywords that say nothing about what is valid, or where others are.
_NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
     "$schema", "$id", "$comment", "$defs", "definitions")
)  # fmt: skip
_OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_OF_TYPES = {
    "string": ("minLength", "maxLength"),
    "number": _OF_NUMBERS,
    "integer": _OF_NUMBERS,
    "boolean": (),
    "null": (),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
_INTEGER = r"/-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?/"
_DEEPEST = 3  # of values that a schema says nothing about
_NO_JSON_STRING = r"[^\"\\\x00-\x1f\x7f]"


class Unwritable(Exception):
    """A schema, or a keyword of one, for which a family's spelling has no rule."""


class Parameters:
    """The schema of a tool's parameters, an object's. What is not `strict` is left out instead."""

    def __init__(self, schema: Mapping[str, Any], is_strict: bool) -> None:
        self.root, self.is_strict = schema, is_strict

    @property
    def schema(self) -> Mapping[str, Any]:
        """What describes the object itself: references at the top are followed."""
        found: Schema = self.root
        for _ in range(8):
            if isinstance(found, Mapping) and isinstance(found.get("$ref"), str):
                self.check(found, ("$ref",))
                found = self.resolve(found["$ref"])
        return found if isinstance(found, Mapping) else {}

    def members(self) -> list[tuple[str, Schema, bool]]:
        """Name, schema and whether it is required, of each."""
        schema = self.schema
        self.check(schema, ("type", *_OF_TYPES["object"]))
        return members(schema)

    def check(self, schema: Mapping[str, Any], known: Sequence[str]) -> None:
        unknown = sorted(set(schema) - _NOTES - set(known))
        if unknown and self.is_strict:
            raise Unwritable(f"the keyword {unknown[0]!r} of a schema")

    def resolve(self, ref: str) -> Schema:
        found: Any = self.root
        if not ref.startswith("#"):
            raise Unwritable(f"the reference {ref!r}, which is not to the schema itself")
        for part in ref[1:].split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, Mapping) and key in found:
                found = found[key]
            else:
                raise Unwritable(f"the reference {ref!r}, which leads nowhere,")
        return found if isinstance(found, (bool, Mapping)) else {}


def members(schema: Mapping[str, Any]) -> list[tuple[str, Schema, bool]]:
    properties, required = schema.get("properties"), schema.get("required")
    known = dict(properties) if isinstance(properties, Mapping) else {}
    needed = required if isinstance(required, Sequence) else ()
    known |= {name: True for name in needed if isinstance(name, str) and name not in known}
    return [(name, each, name in needed) for name, each in known.items()]


# -- members in tags ------------------------------------------------------------------------------


def tagged(rules: Rules, spelling: Spelling, tool: Tool, parameters: Parameters) -> str:
    """Arguments one by one, each in tags: texts as they are, other values as JSON."""
    member = spelling.member
    assert member is not None
    found = []
    for name, schema, is_required in parameters.members():
        is_text = tool.takes_text(name) and isinstance(schema, Mapping)
        after = member.after_text if is_text else member.after
        before = rules.say(f"{member.before}{name}{after}")
        if is_text:
            assert isinstance(schema, Mapping)
            close = partial(rules.until, member.close, member.ends)
            value = _text(rules, schema, parameters, close, member.close, member.ends)
        else:
            value = f"{_json_part(parameters, schema)} {rules.say(member.close)}"
        one = rules.rule(f"{before} {value} {rules.say(member.gap)}")
        found.append(one if is_required else f"{one}?")
    return rules.rule(" ".join(found)) if found else ""


def _text(
    rules: Rules,
    schema: Mapping[str, Any],
    parameters: Parameters,
    until: Callable[..., str],
    close: str,
    ends: Sequence[str],
) -> str:
    """A text as it is, and what closes it."""
    parameters.check(schema, ("type", "enum", "const", *_OF_TYPES["string"]))
    values = _listed(schema)
    if values is None:
        return until(body=f"/(?s:.{_times(schema)})/")
    kept = [v for v in values if isinstance(v, str) and not any(e in v for e in (close, *ends))]
    if not kept:
        raise Unwritable("an enum without a text that can be written")
    return f"({_either(map(rules.say, kept))}) {rules.say(close)}"


def _json_part(parameters: Parameters, schema: Schema) -> str:
    """JSON by a part of a schema; what it refers to comes along."""
    if not isinstance(schema, Mapping):
        return json_of({} if schema else {"enum": []})
    if "$ref" in json.dumps(schema):
        schema = {**_rooted(schema), "$defs": {"root": _rooted(parameters.root)}}
    return json_of(schema, lenient=not parameters.is_strict)


def _rooted(value: Any) -> Any:
    """References to the root lead to where it was put."""
    if isinstance(value, Mapping):
        return {
            key: f"#/$defs/root{each[1:]}"
            if key == "$ref" and isinstance(each, str) and each.startswith("#")
            else _rooted(each)
            for key, each in value.items()
        }
    return [_rooted(each) for each in value] if isinstance(value, list) else value


# -- values in words of their own ------------------------------------------------------------------


class Words(NamedTuple):
    """How values are written: literals, keys, what joins them, and the rule of a text."""

    literal: Callable[[Any], str]
    key: Callable[[str], str]
    any_key: str
    pair: str
    comma: str
    text: Callable[[str], str]


def bare(rules: Rules, spelling: Spelling, parameters: Parameters) -> str:
    """Gemma's: keys without quotes, texts between quotes that are tokens."""
    quote, close = spelling.quote, spelling.close
    words = Words(
        literal=partial(_bare_literal, quote),
        key=partial(_bare_key, (quote, close)),
        any_key="/[A-Za-z_][A-Za-z0-9_]{0,30}/",
        pair=":",
        comma=",",
        text=lambda times: f"{rules.say(quote)} {rules.until(quote, (), f'/(?s:.{times})/')} ",
    )
    return _Values(rules, words, parameters).object(parameters.schema)


def python(rules: Rules, spelling: Spelling, parameters: Parameters) -> str:
    """Python's: keyword arguments, and values as its literals."""
    ends = (spelling.end.lstrip("])"),)

    def text(times: str) -> str:
        character = rf"({_NO_JSON_STRING}|\\[\"\\nrt])"
        return rules.terminal(text_without(ends, f'/"{character}{times}"/'))

    words = Words(
        literal=_python_literal,
        key=_quoted,
        any_key=f'/"{_NO_JSON_STRING}{{0,30}}"/',
        pair=": ",
        comma=", ",
        text=text,
    )
    values = _Values(rules, words, parameters)
    found = [
        (rules.rule(f"{rules.say(name + '=')} {values.value(schema)}"), is_required)
        for name, schema, is_required in parameters.members()
    ]
    return values.joined(found)


def _bare_key(unwritable: Sequence[str], key: str) -> str:
    if (
        key != key.strip(' "')
        or key != key.strip()
        or any(text in key for text in (":", "}", *unwritable))
    ):
        raise Unwritable(f"the key {key!r}")
    return key


def _bare_literal(quote: str, value: Any) -> str:
    if isinstance(value, str):
        if quote in value:
            raise Unwritable(f"the text {value!r}")
        return f"{quote}{value}{quote}"
    if isinstance(value, Mapping):
        pairs = (f"{_bare_key((quote,), k)}:{_bare_literal(quote, v)}" for k, v in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_bare_literal(quote, each) for each in value) + "]"
    return json.dumps(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _python_literal(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_quoted(k)}: {_python_literal(v)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python_literal, value)) + "]"
    return _quoted(value) if isinstance(value, str) else repr(value)


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
            self._parameters.check(schema, ("$ref",))
            return self._referred(schema["$ref"])
        choices = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(choices, list):
            self._parameters.check(schema, ("anyOf",))
            return self._rules.rule(_either(self.value(each) for each in choices))
        if (listed := _listed(schema)) is not None:
            self._parameters.check(schema, ("type", "enum", "const"))
            return self._rules.rule(_either(self._literals(schema, listed)))
        types = schema.get("type")
        if isinstance(types, str):
            return self._of_type(types, schema)
        if isinstance(types, list) and types:
            parts = [
                {"type": each, **{k: schema[k] for k in _OF_TYPES.get(each, ()) if k in schema}}
                for each in types
            ]
            known = [keyword for each in types for keyword in _OF_TYPES.get(each, ())]
            self._parameters.check(schema, ("type", *known))
            return self._rules.rule(_either(self.value(each) for each in parts))
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

    def _referred(self, ref: str) -> str:
        if ref not in self._of_refs:
            name = self._of_refs[ref] = self._rules.reserve()
            self._rules.define(name, self.value(self._parameters.resolve(ref)))
        return self._of_refs[ref]

    def _of_type(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind not in _OF_TYPES:
            raise Unwritable(f"the type {kind!r}")
        self._parameters.check(schema, ("type", *_OF_TYPES[kind]))
        if kind == "string":
            return self._words.text(_times(schema))
        if kind in ("integer", "number"):
            limits = {key: schema[key] for key in _OF_NUMBERS if key in schema}
            if limits:
                return json_of({"type": kind, **limits})
            return self._rules.terminal(_INTEGER if kind == "integer" else _NUMBER)
        if kind == "boolean":
            return _either(self._rules.say(self._words.literal(each)) for each in (True, False))
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
        known = members(schema)
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
            self._any.append(self._rules.rule(_either(self._of_type(k, {}) for k in kinds)))
        while len(self._any) <= depth:
            inner = self._any[-1]
            key = self._rules.terminal(self._words.any_key)
            pair = self._rules.rule(f"{key} {self._rules.say(self._words.pair)} {inner}")
            many = [self._repeated(each, 0, None) for each in (inner, pair)]
            body = f'{inner} | "[" {many[0]} "]" | "{{" {many[1]} "}}"'
            self._any.append(self._rules.rule(body))
        return self._any[depth]


def _listed(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values of which it must be one."""
    if "const" in schema:
        return [schema["const"]]
    found = schema.get("enum")
    return found if isinstance(found, list) else None


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


def _times(schema: Mapping[str, Any]) -> str:
    """How often a character comes in a text of the right length."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    return f"{{{least},{most}}}" if least or most != "" else "*"


def _either(choices: Any) -> str:
    return "(" + " | ".join(choices) + ")"
