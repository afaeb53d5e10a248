"""Where edgeinfer keeps its files, and every environment variable it reads.

Knows nothing of what is stored there.
"""

from __future__ import annotations

import os
from pathlib import Path

HOME = "EDGEINFER_HOME"  # one folder for everything we write
ISA = "EDGEINFER_ISA"  # force a poorer instruction set: "avx2", "generic"
THREADS = "EDGEINFER_THREADS"  # default of `threads`
DEBUG = "EDGEINFER_DEBUG"  # any value: tracebacks instead of one-line errors


def cache_folder() -> Path:
    """Compiled kernels and other files that can be made again."""
    home = _home()
    if home is not None:
        return home / "cache"
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgeinfer", appauthor=False))


def data_folder() -> Path:
    """Models, sessions and settings."""
    home = _home()
    if home is not None:
        return home / "data"
    import platformdirs

    return Path(platformdirs.user_data_dir("edgeinfer", appauthor=False))


def threads() -> int | None:
    """The number of threads asked for in the environment, None when nothing usable is."""
    value = os.environ.get(THREADS, "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def isa() -> str | None:
    """The instruction-set family asked for in the environment."""
    return os.environ.get(ISA) or None


def is_debug() -> bool:
    return bool(os.environ.get(DEBUG))


def _home() -> Path | None:
    value = os.environ.get(HOME)
    return Path(value).expanduser() if value else None
