"""Where edgeinfer keeps its files, and every environment variable it reads.

Knows nothing of what is stored there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

HOME = "EDGEINFER_HOME"  # one folder for everything we write
ISA = "EDGEINFER_ISA"  # force a poorer instruction set: "avx2", "generic"
THREADS = "EDGEINFER_THREADS"  # default of `threads`
DEBUG = "EDGEINFER_DEBUG"  # any value: tracebacks instead of one-line errors
API_KEY = "EDGEINFER_API_KEY"  # for the server of --url
SYNC = "EDGEINFER_SYNC"  # any value: each kernel of a GPU is waited for, and named where it fails
EARLY = "EDGEINFER_EARLY"  # any value: a GPU's kernels begin before those ahead have ended
PERSISTENT = "EDGEINFER_PERSISTENT"  # any value: a GPU's launches for one row are joined into one

_MOST_DIGITS = 10  # Python refuses to read thousands

# What is neither found nor kept where nobody knows a home: files can't even be made by root there.
_NOWHERE = Path(os.devnull, "no-home-folder")


def cache_folder() -> Path:
    """Compiled kernels and other files that can be made again."""
    return _folder("cache")


def data_folder() -> Path:
    """Models, sessions and settings."""
    return _folder("data")


def _folder(kind: Literal["cache", "data"]) -> Path:
    value = os.environ.get(HOME)
    if value:
        try:
            return expand_user(value).absolute() / kind
        except OSError:  # the folder that it is relative to was deleted
            return _NOWHERE
    import platformdirs

    find = {"cache": platformdirs.user_cache_dir, "data": platformdirs.user_data_dir}[kind]
    try:
        path = Path(find("edgeinfer", appauthor=False))
    except RuntimeError:
        return _NOWHERE
    return path if path.is_absolute() else _NOWHERE


def expand_user(path: str | Path) -> Path:
    """A path with the home it begins with; as it is where that is not known."""
    return Path(os.path.expanduser(path))


def threads() -> int | None:
    """The number of threads asked for in the environment, None when nothing usable is."""
    value = os.environ.get(THREADS, "")
    is_number = value.isascii() and value.isdecimal() and len(value) < _MOST_DIGITS
    return (int(value) or None) if is_number else None


def isa() -> str | None:
    """The instruction-set family asked for in the environment."""
    return os.environ.get(ISA) or None


def is_debug() -> bool:
    return bool(os.environ.get(DEBUG))


def api_key(*, is_private: bool) -> str | None:
    """The key for a server: ours, else OpenAI's, for those alone that nobody can listen to."""
    others = os.environ.get("OPENAI_API_KEY") if is_private else None
    return os.environ.get(API_KEY) or others or None


def waits_for_each_kernel() -> bool:
    return bool(os.environ.get(SYNC))


def begins_kernels_early() -> bool:
    return bool(os.environ.get(EARLY))


def joins_kernels() -> bool:
    return bool(os.environ.get(PERSISTENT))


# -- variables of the Hugging Face hub and of other programs' model folders -----------------------


def hub_endpoint() -> str:
    """The hub's address; mirrors and tests set HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token() -> str | None:
    """The user's access token: HF_TOKEN, else the file that `hf auth login` writes."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:
        return token
    path = expand_user(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token")
    try:
        return path.read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def is_offline() -> bool:
    """Whether the user forbade every connection."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def model_folders() -> dict[str, list[Path]]:
    """Where other programs keep models, by program; they need not exist."""
    home, get = _user_home(), os.environ.get
    hub = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE")
    ollama, llama = get("OLLAMA_MODELS"), get("LLAMA_CACHE")
    shared = [Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama/models")]
    return {
        "huggingface": [expand_user(hub) if hub else _hub_home() / "hub"],
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
    return expand_user(home) if home else _xdg_cache() / "huggingface"


def _xdg_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return expand_user(cache) if cache else _user_home() / ".cache"


def _user_home() -> Path:
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and the system does not know this user
        return _NOWHERE
    return home if home.is_absolute() and os.environ.get("HOME") != "" else _NOWHERE
