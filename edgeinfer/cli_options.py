"""The flags that commands share: each is the API keyword with hyphens.

Knows nothing of what commands do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_LOAD = (
    click.option("n_ctx", "-c", "--ctx", "--n-ctx", type=int, help="Context length in tokens."),
    click.option("--memory", metavar="2G|80%", help="Most memory to use."),
    click.option("-t", "--threads", type=int, help="CPU threads."),
    click.option("--kv-type", metavar="TYPE[/TYPE]", help="Type of K and V in the cache (f16)."),
    click.option("--device", metavar="auto|cpu|reference", help="Where to run."),
    click.option("--gpu-layers", type=int, help="Layers on the GPU."),
    click.option("--slots", type=int, help="Full-length contexts that the cache holds."),
    click.option("--pre", metavar="NAME", help="Pre-tokenizer, for a file that names none."),
    click.option("--chat-template", metavar="NAME|FILE", help="Instead of the file's own."),
    click.option("-y", "--yes", is_flag=True, help="Fetch a model that is not here, unasked."),
)
LOAD_NAMES = (
    "n_ctx", "memory", "threads", "kv_type", "device", "gpu_layers", "slots", "pre",
    "chat_template",
)  # fmt: skip

_NUMBERS: dict[str, type] = {
    "top_k": int, "top_p": float, "min_p": float, "typical_p": float, "top_n_sigma": float,
    "xtc_probability": float, "xtc_threshold": float, "repeat_last_n": int,
    "repeat_penalty": float, "presence_penalty": float, "frequency_penalty": float,
    "dry_multiplier": float, "dry_base": float, "dry_allowed_length": int,
    "dry_penalty_last_n": int, "dynatemp_range": float, "dynatemp_exponent": float,
    "mirostat": int, "mirostat_tau": float, "mirostat_eta": float, "seed": int,
}  # fmt: skip
_SAMPLING = (
    click.option("-n", "--max-tokens", type=int, help="Most tokens to generate."),
    click.option("temperature", "--temperature", "--temp", type=float, help="0 is greedy."),
    *(click.option("--" + name.replace("_", "-"), type=kind) for name, kind in _NUMBERS.items()),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text."),
    click.option(
        "--stop-token-ids", type=int, multiple=True, metavar="ID", help="End at this token."
    ),
    click.option(
        "--overflow",
        type=click.Choice(["error", "slide", "drop-turns"]),
        help="When the context is full: stop with an error, or forget the oldest tokens or turns.",
    ),
    click.option(
        "--speculation/--no-speculation",
        default=None,
        help="Guess tokens ahead where that is faster (on); the answer is the same.",
    ),
)
SAMPLING_NAMES = (
    "max_tokens",
    "temperature",
    *_NUMBERS,
    "stop",
    "stop_token_ids",
    "overflow",
    "speculation",
)


def load_flags(command: F) -> F:
    """How the model is loaded."""
    return _with(command, _LOAD)


def sampling_flags(command: F) -> F:
    """How tokens are picked, and when to end."""
    return _with(command, _SAMPLING)


def common_flags(command: F) -> F:
    """What every command has."""
    flag = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
    return flag(command)


def input_flags(command: F) -> F:
    """Where text comes from."""
    prompt = click.option("-p", "--prompt", metavar="TEXT", help="The text; - reads stdin.")
    file = click.option(
        "files", "-f", "--file", multiple=True, type=click.Path(), help="Append this file."
    )
    return _with(command, (prompt, file))


def _with(command: F, flags: tuple[Callable[[F], F], ...]) -> F:
    for flag in reversed(flags):
        command = flag(command)
    return command


def given(flags: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of `names` that were set on the command line."""
    chosen = {name: flags[name] for name in names if flags.get(name) not in (None, ())}
    kv_type = chosen.get("kv_type")
    if kv_type and "/" in kv_type:
        chosen["kv_type"] = tuple(kv_type.split("/", 1))
    return chosen
