"""The commands about the models that are here: pull, list, rm, cache; and names of models.

Knows nothing of running models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from edgeinfer import config, platform
from edgeinfer.cli.console import DownloadLine, note, show, show_json
from edgeinfer.cli.options import common_flags
from edgeinfer.errors import ModelNotFoundError
from edgeinfer.terminal import one_line

if TYPE_CHECKING:
    from edgeinfer.hub.catalog import Alias
    from edgeinfer.llm import LLM
    from edgeinfer.options import Progress

_MB = 10**6
_MAX_SHOWN = 1000  # characters of a path or a fact


# -- commands ------------------------------------------------------------------------------------


@click.command(epilog="Example: edgeinfer pull qwen3-4b")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Fetch it, unasked.")
@common_flags
def pull(name: str, yes: bool) -> None:
    """Fetch a model: an alias, or org/repo[:QUANT] on the Hugging Face hub."""
    show(str(_fetch(name, yes)))


@click.command("list", epilog="Example: edgeinfer list --all")
@click.option("show_all", "--all", is_flag=True, help="Also the names that can be pulled.")
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@common_flags
def list_(show_all: bool, as_json: bool) -> None:
    """The models on this machine, those of Ollama, LM Studio and others included."""
    from edgeinfer.hub.catalog import ALIASES
    from edgeinfer.hub.discovery import list_models

    here = list_models()
    names = {info.name for info in here}
    missing = [alias for alias in ALIASES.values() if show_all and alias.name not in names]
    if as_json:
        show_json(
            {
                "models": [
                    {
                        "name": info.name,
                        "bytes": info.n_bytes,
                        "source": info.source,
                        "quantisation": info.quant,
                        "path": str(info.path),
                    }
                    for info in here
                ],
                "pull": [
                    {"name": a.name, "bytes": a.n_bytes, "source": a.source, "licence": a.licence}
                    for a in missing
                ],
            }
        )
        return
    rows = [(one_line(i.name), f"{i.n_bytes / _MB:.0f} MB", i.source, _shown(i.path)) for i in here]
    rows += [(a.name, f"{a.n_bytes / _MB:.0f} MB", "(pull)", a.licence) for a in missing]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    for name, size, source, path in rows:
        show(f"{name:{widths[0]}}  {size:>{widths[1]}}  {source:{widths[2]}}  {path}")
    if not rows:
        note("no models here yet: `edgeinfer pull smollm2`, or `edgeinfer list --all` for names")


@click.command(epilog="Example: edgeinfer rm qwen3-4b")
@click.argument("name")
@common_flags
def rm(name: str) -> None:
    """Delete a model that edgeinfer fetched; never one of another program."""
    from edgeinfer.hub.fetch import remove

    for path in remove(name):
        note(f"deleted {_shown(path)}")


@click.command(epilog="Example: edgeinfer cache --clear")
@click.option("--clear", is_flag=True, help="Delete built kernels and unfinished downloads.")
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@common_flags
def cache(clear: bool, as_json: bool) -> None:
    """What edgeinfer keeps on this disk, and where."""
    from edgeinfer.hub.discovery import models_folder
    from edgeinfer.hub.fetch import UNFINISHED, discard_unfinished, said_if_undeletable

    kernels, models = config.cache_folder(), models_folder()
    unfinished = [
        path for name in UNFINISHED for path in platform.files_below(models, f"**/{name}")
    ]
    if clear:
        with said_if_undeletable(kernels):
            discard_unfinished()
            platform.delete_all(kernels)
        note(f"emptied {kernels}; models stay (edgeinfer rm NAME deletes one)")
        return
    sizes = {str(folder): platform.bytes_below(folder) for folder in (kernels, models)}
    if as_json:
        show_json({"folders": sizes, "unfinished": [str(path) for path in unfinished]})
        return
    for folder, size in sizes.items():
        show(f"{size / _MB:8.1f} MB  {folder}")
    for path in unfinished:
        show(f"unfinished: {_shown(path)}")


def _shown(value: object) -> str:
    return one_line(str(value), _MAX_SHOWN)


# -- names on the command line -------------------------------------------------------------------


def choose_model(name: str | None, yes: bool, *, is_chat: bool = False) -> str:
    """The path of the model that a command is about; fetches it where the user agrees."""
    from edgeinfer.hub.discovery import find_model
    from edgeinfer.hub.recent import last_model

    if name is None:
        name = last_model() if is_chat and _is_person() else _default_name()
        note(f"no model named: using {_shown(name)}")
    try:
        return str(find_model(name))
    except ModelNotFoundError:
        if not ((yes or _is_person()) and _can_fetch(name)):
            raise
    return str(_fetch(name, yes))


def remember(name: str) -> list[str]:
    """The next chat without MODEL takes this one; else a line that says why not."""
    from edgeinfer.hub import recent

    reason = recent.remember(name)
    why = f"the next chat will not know that this was {name}: {reason}; set EDGEINFER_HOME"
    return [why] if reason else []


def last_model() -> str | None:
    """The model of the latest chat, else the default one, while it is on this machine."""
    from edgeinfer.hub import discovery, recent

    name = recent.last_model()
    return name if os.path.isfile(name) or discovery.find_name(name) is not None else None


def downloadable() -> list[Alias]:
    """The models that fit this machine, the default one first."""
    from edgeinfer.hub.catalog import ALIASES, memory_needed

    available = platform.available_memory()
    return [a for a in ALIASES.values() if memory_needed(a.n_bytes) <= available]


def unkept(llm: LLM) -> list[str]:
    """A line where kernels that were built could not be stored, with the reason."""
    from edgeinfer.backend import unkept_kernels

    reason = unkept_kernels(llm.runtime.program)
    where = f"{config.cache_folder()} ({reason})"
    why = f"kernels can't be kept in {where}: built for this process alone; set EDGEINFER_HOME"
    return [why] if reason else []


def advise_after(path: Path) -> None:
    """Tell who tried the default model, once on this machine, what to fetch for useful answers."""
    from edgeinfer.hub.catalog import largest_that_fits
    from edgeinfer.hub.recent import is_new

    is_small = path.name.lower().startswith("smollm2-135m")
    if not (is_small and sys.stderr.isatty() and is_new("what-to-pull")):
        return
    best = largest_that_fits(platform.available_memory())
    advice = f"; for useful answers: edgeinfer pull {best.name}" if best else ""
    note(f"(135 M parameters are for trying out{advice})")


def _default_name() -> str:
    from edgeinfer.hub.catalog import DEFAULT_MODEL

    return DEFAULT_MODEL


def _is_person() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _can_fetch(name: str) -> bool:
    """Whether a model that is not here may be somewhere else."""
    from edgeinfer.hub.catalog import find_alias, parse_repo

    beside = os.path.dirname(name) or os.curdir
    is_repo = parse_repo(name) is not None and not os.path.isdir(beside)
    return is_repo or find_alias(name) is not None


def _fetch(name: str, yes: bool) -> Path:
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
