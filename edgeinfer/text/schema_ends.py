"""Whether values by a JSON schema come to an end: some schemas refer to themselves for ever.

llguidance takes those: what it makes of them is no JSON, or has no end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from edgeinfer.errors import InvalidRequestError
from edgeinfer.text.json_pointer import pointed

_BY_NAME = ("properties", "patternProperties")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_NESTED = ("object", "array")


class _Part(NamedTuple):
    """An object of a schema that may be asked for a value, and where it stands."""

    schema: dict[str, Any]
    path: str


def check_ends(schema: Any, param: str) -> None:
    """InvalidRequestError where a part of the schema that may be used has no value with an end."""
    if not isinstance(schema, dict):
        return
    parts = {id(part.schema): part for part in _parts(schema)}
    askers: dict[int, list[dict[str, Any]]] = {}  # who a part's end may be the end of, too
    for part in parts.values():
        for inner, _ in _inner(part, schema):
            askers.setdefault(id(inner), []).append(part.schema)
    ends, failed = set[int](), set[int]()
    waiting = [part.schema for part in parts.values()]  # what is inside of others comes first
    while waiting:
        found = waiting.pop()
        failed.discard(id(found))
        if id(found) in ends:
            continue
        if _ends(found, schema, ends):
            ends.add(id(found))
            waiting += (each for each in askers.get(id(found), ()) if id(each) in failed)
        else:
            failed.add(id(found))
    for number, part in parts.items():
        if number not in ends:
            raise InvalidRequestError(
                f"{param} can't be kept to: what it asks for at {part.path} never ends, since it "
                "refers to itself whatever is chosen; leave a key out of 'required', or let it be "
                "null",
                param=param,
            )


def _parts(root: dict[str, Any]) -> Iterator[_Part]:
    """All that an answer may come to, each once."""
    seen, left = {id(root)}, [_Part(root, "$")]
    while left:
        part = left.pop()
        yield part
        for inner, path in _inner(part, root):
            if id(inner) not in seen:
                seen.add(id(inner))
                left.append(_Part(inner, path))


def _inner(part: _Part, root: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The schemas that a part names for its value, or for what is in that."""
    schema, path = part
    if "enum" in schema or "const" in schema:
        return  # nothing but what these list
    for key in _BY_NAME:
        if isinstance(named := schema.get(key), dict):
            yield from ((each, f"{path}.{key}.{name}") for name, each in named.items()
                        if isinstance(each, dict))  # fmt: skip
    for key in _LISTED:
        if isinstance(listed := schema.get(key), list):
            yield from ((each, f"{path}.{key}[{i}]") for i, each in enumerate(listed)
                        if isinstance(each, dict))  # fmt: skip
    for key in _SINGLE:
        if isinstance(each := schema.get(key), dict):
            yield each, f"{path}.{key}"
    if isinstance(target := _referred(schema, root), dict):
        yield target, f"{path}.$ref"


def _referred(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """What its `$ref` points to; None where there is none, or where it is not found by a path."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    try:
        return pointed(root, reference[1:])
    except LookupError:
        return None


def _ends(schema: dict[str, Any], root: dict[str, Any], ends: set[int]) -> bool:
    """Whether there is a value that ends, where those by schemas in `ends` are known to."""
    if "enum" in schema or "const" in schema:
        return True

    def may_end(each: Any) -> bool:
        return not isinstance(each, dict) or id(each) in ends

    if not may_end(_referred(schema, root)):
        return False
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list) and choices:
            if not any(map(may_end, choices)):
                return False
    if isinstance(parts := schema.get("allOf"), list) and not all(map(may_end, parts)):
        return False
    kinds = schema.get("type", "null")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if any(kind not in _NESTED for kind in kinds) or not kinds:
        return True
    needed = {"object": _keys, "array": _items}
    return any(all(map(may_end, needed[kind](schema))) for kind in kinds)


def _keys(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas of the keys that an object must have."""
    named, required = schema.get("properties"), schema.get("required")
    if isinstance(named, dict) and isinstance(required, list):
        yield from (named.get(name) for name in required if isinstance(name, str))


def _items(schema: dict[str, Any]) -> Iterator[Any]:
    """Those of the items that an array must have."""
    least, items = schema.get("minItems", 0), schema.get("items")
    first = items if isinstance(items, list) else schema.get("prefixItems")
    first = first if isinstance(first, list) else []
    n_least = int(least) if isinstance(least, (int, float)) and least > 0 else 0
    yield from first[:n_least]
    if n_least > len(first):
        yield schema.get("additionalItems") if isinstance(items, list) else items
