"""The command `history`: conversations of the full-screen chat, from outside of it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from edgeinfer import config
from edgeinfer.cli.console import note, show
from edgeinfer.cli.options import FileName, common_flags
from edgeinfer.errors import EdgeInferError


@click.command("history", epilog="Example: edgeinfer history --export talks.json")
@click.option("--list", "lists", is_flag=True, help="Number, day, messages, title, tags of each.")
@click.option(
    "--export",
    "target",
    metavar="FILE",
    type=FileName(),
    help="Write all conversations to one file.",
)
@click.option(
    "--import", "source", metavar="FILE", type=FileName(), help="Take in what --export wrote."
)
@click.option("--rename", nargs=2, metavar="NUMBER TITLE", help="Give a conversation a title.")
@click.option("--tag", nargs=2, metavar="NUMBER TAGS", help="Give it tags; '' takes them away.")
@click.option("--clear", is_flag=True, help="Delete every conversation of the full-screen chat.")
@click.option("-y", "--yes", is_flag=True, help="Delete or replace unasked.")
@common_flags
def command(
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
