"""Ids of calls: which result is of which call, whatever clients have called either.

Knows nothing of templates.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

ID_LENGTH = 9  # letters of a call's id: some templates refuse others
_ID_PREFIXES = ("call_", "toolu_")


class _Call(NamedTuple):
    """The id that a call came with, made short, the one that it has, and the name of its tool."""

    given: str
    id: str
    name: str


class _Waiting:
    """Calls that wait for their results."""

    def __init__(self, calls: Iterable[_Call] = ()) -> None:
        self._queues: defaultdict[tuple[str, str], deque[_Call]] = defaultdict(deque)
        self._answered = set[str]()
        for call in calls:
            for key in (("id", call.given), ("name", call.name), ("", "")):
                self._queues[key].append(call)

    def take(self, *keys: tuple[str, str]) -> _Call | None:
        """The first that has one of the keys, by the first of these that any has."""
        for key in keys:
            queue = self._queues[key]
            while queue:
                call = queue.popleft()
                if call.id not in self._answered:
                    self._answered.add(call.id)
                    return call
        return None


def with_short_ids(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls, and their results, with ids of the one length that some templates take.

    A call without one, or with that of another in its message, gets its own. A result is that of
    the first call that waits for it by its id, else by its name, else at all; it has that name.
    """
    found, waiting, names = [], _Waiting(), dict[str, str]()
    for i, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            known = _known(calls, i)
            waiting = _Waiting(known)
            names |= {call.id: call.name for call in known}
            named = [{**call, "id": each.id} for call, each in zip(calls, known, strict=True)]
            message = {**message, "tool_calls": named}
        elif message["role"] == "tool":
            given, name = _short(message.get("tool_call_id")), str(message.get("name") or "")
            keys = (("id", given), ("id", "")) if given else (("name", name), ("", ""))
            called = waiting.take(*keys)
            id = called.id if called is not None else given or short_id(str(i))
            message = {"name": names.get(id, ""), **message, "tool_call_id": id}
        found.append(message)
    return found


def _known(calls: Sequence[Mapping[str, Any]], i: int) -> list[_Call]:
    """Those of the message `i`."""
    found, taken = [], set[str]()
    for n, call in enumerate(calls):
        given = _short(call.get("id"))
        id = given if given and given not in taken else short_id(f"{given}{i}.{n}")
        taken.add(id)
        found.append(_Call(given, id, _name(call)))
    return found


def with_naming_ids(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with ids that hold the names of tools, as Kimi K2 knows them.

    For templates that show nothing of a call but its id and its arguments.
    """
    numbers, ids = count(), dict[str, str]()
    found = []
    for message in with_short_ids(messages):
        calls = message.get("tool_calls") or ()
        ids |= {call["id"]: f"functions.{_name(call)}:{next(numbers)}" for call in calls}
        if calls:
            message = {**message, "tool_calls": [{**c, "id": ids[c["id"]]} for c in calls]}
        elif message["role"] == "tool":
            id = message["tool_call_id"]
            message = {**message, "tool_call_id": ids.get(id, id)}
        found.append(message)
    return found


def _name(call: Mapping[str, Any]) -> str:
    return str(call.get("function", call).get("name") or "")


def _short(id: Any) -> str:
    return short_id(str(id)) if id else ""


def short_id(id: str) -> str:
    """The id of a call as nine letters and digits, always the same of the same."""
    bare = next((id[len(p) :] for p in _ID_PREFIXES if id.startswith(p)), id)
    if len(bare) == ID_LENGTH and bare.isascii() and bare.isalnum():
        return bare
    import hashlib  # of calls alone

    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:ID_LENGTH]
