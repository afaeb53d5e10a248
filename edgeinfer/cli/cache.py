"""The command `cache`: what is kept on the disk, and where."""

from __future__ import annotations

import click

from edgeinfer import config, platform
from edgeinfer.cli.console import note, show, show_json
from edgeinfer.cli.models import shown
from edgeinfer.cli.options import common_flags, json_flag

_MB = 10**6


@click.command("cache", epilog="Example: edgeinfer cache --clear")
@click.option("--clear", is_flag=True, help="Delete built kernels and unfinished downloads.")
@json_flag
@common_flags
def command(clear: bool, as_json: bool) -> None:
    """What edgeinfer keeps on this disk, and where."""
    from edgeinfer.hub.discovery import models_folder
    from edgeinfer.hub.fetch import UNFINISHED, discard_unfinished, said_if_undeletable

    kernels, models = config.cache_folder(), models_folder()
    unfinished = [
        path for name in UNFINISHED for path in platform.files_below(models, f"**/{name}")
    ]
    if clear:
        with said_if_undeletable(kernels):
            discard_unfinished()
            platform.delete_all(kernels)
        note(f"emptied {kernels}; models stay (edgeinfer rm NAME deletes one)")
        if not as_json:
            return
        unfinished = [path for path in unfinished if path.exists()]
    sizes = {str(folder): platform.bytes_below(folder) for folder in (kernels, models)}
    if as_json:
        show_json({"folders": sizes, "unfinished": [str(path) for path in unfinished]})
        return
    for folder, size in sizes.items():
        show(f"{size / _MB:8.1f} MB  {folder}")
    for path in unfinished:
        show(f"unfinished: {shown(path)}")
