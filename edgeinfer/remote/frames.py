"""The events of a server's stream, as JSON; nothing that comes grows without limit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from edgeinfer.event_stream import EventReader, EventTooLargeError
from edgeinfer.remote.address import Address
from edgeinfer.remote.refusals import ServerError
from edgeinfer.terminal import one_line

_MOST_BYTES = 8 << 20  # of one event
_MOST_SHOWN = 400  # characters of what can't be read
_END = "[DONE]"


def frames(chunks: Iterable[bytes], address: Address) -> Iterator[dict[str, Any] | None]:
    """The events of a stream; None is the mark of its end, which is missing where it broke off.

    ServerError for what is no event; one that is cut off is left out, and one without data, which
    only keeps the connection.
    """
    for text in _events(chunks, address):
        if text == _END:
            yield None
            return
        if text:
            yield as_object(text, address)


def _events(chunks: Iterable[bytes], address: Address) -> Iterator[str]:
    """The data of each; the last may lack the empty line that ends it, where it is whole."""
    reader = EventReader(_MOST_BYTES)
    for chunk in chunks:
        try:
            found = reader.push(chunk)
        except EventTooLargeError:
            most = _MOST_BYTES >> 20
            raise ServerError(f"{address.place} sent an event of more than {most} MiB") from None
        for data in found:
            yield _text(data)
    last = _text(reader.end())
    if last == _END or isinstance(_json(last), dict):
        yield last


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()


def as_object(text: str, address: Address) -> dict[str, Any]:
    """What a server sends as JSON; ServerError for anything else."""
    found = _json(text)
    if not isinstance(found, dict):
        raise no_api(text, address)
    return found


def _json(text: str) -> Any:
    """None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def no_api(text: str, address: Address) -> ServerError:
    """What sends this is something else than was thought."""
    sent = one_line(address.hidden(" ".join(text[:_MOST_SHOWN].split())), 80)
    return ServerError(
        f"{address.place} does not answer as OpenAI's API does, but {sent!r}; check the URL"
    )
