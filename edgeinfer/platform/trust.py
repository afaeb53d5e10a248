"""Whom files are from: whether others than this user and root can have written them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from edgeinfer.platform.files import open_plain, read_whole

_MOST_BYTES = 64 << 20  # of a kernel, with room to spare


def distrust(folder: Path) -> str | None:
    """Why others may have put what lies in a folder: like the StrictModes of OpenSSH.

    None where every folder from the root on, through links, belongs to this user or root and
    nobody else can write there, or only add files (sticky). What does not exist is no reason.
    """
    if os.name != "posix":
        return None
    pending, at = _parts(os.fspath(folder.absolute())), "/"
    n_links = 0
    while True:
        try:
            status = os.lstat(at)
            target = os.readlink(at) if stat.S_ISLNK(status.st_mode) else None
        except OSError:  # what we can't look at, we can't read either
            return None
        if target is None and not stat.S_ISDIR(status.st_mode):  # nothing can lie there
            return None
        reason = _not_ours(status, at)
        if reason is not None or n_links > _MOST_LINKS:
            return reason or f"{folder} is too many links"
        if target is not None:
            target = os.path.join(os.path.dirname(at), target)
            n_links, at, pending = n_links + 1, "/", [*_parts(target), *pending]
        elif not pending:
            return None
        else:
            at = os.path.normpath(os.path.join(at, pending.pop(0)))


_MOST_LINKS = 40


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _not_ours(status: os.stat_result, path: str) -> str | None:
    """Why others can change a file or folder of this status."""
    mode, uid = stat.S_IMODE(status.st_mode), status.st_uid
    if uid not in (0, os.geteuid()):
        return f"{path} belongs to user {uid}"
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX):
        return None
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_only_member(status.st_gid)):
        return f"others can write to {path} (mode {mode:04o})"
    return None


def _is_only_member(gid: int) -> bool:
    """Whether a group is the private one of this user, as many systems make one for each."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    is_private = gid == user.pw_gid and group.gr_name == user.pw_name
    return is_private and set(group.gr_mem) <= {user.pw_name}


def read_private(path: Path) -> bytes:
    """A file that only this user or root can have written; PermissionError for any other.

    Whether others can put another file there is the folder's to say: see `distrust`.
    """
    descriptor, status = open_plain(path, os.O_RDONLY)
    with open(descriptor, "rb") as file:
        reason = _not_ours(status, str(path)) if os.name == "posix" else None
        if reason is not None:
            raise PermissionError(errno.EPERM, reason, str(path))
        return read_whole(file, _MOST_BYTES)
