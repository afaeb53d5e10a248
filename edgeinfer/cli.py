"""The `edgeinfer` command. stdout carries the answer or the JSON, stderr everything else.

Imports nothing that a command does not need: each command imports for itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

import click

from edgeinfer import __version__, config, platform
from edgeinfer.cli_models import (
    add_to,
    advice_after,
    choose_model,
    downloadable,
    last_model,
    remember,
    unkept,
)
from edgeinfer.cli_options import (
    LOAD_NAMES,
    SAMPLING_NAMES,
    common_flags,
    given,
    input_flags,
    load_flags,
    sampling_flags,
)
from edgeinfer.console import (
    Output,
    ProgressLine,
    draws_screens,
    drop,
    note,
    prepare_streams,
    show,
    show_json,
    tell,
    unheard,
)
from edgeinfer.errors import ContextLengthError, EdgeInferError, InvalidRequestError
from edgeinfer.terminal import one_line, printable

if TYPE_CHECKING:
    from edgeinfer.llm import LLM
    from edgeinfer.options import LoadOptions, Progress, Sampling
    from edgeinfer.stream import Stream

_MIB = 1 << 20
_INTERRUPTED = 130
_MAX_LINE = 2000  # characters
_MOST_TEXT = 256 << 20  # bytes of a prompt or a book
_GC_THRESHOLD = 10_000  # new objects between two collections; Python's own are 700 to 2,000
_GC_THRESHOLD_OF_START = 200_000  # more than a start makes


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs a command and turns whatever ends it into an exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    # A start makes many objects that all stay: looking through them ten times took 0.03 s.
    gc.set_threshold(_GC_THRESHOLD_OF_START)
    prepare_streams()
    code = _exit_code(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)
    except OSError as error:
        note(f"edgeinfer: {_one_line(error)}")
        drop(sys.stdout)
        code = code or 1
    if code == _INTERRUPTED:
        # What still loads or builds in other threads would be waited for.
        os._exit(code)
    sys.exit(code)


def _exit_code(arguments: list[str]) -> int:
    try:
        # click's own main has its own ideas of exit codes for interrupts and pipes.
        with _interrupts_raise(), commands.make_context("edgeinfer", [*arguments]) as context:
            commands.invoke(context)
    except click.ClickException as error:
        with unheard():
            error.show()
        return error.exit_code
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except (KeyboardInterrupt, click.Abort):
        tell("\n")
        return _INTERRUPTED
    except BrokenPipeError:
        drop(sys.stdout)
    except Exception as error:
        if "--debug" in arguments or config.is_debug():
            import traceback

            with unheard():
                traceback.print_exc()
        note(f"edgeinfer: {_one_line(error)}")
        is_usage = isinstance(error, InvalidRequestError)
        return 2 if is_usage and not isinstance(error, ContextLengthError) else 1
    return 0


@contextlib.contextmanager
def _interrupts_raise() -> Iterator[None]:
    """While a command runs, an interrupt is KeyboardInterrupt, whatever it is around it."""
    outside = signal.getsignal(signal.SIGINT)
    if callable(outside) and outside is not signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if callable(outside) and outside is not signal.default_int_handler:
            signal.signal(signal.SIGINT, outside)


def _one_line(error: Exception) -> str:
    text = one_line(" ".join(str(error).split()), _MAX_LINE)
    if isinstance(error, EdgeInferError):
        return text
    if isinstance(error, OSError) and text:
        return text
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgeinfer")
@common_flags
def commands() -> None:
    """Run GGUF language models on this machine."""


add_to(commands)


@commands.command(epilog="Example: edgeinfer run qwen3-4b -p 'Why is the sky blue?'")
@click.argument("model", required=False)
@input_flags
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without chat template.")
@click.option("as_json", "--json", is_flag=True, help="One JSON object instead of the text.")
@load_flags
@sampling_flags
@common_flags
def run(
    model: str | None,
    prompt: str | None,
    files: tuple[str, ...],
    system: str | None,
    raw: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Answer one prompt."""
    text = _read_prompt(prompt, files)
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, --raw leaves it out")
    sampling = cast("Sampling", given(flags, SAMPLING_NAMES))
    with _open(model, flags, templates=not raw) as llm:
        if raw:
            stream = llm.stream(text, **sampling)
        else:
            stream = llm.stream_chat(_conversation(system, text), **sampling)
        with stream:
            _follow(stream, None if as_json else Output())
        advice = advice_after(llm.runtime.model.file.path)
        if model is None and advice and sys.stderr.isatty():
            note(advice)
        if as_json:
            show_json(_answer_json(stream, text, system, raw, flags))


def _read_prompt(prompt: str | None, files: tuple[str, ...]) -> str:
    parts = []
    if prompt == "-" or (prompt is None and not files):
        if prompt is None and sys.stdin.isatty():
            raise click.UsageError("no prompt: give -p TEXT, -f FILE, or pipe text in")
        parts.append(_read_text(sys.stdin.buffer))
    elif prompt is not None:
        parts.append(prompt)
    parts += map(_read_file, files)
    return "\n\n".join(parts)


def _read_file(path: str) -> str:
    with open(path, "rb") as file:
        return _read_text(file)


def _read_text(file: BinaryIO) -> str:
    return platform.read_whole(file, _MOST_TEXT).decode("utf-8", "replace")


def _conversation(system: str | None, text: str) -> list[Any]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": text}]


@contextlib.contextmanager
def _open(
    model: str | None, flags: dict[str, Any], *, is_chat: bool = False, templates: bool = False
) -> Iterator[LLM]:
    """The model, with a progress line while it loads and its context length on stderr.

    `templates` says that its chat template will be needed: that gets ready beside it.
    """
    from edgeinfer.template_engine import TemplateEngine

    path = choose_model(model, bool(flags.get("yes")), is_chat=is_chat)
    engine = TemplateEngine() if templates else None
    if engine is not None:
        engine.start(may_fork=True)  # while this process imports NumPy
    line = ProgressLine()

    def progress(event: Progress) -> None:
        line.show(event.stage, event.done, event.total)

    from edgeinfer import runtime
    from edgeinfer.llm import LLM

    options = cast("LoadOptions", {**given(flags, LOAD_NAMES), "progress": progress})
    try:
        llm = LLM.of(runtime.load(path, options, engine))
    finally:
        line.clear()
    for why in unkept(llm):
        note(why)
    # What a start has made stays: no later collection, nor the one at exit, needs to look at it.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    with llm:
        opened, plan = llm.runtime, llm.plan
        trained = opened.model.hparams.n_ctx_train
        why = f" ({plan.note})" if plan.note else ""
        note(
            f"{llm.name}: context {llm.n_ctx} of {trained} tokens{why}, {opened.n_threads} "
            f"threads, {plan.total_bytes // _MIB} MiB planned"
        )
        yield llm


def _follow(stream: Stream, output: Output | None) -> None:
    """Write an answer as it comes; its reasoning goes to stderr where a person reads that."""
    line, shows_reasoning = ProgressLine(), sys.stderr.isatty()
    try:
        for event in stream:
            if event.type == "prompt_progress":
                line.show("prompt", event.done, event.total)
            elif event.type == "delta":
                line.clear()
                if event.reasoning and shows_reasoning:
                    tell(printable(event.reasoning))
                if output:
                    output.write(event.text)
    finally:
        line.clear()
    if output:
        output.end()


def _answer_json(
    stream: Stream, prompt: str, system: str | None, raw: bool, flags: dict[str, Any]
) -> dict[str, Any]:
    from dataclasses import asdict

    answer = stream.completion
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop": answer.stop,
        **asdict(answer.usage),
        "seed": answer.seed,
        "model": answer.model,
        "prompt": prompt,
        "prompt_token_ids": stream.prompt_ids,
        "system": system,
        "raw": raw,
        "load": given(flags, LOAD_NAMES),
        "sampling": given(flags, SAMPLING_NAMES),
        "version": __version__,
        "timings": asdict(answer.timings),
    }


@commands.command(epilog="Example: edgeinfer chat qwen3-4b --system 'Answer in one sentence.'")
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
        advice = advice_after(Path(last_model() or ""))
        if advice:
            note(advice)
        return
    from edgeinfer.plain_chat import talk

    with _open(model, flags, is_chat=True, templates=True) as llm:
        path = llm.runtime.model.file.path
        for why in remember(str(path.resolve())):
            note(why)
        sampling = cast("Sampling", given(flags, SAMPLING_NAMES))
        talk(llm, system, sampling, _follow, advice_after(path))


def _open_tui(
    model: str | None, system: str | None, keeps_history: bool, flags: dict[str, Any]
) -> None:
    gc.set_threshold(_GC_THRESHOLD)
    notes: dict[str, None] = {}  # said once the screen is the shell's again

    def take_loaded(path: str, llm: LLM) -> None:
        notes.update(dict.fromkeys([*remember(path), *unkept(llm)]))

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
        last_model=last_model,
        take_loaded=take_loaded,
        downloads=downloadable,
    )
    for line in notes:
        note(line)


@commands.command(epilog="Example: edgeinfer history --clear")
@click.option("--clear", is_flag=True, help="Delete every conversation of the full-screen chat.")
@common_flags
def history(clear: bool) -> None:
    """Where conversations are kept; --clear deletes them."""
    store = importlib.import_module("edgeinfer.tui.store")
    path = config.data_folder() / store.FILE_NAME
    if clear:
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


@commands.command(epilog="Example: edgeinfer info smollm2")
@click.argument("model", required=False)
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@common_flags
def info(model: str | None, as_json: bool) -> None:
    """What a model file is, and whether it runs."""
    from edgeinfer.inspect_file import describe

    facts = describe(choose_model(model, False))
    if as_json:
        show_json(facts)
        return
    for key, value in facts.items():
        show(f"{key.replace('_', ' ')}: {'' if value is None else one_line(str(value), _MAX_LINE)}")


@commands.command(epilog="Example: edgeinfer plan qwen3-4b -c 16384")
@click.argument("model", required=False)
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@load_flags
@common_flags
def plan(model: str | None, as_json: bool, **flags: Any) -> None:
    """How much memory a model will take, without loading it."""
    from edgeinfer.inspect_file import plan_file

    solved = plan_file(
        choose_model(model, bool(flags.get("yes"))), cast("LoadOptions", given(flags, LOAD_NAMES))
    )
    rows = [{"name": name, "bytes": size} for name, size in solved.rows.items()]
    if as_json:
        solution = {"n_ctx": solved.n_ctx, "slots": solved.slots, "note": solved.note}
        total = {"fits": solved.fits, "total_bytes": solved.total_bytes}
        show_json({**total, "rows": rows, "solved": solution})
        return
    for name, size in solved.rows.items():
        show(f"{name:16} {size / _MIB:9.1f} MiB")
    show(f"{'total':16} {solved.total_bytes / _MIB:9.1f} MiB of {solved.available / _MIB:.0f}")
    show(f"context {solved.n_ctx} tokens {solved.note}".rstrip())


@commands.command(epilog="Example: edgeinfer bench smollm2 -p 512 -n 128")
@click.argument("model", required=False)
@click.option("-p", "--prompt-tokens", default=256, show_default=True)
@click.option("-n", "--gen-tokens", default=64, show_default=True)
@click.option("-d", "--depth", default=0, show_default=True, help="Tokens of context before.")
@click.option("-r", "--repeat", default=3, show_default=True)
@click.option("--compare", metavar="LLAMA_BENCH", help="Against this llama-bench, in turns.")
@click.option("--sweep", is_flag=True, help="Steps by threads, depth and rows.")
@click.option("--ops", is_flag=True, help="A decode and a prefill step, op by op.")
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@load_flags
@common_flags
def bench(
    model: str | None,
    prompt_tokens: int,
    gen_tokens: int,
    depth: int,
    repeat: int,
    compare: str | None,
    sweep: bool,
    ops: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure speed on this machine."""
    from edgeinfer import cli_bench

    for name, value in (("-p", prompt_tokens), ("-n", gen_tokens), ("-r", repeat)):
        if value < 1:
            raise click.UsageError(f"{name} is {value}, need at least 1")
    if depth < 0:
        raise click.UsageError(f"-d is {depth}, need at least 0")
    if sweep and depth:
        raise click.UsageError("--sweep goes through depths of its own; leave -d out")
    if bool(compare) + sweep + ops > 1:
        raise click.UsageError("--compare, --sweep and --ops each measure alone")
    if sweep:
        result, lines = cli_bench.sweep_all(
            lambda n: _open(model, {**flags, "threads": n}), flags["threads"], repeat
        )
    else:
        with _open(model, flags) as llm:
            result, lines = cli_bench.measure(
                llm.runtime, prompt_tokens, gen_tokens, depth, repeat, compare, ops
            )
    if as_json:
        show_json(result)
    for line in [] if as_json else lines:
        show(line)


@commands.command(epilog="Example: edgeinfer perplexity smollm2 book.txt")
@click.argument("model")
@click.argument("file", type=click.Path())
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@load_flags
@common_flags
def perplexity(model: str, file: str, as_json: bool, **flags: Any) -> None:
    """How well a model predicts the text of FILE."""
    from edgeinfer.perplexity import measure

    text = _read_file(file)
    with _open(model, flags) as llm:
        tokenizer, line = llm.runtime.tokenizer, ProgressLine()
        ids = tokenizer.encode(text)
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        try:
            result = measure(
                llm.runtime.engine, ids, bos, lambda done, all: line.show("text", done, all)
            )
        finally:
            line.clear()
    if as_json:
        show_json({"ppl": result.ppl, "tokens": result.tokens})
    else:
        show(f"ppl {result.ppl:.4f} over {result.tokens} tokens")


@commands.command(epilog="Example: edgeinfer tokenize smollm2 -p 'Hello there'")
@click.argument("model", required=False)
@input_flags
@click.option("--special", is_flag=True, help="Read spellings of control tokens as those.")
@click.option("--bos", is_flag=True, help="Begin with the token that begins a text.")
@click.option("--pre", metavar="NAME", help="Pre-tokenizer, for a file that names none.")
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@common_flags
def tokenize(
    model: str | None,
    prompt: str | None,
    files: tuple[str, ...],
    special: bool,
    bos: bool,
    pre: str | None,
    as_json: bool,
) -> None:
    """Show the tokens of a text."""
    from edgeinfer.inspect_file import read_tokenizer

    path = choose_model(model, False)
    text = _read_prompt(prompt, files)
    tokenizer = read_tokenizer(path, pre)
    ids = tokenizer.encode(text, bos=bos, parse_special=special)
    pieces = [tokenizer.piece(id).decode("utf-8", "replace") for id in ids]
    if as_json:
        show_json({"token_ids": ids, "pieces": pieces})
        return
    for id, piece in zip(ids, pieces, strict=True):
        show(f"{id}\t{piece!r}")


@commands.command(epilog="Example: edgeinfer warmup smollm2")
@click.argument("model", required=False)
@load_flags
@common_flags
def warmup(model: str | None, **flags: Any) -> None:
    """Build and tune what a model needs, so that its first use starts at once and runs fastest."""
    from edgeinfer.backend import build_exactly, tune

    with _open(model, flags) as llm:
        llm.generate([0], max_tokens=1)
        line = ProgressLine()
        try:
            n = build_exactly(llm.runtime.program, lambda d, all: line.show("kernels", d, all))
        finally:
            line.clear()
        n_threads = None if n else tune(llm.runtime.program)
        lost = unkept(llm)
    if n:  # what was built is what must be measured
        with _open(model, flags) as llm:
            n_threads = tune(llm.runtime.program)
            lost = unkept(llm)
    if lost:
        raise EdgeInferError(lost[0])
    rebuilt = f"; {n} were rebuilt for this very processor" if n else ""
    threads = f"; it decodes fastest on {n_threads} threads" if n_threads else ""
    note(f"kernels are ready{rebuilt}{threads}")
