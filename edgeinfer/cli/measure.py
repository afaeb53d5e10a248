"""The commands that measure a model and this machine: bench, perplexity, warmup."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import ProgressLine, note, show, show_json
from edgeinfer.cli.input import read_file
from edgeinfer.cli.models import unkept
from edgeinfer.cli.opening import open_model
from edgeinfer.cli.options import common_flags, load_flags
from edgeinfer.errors import EdgeInferError

if TYPE_CHECKING:
    from edgeinfer.llm import LLM


@click.command(epilog="Example: edgeinfer bench smollm2 -p 512 -n 128")
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
    from edgeinfer.cli import bench as cli_bench

    for name, value in (("-p", prompt_tokens), ("-n", gen_tokens), ("-r", repeat)):
        if value < 1:
            raise click.UsageError(f"{name} is {value}, need at least 1")
    if depth < 0:
        raise click.UsageError(f"-d is {depth}, need at least 0")
    if sweep and depth:
        raise click.UsageError("--sweep goes through depths of its own; leave -d out")
    if bool(compare) + sweep + ops > 1:
        raise click.UsageError("--compare, --sweep and --ops each measure alone")
    with ProgressLine() as line:
        tell = line.on_terminals
        if sweep:

            def open_with(n_threads: int) -> AbstractContextManager[LLM]:
                line.clear()
                return open_model(model, {**flags, "threads": n_threads})

            result, lines = cli_bench.sweep_all(open_with, flags["threads"], repeat, tell)
        else:
            with open_model(model, flags) as llm:
                result, lines = cli_bench.measure(
                    llm.runtime, prompt_tokens, gen_tokens, depth, repeat, compare, ops, tell
                )
    if as_json:
        show_json(result)
    for text in [] if as_json else lines:
        show(text)


@click.command(epilog="Example: edgeinfer perplexity smollm2 book.txt")
@click.argument("model")
@click.argument("file", type=click.Path())
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@load_flags
@common_flags
def perplexity(model: str, file: str, as_json: bool, **flags: Any) -> None:
    """How well a model predicts the text of FILE."""
    from edgeinfer.bench.perplexity import measure

    text = read_file(file)
    with open_model(model, flags) as llm:
        tokenizer = llm.runtime.tokenizer
        ids = tokenizer.encode(text)
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        with ProgressLine() as line:
            result = measure(llm.runtime.engine, ids, bos, partial(line.show, "text"))
    if as_json:
        show_json({"ppl": result.ppl, "tokens": result.tokens})
    else:
        show(f"ppl {result.ppl:.4f} over {result.tokens} tokens")


@click.command(epilog="Example: edgeinfer warmup smollm2")
@click.argument("model", required=False)
@load_flags
@common_flags
def warmup(model: str | None, **flags: Any) -> None:
    """Build and tune what a model needs, so that its first use starts at once and runs fastest."""
    from edgeinfer.backend import build_exactly

    with open_model(model, flags) as llm:
        llm.generate([0], max_tokens=1)
        with ProgressLine() as line:
            n = build_exactly(llm.runtime.program, partial(line.show, "kernels"))
        n_threads = None if n else _tune(llm)
        lost = unkept(llm)
    if n:  # what was built is what must be measured
        with open_model(model, flags) as llm:
            n_threads = _tune(llm)
            lost = unkept(llm)
    if lost:
        raise EdgeInferError(lost[0])
    rebuilt = f"; {n} were rebuilt for this very processor" if n else ""
    threads = "1 thread" if n_threads == 1 else f"{n_threads} threads"
    fastest = f"; it decodes fastest on {threads}" if n_threads else ""
    note(f"kernels are ready{rebuilt}{fastest}")


def _tune(llm: LLM) -> int | None:
    from edgeinfer.backend import tune

    with ProgressLine() as line:
        return tune(llm.runtime.program, partial(line.on_terminals, "tuning"))
