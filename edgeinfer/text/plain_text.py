"""Bytes of a file or a pipe as text: as their mark says, else as UTF-8, else refused."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from edgeinfer.errors import EdgeInferError

# UTF-32 before UTF-16, whose mark its own begins with.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROLS = bytes(sorted({*range(32), 127} - {*b"\b\t\n\v\f\r\x1b"}))
_MOST_CONTROLS = 0.05  # of all characters; random bytes have 0.11
_MOST_LOST = 0.1  # Latin-1 has 0.04 in French
_LOOKED_AT = 4096  # bytes


def marked_encoding(data: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning names."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def decode(data: bytes, name: str) -> tuple[str, int]:
    """The text, and how many characters of it are U+FFFD in place of bytes that are none.

    EdgeInferError says that what is called `name` is no text.
    """
    encoding = marked_encoding(data) or _unmarked_encoding(data)
    try:
        text, n_lost = data.decode(encoding), 0
    except UnicodeDecodeError:
        text, n_lost = _in_the_systems(data, encoding) or _with_gaps(data, encoding)
    if encoding.startswith("utf-8"):
        n_controls = len(data) - len(data.translate(None, _CONTROLS))
        if n_controls > _MOST_CONTROLS * len(text):
            raise _no_text(name, f"{n_controls:,} of {len(text):,} characters are control codes")
    if n_lost > _MOST_LOST * len(text):
        raise _no_text(name, f"{n_lost:,} of {len(text):,} characters are not {encoding.upper()}")
    return text, n_lost


def lines(parts: Iterable[bytes]) -> Iterator[str]:
    """The lines of bytes that come part by part, whatever they are; a mark names the encoding."""
    decoder, pending = None, ""
    for part in parts:
        if decoder is None:
            encoding = marked_encoding(part) or "utf-8"
            decoder = codecs.getincrementaldecoder(encoding)("replace")
        *whole, pending = (pending + decoder.decode(part)).split("\n")
        yield from (line.rstrip("\r") for line in whole)
    pending += decoder.decode(b"", True) if decoder is not None else ""
    if pending:
        yield pending.rstrip("\r")


def _unmarked_encoding(data: bytes) -> str:
    """UTF-16 without a mark, where every other byte of European text is zero, or UTF-8."""
    start = data[:_LOOKED_AT]
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        n_zeros, n_others = start[first::2].count(0), start[1 - first :: 2].count(0)
        if n_zeros > len(start) // 4 and not n_others and not len(data) % 2:
            return name
    return "utf-8"


def _in_the_systems(data: bytes, encoding: str) -> tuple[str, int] | None:
    """In the encoding that the system writes its own texts in, where that is another."""
    import locale  # a text in UTF-8 needs none

    usual = locale.getpreferredencoding(False)
    try:
        if encoding == "utf-8" and codecs.lookup(usual).name not in ("utf-8", "ascii"):
            return data.decode(usual), 0
    except (LookupError, UnicodeDecodeError):
        pass
    return None


def _with_gaps(data: bytes, encoding: str) -> tuple[str, int]:
    text = data.decode(encoding, "replace")
    n_meant = data.count("\ufffd".encode()) if encoding.startswith("utf-8") else 0
    return text, text.count("\ufffd") - n_meant


def _no_text(name: str, why: str) -> EdgeInferError:
    return EdgeInferError(
        f"{name} is not text: {why}; give UTF-8 or UTF-16 (`iconv -f CHARSET -t UTF-8` converts)"
    )
