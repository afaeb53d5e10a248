"""Every question to the operating system, each with an answer for systems that don't know it.

Knows nothing of models or kernels.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform as _platform
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    import subprocess

_ROOT = Path("/")
_FALLBACK_MEMORY = 4 << 30
_HUGE_PAGE = 2 << 20
_UNKNOWN_DISK = 1 << 62
_SMALL_FILE = 64 << 10  # bytes of a kernel
_LOSSES = (errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_LOCKED_BYTE = 1 << 40  # beyond what any file holds


# -- processors ----------------------------------------------------------------------------------


def default_threads(root: Path = _ROOT) -> int:
    """Physical cores that this process may use: affinity and cgroup quotas respected.

    `root` is where the system's own files are looked for.
    """
    allowed = _affinity()
    cores = _physical_cores(allowed) if allowed else None
    count = cores or (len(allowed) if allowed else os.cpu_count() or 1)
    return max(1, min([count, *_cgroup_cpus(root)]))


def _affinity() -> set[int] | None:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return None


def _physical_cores(cpus: set[int]) -> int | None:
    """Cores behind these logical processors; None where the system doesn't tell."""
    siblings = set()
    for cpu in cpus:
        text = _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        if text is None:
            return None
        siblings.add(text)
    return len(siblings)


def _cgroup_cpus(root: Path) -> Iterator[int]:
    """Whole processors that the quota of each of our cgroups grants."""
    for folder in _cgroups(root, "cpu"):
        fields = (_read(folder / "cpu.max") or "").split()  # version 2: quota and period
        if len(fields) < 2:
            fields = [_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        quota, period = map(_number, fields[:2])
        if quota is not None and period:
            yield quota // period


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, inner ones first; versions 1 and 2."""
    for line in (_read(root / "proc/self/cgroup") or "0::/").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        mount = root / "sys/fs/cgroup"
        if controllers:  # version 1 has a tree for each controller, or for a few
            if controller not in controllers.split(","):
                continue
            mounts = (mount / controllers, mount / controller)
            mount = next((each for each in mounts if os.path.isdir(each)), mount)
        # In a container the path may be the host's: then only the mounted root is there.
        parts = [] if ".." in path else path.strip("/").split("/")
        for n in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:n])


def processor_facts() -> str | None:
    """What the system says of the first processor and never changes while it is this one."""
    text = (_read(_CPUINFO) or "").partition("\n\n")[0]
    lines = [line for line in text.splitlines() if not line.startswith(_CHANGING_FACTS)]
    return "\n".join([_platform.machine(), *lines]) if lines else None


_CPUINFO = Path("/proc/cpuinfo")
_CHANGING_FACTS = ("processor", "cpu MHz", "bogomips", "BogoMIPS", "apicid", "initial apicid",
    "core id", "physical id")  # fmt: skip


def cpu_name() -> str:
    """The processor's name as its maker gives it."""
    for line in (_read(_CPUINFO) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _platform.processor() or _platform.machine()


# -- memory --------------------------------------------------------------------------------------


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that a new allocation may take without swapping.

    Never more than our cgroups and this process's own limits allow; clean pages of files count as
    free. `root` is where the system's own files are looked for.
    """
    available = _field(root / "proc/meminfo", "MemAvailable:", 1024)
    if available is None:
        available = _windows_memory() or _sysconf_memory()
    return max(0, min([available, *_cgroup_memory(root), *_address_space(root)]))


def _cgroup_memory(root: Path) -> Iterator[int]:
    """Bytes below the limit of each of our cgroups."""
    for folder in _cgroups(root, "memory"):
        for limit_name, used_name, prefix in _MEMORY_LIMITS:
            limit, used = _number(_read(folder / limit_name)), _number(_read(folder / used_name))
            if limit is None or used is None:
                continue
            stat = folder / "memory.stat"
            clean, dirty = (
                sum(_field(stat, prefix + name, 1) or 0 for name in names)
                for names in (("inactive_file", "active_file"), _DIRTY_FILES[prefix])
            )
            yield limit - used + min(used, max(0, clean - dirty))


# Version 2, where `high` is what a group is slowed down at, and version 1.
_MEMORY_LIMITS = (
    ("memory.max", "memory.current", ""),
    ("memory.high", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
_DIRTY_FILES = {"": ("file_dirty", "file_writeback"), "total_": ("dirty", "writeback")}


def _address_space(root: Path) -> Iterator[int]:
    """Bytes below the limits that were set for this process itself (`ulimit -v`, `-d`)."""
    try:
        import resource
    except ImportError:  # Windows
        return
    status = root / "proc/self/status"
    for limit_name, used_name in (("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:")):
        which = getattr(resource, limit_name, None)  # not every system has both
        if which is not None and (limit := resource.getrlimit(which)[0]) >= 0:  # -1: none
            yield limit - (_field(status, used_name, 1024) or 0)


def _field(path: Path, name: str, unit: int) -> int | None:
    """A number behind a name at the start of a line, in bytes; None where there is none."""
    for line in (_read(path) or "").splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and (number := _number(words[1])) is not None:
            return number * unit
    return None


def _number(text: str | None) -> int | None:
    """A count of up to 20 digits; None for "max", -1 and anything else."""
    return int(text) if text and len(text) <= 20 and text.isascii() and text.isdigit() else None


def peak_rss() -> int:
    """The most memory this process has held, in bytes; 0 where the system doesn't tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss() -> int:
    """The memory this process holds now, in bytes; 0 where the system doesn't tell."""
    fields = (_read(Path("/proc/self/statm")) or "0 0").split()
    return int(fields[1]) * mmap.PAGESIZE


def _sysconf_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _FALLBACK_MEMORY


class _MemoryStatus(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
        (name, ctypes.c_ulonglong)
        for name in ("total", "available", "page_total", "page_free", "virtual", "free", "extended")
    ]


def _windows_memory() -> int | None:
    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return None
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    return (
        int(status.available)
        if windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        else None
    )


class Memory:
    """Zeroed memory outside the Python heap; pages cost nothing until they are touched.

    With `huge` it asks for huge pages, for data that is read from end to end.
    """

    def __init__(self, n_bytes: int, *, huge: bool = False) -> None:
        self.n_bytes = n_bytes
        # One huge page more, so that the start can be aligned; a prefetch may run past the end.
        self._map = _map_anonymous(n_bytes + _HUGE_PAGE + mmap.PAGESIZE)
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without transparent huge pages
                pass
        self._view = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        base = ctypes.addressof(self._view)
        self.address = -(-base // _HUGE_PAGE) * _HUGE_PAGE

    def close(self) -> None:
        """Return the memory; every address into it is dead from here on."""
        if self.address:
            self.address = 0
            del self._view
            self._map.close()


class Code:
    """Machine code in memory that can be run and no longer written; OSError where that fails."""

    def __init__(self, image: bytes) -> None:
        self._map = _map_anonymous(len(image))
        self._map.write(image)
        # Whoever holds the view keeps the memory: it is freed when this object is dropped.
        self._view = (ctypes.c_char * len(image)).from_buffer(self._map)
        self.address = ctypes.addressof(self._view)
        protect = getattr(_libc(), "mprotect", None)
        if protect is None:
            raise OSError("this system has no mprotect")
        address, n_bytes = ctypes.c_void_p(self.address), ctypes.c_size_t(len(image))
        if protect(address, n_bytes, _READ_AND_RUN):
            raise OSError("memory can't be made executable")


def _map_anonymous(n_bytes: int) -> mmap.mmap:
    # Python's default is shared memory, of which Linux makes no huge pages.
    if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, n_bytes)


_READ_AND_RUN = 5  # mprotect's PROT_READ | PROT_EXEC


def _libc() -> ctypes.CDLL | None:
    return None if sys.platform == "win32" else ctypes.CDLL(None)


def keep(thing: object) -> None:
    """Let an object live as long as the process: an interpreter that ends would free it before."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


# -- what native threads call --------------------------------------------------------------------


class ThreadCalls(NamedTuple):
    """Addresses of C functions by which native threads yield and sleep.

    With `futex` set, `wait` is libc's `syscall` and sleepers are woken by the same; without it,
    `wait` is a plain sleep of `sleep_arg`, and a sleeper looks by itself.
    """

    yield_: int
    wait: int
    futex: int  # the system call's number, 0 for none
    sleep_arg: int


_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}


def thread_calls() -> ThreadCalls:
    if sys.platform == "win32":
        kernel32 = ctypes.windll.kernel32
        return ThreadCalls(_address(kernel32.SwitchToThread), _address(kernel32.Sleep), 0, 1)
    libc = ctypes.CDLL(None)
    number = _FUTEX_NUMBERS.get(_platform.machine(), 0) if sys.platform.startswith("linux") else 0
    wait = libc.syscall if number else libc.usleep
    return ThreadCalls(_address(libc.sched_yield), _address(wait), number, 200)


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


# -- limits of this process ------------------------------------------------------------------------


def ended_for_time(status: int) -> bool:
    """Whether a process ran too long, by its exit status: `allow_seconds` or `kill` ended it."""
    if sys.platform == "win32":
        return status in (1, _WINDOWS_QUOTA)
    return -status in (signal.SIGPROF, signal.SIGKILL)


_WINDOWS_QUOTA = 1816


class ProcessLimits:
    """What the system holds this process to: `n_bytes` more memory, and seconds of a processor.

    `ends_loops` is False where the system can't end what runs too long; macOS keeps no limit of
    memory.
    """

    def __init__(self, n_bytes: int) -> None:
        self._job = _Job.of_this_process() if sys.platform == "win32" else None
        self.ends_loops = self._job is not None or hasattr(signal, "setitimer")
        if self._job is not None:
            self._job.limit(memory=n_bytes + _WINDOWS_BASE)
        if hasattr(signal, "setitimer"):
            # Who started us may have ignored or blocked signals, which a process inherits.
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.signal(signal.SIGVTALRM, _raise_timeout)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF, signal.SIGVTALRM])
        pages = int((_read(Path("/proc/self/statm")) or "0").split()[0])
        if pages:
            _lower_limit("RLIMIT_AS", pages * mmap.PAGESIZE + n_bytes)
        _lower_limit("RLIMIT_CORE", 0)

    def allow_seconds(self, seconds: float | None) -> None:
        """End the process once it has run this much longer; None takes the limit off.

        TimeoutError comes a little before that, if Python code runs then.
        """
        if self._job is not None:
            self._job.limit(seconds=None if seconds is None else time.process_time() + seconds)
        elif hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_VIRTUAL, _WARNED_SHARE * (seconds or 0))
            signal.setitimer(signal.ITIMER_PROF, seconds or 0)


_WARNED_SHARE = 0.8
_WINDOWS_BASE = 64 << 20  # what Python itself has committed there


def _raise_timeout(*_: object) -> None:
    raise TimeoutError("time")


def _lower_limit(name: str, value: int) -> None:
    try:
        import resource

        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (lower, lower))
    except (ImportError, AttributeError, OSError, ValueError):  # not this system's way
        pass


class _JobLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = [
        ("process_time", ctypes.c_longlong),
        ("job_time", ctypes.c_longlong),
        ("flags", ctypes.c_uint32),
        ("working_sets", ctypes.c_size_t * 2),
        ("n_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("classes", ctypes.c_uint32 * 2),
        ("io", ctypes.c_ulonglong * 6),
        ("process_memory", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 3),
    ]


class _Job:
    """A Windows job object that holds this process alone."""

    def __init__(self, kernel32: Any, handle: Any) -> None:
        self._kernel32, self._handle = kernel32, handle
        self._limits = _JobLimits()

    @classmethod
    def of_this_process(cls) -> _Job | None:
        kernel32 = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
        for name in ("CreateJobObjectW", "GetCurrentProcess"):
            getattr(kernel32, name).restype = ctypes.c_void_p
        handle = ctypes.c_void_p(kernel32.CreateJobObjectW(None, None))
        us = ctypes.c_void_p(kernel32.GetCurrentProcess())
        joined = handle and kernel32.AssignProcessToJobObject(handle, us)
        return cls(kernel32, handle) if joined else None

    def limit(self, *, memory: int | None = None, seconds: float | None = None) -> None:
        """Keep to bytes from now on, and to seconds since the process began (None: no end)."""
        if memory is not None:
            self._limits.process_memory = memory
            self._limits.flags |= _JOB_PROCESS_MEMORY
        self._limits.process_time = int((seconds or 0) * 1e7)
        self._limits.flags &= ~_JOB_PROCESS_TIME
        self._limits.flags |= _JOB_PROCESS_TIME if seconds is not None else 0
        limits = ctypes.byref(self._limits)
        self._kernel32.SetInformationJobObject(self._handle, 9, limits, ctypes.sizeof(_JobLimits))


_JOB_PROCESS_TIME, _JOB_PROCESS_MEMORY = 0x2, 0x100


# -- disks ---------------------------------------------------------------------------------------


def files_below(folder: Path, pattern: str) -> list[Path]:
    """What matches in a folder, in order; nothing where it is absent or not ours to look into."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def free_disk(folder: Path) -> int:
    """Bytes that can be written below `folder`, which need not exist yet."""
    for existing in (folder, *folder.parents):
        if os.path.isdir(existing):
            try:
                return shutil.disk_usage(existing).free
            except OSError:
                break
    return _UNKNOWN_DISK


def is_writable(folder: Path) -> bool:
    """Whether files can be made and filled in `folder`; it is made when it does not exist."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_SMALL_FILE))  # a full disk takes empty ones
            file.flush()
            return True
    except OSError:
        return False


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, whoever writes it at the same time; makes folders."""
    make_folder(path.parent)
    descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def delete_all(path: Path) -> None:
    """Delete a file or a folder with all that is in it; OSError for the first that stays."""
    shutil.rmtree(path, ignore_errors=True)  # whatever can go goes
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except FileNotFoundError:
        pass


def open_scratch() -> IO[bytes] | None:
    """A file of no name, in memory where that can be; None where there is no room for one."""
    try:
        if hasattr(os, "memfd_create"):
            return open(os.memfd_create("edgeinfer"), "w+b")
        return tempfile.TemporaryFile()
    except OSError:
        return None


def open_appending(path: Path) -> BinaryIO:
    """Open or make a file to read and append to; OSError for a link, or what has another name."""
    return open(path, "ab+", opener=_open_plain)


def _open_plain(path: str, flags: int) -> int:
    no_link = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | no_link, 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "not a plain file", path)
    return descriptor


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
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], at)
        with self._lock:
            self._file.seek(at)
            return self._file.readinto(buffer) or 0

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

    def __del__(self) -> None:
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


# -- whom files are from -------------------------------------------------------------------------


def distrust(folder: Path) -> str | None:
    """Why others may have put what lies in a folder: like the StrictModes of OpenSSH.

    None where every folder from the root on, through links, belongs to this user or root and
    nobody else can write there, or only add files (sticky). What does not exist is no reason.
    """
    if os.name != "posix":
        return None
    pending, at = _parts(os.fspath(folder.absolute())), "/"
    n_links = 0
    while True:
        try:
            status = os.lstat(at)
            target = os.readlink(at) if stat.S_ISLNK(status.st_mode) else None
        except OSError:  # what we can't look at, we can't read either
            return None
        if target is None and not stat.S_ISDIR(status.st_mode):  # nothing can lie there
            return None
        reason = _not_ours(status, at)
        if reason is not None or n_links > _MOST_LINKS:
            return reason or f"{folder} is too many links"
        if target is not None:
            target = os.path.join(os.path.dirname(at), target)
            n_links, at, pending = n_links + 1, "/", [*_parts(target), *pending]
        elif not pending:
            return None
        else:
            at = os.path.normpath(os.path.join(at, pending.pop(0)))


_MOST_LINKS = 40


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _not_ours(status: os.stat_result, path: str) -> str | None:
    """Why others can change a file or folder of this status."""
    mode, uid = stat.S_IMODE(status.st_mode), status.st_uid
    if uid not in (0, os.geteuid()):
        return f"{path} belongs to user {uid}"
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX):
        return None
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_only_member(status.st_gid)):
        return f"others can write to {path} (mode {mode:04o})"
    return None


def _is_only_member(gid: int) -> bool:
    """Whether a group is the private one of this user, as many systems make one for each."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    is_private = gid == user.pw_gid and group.gr_name == user.pw_name
    return is_private and set(group.gr_mem) <= {user.pw_name}


def read_private(path: Path) -> bytes:
    """A file that only this user or root can have written; PermissionError for any other.

    Whether others can put another file there is the folder's to say: see `distrust`.
    """
    flags = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # of a pipe nobody waits for
    descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        reason = _not_ours(status, str(path)) if os.name == "posix" else None
        if reason is not None or not stat.S_ISREG(status.st_mode):
            raise PermissionError(errno.EPERM, reason or "not a plain file", str(path))
        return file.read()


def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it, for this user alone."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


# -- other programs ------------------------------------------------------------------------------


def can_start_python() -> bool:
    """Whether there is an interpreter to start: a frozen program would start itself."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def python_command(module: str, *arguments: str, folders: Sequence[str] = ()) -> list[str]:
    """A command that runs a module as `python -m` does, for `start_program`.

    Modules are found in `folders`, then where this process finds them, but never in the folder it
    is started in: anything may lie there.
    """
    # -I doesn't look at PYTHONHOME either, without which a moved Python finds nothing.
    alone = "-s" if "PYTHONHOME" in os.environ else "-I"
    flags = [alone, "-B"] if sys.dont_write_bytecode else [alone]
    found = "\n".join([*folders, *module_folders()])
    return [sys.executable, *flags, "-c", _RUN_MODULE, found, module, *arguments]


_RUN_MODULE = """
import sys
found = sys.argv.pop(1).split("\\n")
sys.path = found + [folder for folder in sys.path if folder and folder not in found]
del sys.argv[0]
import runpy
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def start_isolated(module: str, folders: Sequence[str]) -> subprocess.Popen[str]:
    """Start `main()` of a module that lies in `folders`, as is all that Python lacks of itself.

    No garbage is collected before it asks for that: imports would be a tenth slower.
    OSError where no such process can be started.
    """
    if getattr(sys, STARTS_ITSELF, False):
        command = [sys.executable, MODULE_FLAG, module]
    elif can_start_python():
        # Without `site` it is ready 20 ms sooner.
        alone = "-s" if "PYTHONHOME" in os.environ else "-I"
        command = [sys.executable, alone, "-S", "-c", _RUN_MAIN, module, *folders]
    else:
        raise OSError("this program can't start a second Python, since it is frozen or embedded")
    return start_program(command, hears_keys=False)


STARTS_ITSELF = "_edgeinfer_starts_itself"  # set in `sys` by a frozen program that knows the flag
MODULE_FLAG = "--edgeinfer-module"
_RUN_MAIN = """
import gc, sys
gc.disable()
sys.path = [folder for folder in sys.path if folder] + sys.argv[2:]
import importlib
importlib.import_module(sys.argv[1]).main()
"""


def module_folders() -> list[str]:
    """Where this process finds modules, but for the folder it was started in."""
    ours = str(Path(__file__).parent.parent)
    found = [folder for folder in sys.path if os.path.isabs(folder) and not _is_here(folder)]
    return found if ours in found else [ours, *found]


def _is_here(folder: str) -> bool:
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:
        return False


def find_program(name: str) -> str | None:
    """The path of a program in PATH; never one in the current folder, where Windows looks first."""
    endings = ["", *os.environ.get("PATHEXT", "").split(";")] if sys.platform == "win32" else [""]
    for folder in filter(os.path.isabs, os.get_exec_path()):
        for path in (os.path.join(folder, name + ending) for ending in endings):
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return path
    return None


def run_tool(command: Sequence[str], text: bytes) -> bool:
    """Give a text to a program of PATH that takes it at once; False where that fails."""
    import subprocess

    program = find_program(command[0])
    if program is None:
        return False
    try:
        # Nobody reads what it says: xclip stays in the background, and would keep a pipe open.
        done = subprocess.run(
            [program, *command[1:]], input=text, timeout=_TOOL_SECONDS, cwd=Path(__file__).parent,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


_TOOL_SECONDS = 2.0


def start_program(
    command: Sequence[str],
    *,
    errors: IO[Any] | None = None,
    talks: bool = True,
    folder: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
    in_background: bool = False,
    hears_keys: bool = True,
) -> subprocess.Popen[str]:
    """A child whose standard streams are pipes of text where it `talks`, else closed.

    It runs in `folder`, by default our own: what lies where this process was started can't change
    what it does. `in_background` it gets only what processors have left over; then, and where it
    does not hear keys, an interrupt from the terminal doesn't reach it.
    """
    import subprocess  # 20 ms that most starts don't need

    stream = subprocess.PIPE if talks else subprocess.DEVNULL
    mine = {k: v for k, v in os.environ.items() if k == "PYTHONHOME" or k[:6] != "PYTHON"}
    is_apart = in_background or not hears_keys
    names = _BACKGROUND_FLAGS[not in_background :] if is_apart else ()
    process = subprocess.Popen(
        command,
        stdin=stream,
        stdout=stream,
        stderr=subprocess.DEVNULL if errors is None else errors,
        text=True,
        cwd=folder or Path(__file__).parent,
        env={**mine, **variables},
        start_new_session=is_apart,
        creationflags=sum(getattr(subprocess, name, 0) for name in names),
    )
    if in_background:
        try:
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        except (AttributeError, OSError):  # not this system's way, or it forbids that
            pass
    return process


_BACKGROUND_FLAGS = ("IDLE_PRIORITY_CLASS", "CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")


# -- what may run --------------------------------------------------------------------------------


def can_run_generated_code() -> bool | None:
    """Whether memory may be written and then executed; None where the system doesn't tell."""
    if sys.platform == "win32":
        return None
    try:
        libc = ctypes.CDLL(None)
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            view = ctypes.c_char.from_buffer(page)
            address = ctypes.c_void_p(ctypes.addressof(view))
            allowed = libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), 5) == 0
            del view
        return bool(allowed)
    except (AttributeError, OSError, BufferError):
        return None


def board_name() -> str | None:
    """The model of a single-board computer, such as a Jetson."""
    text = _read(Path("/proc/device-tree/model"))
    return text.strip("\0 \n") if text else None


class Gpu(NamedTuple):
    """One CUDA device, as its driver describes it."""

    name: str
    compute_capability: str
    n_bytes: int


class CudaDriver(NamedTuple):
    """NVIDIA's driver: the newest CUDA it runs (13000 is 13.0), its devices, or its error."""

    version: int
    devices: tuple[Gpu, ...]
    error: int = 0


def cuda_driver() -> CudaDriver | None:
    """What the CUDA driver says, None where there is none. Loads no CUDA library but libcuda."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = () if error else tuple(_gpu(cuda, i) for i in range(count.value))
    return CudaDriver(version.value, devices, error)


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, n_bytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(n_bytes), device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in ((major, 75), (minor, 76)):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    text = name.value.decode("utf-8", "replace")
    return Gpu(text, f"{major.value}.{minor.value}", n_bytes.value)


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except (OSError, ValueError):
        return None
