"""Loads compiled kernels: those cached for this exact machine, else ready ones, else built now.

Never imports Numba: building runs in other processes. Knows kernels by name only.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, cast

from edgeinfer import platform, quant
from edgeinfer.errors import DeviceError
from edgeinfer.kernels.cpu import linker
from edgeinfer.kernels.cpu.ready import FOLDER, Ready
from edgeinfer.kernels.cpu.targets import Target
from edgeinfer.terminal import printable

if TYPE_CHECKING:
    import subprocess

Progress: TypeAlias = Callable[[int, int, str], None]  # done, total, kernel
# Built for this machine exactly and kept; for its family and shipped; built for this process.
Origin: TypeAlias = Literal["cached", "ready", "built"]

_MAX_VERSIONS = 4
_DIGEST = 32  # bytes of SHA-256 in front of every cached object
# The most a process that builds kernels takes: x86-64 Linux, LLVM 20 and 22, all kernels in one.
BUILDER_BYTES = 400 << 20
# Objects are 1 to 52 KB, 8 on average, and are held while they are linked. VmRSS grows by 41 MiB
# where LLVM is asked about the processor, by 50 where it links.
_KERNEL_BYTES, _LLVM_BYTES = 32 << 10, 52 << 20
_SLOWEST = ("sample", "attend", "matmul")  # to build, in this order


def symbol(name: str) -> str:
    """The linker's name of a kernel: `matmul.q4_0.8` is `ei_matmul_q4_0_8`."""
    return "ei_" + name.replace(".", "_")


@cache
def source_key(module: str) -> str:
    """Changes whenever a source that kernels of this native module are made of changes."""
    digest = hashlib.sha256()
    for path in sorted(_sources(module), key=lambda path: (_HERE not in path.parents, path)):
        digest.update(path.name.encode() + b"\0" + _read(path))
    return digest.hexdigest()


_HERE = Path(__file__).parent
_PACKAGES = {"kernels.cpu": _HERE, "kernels.cpu.native": _HERE / "native"}
_CONSTANTS = Path(quant.__file__).parent  # of modules that no kernel runs code of
_BUILDER = [_HERE / "build.py", _HERE / "soft_float.py"]
# A newline, not "^": a search for a literal prefix takes a fraction of the time.
_IMPORT = re.compile(r"\nfrom edgeinfer\.((?:\w+\.)*\w+) import ([\w, ]*)")


def _sources(module: str) -> set[Path]:
    """The native module, what it imports of ours, every vocabulary, and the builder."""
    found: set[Path] = set()
    pending = [_HERE / "native" / f"{module}.py", _HERE / "native" / "registry.py", *_BUILDER]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        if path in _BUILDER or _HERE not in path.parents:
            continue
        pending += _imports(path)
    return found


@cache
def _imports(path: Path) -> list[Path]:
    """What a source imports of ours."""
    found: list[Path] = []
    for dotted, names in _IMPORT.findall(_read(path).decode()):
        folder, inner = _PACKAGES.get(dotted), dotted.removeprefix("kernels.cpu.")
        if folder is not None:
            found += [folder / f"{name.split()[0]}.py" for name in names.split(",")]
        elif inner != dotted:
            found.append(_HERE / (inner.replace(".", "/") + ".py"))
        else:
            found.append(_CONSTANTS / (dotted.replace(".", "/") + ".py"))
    return found


@cache
def _read(path: Path) -> bytes:
    return path.read_bytes()


def cache_folder(root: Path, target: Target) -> Path:
    """Where objects for this machine and this LLVM are kept."""
    import llvmlite

    facts = (target, llvmlite.__version__)
    return root / "kernels" / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def object_path(folder: Path, name: str) -> Path:
    """The file of one kernel; its name says which sources it was made of."""
    return folder / f"{name}-{source_key(name.partition('.')[0])[:16]}.o"


def write_object(folder: Path, name: str, data: bytes) -> None:
    """Write an object with its digest, complete or not at all.

    Versions made of other sources stay, the latest few: another installation may use them.
    """
    platform.write_whole(object_path(folder, name), hashlib.sha256(data).digest() + data)
    with suppress(OSError):  # too many do no harm
        versions = sorted(folder.glob(f"{name}-*.o"), key=lambda path: path.stat().st_mtime)
        for old in versions[:-_MAX_VERSIONS]:
            old.unlink(missing_ok=True)


def read_object(folder: Path, name: str) -> bytes | None:
    """The object, or None where it is absent, damaged (LLVM dies on that), or another user's."""
    try:
        data = platform.read_private(object_path(folder, name))
    except OSError:
        return None
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        return None
    return data[_DIGEST:]


class Library:
    """Kernels of one target in executable memory, by name; addresses live as long as this."""

    def __init__(
        self,
        target: Target,
        folder: Path,
        ready: Ready | None = None,
        memory: int | None = None,  # bytes that building may take, None: without end
    ) -> None:
        self.target, self.folder, self._memory = target, folder, memory
        self.is_cached = True  # False once something had to be built for this process alone
        self.unkept = ""  # what the system says of why
        self.origins: dict[str, Origin] = {}  # of every loaded kernel
        self._ready = Ready.of(target) if ready is None else ready
        self._is_trusted = _is_trusted(folder)
        self._addresses: dict[str, int] = {}
        self._code: list[Any] = []  # what owns the memory that addresses point into

    @classmethod
    def host(cls, cache_dir: Path, isa: str | None = None, memory: int | None = None) -> Library:
        """Kernels for this machine, or for the family `isa`, kept below `cache_dir`."""
        target = Target.host(isa, memory=cache_dir)
        return cls(target, cache_folder(cache_dir, target), memory=memory)

    def load(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Make these kernels callable. `progress(done, total, name)` is told of every build."""
        wanted = sorted(set(names) - self._addresses.keys())
        if not wanted:
            return
        # LLVM does not look whether it may: the first call of a kernel would end the process.
        if platform.can_run_generated_code() is False:
            raise DeviceError(
                "this system forbids generated code (SELinux's execmem, a hardened service): allow "
                "it for this program, or use device='reference' (slow)"
            )
        objects, origins = self._find(wanted)
        missing = [name for name in wanted if name not in objects]
        if missing:
            objects |= self._build(missing, progress)
        self._link(objects)
        lost = [name for name in wanted if name not in self._addresses]
        if lost:
            raise DeviceError(f"kernels {', '.join(lost)} changed while they were being built")
        self.origins |= {name: origins.get(name, "built") for name in wanted}

    def inexact(self) -> list[str]:
        """Loaded kernels that were made for a whole family, where this machine can have its own."""
        names = [name for name, origin in self.origins.items() if origin == "ready"]
        target = self.target
        is_exact = target == Target.any(target.family, target.machine, target.triple)
        can_change = names and not is_exact and can_build() and self._can_keep()
        return names if can_change else []

    def rebuild(self, progress: Progress | None = None) -> int:
        """Build `inexact` kernels for this machine exactly; the next process takes those.

        Returns how many; raises DeviceError where they can't be kept.
        """
        names = self.inexact()
        if names:
            self._build(names, progress)
        if names and not self.is_cached:
            raise DeviceError(
                f"kernels can't be kept in {self.folder} ({self.unkept}); make room, or set "
                "EDGEINFER_HOME to another folder"
            )
        return len(names)

    def building_bytes(self, names: Iterable[str]) -> int:
        """Memory that the processes take which will build those of these kernels not here."""
        n_missing = sum(not self._is_here(name) for name in names)
        return n_builders(n_missing, self._memory) * BUILDER_BYTES if n_missing else 0

    def code_bytes(self, names: Collection[str]) -> int:
        """Memory of these kernels' code, and of LLVM where this process has it or will need it."""
        can_link = self.target.machine == "x86_64" and self.target.system != "windows"
        has_llvm = not can_link or "llvmlite.binding" in sys.modules
        return len(names) * _KERNEL_BYTES + has_llvm * _LLVM_BYTES

    def _is_here(self, name: str) -> bool:
        if name in self._addresses or self._ready.has(name, _source_key_or_none(name)):
            return True
        try:
            return self._is_trusted and object_path(self.folder, name).is_file()
        except OSError:  # a frozen program, which carries no sources
            return False

    def address(self, name: str) -> int:
        """Address of a loaded kernel."""
        return self._addresses[name]

    def _find(self, names: Sequence[str]) -> tuple[dict[str, bytes], dict[str, Origin]]:
        """The objects that are there, and where each comes from."""
        objects: dict[str, bytes] = {}
        origins: dict[str, Origin] = {}
        has_cache = self._is_trusted and os.path.isdir(self.folder)
        for name in names:
            data, origin = read_object(self.folder, name) if has_cache else None, "cached"
            if data is None:
                data, origin = self._ready.read(name, _source_key_or_none(name)), "ready"
            if data is not None:
                objects[name], origins[name] = data, cast(Origin, origin)
        return objects, origins

    def _can_keep(self) -> bool:
        """Whether the next process may take what is built; only now the folder surely exists."""
        is_there = self._is_trusted and platform.is_writable(self.folder)
        return is_there and platform.distrust(self.folder) is None

    def _build(self, names: Sequence[str], progress: Progress | None) -> dict[str, bytes]:
        """Build into the cache, or where it can't be written or others can, in memory alone."""
        if not can_build():
            listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            raise DeviceError(
                f"this program was frozen without the kernels {listed} for "
                f"{self.target.system} {self.target.machine} {self.target.family}, and a frozen "
                "program can't build them: freeze it where edgeinfer was installed from a wheel "
                "made by .ci/wheel.py, or use device='reference' (slow)"
            )
        failed: list[OSError] = []
        folder = self.folder if self._is_trusted else None
        try:
            platform.make_folder(self.folder)
        except OSError as error:
            failed.append(error)
        if failed or platform.distrust(self.folder) is not None:
            folder = None
        objects = build_objects(folder, names, self.target, progress, failed, self._memory)
        self.is_cached = folder is not None and not failed
        self.unkept = "".join(error.strerror or str(error) for error in failed[:1])
        return objects

    def _link(self, objects: dict[str, bytes]) -> None:
        try:
            image, places = linker.lay_out(objects)
            code = platform.Code(image)
        except (linker.UnknownObject, OSError):
            self._link_with_llvm(objects)
            return
        self._code.append(code)
        for name in objects:
            if symbol(name) in places:
                self._addresses[name] = code.address + places[symbol(name)]

    def _link_with_llvm(self, objects: dict[str, bytes]) -> None:
        """Takes whatever LLVM has made, on every system."""
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for data in objects.values():
            engine.add_object_file(llvm.ObjectFileRef.from_data(data))
        engine.finalize_object()
        self._code.append(engine)
        for name in objects:
            address = engine.get_function_address(symbol(name))
            if address:
                self._addresses[name] = address


def _is_trusted(folder: Path) -> bool:
    """Whether nobody else can have put kernels there; says so where somebody can."""
    reason = platform.distrust(folder)
    if reason is not None:
        import logging

        logging.getLogger("edgeinfer").warning(
            "compiled kernels in %s are not used: %s; set EDGEINFER_HOME to a folder of your own",
            *map(printable, (str(folder), reason)),
        )
    return reason is None


def kernels_here(target: Target, folder: Path) -> dict[str, Origin]:
    """The kernels that need no building on this machine, and where each would come from."""
    ready = Ready.of(target)
    found: dict[str, Origin] = {
        name: "ready" for name in ready.names if ready.has(name, _source_key_or_none(name))
    }
    is_trusted = platform.distrust(folder) is None
    for path in platform.files_below(folder, "*.o") if is_trusted else []:
        name = path.name.rpartition("-")[0]
        if (_HERE / "native" / f"{name.partition('.')[0]}.py").is_file():
            if path == object_path(folder, name):
                found[name] = "cached"
    return found


def current_files(folder: Path = FOLDER) -> list[Path]:
    """Files of ready kernels that were all made of the sources that are here."""
    found = []
    for path in sorted(folder.glob("*.kernels")):
        ready = Ready.open(path)
        if ready.names and all(ready.has(name, _source_key_or_none(name)) for name in ready.names):
            found.append(path)
    return found


def _source_key_or_none(name: str) -> str | None:
    """None in a frozen program, which carries no sources."""
    module = name.partition(".")[0]
    return source_key(module) if (_HERE / "native" / f"{module}.py").is_file() else None


def can_build() -> bool:
    """Whether there are sources and an interpreter to build with: not in a frozen program."""
    return platform.can_start_python() and (_HERE / "build.py").is_file()


def n_builders(n_kernels: int, memory: int | None) -> int:
    """Processes that build: as many as there are cores and memory for; Numba uses one core each."""
    n = min(os.cpu_count() or 1, -(-n_kernels // 2), 8)
    return max(1, n if memory is None else min(n, memory // BUILDER_BYTES))


def build_objects(
    folder: Path | None,
    names: Sequence[str],
    target: Target,
    progress: Progress | None,
    failed: list[OSError] | None = None,
    memory: int | None = None,
) -> dict[str, bytes]:
    """Build kernels, into a folder if there is one, in `n_builders` processes.

    Each process takes the next name when it is done with one, the slowest first. Where the folder
    takes one no more, why goes to `failed`, and no further ones are written.
    """
    n_jobs = n_builders(len(names), memory)
    command = build_command(None, target)
    failed = [] if failed is None else failed

    def keep(name: str, data: bytes) -> None:
        if folder is not None and not failed:
            try:
                write_object(folder, name, data)
            except OSError as error:
                failed.append(error)

    waiting, done = deque(sorted(names, key=_slowest_first)), dict[str, bytes]()
    if progress:
        progress(0, len(names), waiting[0])
    with platform.open_scratch() or nullcontext() as errors:
        jobs = [platform.start_program(command, errors=errors) for _ in range(n_jobs)]
        feeders = [
            threading.Thread(target=_feed, args=(job, waiting, done, keep), daemon=True)
            for job in jobs
        ]
        try:
            for feeder in feeders:
                feeder.start()
            n_told = 0
            while any(feeder.is_alive() for feeder in feeders) or n_told < len(done):
                for feeder in feeders:
                    feeder.join(0.02)
                for name in list(done)[n_told:]:
                    n_told += 1
                    if progress:
                        progress(n_told, len(names), name)
            if status := next(filter(None, [job.wait() for job in jobs]), 0):
                why = _end_of(errors) or f"a builder ended with status {status}, as one that is "
                "killed where memory runs out"
                raise DeviceError(f"building CPU kernels failed:\n{why}")
        finally:
            for job in jobs:
                if job.poll() is None:
                    job.kill()
                with job:  # closes its pipes
                    pass
    return done


def _end_of(errors: IO[bytes] | None) -> str:
    """The last of what children have said on their standard error."""
    if errors is None:
        return "there was no room for what was said of it"
    errors.seek(0)
    return errors.read().decode("utf-8", "replace").strip()[-2000:]


def build_command(folder: Path | None, target: Target) -> list[str]:
    """A process that builds the kernels whose names it reads, and answers each with its name.

    Where there is no folder to write them to, the object follows, in hexadecimal.
    """
    to = "-" if folder is None else str(folder.absolute())
    facts = [f"--triple={target.triple}", f"--cpu={target.cpu}", f"--features={target.features}"]
    return platform.python_command(
        "edgeinfer.kernels.cpu.build", to, "--family", target.family, *facts
    )


def _slowest_first(name: str) -> int:
    module = name.partition(".")[0]
    return _SLOWEST.index(module) if module in _SLOWEST else len(_SLOWEST)


def _feed(
    job: subprocess.Popen[str],
    waiting: deque[str],
    done: dict[str, bytes],
    keep: Callable[[str, bytes], None],
) -> None:
    """Hand one process name after name, until none is left or it ends."""
    assert job.stdin is not None and job.stdout is not None
    try:
        while waiting:
            job.stdin.write(waiting.popleft() + "\n")
            job.stdin.flush()
            line = job.stdout.readline()
            if not line:
                waiting.clear()  # it failed; the others need not go on
                return
            name, _, data = line.strip().partition(" ")
            built = bytes.fromhex(data)
            keep(name, built)
            done[name] = built
    except (IndexError, OSError):  # another took the last one; it ended
        pass
    finally:
        with suppress(OSError):
            job.stdin.close()
