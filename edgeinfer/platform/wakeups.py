"""Waking an event loop from other threads."""

from __future__ import annotations

import ctypes
import os


class Wakeup:
    """A descriptor that is readable once it was rung, in any thread; OSError where there is none.

    Neither way takes longer than the system does: the interpreter is not given to others
    meanwhile, who might keep it for a hundred times as long.
    """

    def __init__(self) -> None:
        try:
            libc = ctypes.PyDLL(None)
            self._write, self._read = libc.eventfd_write, libc.eventfd_read
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except (AttributeError, TypeError) as error:  # Linux alone has them
            raise OSError("this system has no eventfd") from error
        self._write.argtypes = ctypes.c_int, ctypes.c_uint64
        self._count = ctypes.c_uint64()
        self._count_at = ctypes.byref(self._count)

    @classmethod
    def or_none(cls) -> Wakeup | None:
        """One where the system has it."""
        try:
            return cls()
        except OSError:
            return None

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        self._write(self._fd, 1)

    def clear(self) -> None:
        """Not readable any more until it is rung again."""
        self._read(self._fd, self._count_at)

    def __del__(self) -> None:
        # NOTE: only now: a thread that still rings would write to whoever has the number next.
        if hasattr(self, "_fd"):
            os.close(self._fd)
