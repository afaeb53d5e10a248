"""How much memory is free for this process, and how much it holds."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from edgeinfer.platform import system_files

_ROOT = Path("/")
_FALLBACK_MEMORY = 4 << 30


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that a new allocation may take without swapping.

    Never more than our cgroups and this process's own limits allow; clean pages of files count as
    free. `root` is where the system's own files are looked for.
    """
    return max(0, min([_free_memory(root), *(left for _, left in _limits(root))]))


def memory_budget(held: int = 0, root: Path = _ROOT) -> int:
    """Bytes that this process may hold where nobody says how many, `held` being so already.

    Three quarters of what is available, and of each limit of ours all but a tenth.
    """
    rooms = [(_free_memory(root) + held) * 3 // 4]
    rooms += [left + held - limit // 10 for limit, left in _limits(root)]
    return max(0, min(rooms))


def _free_memory(root: Path) -> int:
    """Bytes that the whole system can give without swapping."""
    kib = system_files.fields(root / "proc/meminfo").get("MemAvailable:")
    return kib * 1024 if kib is not None else _windows_memory() or _sysconf_memory()


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """The limits that hold for this process, in bytes, and how many are left below each."""
    yield from _cgroup_limits(root)
    yield from _process_limits(root)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Those of each of our cgroups; clean pages of files count as left."""
    for folder in system_files.cgroups(root, "memory"):
        for limit_name, used_name, prefix in _MEMORY_LIMITS:
            texts = (system_files.read(folder / name) for name in (limit_name, used_name))
            limit, used = map(system_files.number, texts)
            if limit is None:
                continue
            used = rss() if used is None else used  # a sandbox may hide it: it is no less
            stat = system_files.fields(folder / "memory.stat")
            clean, dirty = (
                sum(stat.get(prefix + name, 0) for name in names)
                for names in (("inactive_file", "active_file"), _DIRTY_FILES[prefix])
            )
            yield limit, limit - used + min(used, max(0, clean - dirty))


# Version 2, where `high` is what a group is slowed down at, and version 1.
_MEMORY_LIMITS = (
    ("memory.max", "memory.current", ""),
    ("memory.high", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
_DIRTY_FILES = {"": ("file_dirty", "file_writeback"), "total_": ("dirty", "writeback")}


def _process_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Those that were set for this process itself (`ulimit -v`, `-d`)."""
    try:
        import resource
    except ImportError:  # Windows
        return
    status: dict[str, int] | None = None
    for limit_name, used_name in (("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:")):
        which = getattr(resource, limit_name, None)  # not every system has both
        if which is None:
            continue
        try:
            limit = resource.getrlimit(which)[0]
        except OSError:  # a sandbox may forbid the question
            continue
        if limit >= 0:  # -1: none
            if status is None:  # most processes have no such limits
                status = system_files.fields(root / "proc/self/status")
            yield limit, limit - 1024 * status.get(used_name, 0)


def peak_rss(root: Path = _ROOT) -> int:
    """The most memory this process has held, in bytes; 0 where the system doesn't tell."""
    # What `resource` says counts, on Linux, what the process that started this one held then.
    kib = system_files.fields(root / "proc/self/status").get("VmHWM:")
    if kib is not None:
        return 1024 * kib
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss() -> int:
    """The memory this process holds now, in bytes; 0 where the system doesn't tell."""
    fields = (system_files.read("/proc/self/statm") or "").split()
    n_pages = system_files.number(fields[1]) if len(fields) > 1 else None
    return (n_pages or 0) * mmap.PAGESIZE


def _windows_memory() -> int | None:
    if sys.platform != "win32":
        return None
    from edgeinfer.platform import windows

    return windows.available_memory()


def _sysconf_memory() -> int:
    try:
        n_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _FALLBACK_MEMORY
    return n_bytes if n_bytes > 0 else _FALLBACK_MEMORY  # -1: it is not told
