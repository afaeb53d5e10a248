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


# -- variables of the Hugging Face hub and of other programs' model folders -----------------------


def hub_endpoint() -> str:
    """The hub's address; mirrors and tests set HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token() -> str | None:
    """The user's access token: HF_TOKEN, else the file that `hf auth login` writes."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:
        return token
    path = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
    try:
        return path.read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def is_offline() -> bool:
    """Whether the user forbade every connection."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def model_folders() -> dict[str, list[Path]]:
    """Where other programs keep models, by program; they need not exist."""
    home, get = Path.home(), os.environ.get
    hub = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE")
    ollama, llama = get("OLLAMA_MODELS"), get("LLAMA_CACHE")
    shared = [Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama/models")]
    return {
        "huggingface": [Path(hub).expanduser() if hub else _hub_home() / "hub"],
        "ollama": [Path(ollama)] if ollama else [home / ".ollama" / "models", *shared],
        "lmstudio": [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"],
        "llama.cpp": [Path(llama)] if llama else _llama_cpp_folders(home),
    }


def _llama_cpp_folders(home: Path) -> list[Path]:
    local = os.environ.get("LOCALAPPDATA")
    windows = [Path(local) / "llama.cpp"] if local else []
    return [_xdg_cache() / "llama.cpp", home / "Library" / "Caches" / "llama.cpp", *windows]


def _hub_home() -> Path:
    home = os.environ.get("HF_HOME")
    return Path(home).expanduser() if home else _xdg_cache() / "huggingface"


def _xdg_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache).expanduser() if cache else Path.home() / ".cache"


def _home() -> Path | None:
    value = os.environ.get(HOME)
    return Path(value).expanduser().absolute() if value else None
