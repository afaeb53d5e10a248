"""Machines to compile kernels for: this one exactly, or any of an instruction-set family.

Knows no kernel.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from edgeinfer import platform
from edgeinfer.errors import DeviceError


class Target(NamedTuple):
    """A machine to compile for: its instruction-set family, and LLVM's names for it."""

    family: str
    triple: str
    cpu: str
    features: str

    @property
    def machine(self) -> str:
        """ "x86_64" or "aarch64", whatever the system calls it."""
        first = self.triple.partition("-")[0]
        return {"amd64": "x86_64", "arm64": "aarch64"}.get(first, first)

    @property
    def system(self) -> str:
        """What objects for it are called after: "linux", "macos", "windows" or "other"."""
        return next((name for word, name in _SYSTEMS.items() if word in self.triple), "other")

    @classmethod
    def host(cls, family: str | None = None, memory: Path | None = None) -> Target:
        """This machine; a family that is not its own means any machine of that family.

        With a folder as `memory` LLVM is asked once, and its answer kept there.
        """
        triple, cpu, flags = _host_facts(memory)
        triple = _for_objects(triple)
        exact = cls("generic", triple, cpu, flags)
        families = runnable(exact.machine, _features(cpu, flags))
        if family is None or family == families[0]:
            if families[0] == "neon" and "+dotprod" not in flags:
                flags = ",".join(filter(None, (flags, "+dotprod")))
            return cls(families[0], triple, exact.cpu, flags)
        if family not in families:
            raise DeviceError(f"no {family} on this processor; it runs {', '.join(families)}")
        return cls.any(family, exact.machine, triple)

    @classmethod
    def any(cls, family: str, machine: str, triple: str | None = None) -> Target:
        """Any machine of a family, running Linux if `triple` does not say otherwise."""
        cpu, features = _PORTABLE[machine, family]
        return cls(family, triple or f"{machine}-unknown-linux-gnu", cpu, features)


# The machine that stands for a family, by LLVM's name and features. Every family needs them all:
# it has to run on the poorest of its machines. Best first.
_PORTABLE = {
    ("x86_64", "avx512"): ("x86-64-v4", "+avx512vnni"),
    ("x86_64", "vnni"): ("x86-64-v3", "+avxvnni"),
    ("x86_64", "avx2"): ("x86-64-v3", ""),
    ("x86_64", "generic"): ("x86-64-v2", ""),
    ("aarch64", "neon"): ("generic", "+v8.2a,+dotprod"),
    ("aarch64", "generic"): ("generic", ""),
}
_V3 = {"avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_NEEDS: dict[str, set[str]] = {
    "avx512": _V4 | {"avx512vnni"},
    "vnni": _V3 | {"avxvnni"},
    "avx2": _V3,
    "neon": {"dotprod"},
    "generic": set(),
}

_SYSTEMS = {"linux": "linux", "darwin": "macos", "macos": "macos", "windows": "windows"}
# Systems that numba has wheels for, by processor.
TRIPLES = {
    "x86_64": ("x86_64-unknown-linux-gnu", "x86_64-pc-windows-msvc-elf"),
    "aarch64": ("aarch64-unknown-linux-gnu", "arm64-apple-darwin"),
}
FAMILIES = tuple(_PORTABLE)  # (machine, family)


def _for_objects(triple: str) -> str:
    """The triple that makes objects which LLVM's linker can load: on Windows it wants ELF."""
    is_coff = "windows" in triple and not triple.endswith("-elf")
    return f"{triple}-elf" if is_coff else triple


def runnable(machine: str, features: set[str]) -> list[str]:
    """The families that a processor runs, best first."""
    families = [family for each, family in FAMILIES if each == machine]
    return [family for family in families if _NEEDS[family] <= features] or ["generic"]


def _features(cpu: str, flags: str) -> set[str]:
    features = {flag[1:] for flag in flags.split(",") if flag.startswith("+")}
    if cpu.startswith("apple-m") or "asimddp" in _linux_features():
        features.add("dotprod")  # older LLVM does not look for it
    return features


def _ask_llvm() -> tuple[str, str, str]:
    """The triple of this process, the processor's name and its features."""
    import llvmlite.binding as llvm

    flags = llvm.get_host_cpu_features().flatten()
    return llvm.get_process_triple(), llvm.get_host_cpu_name(), flags


def _host_facts(memory: Path | None) -> tuple[str, str, str]:
    """LLVM's answer, from `memory` where it was asked about this very processor before.

    Importing LLVM takes a tenth of a start, which needs nothing else of it.
    """
    system = platform.processor_facts()
    if memory is None or system is None or platform.distrust(memory) is not None:
        return _ask_llvm()
    import llvmlite

    asked = hashlib.sha256(f"{llvmlite.__version__}\n{system}".encode()).hexdigest()
    path = memory / f"processor-{asked[:16]}"
    with suppress(OSError, ValueError):
        found_asked, digest, facts = platform.read_private(path).decode().split("\n", 2)
        if (found_asked, digest) == (asked, hashlib.sha256(facts.encode()).hexdigest()):
            triple, cpu, flags = facts.split("\n")
            return triple, cpu, flags
    facts = "\n".join(answer := _ask_llvm())
    with suppress(OSError):
        digest = hashlib.sha256(facts.encode()).hexdigest()
        platform.write_whole(path, f"{asked}\n{digest}\n{facts}".encode())
    return answer


def _linux_features() -> list[str]:
    """The kernel's own list on an AArch64 Linux."""
    if sys.platform != "linux":
        return []
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line[:8] == "Features"), [])
