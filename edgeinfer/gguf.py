"""Opens GGUF files: metadata, and tensors that are read when asked for. Every number is checked.

Knows nothing of what the metadata means, of architectures or of running a tensor's type.
"""

from __future__ import annotations

import builtins
import math
import re
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from edgeinfer import platform
from edgeinfer.errors import ClosedError, InvalidModelError, ModelNotFoundError
from edgeinfer.quant import Weight, quant_type
from edgeinfer.terminal import one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = "Scalar | Array"


class GGUFFile:
    """A model file, or all parts of a split one, open until `close`.

    Nothing is mapped: a file that is cut short or written to while it is read is an error.

    `metadata` is that of the first part; `tensors` are those of all parts in file order, also
    the ones whose type this version can't run.
    """

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Open a GGUF file; of a split one any part may be named, all must be present."""
        parts = [_Part(Path(path))]
        try:
            if parts[0].metadata.get_int("split.count", 1, high=_MAX_PARTS) > 1:
                siblings = _siblings(parts[0])
                parts.pop().close()
                for sibling in siblings:
                    parts.append(_Part(sibling))
                _check_parts(parts)
                for part in parts:
                    part.check_in_place()
            return cls(parts)
        except BaseException:
            for part in parts:
                part.close()
            raise

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self.path = parts[0].path
        self.paths = tuple(part.path for part in parts)
        self.version = parts[0].version
        self.metadata = parts[0].metadata
        self.tensors: dict[str, Weight] = {}
        for part in parts:
            for name, weight in part.tensors.items():
                if name in self.tensors:
                    raise InvalidModelError(
                        f"a second tensor of this name; {_AGAIN}", path=part.path, field=name
                    )
                self.tensors[name] = weight

    @property
    def n_bytes(self) -> int:
        """Size on disk of all parts."""
        return sum(part.size for part in self._parts)

    def close(self) -> None:
        """Close the file and drop its header; what was read of tensors stays."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Metadata(Mapping[str, Value]):
    """The key/value pairs of a file, in file order. Strings are decoded when asked for.

    One above 1 MiB is no text that anything here reads: asking for it raises. So do the typed
    getters, naming the key, when its value is absent (and no default is given), of another type,
    or out of range.
    """

    def __init__(self, path: Path, entries: dict[str, _Entry]) -> None:
        self._path, self._entries = path, entries

    def __getitem__(self, key: str) -> Value:
        value = self._entries[key].value
        return self._text(key, value) if isinstance(value, bytes) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def get_int(
        self, key: str, default: int | None = None, *, low: int = 0, high: int = 2**31 - 1
    ) -> int:
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(key, value, "an integer")
        return self._in_range(key, value, low, high)

    def get_float(self, key: str, default: float | None = None) -> float:
        """A finite number; integers are accepted."""
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._wrong(key, value, "a number")
        if not math.isfinite(value):
            self._wrong(key, value, "a finite number")
        return float(value)

    def get_str(self, key: str, default: str | None = None) -> str:
        value = self._find(key, default)
        if isinstance(value, bytes):
            return self._text(key, value)
        if not isinstance(value, str):
            self._wrong(key, value, "a string")
        return value

    def get_bytes(self, key: str) -> bytes:
        """A string as it is in the file, valid UTF-8 or not."""
        value = self._find(key, None)
        if not isinstance(value, bytes):
            self._wrong(key, value, "a string")
        return value

    def get_bool(self, key: str, default: bool | None = None) -> bool:
        value = self._find(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "a boolean")
        return value

    def get_array(self, key: str) -> Array:
        value = self._find(key, None)
        if not isinstance(value, Array):
            self._wrong(key, value, "an array")
        return value

    def get_ints(
        self, key: str, n: int | None = None, *, low: int = 0, high: int = 2**31 - 1
    ) -> tuple[int, ...]:
        """An integer array; with `n` it must have that length, and a single integer is repeated."""
        value = self._find(key, None)
        if n is not None and isinstance(value, int):
            return (self.get_int(key, low=low, high=high),) * n
        items = self._items(key, n, int, "integers")
        return tuple(self._in_range(key, item, low, high) for item in items)

    def get_floats(self, key: str, n: int | None = None) -> tuple[float, ...]:
        """An array of finite numbers; with `n` it must have that length."""
        items = self._items(key, n, (int, float), "numbers")
        if not all(map(math.isfinite, items)):
            self._wrong(key, self.get_array(key), "finite numbers")
        return tuple(map(float, items))

    def get_bools(self, key: str, n: int | None = None) -> tuple[bool, ...]:
        """A boolean array; with `n` it must have that length, and a single boolean is repeated."""
        value = self._find(key, None)
        if n is not None and isinstance(value, bool):
            return (value,) * n
        return tuple(self._items(key, n, bool, "booleans"))

    def _items(
        self, key: str, n: int | None, kind: type | tuple[type, ...], what: str
    ) -> list[Any]:
        array = self.get_array(key)
        if n is not None and len(array) != n:
            self._wrong(key, array, f"{n} {what}")
        if array.item_type == "string" or (array.item_type == "bool") != (kind is bool):
            self._wrong(key, array, f"an array of {what}")
        items = array.tolist()
        if not all(isinstance(item, kind) for item in items):
            self._wrong(key, array, f"an array of {what}")
        return items

    def _text(self, key: str, raw: bytes) -> str:
        if len(raw) > _MAX_VALUE:
            self._wrong(key, raw, f"at most {_MAX_VALUE} bytes, it has {len(raw)}")
        return _text(raw)

    def _find(self, key: str, default: Scalar | None) -> Scalar | bytes | Array:
        if key in self._entries:
            return self._entries[key].value
        if default is None:
            raise InvalidModelError(
                "the file lacks this metadata key; take a file from another publisher",
                path=self._path,
                field=key,
            )
        return default

    def _in_range(self, key: str, value: int, low: int, high: int) -> int:
        if not low <= value <= high:
            self._wrong(key, value, f"an integer from {low} to {high}")
        return value

    def _wrong(self, key: str, value: Scalar | bytes | Array, wanted: str) -> NoReturn:
        shown = repr(_text(value[:40]) if isinstance(value, bytes) else value)
        entry = self._entries.get(key)
        raise InvalidModelError(
            f"found {shown}, need {wanted}",
            path=self._path,
            field=key,
            offset=entry.offset if entry else None,
        )


class Array:
    """An array of the metadata, taken from the file's header each time it is asked for.

    It takes `n_bytes` there. `item_type` is one of bool, string, int8 to int64, uint8 to uint64,
    float32, float64.
    """

    def __init__(
        self,
        header: _Bytes,
        item_type: str,
        start: int,
        n: int,
        n_bytes: int,
        lengths: array[int],
        origin: _Origin,
    ) -> None:
        self.item_type, self.n_bytes = item_type, n_bytes
        self._header, self._start, self._n, self._origin = header, start, n, origin
        self._lengths = lengths  # of strings, in bytes

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return f"Array({self._n} x {self.item_type})"

    def bytes(self) -> list[builtins.bytes]:
        """The strings as they are in the file, valid UTF-8 or not."""
        if self.item_type != "string":
            self._origin.fail(f"found an array of {self.item_type}, need strings")
        # A call takes a third of the time that a loop does; 8 bytes are each string's length.
        data, at, strings = self._open_data(), self._start, list[builtins.bytes]()
        for i in range(0, self._n, _STRINGS_AT_ONCE):
            lengths = self._lengths[i : i + _STRINGS_AT_ONCE]
            form = struct.Struct("8x%ds" * len(lengths) % tuple(lengths))
            strings += form.unpack_from(data, at)
            at += form.size
        return strings

    def strings(self) -> list[str]:
        """The strings, with U+FFFD for what is not UTF-8."""
        raw = self.bytes()
        try:
            return list(map(builtins.bytes.decode, raw))
        except UnicodeDecodeError:
            return [_text(each) for each in raw]

    def numpy(self) -> NDArray[Any]:
        """The numbers or booleans as a read-only view of the header."""
        import numpy as np

        if self.item_type == "string":
            self._origin.fail("found an array of strings, need numbers")
        dtype = np.dtype(self.item_type).newbyteorder("<")
        numbers = np.frombuffer(self._open_data(), dtype, self._n, self._start)
        if self.item_type == "bool" and numbers.view(np.uint8).max(initial=0) > 1:
            self._origin.fail("a boolean is neither 0 nor 1")
        return numbers

    def tolist(self) -> list[Any]:
        """The items as Python values; of millions of numbers ask `numpy` instead."""
        if self.item_type == "string":
            return self.strings()
        if self._n > _MAX_ITEMS:
            self._origin.fail(f"found {self._n} numbers, at most {_MAX_ITEMS} are supported")
        form = f"<{self._n}{_CODES[self.item_type]}"
        items = list(struct.unpack_from(form, self._open_data(), self._start))
        if self.item_type != "bool":
            return items
        if not {0, 1}.issuperset(items):
            self._origin.fail("a boolean is neither 0 nor 1")
        return [item == 1 for item in items]

    def _open_data(self) -> memoryview:
        return self._header.all()


class TensorBytes:
    """The bytes of a tensor in its file: a slice reads them, and belongs to whoever asked."""

    def __init__(self, source: _Bytes, start: int, n_bytes: int) -> None:
        self._source, self._start, self._n_bytes = source, start, n_bytes

    def __len__(self) -> int:
        return self._n_bytes

    def __getitem__(self, part: slice) -> memoryview:
        begin, end, step = part.indices(self._n_bytes)
        assert step == 1
        return self._source.read(self._start + begin, max(0, end - begin))

    def read_into(self, buffer: memoryview, start: int) -> None:
        assert start + len(buffer) <= self._n_bytes
        self._source.read_into(buffer, self._start + start)


class _Bytes:
    """A file's bytes: its header, which stays, and whatever else is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = platform.ReadableFile(path)
        except OSError as error:
            self._fail_to_read(error)
        self.size = self._file.n_bytes
        self._header = bytearray()
        self._view: memoryview | None = None

    def header(self, end: int) -> bytearray:
        """The file up to `end` at least; more of it is read as it is needed."""
        n = len(self._header)
        if end > n:
            # Doubling, so that few steps lead to a large header.
            more = self.read(n, min(max(end - n, n, _HEADER_STEP), self.size - n))
            self._header += more
        return self._header

    def end_header(self, end: int) -> None:
        """Keep what was the header, and no more."""
        del self._header[end:]
        self._view = memoryview(self._header).toreadonly()

    def all(self) -> memoryview:
        """The header."""
        if self._view is None:
            raise ClosedError(f"{self.path} was closed")
        return self._view

    def read(self, start: int, n_bytes: int) -> memoryview:
        """Fresh bytes of the file."""
        import numpy as np

        buffer = np.empty(n_bytes, np.uint8).data
        self.read_into(buffer, start)
        return buffer.toreadonly()

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer; InvalidModelError where the file is not what was opened any more."""
        if self._file.is_closed:
            raise ClosedError(f"{self.path} was closed")
        try:
            n_read = self._file.read_into(buffer, start)
            is_unchanged = self._file.is_unchanged()
        except OSError as error:
            self._fail_to_read(error)
        if n_read < len(buffer) or not is_unchanged:
            raise InvalidModelError(
                "the file was cut short or written to while it was read; load it again once it is "
                "complete",
                path=self.path,
                offset=start,
            )

    def is_in_place(self) -> bool:
        return self._file.is_in_place()

    def close(self) -> None:
        self._file.close()
        self._view = None
        self._header = bytearray()

    def _fail_to_read(self, error: OSError) -> NoReturn:
        raise InvalidModelError(
            f"can't be read ({error.strerror or error})", path=self.path
        ) from error


_MAGIC = b"GGUF"
_MAX_PARTS = 99_999
# Far above any model in use: a hostile file can't make opening slow or large.
_MAX_KEYS = _MAX_TENSORS = 1 << 16
_MAX_NAME = 1 << 16
_MAX_STRINGS = 1 << 22
_MAX_TEXT = 3 << 25
_STRINGS_AT_ONCE = 1 << 18
_MAX_VALUE = 1 << 20
_MAX_ITEMS = 1 << 20
_MAX_DIMS = 4
_MAX_HEADER = 1 << 29
_HEADER_STEP = 1 << 20

_AGAIN = "the file is damaged; download it again"
_CUT = "the file is cut short or damaged; download it again"

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# A boolean is read as a byte, so that a value other than 0 and 1 is noticed.
_CODES = {
    "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i",
    "float32": "f", "bool": "B", "uint64": "Q", "int64": "q", "float64": "d",
}  # fmt: skip
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in _CODES.items()}
_TYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
    "uint64", "int64", "float64",
)  # fmt: skip
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


class _Entry(NamedTuple):
    value: bool | int | float | bytes | Array
    offset: int


class _Origin(NamedTuple):
    """Where in which file something was read, for the error message."""

    path: Path
    field: str
    offset: int

    def fail(self, message: str) -> NoReturn:
        raise InvalidModelError(message, path=self.path, field=self.field, offset=self.offset)


class _Part:
    """One file and what its header says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise ModelNotFoundError(f"no file {path}")
        if not path.is_file():
            raise ModelNotFoundError(f"{path} is not a file; name a .gguf file")
        self._bytes = _Bytes(path)
        self.size = self._bytes.size
        self.tensors: dict[str, Weight] = {}
        try:
            _check_magic(path, bytes(self._bytes.header(min(64, self.size))[:64]))
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._bytes.close()

    def check_in_place(self) -> None:
        """InvalidModelError where another file got this name since it was opened."""
        if not self._bytes.is_in_place():
            raise InvalidModelError(
                "the file was replaced while the parts of its model were opened; load it again "
                "once all are complete",
                path=self.path,
            )

    def _read(self) -> None:
        header = _Header(self.path, self._bytes)
        self.version = header.version()
        n_tensors = header.count("tensor count", _MAX_TENSORS)
        n_keys = header.count("metadata count", _MAX_KEYS)
        self.metadata = header.metadata(n_keys)
        infos = [header.tensor() for _ in range(n_tensors)]
        header.end()
        alignment = self._alignment()
        start = -(-header.at // alignment) * alignment
        _check_tensors(self.path, infos, start, alignment, self.size)
        for info in infos:
            begin = start + info.offset
            data = TensorBytes(self._bytes, begin, info.n_bytes)
            self.tensors[info.name] = Weight(info.name, info.shape, quant_type(info.type), data)

    def _alignment(self) -> int:
        key = "general.alignment"
        alignment = self.metadata.get_int(key, 32, low=1, high=1 << 30)
        if alignment & (alignment - 1):
            raise InvalidModelError(
                f"found {alignment}, need a power of two; {_AGAIN}", path=self.path, field=key
            )
        return alignment


class _TensorInfo(NamedTuple):
    """`at` is where the file describes the tensor, `offset` where its data begins."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int
    at: int


class _Header:
    """Reads the header front to back; `at` never passes the end of the file."""

    def __init__(self, path: Path, data: _Bytes) -> None:
        self.path, self.at = path, len(_MAGIC)
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
            self._fail(f"found {n}, at most {high} are supported; {_AGAIN}", field, offset)
        return n

    def metadata(self, n: int) -> Metadata:
        entries: dict[str, _Entry] = {}
        for i in range(n):
            offset = self.at
            key = self._name(f"metadata key {i}")
            if key in entries:
                self._fail(f"a second value for this key; {_AGAIN}", key, offset)
            kind = self._type(key)
            offset = self.at
            entries[key] = _Entry(self._value(kind, key), offset)
        return Metadata(self.path, entries)

    def tensor(self) -> _TensorInfo:
        at = self.at
        name = self._name("tensor name")
        n_dims = int(self._unpack(_U32, name))
        if n_dims > _MAX_DIMS:
            self._fail(
                f"{n_dims} dimensions, at most {_MAX_DIMS} are supported; {_AGAIN}", name, at
            )
        dims = [int(self._unpack(_U64, name)) for _ in range(n_dims)]
        if 0 in dims:
            self._fail(f"a dimension of 0; {_AGAIN}", name, at)
        ggml_id = int(self._unpack(_U32, name))
        offset = int(self._unpack(_U64, name))
        kind, n_bytes = quant_type(ggml_id), 0
        if kind.is_known:
            row = dims[0] if dims else 1
            if row % kind.block:
                self._fail(
                    f"rows of {row} elements are not whole {kind.name} blocks of {kind.block}; "
                    f"{_AGAIN}",
                    name,
                    at,
                )
            n_bytes = kind.row_bytes(row) * math.prod(dims[1:])
        return _TensorInfo(name, tuple(reversed(dims)), ggml_id, offset, n_bytes, at)

    def _value(self, kind: str, field: str) -> bool | int | float | bytes | Array:
        if kind == "string":
            return self._string(field)
        if kind == "array":
            return self._array(field)
        offset = self.at
        value: int | float = self._unpack(_SCALARS[kind], field)
        if kind == "bool" and value not in (0, 1):
            self._fail(f"a boolean of {value}, need 0 or 1; {_AGAIN}", field, offset)
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
        origin = _Origin(self.path, field, offset)
        return Array(self._data, item_type, start, n, self.at - start, lengths, origin)

    def _skip_strings(self, n: int, field: str, offset: int) -> array[int]:
        """Their lengths in bytes."""
        self._n_strings += n
        if self._n_strings > _MAX_STRINGS:
            self._fail(
                f"{n} strings, at most {_MAX_STRINGS} are supported; {_AGAIN}", field, offset
            )
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
        self._fail(f"{n} strings run past the end, byte {self._size}; {_CUT}", field, offset)

    def _name(self, field: str) -> str:
        offset = self.at
        name = self._string(field, _MAX_NAME)
        if not name:
            self._fail(f"an empty name; {_AGAIN}", field, offset)
        return _text(name)

    def _string(self, field: str, high: int | None = None) -> bytes:
        offset = self.at
        n = int(self._unpack(_U64, field))
        if high is not None and n > high:
            self._fail(f"a name of {n} bytes, at most {high} are supported; {_CUT}", field, offset)
        self._count_text(n, field)
        start = self.at
        self._skip(n, field)
        self._load(self.at)
        with memoryview(self._loaded) as view:
            return bytes(view[start : self.at])

    def _count_text(self, n: int, field: str) -> None:
        self._n_text += n
        if self._n_text > _MAX_TEXT:
            message = f"{n} bytes more text, at most {_MAX_TEXT} in all are supported; {_CUT}"
            self._fail(message, field, self.at)

    def _type(self, field: str) -> str:
        offset = self.at
        kind = int(self._unpack(_U32, field))
        if kind >= len(_TYPES):
            self._fail(
                f"value type {kind}, known are 0 to {len(_TYPES) - 1}; {_AGAIN}", field, offset
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
            self._fail(f"a header of more than {_MAX_HEADER} bytes; {_AGAIN}", "header", self.at)
        self._data.header(min(end, self._size))

    def _window(self, at: int) -> bytes:
        end = min(at + _WINDOW, self._size)
        self._load(end)
        return bytes(memoryview(self._loaded)[at:end])

    def _skip(self, n: int, field: str) -> None:
        if n > self._size - self.at:
            self._fail(
                f"{n} bytes needed at byte {self.at}, the file ends at {self._size}; {_CUT}",
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


def _check_tensors(
    path: Path, infos: list[_TensorInfo], start: int, alignment: int, size: int
) -> None:
    seen: set[str] = set()
    for info in infos:
        if info.name in seen:
            message = f"a second tensor of this name; {_AGAIN}"
            raise InvalidModelError(message, path=path, field=info.name, offset=info.at)
        seen.add(info.name)
        if info.offset % alignment:
            message = f"data at {info.offset}, need a multiple of {alignment}; {_AGAIN}"
            raise InvalidModelError(message, path=path, field=info.name, offset=info.at)
    ordered = sorted(infos, key=lambda info: (info.offset, info.n_bytes))
    need = max((start + info.offset + info.n_bytes for info in infos), default=0)
    if need > size:
        bad = next(info for info in ordered if start + info.offset + info.n_bytes > size)
        message = f"the tensors need {need} bytes, the file has {size}; {_CUT}"
        raise InvalidModelError(message, path=path, field=bad.name, offset=start + bad.offset)
    for left, right in zip(ordered, ordered[1:], strict=False):
        # Overlaps would let a small file describe a model of any size.
        if left.offset + left.n_bytes > right.offset:
            message = f"its data overlaps that of {one_line(left.name)}; {_AGAIN}"
            raise InvalidModelError(message, path=path, field=right.name, offset=right.at)


def _siblings(part: _Part) -> list[Path]:
    """The paths of all parts of the split file that `part` belongs to."""
    count = part.metadata.get_int("split.count")
    match = _SPLIT_NAME.fullmatch(part.path.name)
    if match is None or int(match["count"]) != count:
        raise InvalidModelError(
            f"a part of a model split into {count} files, which must be named "
            f"NAME-00001-of-{count:05}.gguf and so on; give the files their original names",
            path=part.path,
            field="split.count",
        )
    paths = [
        part.path.with_name(f"{match['stem']}-{no:05}-of-{count:05}.gguf")
        for no in range(1, count + 1)
    ]
    for no, path in enumerate(paths, 1):
        if not path.is_file():
            raise InvalidModelError(
                f"part {no} of {count} is missing: {path.name}; download it to the same folder",
                path=path,
                field="split.count",
            )
    return paths


def _check_parts(parts: list[_Part]) -> None:
    for no, part in enumerate(parts):
        for key, wanted in (("split.count", len(parts)), ("split.no", no)):
            found = part.metadata.get_int(key)
            if found != wanted:
                raise InvalidModelError(
                    f"found {found}, need {wanted}: a part of another model or under a wrong "
                    "name; download the parts again",
                    path=part.path,
                    field=key,
                )
    key, n_tensors = "split.tensors.count", sum(len(part.tensors) for part in parts)
    wanted = parts[0].metadata.get_int(key, n_tensors)
    if wanted != n_tensors:
        raise InvalidModelError(
            f"the parts hold {n_tensors} tensors, need {wanted}; download the parts again",
            path=parts[0].path,
            field=key,
        )


def _check_magic(path: Path, head: bytes) -> None:
    if head.startswith(_MAGIC):
        return
    hint = "name a .gguf file"
    if not head:
        hint = "it is empty; download it again"
    elif not head.strip(b"\0"):
        hint = "it begins with zeros, as an unfinished download does; download it again"
    elif head.startswith(b"version https://git-lfs"):
        hint = "a git-lfs pointer, not the model itself; run `git lfs pull` or download the file"
    elif head[8:9] == b"{":
        hint = "probably safetensors; download a GGUF of this model"
    elif head.lstrip()[:1] == b"<":
        hint = "a web page; download the file itself (its link has `resolve`, not `blob`)"
    elif head.startswith(b"PK"):
        hint = "a zip archive or PyTorch checkpoint; unpack it or download a GGUF of this model"
    elif head[:4] in (b"lmgg", b"tjgg", b"fmgg", b"algg"):
        hint = "a GGML file from before GGUF (2023); download a GGUF of this model"
    elif head.startswith(b"FUGG"):
        hint = "a byte-swapped GGUF; download it again"
    raise InvalidModelError(
        f"not a GGUF file, it begins with {head[:16]!r}: {hint}", path=path, field="magic", offset=0
    )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
