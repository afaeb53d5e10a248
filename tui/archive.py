"""The whole history: counted, cleared, written to one file and read from one, whoever wrote it."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from edgeinfer import EdgeInferError, one_line, reason_of
from edgeinfer.tui.conversation import Conversation, title_of
from edgeinfer.tui.export import message_of, write
from edgeinfer.tui.records import (
    DETAILS,
    Attachment,
    Header,
    Node,
    State,
    details_of,
    tags_of,
    text_of,
)
from edgeinfer.tui.schema import explain
from edgeinfer.tui.store import FILE_NAME, Store, Times

T = TypeVar("T")

_FORMAT, _VERSION = "edgeinfer history", 1
_MOST_BYTES = 256 << 20
_MOST_ID = 1 << 62
_LATEST = 1e11  # seconds, of the year 5138
_Whole = tuple[int | None, Header, list[Node], Times]


def count_conversations(path: Path) -> int:
    """How many a file holds; raises EdgeInferError where it can't be read."""
    if not os.path.isfile(path):
        raise EdgeInferError(f"{path} can't be read: it is no file; move it away")
    address = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=1.0)) as db:
            return int(db.execute("SELECT count(*) FROM conversation").fetchone()[0])
    except (sqlite3.Error, OSError) as error:
        raise EdgeInferError(f"the history can't be read: {explain(error, path)}") from error


def clear_history(data_folder: Path) -> int | None:
    """Delete the history file; the number of conversations that were in it, None if unknown.

    Raises EdgeInferError where it can't be deleted.
    """
    path = data_folder / FILE_NAME
    n: int | None = 0
    if os.path.exists(path):
        try:
            n = count_conversations(path)
        except EdgeInferError:
            n = None
    for each in (path, *(Path(f"{path}{suffix}") for suffix in ("-wal", "-shm", "-journal"))):
        try:
            each.unlink(missing_ok=True)
        except OSError as error:
            raise EdgeInferError(
                f"{each} can't be deleted: {reason_of(error)}; end what uses it, or delete "
                "it yourself"
            ) from error
    return n


def lines(store: Store) -> Iterator[str]:
    """A line for each conversation, newest first."""
    for each in store.recent(_MOST_ID):
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.updated))
        tags = "".join(f" #{tag}" for tag in each.tags.split())
        yield f"{each.id}  {day}  {each.n_messages:4} messages  {one_line(each.title)}{tags}"


def name(store: Store, number: str, column: str, text: str) -> str:
    """Give a conversation a `title` or `tags`; what it then has. EdgeInferError without one."""
    text = tags_of(text) if column == "tags" else " ".join(text.split())
    if not text and column == "title":
        raise EdgeInferError("a title has at least one letter")
    id = int(number) if number.isascii() and number.isdigit() and len(number) < 20 else 0
    if not 0 < id < 1 << 63 or store.conversation(id) is None:
        raise EdgeInferError(
            f"no conversation {number[:40]!r}; `edgeinfer history --list` shows their numbers"
        )
    store.update_conversation(id, **{column: text})
    if why := store.notice(id):
        raise EdgeInferError(why)
    return f"{column}: {text or 'none'}"


# -- writing -------------------------------------------------------------------------------------


def export_history(store: Store, path: Path, *, replaces: bool = False) -> int:
    """Write every conversation with all its branches; how many.

    Raises EdgeInferError where the history can't be read or the file not be written,
    FileExistsError where that would replace a file unasked.
    """
    if path.is_file() and not replaces:
        raise FileExistsError(path)
    found = [each.id for each in store.recent(_MOST_ID)]
    texts = (json.dumps(one, ensure_ascii=False, indent=1) for one in _all(store, found))
    head = json.dumps({"format": _FORMAT, "version": _VERSION})[:-1]
    text = f'{head}, "conversations": [\n' + ",\n".join(texts) + "\n]}\n"
    try:
        write(path, text.encode("utf-8", "replace"))
    except (OSError, RuntimeError) as error:  # links in a ring
        reason = reason_of(error)
        raise EdgeInferError(f"{path} can't be written ({reason})") from error
    return len(found)


def _all(store: Store, ids: list[int]) -> Iterator[dict[str, Any]]:
    for id in ids:
        conversation = Conversation.load(store, id)
        if conversation is None:  # deleted meanwhile
            continue
        begun, changed = store.times(id)
        yield {
            "id": id,
            "title": conversation.title,
            "tags": conversation.tags.split(),
            "model": conversation.model,
            "system": conversation.system,
            "begun": begun,
            "changed": changed,
            "leaf": conversation.leaf,
            "messages": [
                {"id": node.id, "parent": node.parent, **message_of(node)}
                for node in conversation.nodes()
            ],
        }


# -- reading -------------------------------------------------------------------------------------


def import_history(store: Store, path: Path) -> tuple[int, int]:
    """Take in what `export_history` or `/export json` wrote: how many came, of how many.

    What is here already, by its number, stays as it is. Raises EdgeInferError for any other file,
    or where the history can't be written; then nothing was taken in.
    """
    try:
        if not path.is_file():
            raise EdgeInferError(f"{path} can't be imported: it is no file")
        if path.stat().st_size > _MOST_BYTES:
            raise EdgeInferError(f"{path} can't be imported: more than {_MOST_BYTES >> 20} MiB")
        whole = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        text = reason_of(error) if isinstance(error, OSError) else f"it is no JSON: {error}"
        raise EdgeInferError(f"{path} can't be imported: {text}") from error
    try:
        found = _checked(whole)
    except _Unfit as error:
        raise EdgeInferError(
            f"{path} can't be imported: {error}; what `edgeinfer history --export` and "
            "`/export json` write can be"
        ) from None
    return store.insert(found), len(found)


class _Unfit(Exception):
    """What is wrong, and where."""


def _checked(whole: object) -> list[_Whole]:
    if not isinstance(whole, dict):
        raise _Unfit(f"it holds {_kind(whole)}, not an object")
    if "messages" in whole:
        return [_conversation(whole, "it")]
    if whole.get("format") != _FORMAT:
        raise _Unfit(f"its format is {str(whole.get('format'))[:40]!r}, not {_FORMAT!r}")
    version = whole.get("version")
    if version != _VERSION or type(version) is not int:  # True and 1.0 are equal to 1
        raise _Unfit(f"its version is {str(version)[:40]}, this edgeinfer knows {_VERSION}")
    each = _field(whole, "conversations", list, "it")
    found = [_conversation(one, f"conversation {i}") for i, one in enumerate(each, 1)]
    ids = [id for id, *_ in found if id is not None]
    if len(set(ids)) < len(ids):
        raise _Unfit("two of its conversations have the same id")
    return found


def _conversation(value: object, where: str) -> _Whole:
    one = _object(value, where)
    nodes: dict[int, Node] = {}
    for i, each in enumerate(_field(one, "messages", list, where), 1):
        node = _message(each, f"message {i} of {where}", nodes)
        nodes[node.id] = node
    if not nodes:
        raise _Unfit(f"{where} has no messages")
    leaf = _number(one, "leaf", where, max(nodes))
    if leaf not in nodes:
        raise _Unfit(f"leaf of {where} is {leaf}, which is no message of it")
    tags = [text_of(tag) for tag in _field(one, "tags", list, where, []) if isinstance(tag, str)]
    header = Header(
        _text(one, "title", where) or title_of(next(iter(nodes.values())).content),
        _text(one, "model", where),
        _text(one, "system", where) or None,
        leaf,
        tags_of(" ".join(tags)),
    )
    now = time.time()
    times = (_time(one, "begun", where, now), _time(one, "changed", where, now))
    return _number(one, "id", where, None), header, list(nodes.values()), times


def _message(value: object, where: str, before: dict[int, Node]) -> Node:
    one = _object(value, where)
    last = next(reversed(before), None)
    id = _number(one, "id", where, (last or 0) + 1)
    parent = _number(one, "parent", where, None) if "parent" in one or "id" in one else last
    if id is None or id in before:
        raise _Unfit(f"id of {where} is {id}, as of a message before")
    if parent is not None and parent not in before:
        raise _Unfit(f"parent of {where} is {parent}, which is no message before it")
    role, state = _text(one, "role", where), _text(one, "state", where) or "done"
    if role not in ("user", "assistant"):
        raise _Unfit(f"role of {where} is {role[:40]!r}, not 'user' or 'assistant'")
    if state not in get_args(State):
        raise _Unfit(f"state of {where} is {state[:40]!r}, not one of {', '.join(get_args(State))}")
    attached = [
        _object(each, f"an attachment of {where}")
        for each in _field(one, "attachments", list, where, [])
    ]
    return Node(
        id, parent, role, _text(one, "content", where), _text(one, "reasoning", where),
        tuple(Attachment(_text(each, "name", where), _text(each, "text", where))
              for each in attached),
        "stopped" if state == "partial" else cast("State", state),
        details_of({name: one[name] for name in DETAILS & one.keys()}),
    )  # fmt: skip


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Unfit(f"{where} is {_kind(value)}, not an object")
    return value


def _field(one: dict[str, Any], name: str, kind: type[T], where: str, absent: T | None = None) -> T:
    value = one.get(name, absent)
    if not isinstance(value, kind):
        raise _Unfit(f"{name} of {where} is {_kind(value)}, not {_kind(kind())}")
    return value


def _text(one: dict[str, Any], name: str, where: str) -> str:
    value = one.get(name)
    return "" if value is None else text_of(_field(one, name, str, where))


def _number(one: dict[str, Any], name: str, where: str, absent: int | None) -> int | None:
    value = one.get(name)
    if value is None:
        return absent
    if type(value) is not int or not 0 < value < _MOST_ID:
        raise _Unfit(f"{name} of {where} is {str(value)[:40]}, not a number of a message")
    return value


def _time(one: dict[str, Any], name: str, where: str, absent: float) -> float:
    value = one.get(name, absent)
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value < _LATEST:
        raise _Unfit(f"{name} of {where} is {str(value)[:40]}, not a time in seconds")
    return float(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), f"{str(value)[:40]}")
