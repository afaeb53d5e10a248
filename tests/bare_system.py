"""A pytest plugin: an operating system that knows none of the calls of edgeinfer.platform.

`python -m pytest -p tests.bare_system` runs the suite without affinity, cgroups, /proc, madvise,
futexes, file locks, resource limits and fork. Knows nothing of the tests.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any

_OS_CALLS = (
    "sched_getaffinity", "sysconf", "posix_fadvise", "fork", "forkpty", "register_at_fork",
    "getloadavg", "fsync", "preadv", "eventfd",
)  # fmt: skip
_ADVICE = ("MADV_HUGEPAGE", "MADV_DONTNEED", "MADV_WILLNEED", "MADV_SEQUENTIAL")


def pytest_configure(config: Any) -> None:
    for name in _OS_CALLS:
        if hasattr(os, name):
            delattr(os, name)
    for name in _ADVICE:
        if hasattr(mmap, name):
            delattr(mmap, name)
    for module in ("resource", "fcntl"):
        sys.modules[module] = None  # type: ignore[assignment]
    from edgeinfer import platform
    from edgeinfer.platform import native, system_files

    system_files.read = lambda path: None
    native._FUTEX_NUMBERS.clear()
    platform.can_run_generated_code = lambda: None
    platform.cuda_driver = lambda: None
