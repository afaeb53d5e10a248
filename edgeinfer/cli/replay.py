"""The command `replay`: whether an answer that was recorded comes out again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeinfer import __version__
from edgeinfer.cli.console import note, show, show_json
from edgeinfer.cli.opening import open_model
from edgeinfer.cli.options import FileName, common_flags, json_flag, load_flags
from edgeinfer.terminal import one_line

if TYPE_CHECKING:
    from edgeinfer.llm import LLM
    from edgeinfer.replay import Recording, Replay


@click.command("replay", epilog="Example: edgeinfer replay answer.json --device cpu")
@click.argument("file", type=FileName())
@click.option("--model", metavar="MODEL", help="Where the model is now.")
@json_flag
@load_flags
@common_flags
def command(file: str, model: str | None, as_json: bool, **flags: Any) -> None:
    """Compute again what `edgeinfer run --json` wrote to FILE, and compare the tokens.

    They are the same on every device but `reference`, which has numbers of its own; those of `fast`
    numerics on GPUs of the same kind. Exit code 1 says that they are not.
    """
    from edgeinfer.replay import Recording

    recording = Recording.read(file)
    flags["n_ctx"] = flags["n_ctx"] or recording.n_ctx
    flags["kv_type"] = flags["kv_type"] or recording.kv_type
    flags["numerics"] = flags["numerics"] or recording.numerics
    with open_model(model or recording.model, flags) as llm:
        replay = recording.replay(llm)
        line = _verdict(replay, recording, llm)
    if as_json:
        show_json(
            {
                "equal": replay.is_equal,
                "differs_at": replay.differs_at,
                "expected": replay.expected,
                "found": replay.found,
            }
        )
    else:
        show(line)
    if not replay.is_equal:
        raise click.exceptions.Exit(1)


def _verdict(replay: Replay, recording: Recording, llm: LLM) -> str:
    n, at = len(replay.expected), replay.differs_at
    if at is None:
        return f"equal: {n} tokens, as recorded on {one_line(recording.device)}"
    if "reference" in (recording.device, llm.runtime.devices):
        note("(the device reference has numbers of its own; law has those of all others)")
    if recording.numerics != "exact":
        note(f"({recording.numerics} numerics are the same on GPUs of one kind alone)")
    if recording.version != __version__:
        note(f"(recorded by edgeinfer {recording.version}, this is {__version__})")
    then, now = (_token(llm, tokens, at) for tokens in (replay.expected, replay.found))
    return f"differs at token {at} of {n}: {then} was recorded, {now} came"


def _token(llm: LLM, tokens: tuple[int, ...], at: int) -> str:
    if at == len(tokens):
        return "the end"
    piece = llm.runtime.tokenizer.piece(tokens[at]).decode("utf-8", "replace")
    return f"{tokens[at]} {piece!r}"
