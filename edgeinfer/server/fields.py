"""Fields of a JSON object as a handler wants them; what is of another type is refused by name.

null is the same as leaving a field out. Fields that nobody asks for are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HttpRequest

from edgeinfer.errors import InvalidRequestError
from edgeinfer.parameters import ANSWER, shown
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.wire import decode, read_body

_SEEDS = 1 << 64
_MOST_STOPS = 64  # each is looked for with each token


class Fields:
    """A JSON object, and where in a request it stands."""

    def __init__(self, values: Json, path: str = "") -> None:
        self._values, self._path = values, path

    @property
    def path(self) -> str:
        """What stands before the names of its fields."""
        return self._path

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str) -> Any:
        """Whatever it is."""
        return self._values.get(name)

    def text(self, name: str, default: str = "") -> str:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        value = whole(self._values.get(name))
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def object(self, name: str) -> Fields:
        """An empty one where there is none."""
        value = self._values.get(name)
        if not isinstance(value, (dict, type(None))):
            raise self.wrong(name, "an object")
        return Fields(value or {}, f"{self._path}{name}.")

    def objects(self, name: str) -> list[Fields]:
        """Those of a list."""
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.wrong(name, "a list of objects")
        return [Fields(each, f"{self._path}{name}[{i}].") for i, each in enumerate(value)]

    @property
    def values(self) -> Json:
        return self._values

    def wrong(self, name: str, needed: str) -> ApiError:
        found, param = shown(self._values.get(name)), f"{self._path}{name}"
        return ApiError(400, f"{param} is {found}; it must be {needed}", param=param)

    def refuse(self, names: Mapping[str, str]) -> None:
        """ApiError for a field that asks for anything; `names` say what to do instead of each."""
        for name, advice in names.items():
            if self.get(name):
                param = f"{self._path}{name}"
                told = f"{param} is not supported: {advice}"
                raise ApiError(400, told, param=param, code="unsupported")

    def sampling(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Keywords of an answer, checked, from the fields that an API names them by."""
        found: dict[str, Any] = {}
        for name, keyword in names.items():
            value = self._meant(name, keyword)
            if value is None:
                continue
            try:
                found[keyword] = ANSWER[keyword].check(value)
            except InvalidRequestError as error:
                param = f"{self._path}{name}"
                raise ApiError(400, param + str(error).removeprefix(keyword), param=param) from None
        return found

    def _meant(self, name: str, keyword: str) -> Any:
        """A field's value as the keyword has it, None for what is the same as nothing."""
        value = whole(self._values.get(name)) if ANSWER[keyword].kind is int else self.get(name)
        if keyword == "stop" and value == "":  # a form that was left empty
            return None
        if keyword == "stop" and isinstance(value, list):
            if len(value) > _MOST_STOPS:
                param = f"{self._path}{name}"
                raise ApiError(400, f"{param} has over {_MOST_STOPS} texts", param=param)
            return [each for each in value if each != ""] or None
        if keyword == "seed" and type(value) is int and value < 0:
            return None if value == -1 else value % _SEEDS  # -1 asks for any; some have signs
        return value


def whole(value: Any) -> Any:
    """Some clients send every number as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


async def read_fields(http: HttpRequest, most: int) -> Fields:
    """Those of a body of at most so many bytes; ApiError where it is no JSON object."""
    return Fields(decode(await read_body(http, most)))
