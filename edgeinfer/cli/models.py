"""Models as commands name them: found, fetched, remembered; and what is told of them.

Knows nothing of running models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from edgeinfer import config
from edgeinfer.cli.console import DownloadLine, note
from edgeinfer.errors import ModelNotFoundError
from edgeinfer.terminal import one_line

if TYPE_CHECKING:
    from edgeinfer.hub.catalog import Alias
    from edgeinfer.llm import LLM
    from edgeinfer.options import Progress

_MAX_SHOWN = 1000  # characters of a path or a fact


def shown(value: object) -> str:
    """A path or a fact in a line."""
    return one_line(str(value), _MAX_SHOWN)


def choose_model(name: str | None, yes: bool, *, is_chat: bool = False) -> str:
    """The path of the model that a command is about; fetches it where the user agrees."""
    from edgeinfer.hub import recent
    from edgeinfer.hub.catalog import DEFAULT_MODEL
    from edgeinfer.hub.discovery import find_model

    if name is None:
        name = (recent.last_model() if is_chat and _is_person() else None) or DEFAULT_MODEL
        note(f"no model named: using {shown(name)}")
    try:
        return str(find_model(name))
    except ModelNotFoundError:
        if not ((yes or _is_person()) and _can_fetch(name)):
            raise
    return str(fetch(name, yes))


def remember(name: str) -> list[str]:
    """The next chat without MODEL takes this one; else a line that says why not."""
    from edgeinfer.hub import recent

    reason = recent.remember(name)
    why = f"the next chat will not know that this was {name}: {reason}; set EDGEINFER_HOME"
    return [why] if reason else []


def last_model() -> str | None:
    """The model of the latest chat, else the default one, while it is on this machine."""
    from edgeinfer.hub import recent
    from edgeinfer.hub.catalog import DEFAULT_MODEL
    from edgeinfer.hub.discovery import find_name

    return recent.last_model() or (DEFAULT_MODEL if find_name(DEFAULT_MODEL) else None)


def downloadable() -> list[Alias]:
    """The models that fit this machine, the default one first."""
    from edgeinfer.device import model_room
    from edgeinfer.hub.catalog import ALIASES, memory_needed

    available = sum(model_room())
    return [a for a in ALIASES.values() if memory_needed(a.n_bytes) <= available]


def start_notes(llm: LLM) -> list[str]:
    """What whoever starts a model should know: that a GPU is not used, what can't be kept."""
    note = llm.runtime.device_note
    return [*([note] if note else []), *unkept(llm)]


def unkept(llm: LLM) -> list[str]:
    """A line where kernels that were built could not be stored, with the reason."""
    from edgeinfer.backend import unkept_kernels

    reason = unkept_kernels(llm.runtime.program)
    where = f"{config.cache_folder()} ({reason})"
    why = f"kernels can't be kept in {where}: built for this process alone; set EDGEINFER_HOME"
    return [why] if reason else []


def advise_after(path: Path) -> None:
    """Tell who tried the default model, once on this machine, what to fetch for useful answers."""
    from edgeinfer.device import model_room
    from edgeinfer.hub.catalog import largest_that_fits
    from edgeinfer.hub.recent import is_new

    is_small = path.name.lower().startswith("smollm2-135m")
    if not (is_small and sys.stderr.isatty() and is_new("what-to-pull")):
        return
    best = largest_that_fits(sum(model_room()))
    advice = f"; for useful answers: edgeinfer pull {best.name}" if best else ""
    note(f"(135 M parameters are for trying out{advice})")


def _is_person() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _can_fetch(name: str) -> bool:
    """Whether a model that is not here may be somewhere else."""
    from edgeinfer.hub.catalog import find_alias, parse_repo

    beside = os.path.dirname(name) or os.curdir
    is_repo = parse_repo(name) is not None and not os.path.isdir(beside)
    return is_repo or find_alias(name) is not None


def fetch(name: str, yes: bool) -> Path:
    """Fetch it, with one line of progress; who is at the terminal is asked first."""
    from edgeinfer.hub.catalog import find_alias
    from edgeinfer.hub.fetch import fetch_model

    line, has_begun = DownloadLine(), False

    def agree(what: str) -> bool:
        note(what)
        return yes or not _is_person() or click.confirm("Fetch it?", default=True, err=True)

    def report(event: Progress) -> None:
        nonlocal has_begun
        has_begun = True
        line.show(event.done, event.total)

    try:
        return fetch_model(name, cast("Callable[[Progress], None]", report), note, agree)
    except KeyboardInterrupt:
        alias = find_alias(name)
        line.clear()
        if has_begun and (alias is None or alias.resumes):
            note("stopped; what has come is kept, and the same command goes on from there")
        raise
    finally:
        line.clear()
