"""Compiled kernels on the disk: named by the sources that they are made of, written whole.

Never imports Numba. Knows kernels by name only.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from edgeinfer import platform, quant
from edgeinfer.kernels.cpu.targets import Target

_MAX_VERSIONS = 4
_DIGEST = 32  # bytes of SHA-256 in front of every cached object


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


def source_key_or_none(name: str) -> str | None:
    """That of a kernel; None in a frozen program, which carries no sources."""
    module = name.partition(".")[0]
    return source_key(module) if has_source(module) else None


def has_source(module: str) -> bool:
    """Whether there is such a native module."""
    return (_HERE / "native" / f"{module}.py").is_file()


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
