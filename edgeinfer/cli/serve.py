"""The command `serve`: models behind HTTP, for the clients of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import gc
import ipaddress
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeinfer import platform
from edgeinfer.cli.console import ProgressLine, note
from edgeinfer.cli.models import choose_model, start_notes
from edgeinfer.cli.numbers import Whole
from edgeinfer.cli.opening import GC_THRESHOLD
from edgeinfer.cli.options import FileName, common_flags, load_flags, load_options
from edgeinfer.errors import EdgeInferError, reason_of
from edgeinfer.terminal import one_line

if TYPE_CHECKING:
    from edgeinfer.options import LoadOptions
    from edgeinfer.server.models import Models

_ANY_HOST = ("0.0.0.0", "::")
_MOST_KEYS = 1 << 20  # bytes of a file of keys


@click.command("serve", epilog="Example: edgeinfer serve qwen3-4b --port 8080")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=Whole(0, 65535), default=8080, show_default=True, help="0: a free one."
)
@click.option("api_keys", "--api-key", metavar="KEY", multiple=True, help="Ask clients for one.")
@click.option(
    "--api-key-file", type=FileName(dir_okay=False), help="A file with a key on each line."
)
@click.option("--strict-names", is_flag=True, help="Unknown model names are errors.")
@click.option(
    "--allow-pull", is_flag=True, help="A request that names a model of the hub has it fetched."
)
@click.option(
    "--as-sent", is_flag=True, help="Leave lines in prompts that change with each request."
)
@click.option(
    "allowed", "--allow-host", metavar="NAME", multiple=True, help="Another name of this server."
)
@click.option(
    "origins", "--cors-origin", metavar="ORIGIN", multiple=True,
    help='Pages that may ask: "https://example.org", "*".',
)  # fmt: skip
@click.option(
    "--max-queue", type=Whole(1, 100_000), default=256, show_default=True,
    help="Requests at once; more are refused.",
)  # fmt: skip
@click.option(
    "--max-body", type=Whole(1, 4096), default=32, show_default=True, metavar="MIB",
    help="Largest request.",
)  # fmt: skip
@click.option(
    "--naive", is_flag=True, help="One request at a time, nothing reused: to measure against."
)
@load_flags
@common_flags
def command(
    models: tuple[str, ...],
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    api_key_file: str | None,
    strict_names: bool,
    allow_pull: bool,
    as_sent: bool,
    allowed: tuple[str, ...],
    origins: tuple[str, ...],
    max_queue: int,
    max_body: int,
    naive: bool,
    **flags: Any,
) -> None:
    """Serve models over HTTP until Ctrl-C.

    The first MODEL is loaded at once, the others when a request names them; where memory does not
    hold all, the one that was used longest ago gives way.
    """
    if not host.strip():  # to the system that is every address
        raise click.UsageError("--host is empty; is a variable not set? 0.0.0.0 is every address")
    keys = _checked_keys(api_keys, api_key_file)
    names = models or (None,)
    paths = [Path(choose_model(name, bool(flags.get("yes")))) for name in names]
    served = [(_name(name, path), path) for name, path in zip(names, paths, strict=True)]
    _check_names(served)
    listener = _listen(host, port)
    address, port, *_ = listener.getsockname()
    is_local = ipaddress.ip_address(address).is_loopback  # whatever it was called by
    with listener:
        from edgeinfer.server.models import Models
        from edgeinfer.server.run import Server
        from edgeinfer.server.service import Limits, Service

        line = ProgressLine()
        options: LoadOptions = {**load_options(flags), "naive": naive}
        options["progress"] = lambda event: (
            None if found.is_ready else line.show(event.stage, event.done, event.total)
        )
        found = Models(
            served, options, has_strict_names=strict_names, may_pull=allow_pull, tell=note
        )
        limits = Limits(
            most_body=max_body << 20,
            most_waiting=max_queue,
            api_keys=keys,
            origins=origins,
            hosts=(*allowed, host) if allowed or is_local else None,
            has_prefix_care=not as_sent,
        )
        url = _url(host, port)
        note(f"loading {served[0][0]} ...")
        with line:
            tell = partial(_tell_start, found, url, keys, is_local, line)
            Server(Service(found, limits), tell, note).run_on(listener)


def _listen(host: str, port: int) -> Any:
    try:
        return platform.listen(host, port)
    except (OSError, UnicodeError) as error:
        raise EdgeInferError(
            f"can't listen at {host} port {port}: {reason_of(error)}; choose another with "
            "--port N or --host ADDRESS"
        ) from error


def _checked_keys(given: Sequence[str], path: str | None) -> tuple[str, ...]:
    """Keys that a client can send; an empty one would let everybody in."""
    keys = tuple(key.strip() for key in (*given, *_keys_of(path)))
    for key in keys:
        if not key:
            raise click.UsageError("an API key is empty; is a variable not set?")
        if not key.isprintable():
            raise click.UsageError("an API key has characters that no header can hold")
    return keys


def _keys_of(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        with open(path, "rb") as file:
            text = platform.read_whole(file, _MOST_KEYS).decode("utf-8-sig")  # some editors mark it
    except OSError as error:
        raise click.UsageError(f"--api-key-file {path}: {reason_of(error)}") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"--api-key-file {path}: it is not text in UTF-8") from None
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise click.UsageError(f"--api-key-file {path}: there is no key in it")
    return keys


def _name(given: str | None, path: Path) -> str:
    """How clients name a model: as it was named here, or its file's name."""
    if given is None or "\\" in given or given.endswith(".gguf") or Path(given).exists():
        return one_line(path.stem)
    return given


def _check_names(served: Sequence[tuple[str, Path]]) -> None:
    """UsageError where a request could not name one of them."""
    seen: dict[str, Path] = {}
    for name, path in served:
        other = seen.setdefault(name.lower(), path)
        if other is not path:
            raise click.UsageError(
                f"{other} and {path} are both called {name!r}; rename one, or serve it elsewhere"
            )


def _url(host: str, port: int) -> str:
    shown = "localhost" if host in _ANY_HOST else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _tell_start(
    models: Models, url: str, keys: tuple[str, ...], is_local: bool, line: ProgressLine
) -> None:
    """What a person needs to point a client here."""
    line.clear()
    gc.freeze()  # what a start has made stays, as in other commands
    gc.set_threshold(GC_THRESHOLD)
    first, *others = models.served
    llm = first.opened
    for each in start_notes(llm):
        note(each)
    plan = llm.plan
    why = f" ({plan.note})" if plan.note else ""
    guard = f"{len(keys)} API key{'s' if len(keys) > 1 else ''}" if keys else "no API key"
    note(
        f"{first.name}: context {llm.n_ctx} tokens{why}, {plan.slots} slots, "
        f"{llm.runtime.runs_on}, {plan.summary} planned"
    )
    if others:
        note(f"when asked for: {', '.join(model.name for model in others)}")
    note(f"{url}/v1 (OpenAI), {url} (Anthropic, Ollama), {guard}; Ctrl-C stops")
    if not keys and not is_local:
        note("anyone who can reach this machine can use the models: --api-key KEY asks for one")
