"""The command `warmup`: all that a model needs is built and tuned before its first use."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edgeinfer.cli.console import ProgressLine, note
from edgeinfer.cli.models import unkept
from edgeinfer.cli.opening import open_model
from edgeinfer.cli.options import common_flags, load_flags
from edgeinfer.errors import EdgeInferError

if TYPE_CHECKING:
    from edgeinfer.llm import LLM


@click.command("warmup", epilog="Example: edgeinfer warmup smollm2")
@click.argument("model", required=False)
@load_flags
@common_flags
def command(model: str | None, **flags: Any) -> None:
    """Build and tune what a model needs, so that its first use starts at once and runs fastest."""
    from edgeinfer.backend import build_exactly

    with open_model(model, flags) as llm:
        llm.generate([0], max_tokens=1)
        with ProgressLine() as line:
            n = build_exactly(llm.runtime.program, partial(line.show, "kernels"))
        fastest = "" if n else _tune(llm)
        lost = unkept(llm)
    if n:  # what was built is what must be measured
        with open_model(model, flags) as llm:
            fastest = _tune(llm)
            lost = unkept(llm)
    if lost:
        raise EdgeInferError(lost[0])
    rebuilt = f"; {n} were rebuilt for this very processor" if n else ""
    tuned = f"; it decodes fastest {fastest}" if fastest else ""
    note(f"kernels are ready{rebuilt}{tuned}")


def _tune(llm: LLM) -> str:
    from edgeinfer.backend import tune

    with ProgressLine() as line:
        return tune(llm.runtime.program, partial(line.on_terminals, "tuning"))
