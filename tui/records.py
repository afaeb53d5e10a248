"""Messages and conversations as the history file keeps them; rows are checked, whoever wrote them.

Knows nothing of SQL.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

from edgeinfer.tui.search import tokens

State: TypeAlias = Literal["done", "partial", "stopped", "failed"]
_MOST = 1e12  # seconds, tokens a second
_MOST_TAGS = 20


@dataclass(frozen=True, slots=True)
class Attachment:
    """A text that goes with a message; `n_tokens` None until it was counted."""

    name: str
    text: str
    n_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A message that is being written, waits or is sent."""

    text: str = ""
    attachments: tuple[Attachment, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.text.strip() and not self.attachments

    @classmethod
    def joined(cls, drafts: Iterable[Draft]) -> Draft:
        """All of them as one message."""
        kept = list(drafts)
        attachments = tuple(each for draft in kept for each in draft.attachments)
        return cls("\n".join(draft.text for draft in kept if draft.text), attachments)


@dataclass(slots=True, eq=False)
class Node:
    """A message of the tree. An answer is `partial` from its first token to its end."""

    id: int
    parent: int | None
    role: str
    content: str
    reasoning: str = ""
    attachments: tuple[Attachment, ...] = ()
    state: State = "done"
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Header:
    """What is kept of a conversation beside its messages; `leaf` ends the branch on show.

    `tags` are words, each once, apart by one space.
    """

    title: str
    model: str
    system: str | None
    leaf: int | None
    tags: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """A line of the list of conversations; `snippet` is where a search matched."""

    id: int
    title: str
    updated: float
    model: str
    n_messages: int
    snippet: str = ""
    tags: str = ""


# -- from rows -----------------------------------------------------------------------------------


def header_of(row: sqlite3.Row) -> Header:
    system, leaf = row["system"], row["leaf"]
    return Header(
        text_of(row["title"]),
        text_of(row["model"]),
        None if system is None else text_of(system),
        leaf if isinstance(leaf, int) else None,
        tags_of(text_of(row["tags"])),
    )


def node_of(row: sqlite3.Row) -> Node:
    parent, state = row["parent"], text_of(row["state"])
    return Node(
        id=row["id"],
        parent=parent if isinstance(parent, int) else None,
        role=text_of(row["role"]),
        content=text_of(row["content"]),
        reasoning=text_of(row["reasoning"]),
        attachments=_attachments(_json(row["attachments"])),
        state=cast("State", state) if state in get_args(State) else "stopped",
        details=details_of(_json(row["details"])),
    )


def summary_of(row: sqlite3.Row, snippet: str = "") -> Summary:
    updated = row["updated"]
    return Summary(
        row["id"],
        text_of(row["title"]),
        float(updated) if _is_number(updated) else 0.0,
        text_of(row["model"]),
        row["n"],
        snippet,
        tags_of(text_of(row["tags"])),
    )


def text_of(value: object) -> str:
    """A text that every encoding can take, whatever a column holds."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def draft_of(column: object) -> Draft:
    """A draft as `draft_column` wrote it; an empty one for anything else."""
    value = _json(column)
    if not isinstance(value, dict):
        return Draft()
    return Draft(text_of(value.get("text")), _attachments(value.get("attachments")))


def _json(column: object) -> Any:
    text = text_of(column)
    try:
        value = json.loads(text)
        # An escape can be half of a pair, which nothing can write.
        is_whole = "\\ud" not in text.lower()
        return value if is_whole else json.loads(text_of(json.dumps(value, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return None


def _attachments(value: Any) -> tuple[Attachment, ...]:
    rows = [each for each in value if isinstance(each, list)] if isinstance(value, list) else []
    return tuple(
        Attachment(str(name), str(text), n if _is_count(n) else None)
        for name, text, n in (row for row in rows if len(row) == 3)
    )


def details_of(value: Any) -> dict[str, Any]:
    """Those that are what the screen takes them for; unknown ones as they are."""
    if not isinstance(value, dict):
        return {}
    checks = {name: check for names, check in _DETAILS for name in names}
    return {name: each for name, each in value.items() if checks.get(name, _is_any)(each)}


def _is_any(value: object) -> bool:
    return True


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(cast("float", value)) < _MOST  # not NaN either


def _are_logprobs(value: object) -> bool:
    """[text, logprob, [[text, logprob], ...]] for every token."""
    return isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 3 and _is_pair(each[:2])
        and isinstance(each[2], list) and all(map(_is_pair, each[2]))
        for each in value
    )  # fmt: skip


def _is_pair(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or type(value[1]) not in (int, float):
        return False
    p = value[1]  # NaN where it is unknown
    return _is_text(value[0]) and not p > 1 and (isinstance(p, float) or p > -_MOST)


_DETAILS = (
    (("n_tokens", "n_prompt", "n_cached", "seed"), _is_count),
    (("tok_s", "first_s", "thinking_s"), _is_number),
    (("model", "server", "finish", "error"), _is_text),
    (("logprobs",), _are_logprobs),
)
DETAILS = frozenset(name for names, _ in _DETAILS for name in names)


# -- for the search ------------------------------------------------------------------------------


def message_tokens(content: object, attachments: object) -> str:
    """What is found of a message, from its columns: its text and the names of what it holds."""
    names = [each.name for each in _attachments(_json(attachments))]
    return tokens("\n".join([text_of(content), *names]))


def title_tokens(title: object) -> str:
    return tokens(text_of(title))


def tags_of(text: str) -> str:
    """Tags as they are kept, however they are written: `#work, #travel`."""
    words = (word.strip("#,;") for word in text.replace(",", " ").split())
    return " ".join(list(dict.fromkeys(filter(None, words)))[:_MOST_TAGS])


# -- to rows -------------------------------------------------------------------------------------


def columns_of(node: Node) -> tuple[str, ...]:
    """Role, content, reasoning, attachments, state and details."""
    return (
        node.role, text_of(node.content), text_of(node.reasoning),
        json.dumps(_rows_of(node.attachments)), node.state, json.dumps(node.details),
    )  # fmt: skip


def draft_column(draft: Draft) -> str:
    return json.dumps({"text": draft.text, "attachments": _rows_of(draft.attachments)})


def _rows_of(attachments: Iterable[Attachment]) -> list[list[object]]:
    return [[each.name, each.text, each.n_tokens] for each in attachments]
