"""Builds the wheel to release: the package with ready kernels for every system and GPU.

    .venv/bin/python .ci/wheel.py FOLDER [linux-x86_64-avx2 cuda-89 ...]

Names limit it to some of the ready kernels. What was built before for a CPU is taken from the
kernel cache; kernels for GPUs need NVRTC, as the tests do. The checkout stays as it is: the wheel
is made of a copy. Knows kernels by name only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeinfer.config import cache_folder as cache_root
from edgeinfer.kernels.cpu import ready
from edgeinfer.kernels.cpu.builders import build_objects
from edgeinfer.kernels.cpu.kept_objects import cache_folder, read_object
from edgeinfer.kernels.cpu.targets import FAMILIES, TRIPLES, Target
from edgeinfer.kernels.cuda.cubins import Cubins
from edgeinfer.kernels.cuda.kernel import Sources
from edgeinfer.platform.children import python_command

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "NOTICE",
    *("edgeinfer", "kernels", "models"),
    "tui",
)
# Architectures, and the CUDA whose compiler makes their code: drivers of later ones take it too.
GPUS = {f"cuda-{arch}": (arch, 12) for arch in (61, 75, 86, 87, 89, 90, 120)} | {
    "cuda-110": (110, 13)
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a wheel with ready kernels.")
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    parser.add_argument("names", nargs="*", help="some of: " + " ".join([*_targets(), *GPUS]))
    args = parser.parse_args()
    known = [*_targets(), *GPUS]
    unknown = set(args.names) - set(known)
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {' '.join(known)}")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        for name in PACKAGED:
            _copy(ROOT / name, source / name)
        for name in args.names or known:
            if name in GPUS:
                _add_cubins(source / "kernels" / "cuda" / "ready", *GPUS[name])
            else:
                _add_kernels(source / "kernels" / "cpu" / "ready", _targets()[name])
        build = ("--disable-pip-version-check", "wheel", "-q", "--no-deps", "-w", str(args.folder))
        subprocess.run(python_command("pip", *build, str(source)), check=True)
    for wheel in args.folder.glob("edgeinfer-*.whl"):
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.2f} MB")


def _targets() -> dict[str, Target]:
    """Every machine that a wheel has kernels for, by the name of their file."""
    return {ready.path(Path(), target).stem: target for target in _each_target()}


def _each_target() -> Iterator[Target]:
    for machine, family in FAMILIES:
        for triple in TRIPLES[machine]:
            # Every Mac that numba runs on has the instructions of the better family.
            if not ("darwin" in triple and family == "generic"):
                yield Target.any(family, machine, triple)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "ready")
        shutil.copytree(source, target, symlinks=True, ignore=ignored)
    else:
        shutil.copy(source, target)


def _add_kernels(folder: Path, target: Target) -> None:
    cache = cache_folder(cache_root(), target)
    found = {name: read_object(cache, name) for name in ready.NAMES}
    objects = {name: data for name, data in found.items() if data is not None}
    missing = [name for name in ready.NAMES if name not in objects]
    label = ready.path(folder, target).stem
    if missing:
        objects |= build_objects(
            cache,
            missing,
            target,
            lambda done, total, name: print(
                f"\r{label}: {done}/{total} {name:20}", end="", flush=True
            ),
        )
    path = ready.write(folder, target, objects)
    print(f"\r{path.name}: {len(objects)} kernels, {path.stat().st_size / 1e6:.2f} MB", flush=True)


def _add_cubins(folder: Path, arch: int, cuda: int) -> None:
    sources = Sources()
    kernels = [kernel for name in sources.names() for kernel in sources.variants(name)]
    cubins = Cubins(folder, sources, arch, cuda).load(kernels)
    n_bytes = sum(map(len, cubins.values()))
    print(f"cuda-{arch}: {len(cubins)} kernels, {n_bytes / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
