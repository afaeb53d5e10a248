"""Fields of a JSON object as a handler wants them; what is of another type is refused by name.

null is the same as leaving a field out. Fields that nobody asks for are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HttpRequest

from edgeinfer.parameters import ANSWER, shown
from edgeinfer.server.errors import ApiError, Json
from edgeinfer.server.wire import decode, read_body

_SEEDS = 1 << 64
_MOST_STOPS = 64  # each is looked for with each token


class Fields:
    """A JSON object, and where in a request it stands."""

    def __init__(self, values: Json, path: str = "") -> None:
        self._values, self._path = values, path

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
        value = self._values.get(name)
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

    def sampling(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Keywords of an answer, from the fields that an API names them by."""
        given = {names[name]: self._values[name] for name in names if name in self}
        found = {keyword: _whole(keyword, value) for keyword, value in given.items()}
        if isinstance(stops := found.get("stop"), list):
            if len(stops) > _MOST_STOPS:
                raise ApiError(400, f"at most {_MOST_STOPS} stop texts work", param="stop")
            found["stop"] = [each for each in stops if each != ""]  # a form that was left empty
        if found.get("stop") in ("", []):
            del found["stop"]
        seed = found.get("seed")
        if isinstance(seed, int) and seed < 0:  # -1 asks for any; elsewhere integers have signs
            found["seed"] = None if seed == -1 else seed % _SEEDS
        return found


def _whole(keyword: str, value: Any) -> Any:
    """Some clients send every number as a float."""
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and ANSWER[keyword].kind is int else value


async def read_fields(http: HttpRequest, most: int) -> Fields:
    """Those of a body of at most so many bytes; ApiError where it is no JSON object."""
    return Fields(decode(await read_body(http, most)))
