"""The command `info`: what a model file is, and whether it runs."""

from __future__ import annotations

import click

from edgeinfer.cli.console import show, show_json
from edgeinfer.cli.fact_lines import fact_lines
from edgeinfer.cli.models import choose_model
from edgeinfer.cli.options import common_flags, json_flag


@click.command("info", epilog="Example: edgeinfer info smollm2")
@click.argument("model", required=False)
@json_flag
@common_flags
def command(model: str | None, as_json: bool) -> None:
    """What a model file is, and whether it runs."""
    from edgeinfer.inspect_file import describe

    facts = describe(choose_model(model, False))
    if as_json:
        show_json(facts)
        return
    for line in fact_lines(facts):
        show(line)
