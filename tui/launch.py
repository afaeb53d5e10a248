"""Opens the chat for the command line.

Knows nothing of flags. What takes long to import is imported once the first picture is out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from edgeinfer import one_line
from edgeinfer.tui.settings import ChatServer, ChatSettings, ModelChoice, StopForShell

if TYPE_CHECKING:
    from textual.driver import Driver

    from edgeinfer import LLM, ChatModel, LoadOptions, MemoryPlan, Progress

SignalsCall: TypeAlias = Callable[
    [Callable[[int], None], Callable[[], None]], AbstractContextManager[None]
]


class Downloadable(Protocol):
    """A model that can be fetched by its name."""

    @property
    def name(self) -> str: ...

    @property
    def n_bytes(self) -> int: ...

    @property
    def licence(self) -> str: ...

    @property
    def resumes(self) -> bool: ...


def run_chat(
    model: str | None,
    *,
    system: str | None,
    load: Mapping[str, Any],
    sampling: Mapping[str, Any],
    keeps_history: bool,
    stops_repeats: bool,
    data_folder: Path,
    environment: Mapping[str, str],
    memory_now: Callable[[], int],
    run_tool: Callable[[Sequence[str], bytes], bool],
    stop_for_shell: StopForShell,
    signals_call: SignalsCall,
    note: Callable[[str], None],
    run_editor: Callable[[Sequence[str], Path], int],
    decode: Callable[[bytes, str], tuple[str, int]],
    last_model: Callable[[], str | None],
    take_loaded: Callable[[str, LLM], None],
    downloads: Callable[[], Sequence[Downloadable]],
    server: ChatServer | None = None,
) -> int | None:
    """Run until the user leaves; raises what ended the chat before, returns the signal that did.

    `note` takes a line for the shell's screen. `take_loaded` hears of every model that was opened.
    `downloads` are models that could be here. With a `server` all models are there, none here.
    """
    from edgeinfer.tui.app import ChatApp

    options = cast("LoadOptions", dict(load))

    def with_length(n_ctx: int | None) -> LoadOptions:
        """As the command line says, unless the chat asks for another context length."""
        return options if n_ctx is None else {**options, "n_ctx": n_ctx}

    def open_model(
        path: str, progress: Callable[[Progress], None], n_ctx: int | None = None
    ) -> ChatModel:
        from edgeinfer import LLM

        llm = LLM(path, **cast("LoadOptions", {**with_length(n_ctx), "progress": progress}))
        take_loaded(path, llm)
        return cast("ChatModel", llm)

    def plan_model(
        path: str, n_ctx: int | None = None, freed: Mapping[str, int] = MappingProxyType({})
    ) -> MemoryPlan:
        return _plan(path, with_length(n_ctx), freed)

    settings = ChatSettings(
        data_folder=data_folder, open_model=open_model, model=model, last_model=last_model,
        system=system, sampling=cast("Any", dict(sampling)), keeps_history=keeps_history,
        finds_titles=True, stops_repeats=stops_repeats,
        list_models=lambda: _choices(downloads()), plan_model=plan_model, fetch=_fetch,
        memory_now=memory_now, run_tool=run_tool, run_editor=run_editor, decode=decode,
        stop_for_shell=stop_for_shell, environment=environment,
    )  # fmt: skip
    if server is not None:
        settings = _on_server(settings, server)
    app = ChatApp(settings, driver())
    with signals_call(app.end_by, app.give_up):
        app.run()
    if app.closing is not None:
        app.closing.wait()
    if app.left_download:
        note(f"edgeinfer: {app.left_download}")
    if app.session.notice:
        note(f"edgeinfer: {one_line(app.session.notice, 500)}")
    if app.unsent and (app.ended_by is not None or app.failure is not None):
        note(f"edgeinfer: not sent: {app.unsent}")
    if app.failure is not None:
        raise app.failure
    return app.ended_by


def _on_server(settings: ChatSettings, server: ChatServer) -> ChatSettings:
    """The same without what is about files and memory; nothing is asked of it unasked."""

    def open_model(
        name: str, progress: Callable[[Progress], None], n_ctx: int | None = None
    ) -> ChatModel:
        return server.open(name)

    return replace(
        settings,
        open_model=open_model,
        list_models=list,
        plan_model=None,
        fetch=None,
        last_model=lambda: None,
        memory_now=lambda: 0,
        finds_titles=False,
        server=server,
    )


def _plan(path: str, given: LoadOptions, freed: Mapping[str, int]) -> MemoryPlan:
    """What a file would take, with `freed` bytes of each memory to come back if it needs them."""
    from edgeinfer import PlanError, plan

    if "memory" in given:  # that much of the host's it is, whoever holds it now
        freed = {name: n_bytes for name, n_bytes in freed.items() if name != "host"}
    try:
        found = plan(path, **given)
        if not (found.note and any(freed.values())):
            return found
    except PlanError:
        if not any(freed.values()):
            raise
    found = plan(path, freed=freed, **given)
    if all(p.total_bytes <= p.available - freed.get(p.name, 0) for p in found.pools):
        return found  # what comes back is too little to help
    return found._replace(note=", ".join(filter(None, [found.note, _ONCE_CLOSED])))


_ONCE_CLOSED = "once the open model is closed"


def driver() -> type[Driver] | None:
    """The one that answers Escape at once; None is Textual's own."""
    if os.name != "posix":
        return None
    from edgeinfer.tui.driver import ChatDriver

    return ChatDriver


def _choices(downloads: Sequence[Downloadable]) -> list[ModelChoice]:
    """Models on this machine, then those that could be fetched."""
    from edgeinfer import list_models

    here = [ModelChoice(i.name, str(i.path), i.n_bytes, _source(i.source)) for i in list_models()]
    names = {choice.name.lower() for choice in here}
    others = [
        ModelChoice(each.name, None, each.n_bytes, "", each.licence, each.resumes)
        for each in downloads
        if each.name not in names
    ]
    return [*here, *others]


def _source(name: str) -> str:
    return "" if name == "edgeinfer" else f"from {name}"


def _fetch(name: str, note: Callable[[int, int], None]) -> str:
    from edgeinfer import pull

    return str(pull(name, progress=lambda event: note(event.done, event.total)))
