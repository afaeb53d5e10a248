"""Which processors there are, how many of them this process may use, and who made them."""

from __future__ import annotations

import os
import platform as _platform
from collections.abc import Iterator
from pathlib import Path

from edgeinfer.platform import system_files

_ROOT = Path("/")


def default_threads(root: Path = _ROOT) -> int:
    """Physical cores that this process may use: affinity and cgroup quotas respected.

    `root` is where the system's own files are looked for.
    """
    allowed = _affinity()
    cores = _physical_cores(allowed) if allowed else None
    return min(cores, usable_processors(root)) if cores else usable_processors(root)


def usable_processors(root: Path = _ROOT) -> int:
    """Processors, two of a core counted as two, that affinity and cgroup quotas leave us."""
    allowed = _affinity()
    count = len(allowed) if allowed else os.cpu_count() or 1
    return max(1, min([count, *_cgroup_cpus(root)]))


def _affinity() -> set[int] | None:
    try:
        return set(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system, and a sandbox may forbid it
        return None


def _physical_cores(cpus: set[int]) -> int | None:
    """Cores behind these logical processors; None where the system doesn't tell."""
    siblings = set()
    for cpu in cpus:
        text = system_files.read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if text is None:
            return None
        siblings.add(text)
    return len(siblings)


def _cgroup_cpus(root: Path) -> Iterator[int]:
    """Whole processors that the quota of each of our cgroups grants."""
    for folder in system_files.cgroups(root, "cpu"):
        words = (system_files.read(folder / "cpu.max") or "").split()
        if len(words) < 2:  # version 1
            files = (folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
            words = [system_files.read(file) or "" for file in files]
        quota, period = map(system_files.number, words[:2])
        if quota is not None and period:
            yield quota // period


def processor_facts() -> str | None:
    """What the system says of the first processor and never changes while it is this one."""
    text = (system_files.read(_CPUINFO) or "").partition("\n\n")[0]
    lines = [line for line in text.splitlines() if not line.startswith(_CHANGING_FACTS)]
    return "\n".join([_platform.machine(), *lines]) if lines else None


_CPUINFO = "/proc/cpuinfo"
_CHANGING_FACTS = ("processor", "cpu MHz", "bogomips", "BogoMIPS", "apicid", "initial apicid",
    "core id", "physical id")  # fmt: skip


def cpu_name() -> str:
    """The processor's name as its maker gives it."""
    for line in (system_files.read(_CPUINFO) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _platform.processor() or _platform.machine()
