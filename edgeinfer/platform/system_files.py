"""Files of text in which a system such as Linux says what it is, and which cgroups we are in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, inner ones first; versions 1 and 2."""
    for line in (read(root / "proc/self/cgroup") or "0::/").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        mount = root / "sys/fs/cgroup"
        if controllers:  # version 1 has a tree for each controller, or for a few
            if controller not in controllers.split(","):
                continue
            mounts = (mount / controllers, mount / controller)
            mount = next((each for each in mounts if os.path.isdir(each)), mount)
        # In a container the path may be the host's: then only the mounted root is there.
        parts = [] if ".." in path else path.strip("/").split("/")
        for n in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:n])


def fields(path: Path) -> dict[str, int]:
    """The numbers behind the names at the starts of lines; of equal names the first."""
    found: dict[str, int] = {}
    for line in (read(path) or "").splitlines():
        words = line.split()
        if len(words) > 1 and (count := number(words[1])) is not None:
            found.setdefault(words[0], count)
    return found


def number(text: str | None) -> int | None:
    """A count of up to 20 digits; None for "max", -1 and anything else."""
    return int(text) if text and len(text) <= 20 and text.isascii() and text.isdigit() else None


def read(path: Path | str) -> str | None:
    """All of a file without the blanks around it; None where it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return None
