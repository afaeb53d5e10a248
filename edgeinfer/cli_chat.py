"""The commands of conversations: chat, history."""

from __future__ import annotations

import gc
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from edgeinfer import config, platform
from edgeinfer.cli_models import (
    advise_after,
    choose_model,
    downloadable,
    last_model,
    remember,
    unkept,
)
from edgeinfer.cli_open import GC_THRESHOLD, follow, open_model
from edgeinfer.cli_options import (
    LOAD_NAMES,
    SAMPLING_NAMES,
    common_flags,
    given,
    load_flags,
    sampling_flags,
)
from edgeinfer.console import draws_screens, note, show
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
    from edgeinfer.plain_chat import talk

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

    from edgeinfer.plain_text import decode

    # The TUI is a layer above this one: it is named here, not imported.
    importlib.import_module("edgeinfer.tui.launch").run_chat(
        model,
        system=system,
        load=given(flags, LOAD_NAMES),
        sampling=given(flags, SAMPLING_NAMES),
        keeps_history=keeps_history,
        data_folder=config.data_folder(),
        environment=os.environ,
        memory_now=platform.rss,
        run_tool=platform.run_tool,
        run_editor=platform.run_editor,
        decode=decode,
        last_model=last_model,
        take_loaded=take_loaded,
        downloads=downloadable,
    )
    for line in notes:
        note(line)


@click.command(epilog="Example: edgeinfer history --clear")
@click.option(
    "--clear", is_flag=True, help="Delete every conversation, and the lines typed in plain chats."
)
@common_flags
def history(clear: bool) -> None:
    """Where conversations are kept; --clear deletes them."""
    store = importlib.import_module("edgeinfer.tui.store")
    path = config.data_folder() / store.FILE_NAME
    if clear:
        (config.data_folder() / _TYPED).unlink(missing_ok=True)
        n = store.clear_history(config.data_folder())
        unread = f"deleted {path}, which could not be read"
        show(unread if n is None else f"deleted {n} conversations")
        return
    show(f"{path}{'' if os.path.exists(path) else ' (nothing yet)'}")
    if os.path.exists(path):
        try:
            store.count_conversations(path)
        except EdgeInferError as error:
            note(f"edgeinfer: {error}")
