"""The command `chat`: full-screen on a terminal, else line by line."""

from __future__ import annotations

import gc
import importlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeinfer import config, platform
from edgeinfer.cli.console import draws_screens, note
from edgeinfer.cli.models import (
    advise_after,
    choose_model,
    downloadable,
    last_model,
    remember,
    start_notes,
)
from edgeinfer.cli.opening import GC_THRESHOLD, follow, open_model, open_on_server, server_of
from edgeinfer.cli.options import (
    common_flags,
    load_flags,
    load_options,
    sampling_flags,
    sampling_options,
    url_flags,
)

if TYPE_CHECKING:
    from edgeinfer.llm import LLM
    from edgeinfer.remote.server import Server

_TYPED = "typed-lines"  # at a plain terminal


@click.command("chat", epilog="Example: edgeinfer chat qwen3-4b --system 'Answer in one sentence.'")
@click.argument("model", required=False)
@click.option("--plain", is_flag=True, help="Line by line, without the full-screen view.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--no-history", is_flag=True, help="Keep nothing of this chat.")
@click.option("--let-repeat", is_flag=True, help="Let answers repeat themselves without end.")
@url_flags
@load_flags
@sampling_flags
@common_flags
def command(model: str | None, plain: bool, system: str | None, **flags: Any) -> None:
    """Talk to a model, full-screen on a terminal; with --plain a line is a message."""
    server = server_of(flags)
    if not plain and draws_screens(os.environ):
        if server is not None:
            _open_tui(model, system, flags, server)
            return
        if model is not None or flags["yes"]:
            model = choose_model(model, bool(flags["yes"]), is_chat=True)
        if flags["chat_template"] is not None:
            from edgeinfer.inspect_file import check_template

            check_template(flags["chat_template"], model or last_model())
        _open_tui(model, system, flags)
        advise_after(Path(last_model() or ""))
        return
    from edgeinfer.cli.plain_chat import talk

    follows = partial(follow, stops_repeats=not flags["let_repeat"])
    typed = None if flags["no_history"] else config.data_folder() / _TYPED
    if server is not None:
        with open_on_server(server, model) as answering:
            follows = partial(follows, place=server.place)
            talk(answering, system, sampling_options(flags), follows, history=typed)
        return
    with open_model(model, flags, is_chat=True, templates=True) as llm:
        path = llm.runtime.model.file.path
        for why in remember(str(path.resolve())):
            note(why)
        talk(llm, system, sampling_options(flags), follows, lambda: advise_after(path), typed)


def _open_tui(
    model: str | None, system: str | None, flags: dict[str, Any], server: Server | None = None
) -> None:
    gc.set_threshold(GC_THRESHOLD)
    notes: dict[str, None] = {}  # said once the screen is the shell's again

    def take_loaded(path: str, llm: LLM) -> None:
        # What is below the current folder must be found from another.
        name = os.path.abspath(path) if os.path.isfile(path) else path
        notes.update(dict.fromkeys([*remember(name), *start_notes(llm)]))

    from edgeinfer.text.plain_text import decode

    # The TUI is a layer above this one: it is named here, not imported.
    ended_by = importlib.import_module("edgeinfer.tui.launch").run_chat(
        model,
        system=system,
        load=load_options(flags),
        sampling=sampling_options(flags),
        keeps_history=not flags["no_history"],
        stops_repeats=not flags["let_repeat"],
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
        server=server,
    )
    for line in notes:
        note(line)
    if ended_by is not None:
        raise SystemExit(platform.SIGNAL_CODE + ended_by)
