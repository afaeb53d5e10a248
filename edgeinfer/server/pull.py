"""Models that a request names and that are not here: fetched from the hub, by name alone.

Knows nothing of the models that are served.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeinfer.hub.catalog import find_alias, parse_repo
from edgeinfer.hub.discovery import find_name
from edgeinfer.hub.fetch import fetch_model


def is_on_hub(name: str) -> bool:
    """Whether a name may be a model's there: an alias or org/repo[:QUANT], never a path."""
    return find_alias(name) is not None or parse_repo(name) is not None


def pull(name: str, tell: Callable[[str], None], check: Callable[[], None]) -> Path:
    """The file of such a model, fetched where this machine has none; `tell` gets its size.

    What `check` raises, which is called as it comes, ends it.
    """
    check()
    here = find_name(name)
    if here is not None:
        return here.path

    def agree(what: str) -> bool:
        tell(what)
        return True

    return fetch_model(name, lambda event: check(), tell, agree)
