"""The command `rm`: delete a model that was fetched."""

from __future__ import annotations

import click

from edgeinfer.cli.console import note
from edgeinfer.cli.models import shown
from edgeinfer.cli.options import common_flags


@click.command("rm", epilog="Example: edgeinfer rm qwen3-4b")
@click.argument("name")
@common_flags
def command(name: str) -> None:
    """Delete a model that edgeinfer fetched; never one of another program."""
    from edgeinfer.hub.fetch import remove

    for path in remove(name):
        note(f"deleted {shown(path)}")
