"""Which model the latest chat was held with. Knows nothing of how models come here."""

from __future__ import annotations

import os

from edgeinfer import config, platform
from edgeinfer.catalog import DEFAULT_MODEL
from edgeinfer.discovery import find_name

_LAST = "last-model"


def remember(name: str) -> None:
    """Note the model of the latest chat; a folder that can't be written is no reason to stop."""
    try:
        platform.write_whole(config.data_folder() / _LAST, name.encode())
    except OSError:
        pass


def last_model() -> str:
    """The model of the latest chat while it is here, else the default one."""
    try:
        name = (config.data_folder() / _LAST).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return DEFAULT_MODEL
    is_here = name and (os.path.isfile(name) or find_name(name) is not None)
    return name if is_here else DEFAULT_MODEL
