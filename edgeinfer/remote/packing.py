"""Replies that were compressed on the way though nobody asked for that, as some proxies do."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_ANY_HEADER = 32 + zlib.MAX_WBITS  # of gzip or zlib
_MOST_AT_ONCE = 1 << 18  # bytes


def unpacked(chunks: Iterator[bytes], encoding: str | None) -> Iterator[bytes]:
    """The bytes as they were; ValueError where that can't be known."""
    kind = (encoding or "identity").strip().lower()
    if kind in ("identity", ""):
        yield from chunks
        return
    if kind not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"it is compressed by {kind}, which nobody has asked for")
    inflater = zlib.decompressobj(_ANY_HEADER)
    try:
        for chunk in chunks:
            while chunk:
                yield inflater.decompress(chunk, _MOST_AT_ONCE)
                chunk = inflater.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"what is compressed can't be read: {error}") from None
    if not inflater.eof:
        raise ValueError("what is compressed has no end")
