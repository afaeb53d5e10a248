"""Arguments that models write otherwise than as one JSON object, as rules of a grammar by schema.

What such a rule accepts is valid under its schema; not all that is valid can be written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from edgeinfer.text.call_spellings import Spelling
from edgeinfer.text.json_pointer import pointed
from edgeinfer.text.lark import Rules, json_of
from edgeinfer.text.tools import Tool

Schema: TypeAlias = "Mapping[str, Any] | bool"

# Keywords that say nothing about what is valid, or where others are.
_NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
     "$schema", "$id", "$anchor", "$comment", "$defs", "definitions")
)  # fmt: skip
OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
OF_TYPES = {
    "string": ("minLength", "maxLength", "pattern"),
    "number": OF_NUMBERS,
    "integer": OF_NUMBERS,
    "boolean": (),
    "null": (),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}


class Unwritable(Exception):
    """A schema, or a keyword of one, for which a family's spelling has no rule."""


def _matching(pattern: str) -> str:
    """A pattern, which is looked for, as a regular expression of the whole text."""
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    inner = pattern[begins : len(pattern) - ends]
    plain = re.sub(r"\\[^bBAzZkpP0-9]|\[\^?[^\]\\]*\]|\(\?:", "", inner)
    has_choice = "|" in re.sub(r"\([^()]*\)", "", plain)
    if re.search(r"[\^$\\\[\]]|\(\?", plain) or (has_choice and (begins or ends)):
        raise Unwritable(f"the pattern {pattern!r}")
    inner = re.sub(r"(?s)\\.|/", lambda part: part[0] if part[0] != "/" else r"\/", inner)
    inner = inner.replace("\n", r"\n")
    any_text = "(?s:.*)"
    return f"/{'' if begins else any_text}({inner}){'' if ends else any_text}/"


class Parameters:
    """The schema of a tool's parameters, an object's. What is not `strict` is left out instead."""

    def __init__(self, schema: Mapping[str, Any], is_strict: bool) -> None:
        self.root, self.is_strict = schema, is_strict

    @property
    def object(self) -> Mapping[str, Any]:
        """What describes the object itself: references at the top are followed."""
        found: Schema = self.root
        seen: set[str] = set()
        while isinstance(found, Mapping) and isinstance(ref := found.get("$ref"), str):
            self.check(found, ("$ref", "type"))
            found = self.followed(ref, seen)
        found = found if isinstance(found, Mapping) else {}
        self.check(found, ("type", *OF_TYPES["object"]))
        return found

    def followed(self, ref: str, seen: set[str]) -> Schema:
        """What a reference leads to, if that is not one of those `seen` on the way."""
        if ref in seen:
            raise Unwritable(f"the reference {ref!r}, which leads to itself,")
        seen.add(ref)
        return self.resolve(ref)

    def check(self, schema: Mapping[str, Any], known: Sequence[str]) -> None:
        unknown = sorted(set(schema) - _NOTES - set(known))
        if unknown and self.is_strict:
            raise Unwritable(f"the keyword {unknown[0]!r} of a schema")

    def text(self, schema: Mapping[str, Any]) -> str:
        """What matches the texts of a schema: a terminal's body."""
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        body = f"/(?s:.{{{least},{most}}})/" if least or most != "" else "/(?s:.*)/"
        if isinstance(pattern := schema.get("pattern"), str):
            try:
                return f"{body} & {_matching(pattern)}"
            except Unwritable:
                if self.is_strict:
                    raise
        return body

    def resolve(self, ref: str) -> Schema:
        found: Any = self.root
        if not ref.startswith("#"):
            raise Unwritable(f"the reference {ref!r}, which is not to the schema itself")
        if ref[1:2] not in ("", "/"):
            found = next(_anchored(self.root, ref[1:]), None)
            if found is None:
                raise Unwritable(f"the reference {ref!r}, which leads nowhere,")
        try:
            found = pointed(found, ref[1:])
        except LookupError as error:
            raise Unwritable(f"the reference {ref!r}, which leads nowhere,") from error
        return found if isinstance(found, (bool, Mapping)) else {}


def members(
    schema: Mapping[str, Any], can_name: Callable[[str], bool]
) -> list[tuple[str, Schema, bool]]:
    """Name, schema and whether it is required, of each that has a name that can be written."""
    properties, required = schema.get("properties"), schema.get("required")
    known = dict(properties) if isinstance(properties, Mapping) else {}
    needed = required if isinstance(required, Sequence) else ()
    known |= {name: True for name in needed if isinstance(name, str) and name not in known}
    found = []
    for name, each in known.items():
        if can_name(name) and each is not False:
            found.append((name, each, name in needed))
        elif name in needed:
            raise Unwritable(f"the key {name!r}")
    return found


def _anchored(schema: Any, name: str) -> Iterator[Any]:
    """The parts of a schema that have this name as an anchor."""
    inner: Iterable[Any] = schema if isinstance(schema, list) else ()
    if isinstance(schema, Mapping):
        inner = schema.values()
        if schema.get("$anchor") == name:
            yield schema
    for each in inner:
        yield from _anchored(each, name)


# -- members in tags ------------------------------------------------------------------------------


def tagged(
    rules: Rules,
    spelling: Spelling,
    tool: Tool,
    parameters: Parameters,
    can_name: Callable[[str], bool],
) -> str:
    """Arguments one by one, each in tags: texts as they are, other values as JSON."""
    member = spelling.member
    assert member is not None
    found = []
    for name, schema, is_required in members(parameters.object, can_name):
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
    values = listed(schema)
    if values is None:
        parameters.check(schema, ("type", *OF_TYPES["string"]))
        return until(body=parameters.text(schema))
    parameters.check(schema, ("type", "enum", "const"))
    kept = [v for v in values if isinstance(v, str) and not any(e in v for e in (close, *ends))]
    if not kept:
        raise Unwritable("an enum without a text that can be written")
    return f"({either(map(rules.say, kept))}) {rules.say(close)}"


def _json_part(parameters: Parameters, schema: Schema) -> str:
    """JSON by a part of a schema; what it refers to comes along."""
    if not isinstance(schema, Mapping):
        return json_of({})
    if "$ref" in json.dumps(schema):
        schema = {**_rooted(schema), "$defs": {"root": _rooted(parameters.root)}}
    return json_of(schema, lenient=not parameters.is_strict)


def _rooted(value: Any) -> Any:
    """References to the root lead to where it was put."""
    if isinstance(value, Mapping):
        return {
            key: f"#/$defs/root{each[1:]}"
            if key == "$ref" and isinstance(each, str) and (each == "#" or each.startswith("#/"))
            else _rooted(each)
            for key, each in value.items()
        }
    return [_rooted(each) for each in value] if isinstance(value, list) else value


def listed(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values of which it must be one."""
    found = schema.get("enum")
    if "const" in schema:
        is_one = not isinstance(found, list) or schema["const"] in found
        return [schema["const"]] if is_one else []
    return found if isinstance(found, list) else None


def either(choices: Any) -> str:
    return "(" + " | ".join(choices) + ")"
