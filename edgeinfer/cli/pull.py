"""The command `pull`: fetch a model."""

from __future__ import annotations

import click

from edgeinfer.cli.console import show
from edgeinfer.cli.models import fetch
from edgeinfer.cli.options import common_flags


@click.command("pull", epilog="Example: edgeinfer pull qwen3-4b")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Fetch it, unasked.")
@common_flags
def command(name: str, yes: bool) -> None:
    """Fetch a model: an alias, or org/repo[:QUANT] on the Hugging Face hub."""
    show(str(fetch(name, yes)))
