"""Where a reference inside of a JSON schema leads: a pointer (RFC 6901) behind its #."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

_MOST_DIGITS = 8  # of a place in a list


def pointed(root: Any, pointer: str) -> Any:
    """What stands there, the root itself at ""; LookupError where nothing does."""
    found = root
    for step in pointer.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and len(name) <= _MOST_DIGITS:
            found = found[int(name)]
        elif isinstance(found, Mapping):
            found = found[name]
        else:
            raise LookupError(pointer)
    return found
