"""The command `selftest`: whether a device computes what the CPU computes, and how fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeinfer.cli.console import note, show
from edgeinfer.cli.options import FileName, common_flags
from edgeinfer.errors import EdgeInferError, InvalidRequestError

if TYPE_CHECKING:
    from edgeinfer.batch import Sampler


@click.command("selftest", epilog="Example: edgeinfer selftest --device cuda --json report.json")
@click.option("--device", default="cuda", show_default=True, metavar="cpu|shim|cuda[:N]")
@click.option("--budget", default=300.0, show_default=True, help="Seconds; nothing begins later.")
@click.option("--only", metavar="NAME,NAME", help="These steps alone.")
@click.option("--json", "report", type=FileName(), help="Write a report there after every step.")
@click.option("--write", type=FileName(), help="Write hashes there, and compare with none.")
@common_flags
def command(
    device: str, budget: float, only: str | None, report: str | None, write: str | None
) -> None:
    """Compare what a device computes with hashes of what the CPU does; on a GPU, measure it."""
    from edgeinfer import __version__
    from edgeinfer.backend import find_device, open_backend
    from edgeinfer.device import Device
    from edgeinfer.selftest import judge, table
    from edgeinfer.selftest.run import NAMES, Run

    names = list(NAMES) if only is None else [name.strip() for name in only.split(",")]
    unknown = [name or repr(name) for name in names if name not in NAMES]
    if unknown:
        raise click.UsageError(f"no step {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if not budget >= 0:
        raise click.UsageError(f"--budget is {budget:g}; it must be seconds, 0 or more")
    if "," in device:
        raise InvalidRequestError(f"{device} are several devices; test one at a time")
    kind = Device.parse(device).kind
    if kind not in ("cpu", "shim", "cuda"):
        raise InvalidRequestError(f"{device} is not tested; choose cpu, shim or cuda")
    if write is not None and kind != "cpu":
        raise click.UsageError("hashes are written of what the CPU computes: --device cpu")
    if write is not None:
        judge.check_writable(Path(write))
    found = find_device(device).device
    run = Run(
        open_backend(found, make_sampler=_make_sampler),
        str(found),
        None if write is not None else judge.Judge.committed(),
        note,
    )
    run.report["edgeinfer"] = __version__
    run.steps(names, budget, Path(report) if report is not None else None)
    if write is not None:
        if not (run.is_ok and run.is_whole):
            raise EdgeInferError("not everything was computed, so no hashes are written: try again")
        judge.write(Path(write), run.hashes)
    for line in table.lines(run.report):
        show(line)
    if not run.is_ok:
        sys.stdout.flush()
        raise click.exceptions.Exit(1)


def _make_sampler(n_vocab: int, n_threads: int) -> Sampler:
    """That of NumPy: a machine for tests of GPUs has no compiler of our own."""
    from edgeinfer.sampling.sampler import ReferenceSampler

    return ReferenceSampler()
