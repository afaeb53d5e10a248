"""The commands of conversations: chat, history."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from edgeinfer import config, platform
from edgeinfer.cli.console import draws_screens, note, show
from edgeinfer.cli.models import (
    advise_after,
    choose_model,
    downloadable,
    last_model,
    remember,
    unkept,
)
from edgeinfer.cli.opening import GC_THRESHOLD, follow, open_model
from edgeinfer.cli.options import (
    LOAD_NAMES,
    SAMPLING_NAMES,
    common_flags,
    given,
    load_flags,
    sampling_flags,
)
from edgeinfer.errors import EdgeInferError

if TYPE_CHECKING:
    from edgeinfer.llm import LLM
    from edgeinfer.options import Sampling

_TYPED = "typed-lines"  # at a plain terminal


@click.command(epilog="Example: edgeinfer chat qwen3-4b --system 'Answer in one sentence.'")
@click.argument("model", required=False)
@click.option("--plain", is_flag=True, help="Line by line, without the full-screen view.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--no-history", is_flag=True, help="Keep nothing of this chat.")
@load_flags
@sampling_flags
@common_flags
def chat(
    model: str | None, plain: bool, system: str | None, no_history: bool, **flags: Any
) -> None:
    """Talk to a model, full-screen on a terminal; with --plain a line is a message."""
    if not plain and draws_screens(os.environ):
        if model is not None or flags["yes"]:
            model = choose_model(model, bool(flags["yes"]), is_chat=True)
        _open_tui(model, system, not no_history, flags)
        advise_after(Path(last_model() or ""))
        return
    from edgeinfer.cli.plain_chat import talk

    with open_model(model, flags, is_chat=True, templates=True) as llm:
        path = llm.runtime.model.file.path
        for why in remember(str(path.resolve())):
            note(why)
        sampling = cast("Sampling", given(flags, SAMPLING_NAMES))
        typed = None if no_history else config.data_folder() / _TYPED
        talk(llm, system, sampling, follow, lambda: advise_after(path), typed)


def _open_tui(
    model: str | None, system: str | None, keeps_history: bool, flags: dict[str, Any]
) -> None:
    gc.set_threshold(GC_THRESHOLD)
    notes: dict[str, None] = {}  # said once the screen is the shell's again

    def take_loaded(path: str, llm: LLM) -> None:
        # What is below the current folder must be found from another.
        name = os.path.abspath(path) if os.path.isfile(path) else path
        notes.update(dict.fromkeys([*remember(name), *unkept(llm)]))

    from edgeinfer.text.plain_text import decode

    # The TUI is a layer above this one: it is named here, not imported.
    ended_by = importlib.import_module("edgeinfer.tui.launch").run_chat(
        model,
        system=system,
        load=given(flags, LOAD_NAMES),
        sampling=given(flags, SAMPLING_NAMES),
        keeps_history=keeps_history,
        data_folder=config.data_folder(),
        environment=os.environ,
        memory_now=platform.rss,
        run_tool=platform.run_tool,
        stop_for_shell=platform.stop_for_shell,
        signals_call=platform.signals_call,
        note=note,
        run_editor=platform.run_editor,
        decode=decode,
        last_model=last_model,
        take_loaded=take_loaded,
        downloads=downloadable,
    )
    for line in notes:
        note(line)
    if ended_by is not None:
        raise SystemExit(platform.SIGNAL_CODE + ended_by)


@click.command(epilog="Example: edgeinfer history --export talks.json")
@click.option("--list", "lists", is_flag=True, help="Number, day, messages, title, tags of each.")
@click.option("--export", "target", metavar="FILE", help="Write all conversations to one file.")
@click.option("--import", "source", metavar="FILE", help="Take in what --export wrote.")
@click.option("--rename", nargs=2, metavar="NUMBER TITLE", help="Give a conversation a title.")
@click.option("--tag", nargs=2, metavar="NUMBER TAGS", help="Give it tags; '' takes them away.")
@click.option("--clear", is_flag=True, help="Delete every conversation of the full-screen chat.")
@click.option("-y", "--yes", is_flag=True, help="Delete or replace unasked.")
@common_flags
def history(
    lists: bool,
    target: str | None,
    source: str | None,
    rename: tuple[str, str] | None,
    tag: tuple[str, str] | None,
    clear: bool,
    yes: bool,
) -> None:
    """Where conversations are kept; lists, exports, imports, names and deletes them."""
    given = [bool(each) for each in (lists, target, source, rename, tag, clear)]
    if sum(given) > 1:
        raise click.UsageError("history does one thing at a time")
    if clear:
        _clear_history(yes)
    elif any(given):
        _change_history(lists, target, source, rename, tag, yes)
    else:
        _show_history()


def _show_history() -> None:
    path = _history_path()
    show(f"{path}{'' if os.path.exists(path) else ' (nothing yet)'}")
    if os.path.exists(path):
        try:
            _archive().count_conversations(path)
        except EdgeInferError as error:
            note(f"edgeinfer: {error}")


def _clear_history(yes: bool) -> None:
    path = _history_path()
    if not yes and os.path.exists(path):
        try:
            n = f"{_archive().count_conversations(path)} conversations"
        except EdgeInferError:
            n = "what can't be read"
        if not sys.stdin.isatty():
            raise click.UsageError(
                f"--clear would delete {n} in {path} for good, and here nobody can be asked; "
                "-y deletes unasked"
            )
        if not click.confirm(f"Delete {n} in {path} for good?", err=True):
            note("nothing was deleted")
            return
    n = _archive().clear_history(path.parent)
    unread = f"deleted {path}, which could not be read"
    show(unread if n is None else f"deleted {n} conversations")


def _change_history(
    lists: bool,
    target: str | None,
    source: str | None,
    rename: tuple[str, str] | None,
    tag: tuple[str, str] | None,
    yes: bool,
) -> None:
    path = _history_path()
    if source is None and not os.path.exists(path):
        raise EdgeInferError(f"there is no history yet in {path}")
    store = importlib.import_module("edgeinfer.tui.store").Store(path)
    try:
        if why := store.notice(None):
            raise EdgeInferError(why.removeprefix("not kept: "))
        if lists:
            for line in _archive().lines(store):
                show(line)
        elif target is not None:
            _export_history(store, target, yes)
        elif source is not None:
            n, n_all = _archive().import_history(store, config.expand_user(source))
            here = f"; {n_all - n} were here already" if n < n_all else ""
            show(f"imported {n} conversations{here}")
        else:
            number, text = rename or tag or ("", "")
            show(_archive().name(store, number, "title" if rename else "tags", text))
    finally:
        store.close()


def _export_history(store: Any, target: str, yes: bool) -> None:
    try:
        n = _archive().export_history(store, config.expand_user(target), replaces=yes)
    except FileExistsError as error:
        raise EdgeInferError(f"{error} is there already; -y replaces it") from None
    show(f"exported {n} conversations to {target}")


def _history_path() -> Path:
    name: str = importlib.import_module("edgeinfer.tui.store").FILE_NAME
    return config.data_folder() / name


def _archive() -> Any:
    return importlib.import_module("edgeinfer.tui.archive")
