"""Writes a conversation as Markdown or JSON.

Knows nothing of widgets.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeinfer import EdgeInferError, reason_of
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.records import Node

_ROLES = {"user": "You", "assistant": "Answer"}


def as_markdown(conversation: Conversation) -> str:
    """The branch on show."""
    parts = [f"# {conversation.title or 'Conversation'}"]
    if conversation.model:
        parts.append(f"*{conversation.model}*")
    if conversation.system:
        parts += ["## System", conversation.system]
    for node in conversation.branch():
        parts.append(f"## {_ROLES.get(node.role, node.role)}")
        parts += [f"> attached: {each.name}" for each in node.attachments]
        if node.reasoning.strip():
            thoughts = node.reasoning.strip()
            parts.append(f"<details><summary>Thoughts</summary>\n\n{thoughts}\n\n</details>")
        parts.append(node.content)
        if node.state == "stopped":
            parts.append("*(stopped)*")
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(conversation: Conversation) -> str:
    """The branch on show, with everything that is known of each message."""
    messages = [message_of(node) for node in conversation.branch()]
    whole = {
        "title": conversation.title,
        "model": conversation.model,
        "system": conversation.system,
        "messages": messages,
    }
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def message_of(node: Node) -> dict[str, Any]:
    """What is known of a message."""
    message: dict[str, Any] = {"role": node.role, "content": node.content, "state": node.state}
    if node.reasoning:
        message["reasoning"] = node.reasoning
    if node.attachments:
        message["attachments"] = [
            {"name": each.name, "text": each.text} for each in node.attachments
        ]
    return message | {key: value for key, value in node.details.items() if key not in message}


def export(
    conversation: Conversation, argument: str, folder: Path, *, replaces: bool = False
) -> Path:
    """Write `[md|json] [path]`; FileExistsError where that would replace a file unasked."""
    words = argument.split(maxsplit=1)
    kind = words.pop(0) if words and words[0] in ("md", "json") else ""
    name = words[0] if words else ""
    kind = kind or ("json" if name.endswith(".json") else "md")
    # A home that nobody knows is no folder here: unlike Path's, this one does not raise.
    path = folder / os.path.expanduser(name) if name else _free_name(conversation, kind, folder)
    text = as_json(conversation) if kind == "json" else as_markdown(conversation)
    try:
        if path.is_file() and not replaces:
            raise FileExistsError(path)
        write(path, text.encode("utf-8", "replace"))
    except FileExistsError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # links in a ring, a name with a zero byte
        reason = reason_of(error)
        raise EdgeInferError(
            f"{path} can't be written ({reason}); /export {kind} PATH takes another place"
        ) from error
    return path


def write(path: Path, data: bytes) -> None:
    """All of it or nothing: what was there before stays where it fails."""
    if path.exists() and not path.is_file():  # a pipe, a terminal
        path.write_bytes(data)
        return
    path = path.resolve()
    part = path.with_name(f".{path.name[:80]}.{os.urandom(4).hex()}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _free_name(conversation: Conversation, kind: str, folder: Path) -> Path:
    base = re.sub(r"\W+", "-", conversation.title.lower()).strip("-")[:40] or "conversation"
    return free_path(folder, base, kind)


def free_path(folder: Path, base: str, kind: str) -> Path:
    """Where no file is yet: `base.kind`, or with a number after `base`."""
    path, n = folder / f"{base}.{kind}", 1
    while path.exists():
        n += 1
        path = folder / f"{base}-{n}.{kind}"
    return path
