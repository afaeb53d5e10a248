"""The commands that look at a file or this machine and load no weights.

info, plan, tokenize, doctor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from edgeinfer.cli.console import show, show_json
from edgeinfer.cli.input import read_prompt
from edgeinfer.cli.models import choose_model
from edgeinfer.cli.options import LOAD_NAMES, common_flags, given, input_flags, load_flags
from edgeinfer.fact_lines import SECTIONS, fact_lines, version_lines

if TYPE_CHECKING:
    from edgeinfer.options import LoadOptions

_MIB = 1 << 20


@click.command(epilog="Example: edgeinfer info smollm2")
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
    for line in fact_lines(facts):
        show(line)


@click.command(epilog="Example: edgeinfer plan qwen3-4b -c 16384")
@click.argument("model", required=False)
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@load_flags
@common_flags
def plan(model: str | None, as_json: bool, **flags: Any) -> None:
    """How much memory a model will take, without loading it."""
    from edgeinfer import inspect_file

    path = choose_model(model, bool(flags.get("yes")))
    solved = inspect_file.plan(path, **cast("LoadOptions", given(flags, LOAD_NAMES)))
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


@click.command(epilog="Example: edgeinfer tokenize smollm2 -p 'Hello there'")
@click.argument("model", required=False)
@input_flags
@click.option("--special", is_flag=True, help="Read spellings of control tokens as those.")
@click.option("--bos", is_flag=True, help="Begin with the token that begins a text.")
@click.option("--pre", metavar="NAME", help="Pre-tokenizer, for a file that names none.")
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@common_flags
def tokenize(
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


@click.command(epilog="Example: edgeinfer doctor --json")
@click.option("as_json", "--json", is_flag=True, help="One JSON object.")
@common_flags
def doctor(as_json: bool) -> None:
    """Facts about this machine, and what to do about them, in a few seconds."""
    from edgeinfer.cli.doctor import examine

    facts = examine()
    if as_json:
        show_json(facts)
        return
    for section, values in facts.items():
        show(SECTIONS.get(section, section))
        if section == "edgeinfer":
            values = version_lines(values)
        for line in values if isinstance(values, list) else fact_lines(values):
            show(f"  {line}")
