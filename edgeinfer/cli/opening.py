"""What commands that load a model share: its progress and notes, and an answer as it comes."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import Output, ProgressLine, note, noted_if_silent, tell
from edgeinfer.cli.models import choose_model, start_notes
from edgeinfer.cli.options import as_flag, load_options
from edgeinfer.errors import EdgeInferError, Keyword
from edgeinfer.repeats import RepeatGuard
from edgeinfer.terminal import printable

if TYPE_CHECKING:
    from edgeinfer.chat_model import ChatStream
    from edgeinfer.engine.memory_plan import MemoryPlan
    from edgeinfer.llm import LLM
    from edgeinfer.options import LoadOptions, Progress
    from edgeinfer.remote.model import RemoteModel
    from edgeinfer.remote.server import Server

GC_THRESHOLD = 10_000  # new objects between two collections; Python's own are 700 to 2,000


@contextlib.contextmanager
def open_model(
    model: str | None, flags: dict[str, Any], *, is_chat: bool = False, templates: bool = False
) -> Iterator[LLM]:
    """The model, with a progress line while it loads and its context length on stderr.

    `templates` says that its chat template will be needed: that gets ready beside it.
    """
    from edgeinfer.text.template_engine import TemplateEngine

    path = choose_model(model, bool(flags.get("yes")), is_chat=is_chat)
    engine = TemplateEngine() if templates else None
    if engine is not None:
        engine.start(may_fork=True)  # while this process imports NumPy
    line = ProgressLine()

    def progress(event: Progress) -> None:
        line.show(event.stage, event.done, event.total)

    from edgeinfer import runtime
    from edgeinfer.llm import LLM

    options: LoadOptions = {**load_options(flags), "progress": progress}
    with line:
        llm = LLM.of(runtime.load(path, options, engine))
    for each in start_notes(llm):
        note(each)
    # What a start has made stays: no later collection, nor the one at exit, needs to look at it.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    with llm:
        opened, plan = llm.runtime, llm.plan
        trained = opened.model.hparams.n_ctx_train
        why = f" ({plan.note})" if plan.note else ""
        note(
            f"{llm.name}: context {llm.n_ctx} of {trained} tokens{why}, {opened.runs_on}, "
            f"{plan.summary} planned{_kept(plan)}"
        )
        yield llm


def server_of(flags: dict[str, Any]) -> Server | None:
    """The server that the flags name, which nothing is asked yet; None where they name none.

    Takes its flags away. UsageError for others that say how this machine would load a model.
    """
    url, key = flags.pop("url"), flags.pop("api_key")
    if url is None:
        if key is not None:
            raise click.UsageError("--api-key is for the server of --url, and there is none")
        return None
    given = [as_flag(Keyword(name)) for name in load_options(flags)]
    if given:
        raise click.UsageError(
            f"{', '.join(given)}: how a model is loaded is set where it runs, not with --url"
        )
    from edgeinfer.remote.address import read_address
    from edgeinfer.remote.server import Server

    return Server(read_address(url, key))


@contextlib.contextmanager
def open_on_server(server: Server, model: str | None) -> Iterator[RemoteModel]:
    """A model that runs there, the only one where none is named, and what is told of it."""
    with noted_if_silent(server.place):
        opened = server.open(model or "")
    context = f": context {opened.n_ctx} tokens" if opened.n_ctx else ""
    note(f"{opened.name}{context}")
    try:
        yield opened
    finally:
        opened.close()


def _kept(plan: MemoryPlan) -> str:
    """How much of a plan is for what has been read before."""
    from edgeinfer.engine.plan_rows import size_text

    n_bytes = plan.kept_bytes
    return f", {size_text(n_bytes)} of them for earlier prompts" if n_bytes else ""


def follow(
    stream: ChatStream, output: Output | None, *, stops_repeats: bool = False, place: str = ""
) -> None:
    """Write an answer as it comes; its reasoning goes to stderr where a person reads that.

    One that says the same again and again is ended, with a line that says so, if that is wanted. So
    is said what is waited for, where the server at `place` is silent for long.
    """
    shows_reasoning = sys.stderr.isatty()
    guard, is_repeating = RepeatGuard(), False
    try:
        with ProgressLine() as line, contextlib.ExitStack() as waiting:
            if place:
                waiting.enter_context(noted_if_silent(place))
            for event in stream:
                waiting.close()
                if event.type == "prompt_progress":
                    line.show("prompt", event.done, event.total)
                elif event.type == "delta":
                    line.clear()
                    if event.reasoning and shows_reasoning:
                        tell(printable(event.reasoning))
                    if output:
                        output.write(event.text)
                    if stops_repeats and guard.push(event.reasoning + event.text):
                        is_repeating = True
                        stream.close()
    except EdgeInferError:
        if output:
            output.end()  # what went wrong is a line of its own
        raise
    if output:
        output.end()
    if is_repeating:
        note("(stopped: it repeats itself; chat --let-repeat lets an answer go on)")
