"""Server-sent events: the data of each, as JSON; nothing that comes grows without limit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from edgeinfer.remote.address import Address
from edgeinfer.remote.refusals import ServerError
from edgeinfer.terminal import one_line

_MOST_BYTES = 8 << 20  # of one event
_LINE_BYTES = 64  # that keeping a line takes beside it
_MOST_SHOWN = 400  # characters of what can't be read
_END = "[DONE]"


def frames(chunks: Iterable[bytes], address: Address) -> Iterator[dict[str, Any] | None]:
    """The events of a stream; None is the mark of its end, which is missing where it broke off.

    ServerError for what is no event; one that is cut off is left out.
    """
    data: list[bytes] = []
    n_held = 0
    for line in _lines(chunks, address):
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
            n_held += len(line) + _LINE_BYTES
            if n_held > _MOST_BYTES:
                raise _too_large(address)
        elif not line and data:
            text, data, n_held = b"\n".join(data).decode("utf-8", "replace"), [], 0
            if text.strip() == _END:
                yield None
                return
            yield as_object(text, address)


def as_object(text: str, address: Address) -> dict[str, Any]:
    """What a server sends as JSON; ServerError for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise no_api(text, address)
    return found


def no_api(text: str, address: Address) -> ServerError:
    """What sends this is something else than was thought."""
    sent = one_line(address.hidden(" ".join(text[:_MOST_SHOWN].split())), 80)
    return ServerError(
        f"{address.place} does not answer as OpenAI's API does, but {sent!r}; check the URL"
    )


def _lines(chunks: Iterable[bytes], address: Address) -> Iterator[bytes]:
    """Whole lines, without what ends them."""
    parts: list[bytes] = []  # of a line that has not ended
    n_held = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        n_held += len(first)
        if n_held > _MOST_BYTES:
            raise _too_large(address)
        if others:
            yield b"".join(parts).removesuffix(b"\r")
            *whole, rest = others
            yield from (line.removesuffix(b"\r") for line in whole)
            parts, n_held = [rest], len(rest)


def _too_large(address: Address) -> ServerError:
    return ServerError(f"{address.place} sent an event of more than {_MOST_BYTES >> 20} MiB")
