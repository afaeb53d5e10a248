"""A GGUF file's bytes: the header, which stays, and tensors, which are read when asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol, TypeAlias

from edgeinfer import platform
from edgeinfer.errors import (
    ClosedError,
    EdgeInferError,
    InvalidModelError,
    ModelNotFoundError,
    reason_of,
)


class Readable(Protocol):
    """What bytes are read from at any place, until `close`: see `platform.ReadableFile`."""

    n_bytes: int

    @property
    def is_closed(self) -> bool: ...

    def read_into(self, buffer: memoryview, at: int) -> int: ...

    def is_unchanged(self) -> bool: ...

    def is_in_place(self) -> bool: ...

    def forget(self, at: int, n_bytes: int) -> bool: ...

    def close(self) -> None: ...


# Opens what a path names; ModelNotFoundError where that is no file.
Opener: TypeAlias = Callable[[Path], Readable]


def open_local(path: Path) -> Readable:
    """A file of this machine."""
    if not path.exists():
        raise ModelNotFoundError(f"no file {path}")
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is not a file; name a .gguf file")
    return platform.ReadableFile(path)


class FileBytes:
    """A file's bytes: its header, which stays, and whatever else is asked for."""

    def __init__(self, path: Path, opener: Opener = open_local) -> None:
        self.path = path
        try:
            self._file = opener(path)
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

    def forget(self, start: int, n_bytes: int) -> bool:
        """Have the system keep these bytes in memory no longer; False where it can't."""
        return not self._file.is_closed and self._file.forget(start, n_bytes)

    def is_in_place(self) -> bool:
        return self._file.is_in_place()

    def close(self) -> None:
        self._file.close()
        self._view = None
        self._header = bytearray()

    def _fail_to_read(self, error: OSError) -> NoReturn:
        if isinstance(error, EdgeInferError):  # it says what to do
            raise error
        raise InvalidModelError(f"can't be read ({reason_of(error)})", path=self.path) from error


_HEADER_STEP = 1 << 20


class TensorBytes:
    """The bytes of a tensor in its file: a slice reads them, and belongs to whoever asked."""

    def __init__(self, source: FileBytes, start: int, n_bytes: int) -> None:
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

    def forget(self, start: int, n_bytes: int) -> bool:
        assert start + n_bytes <= self._n_bytes
        return self._source.forget(self._start + start, n_bytes)
