"""The command `plan`: the memory that a model will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import show, show_json
from edgeinfer.cli.models import choose_model
from edgeinfer.cli.options import common_flags, json_flag, load_flags, load_options

if TYPE_CHECKING:
    from edgeinfer.engine.memory_plan import MemoryPlan

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
    if as_json:
        show_json(_facts(solved))
        return
    width = max(16, *map(len, solved.rows))
    for pool in solved.pools:
        if len(solved.pools) > 1:
            show(f"{pool.name}:")
        for name, size in pool.rows.items():
            show(f"{name:{width}} {size / _MIB:9.1f} MiB")
        show(f"{'total':{width}} {pool.total_bytes / _MIB:9.1f} MiB of {pool.available / _MIB:.0f}")
    show(f"context {solved.n_ctx} tokens {solved.note}".rstrip())


def _facts(solved: MemoryPlan) -> dict[str, Any]:
    return {
        "fits": solved.fits,
        "total_bytes": solved.total_bytes,
        "rows": [
            {"name": name, "bytes": size, "memory": pool.name}
            for pool in solved.pools
            for name, size in pool.rows.items()
        ],
        "memories": [
            {"name": pool.name, "bytes": pool.total_bytes, "available_bytes": pool.available}
            for pool in solved.pools
        ],
        "solved": {"n_ctx": solved.n_ctx, "slots": solved.slots, "note": solved.note},
    }
