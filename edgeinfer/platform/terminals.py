"""Terminals: whether something was typed or pasted that nobody has read yet."""

from __future__ import annotations

import os
import sys
import time

_LOOK_SECONDS = 0.01


def input_waits(seconds: float) -> bool:
    """Whether the terminal that is stdin has input, or gets some within so many seconds."""
    if os.name == "posix":
        import select

        return bool(select.select([sys.stdin.fileno()], [], [], seconds)[0])
    if sys.platform == "win32":
        import msvcrt

        end = time.monotonic() + seconds
        while not msvcrt.kbhit():
            if time.monotonic() >= end:
                return False
            time.sleep(_LOOK_SECONDS)
        return True
    return False
