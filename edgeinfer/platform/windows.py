"""What Windows alone is asked in structures of C: its free memory, and limits of a process."""

from __future__ import annotations

import ctypes
from typing import Any


class _MemoryStatus(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
        (name, ctypes.c_ulonglong)
        for name in ("total", "available", "page_total", "page_free", "virtual", "free", "extended")
    ]


def available_memory() -> int | None:
    """Bytes of physical memory that are free; None where Windows doesn't say."""
    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return None
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    return (
        int(status.available)
        if windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        else None
    )


class _JobLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = [
        ("process_time", ctypes.c_longlong),
        ("job_time", ctypes.c_longlong),
        ("flags", ctypes.c_uint32),
        ("working_sets", ctypes.c_size_t * 2),
        ("n_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("classes", ctypes.c_uint32 * 2),
        ("io", ctypes.c_ulonglong * 6),
        ("process_memory", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 3),
    ]


class Job:
    """A Windows job object that holds this process alone."""

    def __init__(self, kernel32: Any, handle: Any) -> None:
        self._kernel32, self._handle = kernel32, handle
        self._limits = _JobLimits()

    @classmethod
    def of_this_process(cls) -> Job | None:
        kernel32 = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
        for name in ("CreateJobObjectW", "GetCurrentProcess"):
            getattr(kernel32, name).restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel32.CreateJobObjectW(None, None))
        us = ctypes.c_void_p(kernel32.GetCurrentProcess())
        joined = handle and kernel32.AssignProcessToJobObject(handle, us)
        return cls(kernel32, handle) if joined else None

    def limit(self, *, memory: int | None = None, seconds: float | None = None) -> None:
        """Keep to bytes from now on, and to seconds since the process began (None: no end)."""
        if memory is not None:
            self._limits.process_memory = memory
            self._limits.flags |= _JOB_PROCESS_MEMORY
        self._limits.process_time = int((seconds or 0) * 1e7)
        self._limits.flags &= ~_JOB_PROCESS_TIME
        self._limits.flags |= _JOB_PROCESS_TIME if seconds is not None else 0
        limits = ctypes.byref(self._limits)
        self._kernel32.SetInformationJobObject(self._handle, 9, limits, ctypes.sizeof(_JobLimits))


_JOB_PROCESS_TIME, _JOB_PROCESS_MEMORY = 0x2, 0x100
