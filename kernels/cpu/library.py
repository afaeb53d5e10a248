"""Loads compiled kernels: those cached for this exact machine, else ready ones, else built now.

Never imports Numba: building runs in other processes. Knows kernels by name only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from edgeinfer import platform
from edgeinfer.errors import DeviceError, reason_of
from edgeinfer.kernels.cpu import linker
from edgeinfer.kernels.cpu.builders import (
    BUILDER_BYTES,
    Progress,
    build_objects,
    can_build,
    n_builders,
)
from edgeinfer.kernels.cpu.kept_objects import (
    cache_folder,
    has_source,
    object_path,
    read_object,
    source_key_or_none,
    symbol,
)
from edgeinfer.kernels.cpu.ready import FOLDER, Ready
from edgeinfer.kernels.cpu.targets import Target
from edgeinfer.terminal import printable

# Built for this machine exactly and kept; for its family and shipped; built for this process.
Origin: TypeAlias = Literal["cached", "ready", "built"]

# Objects are 1 to 52 KB, 8 on average, and are held while they are linked. VmRSS grows by 41 MiB
# where LLVM is asked about the processor, by 50 where it links.
_KERNEL_BYTES, _LLVM_BYTES = 32 << 10, 52 << 20


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
            objects |= self._build(missing, progress, self.code_bytes(wanted))
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
            self._build(names, progress, self.code_bytes(names))
        if names and not self.is_cached:
            raise DeviceError(
                f"kernels can't be kept in {self.folder} ({self.unkept}); make room, or set "
                "EDGEINFER_HOME to another folder"
            )
        return len(names)

    def building_bytes(self, names: Collection[str]) -> int:
        """Memory that the processes take which will build those of these kernels not here."""
        n_missing = sum(not self._is_here(name) for name in names)
        n = n_builders(n_missing, self._memory_beside(self.code_bytes(names)))
        return n * BUILDER_BYTES if n_missing else 0

    def _memory_beside(self, code_bytes: int) -> int | None:
        """What building may take where a plan counts that much beside it; None: without end."""
        return None if self._memory is None else self._memory - code_bytes

    def code_bytes(self, names: Collection[str]) -> int:
        """Memory of these kernels' code, and of LLVM where this process has it or will need it."""
        can_link = self.target.machine == "x86_64" and self.target.system != "windows"
        has_llvm = not can_link or "llvmlite.binding" in sys.modules
        return len(names) * _KERNEL_BYTES + has_llvm * _LLVM_BYTES

    def _is_here(self, name: str) -> bool:
        if name in self._addresses or self._ready.has(name, source_key_or_none(name)):
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
                data, origin = self._ready.read(name, source_key_or_none(name)), "ready"
            if data is not None:
                objects[name], origins[name] = data, cast(Origin, origin)
        return objects, origins

    def _can_keep(self) -> bool:
        """Whether the next process may take what is built; only now the folder surely exists."""
        is_there = self._is_trusted and platform.is_writable(self.folder)
        return is_there and platform.distrust(self.folder) is None

    def _build(
        self, names: Sequence[str], progress: Progress | None, code_bytes: int
    ) -> dict[str, bytes]:
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
        memory = self._memory_beside(code_bytes)
        objects = build_objects(folder, names, self.target, progress, failed, memory)
        self.is_cached = folder is not None and not failed
        self.unkept = "".join(map(reason_of, failed[:1]))
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
        name: "ready" for name in ready.names if ready.has(name, source_key_or_none(name))
    }
    is_trusted = platform.distrust(folder) is None
    for path in platform.files_below(folder, "*.o") if is_trusted else []:
        name = path.name.rpartition("-")[0]
        if has_source(name.partition(".")[0]) and path == object_path(folder, name):
            found[name] = "cached"
    return found


def current_files(folder: Path = FOLDER) -> list[Path]:
    """Files of ready kernels that were all made of the sources that are here."""
    found = []
    for path in sorted(folder.glob("*.kernels")):
        ready = Ready.open(path)
        if ready.names and all(ready.has(name, source_key_or_none(name)) for name in ready.names):
            found.append(path)
    return found
