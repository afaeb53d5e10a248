"""The flags that point a command at a server, and what it then opens there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeinfer.cli.options import LOAD_NAMES, as_flag
from edgeinfer.errors import Keyword

if TYPE_CHECKING:
    from edgeinfer.remote.server import Server

F = TypeVar("F", bound=Callable[..., Any])


def url_flags(command: F) -> F:
    """Where the model runs, if not here."""
    url = click.option(
        "--url",
        metavar="URL",
        help="Ask a server that speaks OpenAI's API; MODEL is its name there.",
    )
    key = click.option(
        "--api-key", metavar="KEY", help="For that server; else EDGEINFER_API_KEY, OPENAI_API_KEY."
    )
    return url(key(command))


def server_of(flags: dict[str, Any]) -> Server | None:
    """The server that the flags name, which nothing is asked yet; None where they name none.

    Takes its flags away. UsageError for others that say how this machine would load a model.
    """
    url, key = flags.pop("url"), flags.pop("api_key")
    if url is None:
        if key is not None:
            raise click.UsageError("--api-key is for the server of --url, and there is none")
        return None
    given = [as_flag(Keyword(name)) for name in LOAD_NAMES if flags.get(name) is not None]
    if given:
        raise click.UsageError(
            f"{', '.join(given)}: how a model is loaded is set where it runs, not with --url"
        )
    from edgeinfer.remote.address import read_address
    from edgeinfer.remote.server import Server

    return Server(read_address(url, key))
