"""Which model the latest chat was held with. Knows nothing of how models come here."""

from __future__ import annotations

import os

from edgeinfer import config, platform
from edgeinfer.catalog import DEFAULT_MODEL
from edgeinfer.discovery import find_name

_LAST = "last-model"


def remember(name: str) -> str:
    """Note the model of the latest chat; why that can't be written, which is no reason to stop."""
    path = config.data_folder() / _LAST
    try:
        platform.write_whole(path, name.encode("utf-8", "surrogateescape"))
    except OSError as error:
        return f"{path} can't be written ({error.strerror or error})"
    return ""


def last_model() -> str:
    """The model of the latest chat while it is here, else the default one."""
    try:
        name = (config.data_folder() / _LAST).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return DEFAULT_MODEL
    is_here = name and (os.path.isfile(name) or find_name(name) is not None)
    return name if is_here else DEFAULT_MODEL
