"""What earlier runs leave behind: the latest chat's model, and what was told already.

Knows nothing of how models come here.
"""

from __future__ import annotations

import os
from contextlib import suppress

from edgeinfer import config, platform
from edgeinfer.errors import reason_of
from edgeinfer.hub.discovery import find_name

_LAST = "last-model"
_TOLD = "told-"


def remember(name: str) -> str:
    """Note the model of the latest chat; why that can't be written, which is no reason to stop."""
    path = config.data_folder() / _LAST
    try:
        platform.write_whole(path, os.fsencode(name))
    except OSError as error:
        return f"{path} can't be written ({reason_of(error)})"
    return ""


def last_model() -> str | None:
    """The model of the latest chat, while it is here."""
    try:
        name = os.fsdecode((config.data_folder() / _LAST).read_bytes()).strip()
    except (OSError, UnicodeDecodeError):
        return None
    is_here = name and (os.path.isfile(name) or find_name(name) is not None)
    return name if is_here else None


def is_new(advice: str) -> bool:
    """Whether nobody was told this yet; from now on somebody was, as far as that can be noted."""
    path = config.data_folder() / f"{_TOLD}{advice}"
    if os.path.exists(path):
        return False
    with suppress(OSError):
        platform.write_whole(path, b"")
    return True
