"""The metadata of a GGUF file: values by name and type. Knows nothing of what they mean."""

from __future__ import annotations

import builtins
import math
import struct
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from edgeinfer.errors import InvalidModelError
from edgeinfer.gguf.source import FileBytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = "Scalar | Array"


class Metadata(Mapping[str, Value]):
    """The key/value pairs of a file, in file order. Strings are decoded when asked for.

    One above 1 MiB is no text that anything here reads: asking for it raises. So do the typed
    getters, naming the key, when its value is absent (and no default is given), of another type,
    or out of range.
    """

    def __init__(self, path: Path, entries: dict[str, Entry]) -> None:
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

    @property
    def n_bytes(self) -> int:
        """Of texts and arrays, in the file."""
        values = (entry.value for entry in self._entries.values())
        arrays_and_texts = [v for v in values if isinstance(v, (Array, bytes))]
        return sum(v.n_bytes if isinstance(v, Array) else len(v) for v in arrays_and_texts)

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
        """An integer array, with `n` of that length; a single integer is repeated."""
        if isinstance(self._find(key, None), int):
            return (self.get_int(key, low=low, high=high),) * (1 if n is None else n)
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

    def get_numbers(self, key: str, n: int, *, integers: bool = False) -> NDArray[Any]:
        """An array of `n` numbers, or whole numbers, as a read-only view of the file's header."""
        array, kinds = (
            self.get_array(key),
            ("int", "uint") if integers else ("int", "uint", "float"),
        )
        if len(array) != n or not array.item_type.startswith(kinds):
            self._wrong(key, array, f"{n} {'integers' if integers else 'numbers'}")
        return array.numpy()

    def get_strings(self, key: str, *, most: int, most_bytes: int) -> list[bytes]:
        """An array of strings as they are in the file, valid UTF-8 or not."""
        array = self.get_array(key)
        for n, limit, what in ((len(array), most, "strings"), (array.n_bytes, most_bytes, "bytes")):
            if n > limit:
                self._wrong(key, array, f"at most {limit} {what}, it has {n}")
        return array.bytes()

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
        return as_text(raw)

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
        shown = repr(as_text(value[:40]) if isinstance(value, bytes) else value)
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
        header: FileBytes,
        item_type: str,
        start: int,
        n: int,
        n_bytes: int,
        lengths: array[int],
        origin: Origin,
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
            return [as_text(each) for each in raw]

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
        form = f"<{self._n}{CODES[self.item_type]}"
        items = list(struct.unpack_from(form, self._open_data(), self._start))
        if self.item_type != "bool":
            return items
        if not {0, 1}.issuperset(items):
            self._origin.fail("a boolean is neither 0 nor 1")
        return [item == 1 for item in items]

    def _open_data(self) -> memoryview:
        return self._header.all()


class Entry(NamedTuple):
    value: bool | int | float | bytes | Array
    offset: int


class Origin(NamedTuple):
    """Where in which file something was read, for the error message."""

    path: Path
    field: str
    offset: int

    def fail(self, message: str) -> NoReturn:
        raise InvalidModelError(message, path=self.path, field=self.field, offset=self.offset)


def as_text(raw: bytes) -> str:
    """With U+FFFD for what is not UTF-8."""
    return raw.decode("utf-8", errors="replace")


_STRINGS_AT_ONCE = 1 << 18
_MAX_VALUE = 1 << 20
_MAX_ITEMS = 1 << 16  # of an array that becomes Python values
# A boolean is read as a byte, so that a value other than 0 and 1 is noticed.
CODES = {
    "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i",
    "float32": "f", "bool": "B", "uint64": "Q", "int64": "q", "float64": "d",
}  # fmt: skip
