"""The command `list`: the models that are here, and those that can be."""

from __future__ import annotations

import click

from edgeinfer.cli.console import note, show, show_json
from edgeinfer.cli.models import shown
from edgeinfer.cli.options import common_flags, json_flag
from edgeinfer.terminal import one_line

_MB = 10**6


@click.command("list", epilog="Example: edgeinfer list --all")
@click.option("show_all", "--all", is_flag=True, help="Also the names that can be pulled.")
@json_flag
@common_flags
def command(show_all: bool, as_json: bool) -> None:
    """The models on this machine, those of Ollama, LM Studio and others included."""
    from edgeinfer.hub.catalog import ALIASES
    from edgeinfer.hub.discovery import list_models

    here = list_models()
    names = {info.name for info in here}
    missing = [alias for alias in ALIASES.values() if show_all and alias.name not in names]
    if as_json:
        show_json(
            {
                "models": [
                    {
                        "name": info.name,
                        "bytes": info.n_bytes,
                        "source": info.source,
                        "quantisation": info.quant,
                        "path": str(info.path),
                    }
                    for info in here
                ],
                "pull": [
                    {"name": a.name, "bytes": a.n_bytes, "source": a.source, "licence": a.licence}
                    for a in missing
                ],
            }
        )
        return
    rows = [(one_line(i.name), f"{i.n_bytes / _MB:.0f} MB", i.source, shown(i.path)) for i in here]
    rows += [(a.name, f"{a.n_bytes / _MB:.0f} MB", "(pull)", a.licence) for a in missing]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    for name, size, source, path in rows:
        show(f"{name:{widths[0]}}  {size:>{widths[1]}}  {source:{widths[2]}}  {path}")
    if not rows:
        note("no models here yet: `edgeinfer pull smollm2`, or `edgeinfer list --all` for names")
