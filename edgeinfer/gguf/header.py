"""The header of a GGUF file: what it says, each number checked before it is used."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from edgeinfer.errors import InvalidModelError
from edgeinfer.gguf.metadata import CODES, Array, Entry, Metadata, Origin, as_text
from edgeinfer.gguf.source import FileBytes
from edgeinfer.quant import quant_type

MAGIC = b"GGUF"
# Far above any model in use: a hostile file can't make opening slow or large.
MAX_KEYS = MAX_TENSORS = 1 << 16
_MAX_NAME = 1 << 16
_MAX_STRINGS = 1 << 22
_MAX_TEXT = 3 << 25
_MAX_DIMS = 4
_MAX_HEADER = 1 << 29

AGAIN = "the file is damaged; download it again"
CUT = "the file is cut short or damaged; download it again"

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in CODES.items()}
_TYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
    "uint64", "int64", "float64",
)  # fmt: skip


class TensorInfo(NamedTuple):
    """`at` is where the file describes the tensor, `offset` where its data begins."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int
    at: int


class Header:
    """Reads the header front to back; `at` never passes the end of the file."""

    def __init__(self, path: Path, data: FileBytes) -> None:
        self.path, self.at = path, len(MAGIC)
        self._data, self._size = data, data.size
        self._loaded = data.header(0)  # grows
        self._n_strings = self._n_text = 0

    def version(self) -> int:
        version = int(self._unpack(_U32, "version"))
        if version in (2, 3):
            return version
        if version & 0xFFFF == 0 and version:
            self._fail(
                "a big-endian GGUF, edgeinfer reads little-endian ones; download the "
                "little-endian file, or convert this one with gguf-py's gguf_convert_endian",
                "version",
                4,
            )
        advice = "convert the model again" if version == 1 else "update edgeinfer"
        self._fail(f"GGUF version {version}, edgeinfer reads 2 and 3; {advice}", "version", 4)

    def count(self, field: str, high: int) -> int:
        offset = self.at
        n = int(self._unpack(_U64, field))
        if n > high:
            self._fail(f"found {n}, at most {high} are supported; {AGAIN}", field, offset)
        return n

    def metadata(self, n: int) -> Metadata:
        entries: dict[str, Entry] = {}
        for i in range(n):
            offset = self.at
            key = self._name(f"metadata key {i}")
            if key in entries:
                self._fail(f"a second value for this key; {AGAIN}", key, offset)
            kind = self._type(key)
            offset = self.at
            entries[key] = Entry(self._value(kind, key), offset)
        return Metadata(self.path, entries)

    def tensor(self) -> TensorInfo:
        at = self.at
        name = self._name("tensor name")
        n_dims = int(self._unpack(_U32, name))
        if n_dims > _MAX_DIMS:
            self._fail(f"{n_dims} dimensions, at most {_MAX_DIMS} are supported; {AGAIN}", name, at)
        dims = [int(self._unpack(_U64, name)) for _ in range(n_dims)]
        if 0 in dims:
            self._fail(f"a dimension of 0; {AGAIN}", name, at)
        ggml_id = int(self._unpack(_U32, name))
        offset = int(self._unpack(_U64, name))
        kind, n_bytes = quant_type(ggml_id), 0
        if kind.is_known:
            row = dims[0] if dims else 1
            if row % kind.block:
                self._fail(
                    f"rows of {row} elements are not whole {kind.name} blocks of {kind.block}; "
                    f"{AGAIN}",
                    name,
                    at,
                )
            n_bytes = kind.row_bytes(row) * math.prod(dims[1:])
        return TensorInfo(name, tuple(reversed(dims)), ggml_id, offset, n_bytes, at)

    def _value(self, kind: str, field: str) -> bool | int | float | bytes | Array:
        if kind == "string":
            return self._string(field)
        if kind == "array":
            return self._array(field)
        offset = self.at
        value: int | float = self._unpack(_SCALARS[kind], field)
        if kind == "bool" and value not in (0, 1):
            self._fail(f"a boolean of {value}, need 0 or 1; {AGAIN}", field, offset)
        return value == 1 if kind == "bool" else value

    def _array(self, field: str) -> Array:
        offset = self.at
        item_type = self._type(field)
        if item_type == "array":
            self._fail("an array of arrays, supported are arrays of plain values", field, offset)
        n = int(self._unpack(_U64, field))
        start, lengths = self.at, array("I")
        if item_type == "string":
            lengths = self._skip_strings(n, field, offset)
        else:
            self._skip(n * _SCALARS[item_type].size, field)
        origin = Origin(self.path, field, offset)
        return Array(self._data, item_type, start, n, self.at - start, lengths, origin)

    def _skip_strings(self, n: int, field: str, offset: int) -> array[int]:
        """Their lengths in bytes."""
        self._n_strings += n
        if self._n_strings > _MAX_STRINGS:
            self._fail(f"{n} strings, at most {_MAX_STRINGS} are supported; {AGAIN}", field, offset)
        last, unpack = self._size - 8, _U64.unpack_from
        lengths, at = _short_lengths(self._window, self.at, n)
        data = self._loaded
        for _ in range(n - len(lengths)):
            if at > last:
                break
            if at + 8 > len(data):
                self._load(at + 8)
            (length,) = unpack(data, at)
            at += 8 + length
            lengths.append(length)
        else:
            if at <= self._size:
                self._count_text(at - self.at, field)
                self.at = at
                return array("I", lengths)
        self._fail(f"{n} strings run past the end, byte {self._size}; {CUT}", field, offset)

    def _name(self, field: str) -> str:
        offset = self.at
        name = self._string(field, _MAX_NAME)
        if not name:
            self._fail(f"an empty name; {AGAIN}", field, offset)
        return as_text(name)

    def _string(self, field: str, high: int | None = None) -> bytes:
        offset = self.at
        n = int(self._unpack(_U64, field))
        if high is not None and n > high:
            self._fail(f"a name of {n} bytes, at most {high} are supported; {CUT}", field, offset)
        self._count_text(n, field)
        start = self.at
        self._skip(n, field)
        self._load(self.at)
        with memoryview(self._loaded) as view:
            return bytes(view[start : self.at])

    def _count_text(self, n: int, field: str) -> None:
        self._n_text += n
        if self._n_text > _MAX_TEXT:
            message = f"{n} bytes more text, at most {_MAX_TEXT} in all are supported; {CUT}"
            self._fail(message, field, self.at)

    def _type(self, field: str) -> str:
        offset = self.at
        kind = int(self._unpack(_U32, field))
        if kind >= len(_TYPES):
            self._fail(
                f"value type {kind}, known are 0 to {len(_TYPES) - 1}; {AGAIN}", field, offset
            )
        return _TYPES[kind]

    def _unpack(self, form: struct.Struct, field: str) -> Any:
        start = self.at
        self._skip(form.size, field)
        if self.at > len(self._loaded):
            self._load(self.at)
        return form.unpack_from(self._loaded, start)[0]

    def end(self) -> None:
        """All of it is read, and is kept."""
        self._load(self.at)
        self._data.end_header(self.at)

    def _load(self, end: int) -> None:
        """Have the file up to `end` at least, or as far as it goes."""
        if end > _MAX_HEADER:
            self._fail(f"a header of more than {_MAX_HEADER} bytes; {AGAIN}", "header", self.at)
        self._data.header(min(end, self._size))

    def _window(self, at: int) -> bytes:
        end = min(at + _WINDOW, self._size)
        self._load(end)
        return bytes(memoryview(self._loaded)[at:end])

    def _skip(self, n: int, field: str) -> None:
        if n > self._size - self.at:
            self._fail(
                f"{n} bytes needed at byte {self.at}, the file ends at {self._size}; {CUT}",
                field,
                self.at,
            )
        self.at += n

    def _fail(self, message: str, field: str, offset: int) -> NoReturn:
        raise InvalidModelError(message, path=self.path, field=field, offset=offset)


def _short_lengths(window_at: Callable[[int], bytes], at: int, n: int) -> tuple[list[int], int]:
    """Lengths of up to `n` strings from `at` on, found many at once, and where the next begins.

    A string of less than 256 bytes begins where 8 bytes are that small a number. Once something
    else looks like that, or a string is longer, this ends, wherever that is.
    """
    import numpy as np

    lengths: list[int] = []
    while len(lengths) < n:
        window = window_at(at)
        if len(window) < 16:
            break
        words = np.ndarray(len(window) - 7, "<u8", window, strides=(1,))
        starts = np.flatnonzero(words < 256)[: n - len(lengths)]
        sizes = words[starts].astype(np.int64)
        expected = np.concatenate(([0], np.cumsum(sizes + 8)))
        wrong = np.flatnonzero(starts != expected[:-1])
        n_right = int(wrong[0]) if len(wrong) else len(starts)
        lengths += sizes[:n_right].tolist()
        at += int(expected[n_right])
        if n_right < _LEAST_RUN:
            break
    return lengths, at


_WINDOW = 1 << 18
_LEAST_RUN = 1000  # strings in a window: for fewer, looking at it takes longer than a loop
