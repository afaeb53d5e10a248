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
_MARK = b"\xef\xbb\xbf"  # of UTF-8


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
    data: list[bytes] = []
    n_held = 0
    for line in _lines(chunks, address):
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
            n_held += len(line) + _LINE_BYTES
            if n_held > _MOST_BYTES:
                raise _too_large(address)
        elif not line and data:
            text, data, n_held = b"\n".join(data), [], 0
            yield text.decode("utf-8", "replace").strip()
    last = b"\n".join(data).decode("utf-8", "replace").strip()
    if last == _END or isinstance(_json(last), dict):
        yield last


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


def _lines(chunks: Iterable[bytes], address: Address) -> Iterator[bytes]:
    """Lines, without what ends them: CR, LF, or both. The last may not have ended."""
    parts: list[bytes] = []  # of a line that has not ended
    n_held = 0
    for chunk in _with_one_end(chunks):
        first, *others = chunk.split(b"\n")
        parts.append(first)
        n_held += len(first)
        if n_held > _MOST_BYTES:
            raise _too_large(address)
        if others:
            yield b"".join(parts)
            *whole, rest = others
            yield from whole
            parts, n_held = [rest], len(rest)
    yield b"".join(parts)


def _with_one_end(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes with LF alone at the ends of lines, and without the mark that some begin with."""
    was_cr, mark = False, _MARK
    for chunk in filter(None, chunks):
        rest = chunk.removeprefix(b"\n") if was_cr else chunk
        was_cr = chunk.endswith(b"\r")
        while mark and rest[:1] == mark[:1]:
            rest, mark = rest[1:], mark[1:]
        mark = mark if not rest else b""
        yield rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _too_large(address: Address) -> ServerError:
    return ServerError(f"{address.place} sent an event of more than {_MOST_BYTES >> 20} MiB")
