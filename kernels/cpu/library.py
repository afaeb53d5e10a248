"""Loads compiled kernels, building the missing ones first; caches them for this exact machine.

Never imports Numba: building runs in other processes. Knows kernels by name only.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from edgeinfer.errors import DeviceError

Progress: TypeAlias = Callable[[int, int, str], None]  # done, total, kernel

_MAX_VERSIONS = 4
_DIGEST = 32  # bytes of SHA-256 in front of every cached object


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to compile for: its instruction-set family, and LLVM's names for it."""

    family: str
    triple: str
    cpu: str
    features: str

    @classmethod
    def host(cls, family: str | None = None) -> Target:
        """This machine; `family` forces a poorer vocabulary ("generic", "avx2")."""
        import llvmlite.binding as llvm

        features = llvm.get_host_cpu_features()
        if family is None:
            family = _family(features)
        return cls(family, llvm.get_process_triple(), llvm.get_host_cpu_name(), features.flatten())


def _family(features: Any) -> str:
    if features.get("avx2") and features.get("fma") and features.get("f16c"):
        if features.get("avx512vnni") and features.get("avx512vl"):
            return "avx512"
        return "vnni" if features.get("avxvnni") else "avx2"
    return "generic"


def symbol(name: str) -> str:
    """The linker's name of a kernel: `matmul.q4_0.8` is `ei_matmul_q4_0_8`."""
    return "ei_" + name.replace(".", "_")


@cache
def source_key(module: str) -> str:
    """Changes whenever a source that kernels of this native module are made of changes."""
    digest = hashlib.sha256()
    for path in sorted(_sources(module)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


_HERE = Path(__file__).parent
_IMPORT = re.compile(r"^from edgeinfer\.kernels\.cpu((?:\.\w+)*) import ([\w, ]*)", re.MULTILINE)


def _sources(module: str) -> set[Path]:
    """The native module, what it imports from here, and the builder."""
    found: set[Path] = set()
    pending = [_HERE / "native" / f"{module}.py", _HERE / "native" / "isa.py", _HERE / "build.py"]
    while pending:
        path = pending.pop()
        if path in found or path == Path(__file__):
            continue
        found.add(path)
        for dotted, names in _IMPORT.findall(path.read_text()):
            base = _HERE.joinpath(*dotted.split("."))
            if base.is_dir():
                pending += [base / f"{name.split()[0]}.py" for name in names.split(",")]
            else:
                pending.append(base.with_suffix(".py"))
    return found


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
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
        file.write(hashlib.sha256(data).digest() + data)
    os.replace(file.name, object_path(folder, name))
    versions = sorted(folder.glob(f"{name}-*.o"), key=lambda path: path.stat().st_mtime)
    for old in versions[:-_MAX_VERSIONS]:
        old.unlink(missing_ok=True)


def read_object(folder: Path, name: str) -> bytes | None:
    """The object, or None where it is absent or damaged (LLVM dies on a damaged one)."""
    try:
        data = object_path(folder, name).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        return None
    return data[_DIGEST:]


class Library:
    """Kernels of one target in executable memory, by name; addresses live as long as this."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.is_cached = True  # False once something had to be built for this process alone
        self._addresses: dict[str, int] = {}
        self._engines: list[Any] = []

    def load(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Make these kernels callable. `progress(done, total, name)` is told of every build."""
        wanted = sorted(set(names) - self._addresses.keys())
        if not wanted:
            return
        objects = {name: read_object(self.folder, name) for name in wanted}
        missing = [name for name, data in objects.items() if data is None]
        if missing:
            objects |= self._build(missing, progress)
        self._link({name: data for name, data in objects.items() if data is not None})
        lost = [name for name in wanted if name not in self._addresses]
        if lost:
            raise DeviceError(f"kernels {', '.join(lost)} changed while they were being built")

    def _build(self, names: Sequence[str], progress: Progress | None) -> dict[str, bytes | None]:
        """Build into the cache, or where that can't be written into a folder that goes again."""
        with ExitStack() as stack:
            folder = self.folder
            if not _is_writable(folder):
                self.is_cached = False
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _build(folder, names, self.target, progress)
            return {name: read_object(folder, name) for name in names}

    def address(self, name: str) -> int:
        """Address of a loaded kernel."""
        return self._addresses[name]

    def _link(self, objects: dict[str, bytes]) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for data in objects.values():
            engine.add_object_file(llvm.ObjectFileRef.from_data(data))
        engine.finalize_object()
        self._engines.append(engine)
        for name in objects:
            address = engine.get_function_address(symbol(name))
            if address:
                self._addresses[name] = address


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _build(folder: Path, names: Sequence[str], target: Target, progress: Progress | None) -> None:
    """Build in as many processes as there are cores; Numba compiles on one core each."""
    import subprocess  # 20 ms that only a first start pays

    n_jobs = max(1, min(os.cpu_count() or 1, len(names) // 2, 8))
    command = [sys.executable, "-m", "edgeinfer.kernels.cpu.build", "--family", target.family]
    jobs = [
        subprocess.Popen(
            [*command, str(folder), *names[i::n_jobs]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(n_jobs)
    ]
    done = 0
    try:
        if progress:
            progress(0, len(names), names[0])
        for job in jobs:
            assert job.stdout is not None
            for line in job.stdout:
                done += 1
                if progress:
                    progress(done, len(names), line.strip())
        for job in jobs:
            _, errors = job.communicate()
            if job.returncode:
                raise DeviceError(f"building CPU kernels failed:\n{errors.strip()[-2000:]}")
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()
