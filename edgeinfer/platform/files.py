"""Files and folders: written whole or not at all, read at any place, locked, on the disk.

`tempfile` and `shutil` are imported where used: most starts write no file.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import IO, BinaryIO, NoReturn

_UNKNOWN_DISK = 1 << 62
_SMALL_FILE = 64 << 10  # bytes of a kernel
_LOSSES = (errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_MOST_LOOKS = 100
_PORTION = 1 << 20  # bytes of a read
_LOCKED_BYTE = 1 << 40  # beyond what any file holds


def files_below(folder: Path, pattern: str) -> list[Path]:
    """What matches in a folder, in order; nothing where it is absent or not ours to look into."""
    for _ in range(_MOST_LOOKS):
        try:
            return sorted(folder.glob(pattern))
        except FileNotFoundError:  # another program has deleted a folder meanwhile
            continue
        except OSError:
            break
    return []


def bytes_below(folder: Path) -> int:
    """The size of all files below a folder, as far as they stay while it looks."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                status = os.lstat(os.path.join(at, name))
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def free_disk(folder: Path) -> int:
    """Bytes that can be written below `folder`, which need not exist yet."""
    import shutil

    for existing in (folder, *folder.parents):
        if os.path.isdir(existing):
            try:
                return shutil.disk_usage(existing).free
            except OSError:
                break
    return _UNKNOWN_DISK


def is_writable(folder: Path) -> bool:
    """Whether files can be made and filled in `folder`; it is made when it does not exist."""
    import tempfile

    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_SMALL_FILE))  # a full disk takes empty ones
            file.flush()
            return True
    except OSError:
        return False


def read_whole(file: BinaryIO, most: int) -> bytes:
    """What is left of a file or pipe; OSError where that is more than `most` bytes.

    A device may have no end.
    """
    data, raw = bytearray(), getattr(file, "raw", file)  # a terminal's end is told once
    while (part := raw.read(_PORTION)) != b"":
        if part is None:  # whoever shares a pipe may have made it one that never waits
            import select

            select.select([file], [], [])
            continue
        data += part
        if len(data) > most:
            raise OSError(errno.EFBIG, f"more than {most >> 20} MiB are not read", file.name)
    return bytes(data)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, whoever writes it at the same time; makes folders."""
    with written_whole(path) as file:
        file.write(data)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end, or never where an error comes before.

    A pipe or a device is written to itself: no file may take its place.
    """
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    make_folder(path.parent)
    # Its name is known before it is there: an interrupt can't come in between and leave it.
    part = path.with_name(f"{_part_prefix(path)}{os.urandom(8).hex()}{_PART}")
    try:
        with open(part, "xb", opener=partial(os.open, mode=0o600)) as file:
            try_lock(file)
            yield file
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


@contextmanager
def replaced_whole(path: Path) -> Iterator[BinaryIO]:
    """`written_whole` for a file that a person names: through links, and it keeps its mode.

    OSError for links in a ring, and for a folder that is not there: it may be mistyped. Names of
    our own are not followed: who knows what is there.
    """
    path = _behind_links(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    with written_whole(path) as file:
        with suppress(OSError, AttributeError):  # there was none, or Windows
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        yield file


def _behind_links(path: Path) -> Path:
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return found


def delete_parts(path: Path) -> None:
    """Delete what processes left that were killed while they replaced a file whole."""
    import time

    with suppress(OSError):
        path = _behind_links(path)
    with suppress(OSError):
        for name in os.listdir(path.parent):
            part = path.parent / name
            if not (name.startswith(_part_prefix(path)) and name.endswith(_PART)):
                continue
            with suppress(OSError):
                with open(part, "rb") as file:
                    # One that is new may not have been claimed yet.
                    is_old = time.time() - os.fstat(file.fileno()).st_mtime > _PART_SECONDS
                    is_left = is_old and try_lock(file)
                if is_left:
                    part.unlink()


def _part_prefix(path: Path) -> str:
    return path.name[:100] + "."  # names have a limit


_PART, _PART_SECONDS = ".part", 60.0


def delete_all(path: Path) -> None:
    """Delete a file or a folder with all that is in it; OSError for the first that stays."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)  # whatever can go goes
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except FileNotFoundError:
        pass


def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, for this user alone."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def open_scratch() -> IO[bytes] | None:
    """A file of no name, in memory where that can be; None where there is no room for one."""
    try:
        if hasattr(os, "memfd_create"):
            return open(os.memfd_create("edgeinfer"), "w+b")
        import tempfile

        return tempfile.TemporaryFile()
    except OSError:
        return None


def open_appending(path: Path) -> BinaryIO:
    """Open or make a file to read and append to; OSError for a link, or what has another name."""
    return open(path, "ab+", opener=_open_sole)


def append_private(path: Path, data: bytes) -> None:
    """Add to a file that is this user's alone, made with its folder where there is none."""
    make_folder(path.parent)
    with open(path, "ab", opener=partial(_open_sole, mode=0o600), buffering=0) as file:
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), 0o600)
        file.write(data)


def _open_sole(path: str, flags: int, mode: int = 0o666) -> int:
    descriptor, status = open_plain(path, flags, mode)
    if status.st_nlink > 1:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "it has another name too", path)
    return descriptor


def open_plain(path: str | Path, flags: int, mode: int = 0o666) -> tuple[int, os.stat_result]:
    """A file's descriptor, never that of a link's target, pipe or device; for a pipe nobody waits.

    PermissionError for what is no file; OSError where nothing can be opened.
    """
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, mode)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "not a plain file", str(path))
    return descriptor, status


def forget_file_pages(descriptor: int, start: int, n_bytes: int) -> bool:
    """Have the system keep no copy of these bytes of a file in memory; False where it can't.

    Of what only begins or ends among them it may keep a page. Nothing is lost: it reads them again.
    """
    if n_bytes < 1 or not hasattr(os, "posix_fadvise"):
        return False
    try:
        os.posix_fadvise(descriptor, start, n_bytes, os.POSIX_FADV_DONTNEED)
    except OSError:  # not on this file system
        return False
    return True


class ReadableFile:
    """A file that is read at any place, by any thread, until `close`; it is never mapped.

    What is mapped and cut short by another process ends this one with a bus error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)
        self._lock = threading.Lock()
        status = os.fstat(self._file.fileno())
        self.n_bytes, self._changed = status.st_size, status.st_mtime_ns

    def read_into(self, buffer: memoryview, at: int) -> int:
        """Fill a buffer from byte `at` on; fewer bytes than it has where the file ends."""
        n_done = 0
        while n_done < len(buffer):
            n = self._read_some(buffer[n_done:], at + n_done)
            if not n:
                break
            n_done += n
        return n_done

    def _read_some(self, buffer: memoryview, at: int) -> int:
        try:
            return os.preadv(self._file.fileno(), [buffer], at)
        except AttributeError:  # Windows
            pass
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):  # a sandbox that lacks the call
                raise
        with self._lock:
            self._file.seek(at)
            return self._file.readinto(buffer) or 0

    def forget(self, at: int, n_bytes: int) -> bool:
        """Free the memory in which the system keeps these bytes; False where it can't."""
        return forget_file_pages(self._file.fileno(), at, n_bytes)

    def is_unchanged(self) -> bool:
        """Whether nobody has written to it since it was opened, as far as its time tells."""
        status = os.fstat(self._file.fileno())
        return (status.st_size, status.st_mtime_ns) == (self.n_bytes, self._changed)

    def is_in_place(self) -> bool:
        """Whether its path still names it."""
        return is_at(self._file, self.path)

    @property
    def is_closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path} is open here: nothing of it can be copied or pickled")

    def __del__(self) -> None:
        if "_file" in vars(self):  # it could be opened
            self._file.close()


def is_at(file: BinaryIO | FileIO, path: Path) -> bool:
    """Whether an open file is still what `path` names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def unlink_open(path: Path) -> bool:
    """Delete a file that is open here; False where the system forbids that, as Windows does."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def sync(file: BinaryIO) -> None:
    """Have what was written to a file on the disk, as far as the system promises that.

    OSError where the system says that it is not there.
    """
    file.flush()
    try:
        os.fsync(file.fileno())
    except AttributeError:
        pass
    except OSError as error:
        if error.errno in _LOSSES:
            raise


def try_lock(file: BinaryIO) -> bool:
    """Claim an open file until it is closed; False where another process has it."""
    try:
        import fcntl
    except ImportError:
        return _windows_lock(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: better unlocked than not at all
        return True
    return True


def _windows_lock(file: BinaryIO) -> bool:
    if sys.platform != "win32":
        return True
    import msvcrt

    position = file.tell()
    try:
        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        file.seek(position)
    return True
