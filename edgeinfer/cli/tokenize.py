"""The command `tokenize`: the tokens of a text."""

from __future__ import annotations

import click

from edgeinfer.cli.console import show, show_json
from edgeinfer.cli.input import read_prompt
from edgeinfer.cli.models import choose_model
from edgeinfer.cli.options import common_flags, input_flags, json_flag


@click.command("tokenize", epilog="Example: edgeinfer tokenize smollm2 -p 'Hello there'")
@click.argument("model", required=False)
@input_flags
@click.option("--special", is_flag=True, help="Read spellings of control tokens as those.")
@click.option("--bos", is_flag=True, help="Begin with the token that begins a text.")
@click.option("--pre", metavar="NAME", help="Pre-tokenizer, for a file that names none.")
@json_flag
@common_flags
def command(
    model: str | None,
    words: tuple[str, ...],
    prompt: str | None,
    files: tuple[str, ...],
    special: bool,
    bos: bool,
    pre: str | None,
    as_json: bool,
) -> None:
    """Show the tokens of a text: TEXT, what is piped in, and files, in this order."""
    from edgeinfer.inspect_file import read_tokenizer

    path = choose_model(model, False)
    text = read_prompt(words, prompt, files)
    tokenizer = read_tokenizer(path, pre)
    ids = tokenizer.encode(text, bos=bos, parse_special=special)
    pieces = [tokenizer.piece(id).decode("utf-8", "replace") for id in ids]
    if as_json:
        show_json({"token_ids": ids, "pieces": pieces})
        return
    for id, piece in zip(ids, pieces, strict=True):
        show(f"{id}\t{piece!r}")
