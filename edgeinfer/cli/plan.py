"""The command `plan`: the memory that a model will take."""

from __future__ import annotations

from typing import Any

import click

from edgeinfer.cli.console import show, show_json
from edgeinfer.cli.models import choose_model
from edgeinfer.cli.options import common_flags, json_flag, load_flags, load_options

_MIB = 1 << 20


@click.command("plan", epilog="Example: edgeinfer plan qwen3-4b -c 16384")
@click.argument("model", required=False)
@json_flag
@load_flags
@common_flags
def command(model: str | None, as_json: bool, **flags: Any) -> None:
    """How much memory a model will take, without loading it."""
    from edgeinfer import inspect_file

    path = choose_model(model, bool(flags.get("yes")))
    solved = inspect_file.plan(path, **load_options(flags))
    rows = [{"name": name, "bytes": size} for name, size in solved.rows.items()]
    if as_json:
        solution = {"n_ctx": solved.n_ctx, "slots": solved.slots, "note": solved.note}
        total = {"fits": solved.fits, "total_bytes": solved.total_bytes}
        show_json({**total, "rows": rows, "solved": solution})
        return
    width = max(16, *map(len, solved.rows))
    for name, size in solved.rows.items():
        show(f"{name:{width}} {size / _MIB:9.1f} MiB")
    show(f"{'total':{width}} {solved.total_bytes / _MIB:9.1f} MiB of {solved.available / _MIB:.0f}")
    show(f"context {solved.n_ctx} tokens {solved.note}".rstrip())
