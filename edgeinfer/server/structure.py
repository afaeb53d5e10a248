"""What an answer must be, in the words of each API: a schema, a grammar or a regular expression.

Knows nothing of what becomes of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edgeinfer.errors import InvalidRequestError
from edgeinfer.server.errors import ApiError
from edgeinfer.server.fields import Fields
from edgeinfer.text.lark import exactly

_ANY_OBJECT = {"type": "object"}
# Of vLLM and llama-server: the fields, and the keywords that they are.
_FIELDS = {
    "guided_json": "schema",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "guided_choice": "choice",
    "json_schema": "schema",
    "grammar": "grammar",
    "regex": "regex",
}
_STRUCTURED = {"json": "schema", "regex": "regex", "grammar": "grammar", "choice": "choice"}


class Structure(NamedTuple):
    """A keyword of `LLM.chat` with its value, and the field that it came in; none, if empty."""

    keyword: str = ""
    value: Any = None
    field: str = ""

    @property
    def sampling(self) -> dict[str, Any]:
        return {self.keyword: self.value} if self.keyword else {}

    def renamed(self, error: InvalidRequestError) -> InvalidRequestError:
        """An error of the keyword as one of the field."""
        if not self.keyword or error.param != self.keyword:
            return error
        return InvalidRequestError(
            self.field + str(error).removeprefix(self.keyword), param=self.field
        )


def of_format(given: Fields, param: str) -> Structure:
    """OpenAI's and Anthropic's objects with a type; the schema may stand in `json_schema`."""
    kind = given.text("type")
    if kind in ("", "text"):
        return Structure()
    inner = given.object("json_schema") if "json_schema" in given else given
    # Chat completions have it a level deeper; llama-server takes it there, too.
    is_deeper = inner is not given or (param == "response_format" and "schema" not in given)
    place = f"{param}.json_schema.schema" if is_deeper else f"{param}.schema"
    if kind == "json_object":  # llama-server's has a schema, too
        return Structure("schema", inner.get("schema") or _ANY_OBJECT, place)
    if kind == "json_schema":
        if "schema" not in inner:
            raise ApiError(400, f"{place} is missing; give a JSON schema", param=place)
        return Structure("schema", inner.get("schema"), place)
    raise ApiError(
        400,
        f"{param} of type {kind!r} is not supported; 'text', 'json_object' and 'json_schema' are",
        param=param,
        code="unsupported",
    )


def of_chat(body: Fields) -> Structure:
    """The field `response_format`, or one that vLLM or llama-server have beside it."""
    found = [of_format(body.object("response_format"), "response_format")]
    found += [_of(keyword, body, name, name) for name, keyword in _FIELDS.items() if name in body]
    outputs = body.object("structured_outputs")
    if "structural_tag" in outputs:
        raise outputs.wrong("structural_tag", f"left out; {', '.join(_STRUCTURED)} are supported")
    for name, keyword in _STRUCTURED.items():
        if name in outputs:
            found.append(_of(keyword, outputs, name, f"structured_outputs.{name}"))
    if outputs.flag("json_object"):
        found.append(Structure("schema", _ANY_OBJECT, "structured_outputs.json_object"))
    return _only([each for each in found if each.keyword])


def of_ollama(body: Fields) -> Structure:
    """`format` is "json" or a schema."""
    given = body.get("format")
    if given in (None, ""):
        return Structure()
    return Structure("schema", _ANY_OBJECT if given == "json" else given, "format")


def _of(keyword: str, fields: Fields, name: str, field: str) -> Structure:
    if keyword == "choice":
        choices = fields.get(name)
        if not isinstance(choices, list) or not choices or not all(map(_is_text, choices)):
            raise fields.wrong(name, "a list of texts")
        return Structure("regex", "|".join(map(exactly, choices)), field)
    return Structure(keyword, fields.get(name) if keyword == "schema" else fields.text(name), field)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _only(found: list[Structure]) -> Structure:
    if len(found) > 1:
        names = " and ".join(each.field for each in found)
        raise ApiError(
            400, f"{names} are given; an answer follows one of them", param=found[1].field
        )
    return found[0] if found else Structure()
