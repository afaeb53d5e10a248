"""What native code needs: memory, leave to run, and the calls by which its threads sleep."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform as _platform
import sys
from typing import NamedTuple

_HUGE_PAGE = 2 << 20


class Memory:
    """Zeroed memory outside the Python heap; pages cost nothing until they are touched.

    With `huge` it asks for huge pages, for data that is read from end to end. None of them is more
    than data, so that no more is held than was asked for.
    """

    def __init__(self, n_bytes: int, *, huge: bool = False) -> None:
        self.n_bytes = n_bytes
        # One huge page more, so that the start can be aligned; a prefetch may run past the end.
        self._map = _map_anonymous(n_bytes + _HUGE_PAGE + mmap.PAGESIZE)
        self._view = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        base = ctypes.addressof(self._view)
        self.address = -(-base // _HUGE_PAGE) * _HUGE_PAGE
        start = self.address - base
        end = start + n_bytes // _HUGE_PAGE * _HUGE_PAGE
        if huge and end > start:
            self._advise("MADV_HUGEPAGE", start, end)
        self._advise("MADV_NOHUGEPAGE", end, len(self._map))  # some systems make them unasked

    def _advise(self, advice: str, start: int, end: int) -> None:
        if hasattr(mmap, advice):
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                self._map.madvise(getattr(mmap, advice), start, end - start)

    def view(self, address: int, n_bytes: int) -> memoryview:
        """Bytes of it, which stay as long as somebody holds the view."""
        start = address - ctypes.addressof(self._view)
        return memoryview(self._map)[start : start + n_bytes]

    def close(self) -> None:
        """Return the memory, or leave it to who holds a view; every address into it is dead."""
        if self.address:
            self.address = 0
            del self._view
            with contextlib.suppress(BufferError):
                self._map.close()
            del self._map


class Code:
    """Machine code in memory that can be run and no longer written; OSError where that fails."""

    def __init__(self, image: bytes) -> None:
        self._map = _map_anonymous(len(image))
        self._map.write(image)
        # Whoever holds the view keeps the memory: it is freed when this object is dropped.
        self._view = (ctypes.c_char * len(image)).from_buffer(self._map)
        self.address = ctypes.addressof(self._view)
        protect = getattr(_libc(), "mprotect", None)
        if protect is None:
            raise OSError("this system has no mprotect")
        address, n_bytes = ctypes.c_void_p(self.address), ctypes.c_size_t(len(image))
        if protect(address, n_bytes, _READ_AND_RUN):
            raise OSError("memory can't be made executable")


def _map_anonymous(n_bytes: int) -> mmap.mmap:
    # Python's default is shared memory, of which Linux makes no huge pages.
    if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, n_bytes)


_READ_AND_RUN = 5  # mprotect's PROT_READ | PROT_EXEC


def _libc() -> ctypes.CDLL | None:
    return None if sys.platform == "win32" else ctypes.CDLL(None)


def can_run_generated_code() -> bool | None:
    """Whether memory may be written and then executed; None where the system doesn't tell."""
    if sys.platform == "win32":
        return None
    try:
        libc = ctypes.CDLL(None)
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            view = ctypes.c_char.from_buffer(page)
            address = ctypes.c_void_p(ctypes.addressof(view))
            allowed = libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 5) == 0
            del view
        return bool(allowed)
    except (AttributeError, OSError, BufferError):
        return None


def keep(thing: object) -> None:
    """Let an object live as long as the process: an interpreter that ends would free it before."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class ThreadCalls(NamedTuple):
    """Addresses of C functions by which native threads yield and sleep.

    With `futex` set, `wait` is libc's `syscall` and sleepers are woken by the same; without it,
    `wait` is a plain sleep of `sleep_arg`, and a sleeper looks by itself.
    """

    yield_: int
    wait: int
    futex: int  # the system call's number, 0 for none
    sleep_arg: int


_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}


def thread_calls() -> ThreadCalls:
    if sys.platform == "win32":
        kernel32 = ctypes.windll.kernel32
        return ThreadCalls(_address(kernel32.SwitchToThread), _address(kernel32.Sleep), 0, 1)
    libc = ctypes.CDLL(None)
    number = _FUTEX_NUMBERS.get(_platform.machine(), 0) if sys.platform.startswith("linux") else 0
    wait = libc.syscall if number else libc.usleep
    return ThreadCalls(_address(libc.sched_yield), _address(wait), number, 200)


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
