"""The command `perplexity`: how well a model predicts a text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import ProgressLine, show, show_json
from edgeinfer.cli.input import read_file
from edgeinfer.cli.numbers import Whole
from edgeinfer.cli.opening import open_model
from edgeinfer.cli.options import FileName, common_flags, json_flag, load_flags

if TYPE_CHECKING:
    from edgeinfer.engine.cache import Overflow


@click.command("perplexity", epilog="Example: edgeinfer perplexity smollm2 book.txt")
@click.argument("model")
@click.argument("file", type=FileName())
@click.option("--slide", is_flag=True, help="Read on in a context that slides, not in windows.")
@click.option("--last", type=Whole(min=1), help="Score the last so many tokens alone.")
@json_flag
@load_flags
@common_flags
def command(
    model: str, file: str, slide: bool, last: int | None, as_json: bool, **flags: Any
) -> None:
    """How well a model predicts the text of FILE."""
    from edgeinfer.bench.perplexity import measure

    text = read_file(file)
    with open_model(model, flags) as llm:
        tokenizer = llm.runtime.tokenizer
        ids = tokenizer.encode(text)
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        overflow: Overflow = "slide" if slide else "error"
        with ProgressLine() as line:
            shown = partial(line.show, "text")
            result = measure(llm.runtime.engine, ids, bos, shown, last=last, overflow=overflow)
    if as_json:
        show_json({"ppl": result.ppl, "tokens": result.tokens})
    else:
        show(f"ppl {result.ppl:.4f} over {result.tokens} tokens")
