"""The command `plan`: the memory that a model will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import note, show, show_json
from edgeinfer.cli.models import choose_model, shown
from edgeinfer.cli.options import common_flags, json_flag, load_flags, load_options
from edgeinfer.errors import ModelNotFoundError

if TYPE_CHECKING:
    from edgeinfer.engine.memory_plan import MemoryPlan

_MIB = 1 << 20


@click.command("plan", epilog="Example: edgeinfer plan qwen3-4b -c 16384")
@click.argument("model", required=False)
@json_flag
@load_flags
@common_flags
def command(model: str | None, as_json: bool, **flags: Any) -> None:
    """How much memory a model will take, without loading it.

    Of a model on the hub that is not here only the header is fetched.
    """
    from edgeinfer import inspect_file

    options = load_options(flags)
    if model is not None and _is_elsewhere(model):
        note(f"{shown(model)} is not here: reading its header on the hub")
        options["download"] = True
        solved = inspect_file.plan(model, **options)
    else:
        solved = inspect_file.plan(choose_model(model, bool(flags.get("yes"))), **options)
    if as_json:
        show_json(_facts(solved))
    else:
        _show(solved)


def _is_elsewhere(model: str) -> bool:
    from edgeinfer.hub.discovery import find_model
    from edgeinfer.hub.header import is_on_hub

    try:
        find_model(model)
    except ModelNotFoundError:
        return is_on_hub(model)
    return False


def _show(solved: MemoryPlan) -> None:
    width = max(16, *map(len, solved.rows))
    for pool in solved.pools:
        if len(solved.pools) > 1:
            show(f"{pool.name}:")
        for name, size in pool.rows.items():
            show(f"{name:{width}} {size / _MIB:9.1f} MiB")
        show(f"{'total':{width}} {pool.total_bytes / _MIB:9.1f} MiB of {pool.available / _MIB:.0f}")
    for line in solved.choices:
        show(line)
    if solved.note:
        show(solved.note)


def _facts(solved: MemoryPlan) -> dict[str, Any]:
    from edgeinfer.batch import PAGE

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
        "solved": {
            "n_ctx": solved.n_ctx,
            "slots": solved.slots,
            "kv_type": list(solved.kv_types),
            "prefix_tokens": solved.n_spare_pages * PAGE,
            "max_rows": solved.limits.max_rows,
            "max_sequences": solved.limits.max_sequences,
            "note": solved.note,
        },
    }
