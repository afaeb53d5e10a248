"""The command `perplexity`: how well a model predicts a text."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from edgeinfer.cli.console import ProgressLine, show, show_json
from edgeinfer.cli.input import read_file
from edgeinfer.cli.opening import open_model
from edgeinfer.cli.options import common_flags, json_flag, load_flags


@click.command("perplexity", epilog="Example: edgeinfer perplexity smollm2 book.txt")
@click.argument("model")
@click.argument("file", type=click.Path())
@json_flag
@load_flags
@common_flags
def command(model: str, file: str, as_json: bool, **flags: Any) -> None:
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
