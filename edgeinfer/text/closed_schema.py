"""Objects of a JSON schema that have no other keys than it names.

JSON Schema lets an object have any key that nothing is said of; whoever states the keys of an
answer means those, and a small model that may write others goes on doing so. What is narrowed here
is still valid under the schema as it was given.
"""

from __future__ import annotations

from typing import Any

VALUES = ("enum", "const", "default", "examples", "required")  # whose values are no schemas
# Keywords by which something else is said of an object's keys, too.
_OF_KEYS = (
    "additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames",
    "dependentRequired",
)  # fmt: skip
_COMBINED = ("allOf", "if", "not", "dependentSchemas", "$dynamicRef", "$recursiveRef")
_CHOSEN = ("anyOf", "oneOf", "$ref")  # schemas that are apart from this, or say more of the same
# Keywords that hold schemas by names.
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def closed(schema: Any) -> Any:
    """With `additionalProperties: false` where properties are listed and nothing says more.

    A schema that combines others anywhere stays as it is: one part would forbid another's keys.
    """
    return schema if _combines(schema) else _closed(schema)


def _combines(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, dict):
        return False
    names_keys = "properties" in schema or "required" in schema
    return any(
        key in _COMBINED
        or (key in _CHOSEN and names_keys)
        or (key not in VALUES and any(map(_combines, _schemas(key, each))))
        for key, each in schema.items()
    )


def _schemas(key: str, value: Any) -> list[Any]:
    """Those that a keyword holds."""
    return list(value.values()) if key in BY_NAME and isinstance(value, dict) else [value]


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, each in schema.items():
        if key in BY_NAME and isinstance(each, dict):
            found[key] = {name: _closed(inner) for name, inner in each.items()}
        else:
            found[key] = each if key in VALUES else _closed(each)
    named, required = schema.get("properties"), schema.get("required", [])
    if (
        isinstance(named, dict)
        and isinstance(required, list)
        and all(name in named for name in required if isinstance(name, str))
        and not any(key in schema for key in _OF_KEYS)
    ):
        found["additionalProperties"] = False
    return found
