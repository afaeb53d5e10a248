"""What a repository on the hub holds, as its answer says: every name and number checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_MOST_BYTES = 1 << 50  # of a file
_MOST_NAME = 200  # bytes of a file's name: file systems take 255, and we add to it


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; only large ones have a checksum."""

    name: str
    n_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """One revision of a repository."""

    name: str
    revision: str
    licence: str | None
    files: dict[str, RemoteFile]


def read_repository(repo: str, facts: dict[str, Any]) -> Repository:
    """What the hub's answer says; KeyError, TypeError, ValueError and the like for another one."""
    files = {}
    for entry in facts["siblings"]:
        name, large = str(entry["rfilename"]), entry.get("lfs") or {}
        size, digest = large.get("size", entry.get("size")), large.get("sha256")
        if name.lower().endswith(".gguf") and _is_plain(name) and size is not None:
            if type(size) is not int or not 0 < size < _MOST_BYTES:
                raise ValueError(f"{name} of {size!r} bytes")
            if digest is not None:
                digest = _matching(SHA256, digest).lower()
            files[name] = RemoteFile(name, size, digest)
    licence = (facts.get("cardData") or {}).get("license")
    full_name = str(facts.get("id") or repo)
    return Repository(
        full_name if _is_plain(full_name) and full_name.count("/") == 1 else repo,
        _matching(_REVISION, facts["sha"]),
        licence if isinstance(licence, str) else None,
        files,
    )


SHA256, _REVISION = re.compile(r"[0-9A-Fa-f]{64}"), re.compile(r"[0-9A-Za-z]{1,64}")


def _matching(form: re.Pattern[str], text: object) -> str:
    """A text of this form; ValueError for anything else. It becomes part of a file's name."""
    if not isinstance(text, str) or not form.fullmatch(text):
        raise ValueError(f"{text!r} is not {form.pattern}")
    return text


def _is_plain(name: str) -> bool:
    """Whether a name can become a path below our folder, on every system."""
    return all(_PLAIN.fullmatch(part) and _is_short(part) for part in name.split("/"))


# Windows drops dots and spaces at the end, and means devices by some names.
_PLAIN = re.compile(
    r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))(?!\.+$)[^\x00-\x1f\x7f\\:*?\"<>|]+(?<![. ])",
    re.IGNORECASE,
)


def _is_short(part: str) -> bool:
    return len(part.encode("utf-8", "surrogatepass")) <= _MOST_NAME
