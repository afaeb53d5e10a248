"""The command `bench`: how fast a model is on this machine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import ProgressLine, show, show_json
from edgeinfer.cli.numbers import Whole
from edgeinfer.cli.opening import open_model
from edgeinfer.cli.options import common_flags, json_flag, load_flags

if TYPE_CHECKING:
    from edgeinfer.llm import LLM

_MOST = 1 << 20
_SOME = Whole(1, _MOST)


@click.command("bench", epilog="Example: edgeinfer bench smollm2 -p 512 -n 128")
@click.argument("model", required=False)
@click.option("-p", "--prompt-tokens", type=_SOME, default=256, show_default=True)
@click.option("-n", "--gen-tokens", type=_SOME, default=64, show_default=True)
@click.option(
    "-d",
    "--depth",
    type=Whole(0, _MOST),
    default=0,
    show_default=True,
    help="Tokens of context before.",
)
@click.option("-r", "--repeat", type=_SOME, default=3, show_default=True)
@click.option("--compare", metavar="LLAMA_BENCH", help="Against this llama-bench, in turns.")
@click.option("--sweep", is_flag=True, help="Steps by threads, depth and rows.")
@click.option("--ops", is_flag=True, help="A decode and a prefill step, op by op.")
@json_flag
@load_flags
@common_flags
def command(
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
    from edgeinfer.bench import report
    from edgeinfer.bench.compare import check_llama_bench

    if sweep and depth:
        raise click.UsageError("--sweep goes through depths of its own; leave -d out")
    if bool(compare) + sweep + ops > 1:
        raise click.UsageError("--compare, --sweep and --ops each measure alone")
    if compare is not None:
        check_llama_bench(compare)  # which is found out before a model is loaded
    with ProgressLine() as line:
        tell = line.on_terminals
        if sweep:

            def open_with(n_threads: int) -> AbstractContextManager[LLM]:
                line.clear()
                return open_model(model, {**flags, "threads": n_threads})

            result, lines = report.sweep_all(open_with, flags["threads"], repeat, tell)
        else:
            with open_model(model, flags) as llm:
                result, lines = report.measure(
                    llm.runtime, prompt_tokens, gen_tokens, depth, repeat, compare, ops, tell
                )
    if as_json:
        show_json(result)
    for text in [] if as_json else lines:
        show(text)
