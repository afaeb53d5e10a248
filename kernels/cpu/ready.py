"""Files of ready kernels: one for each family and system, written for a wheel, read at start.

A file is a manifest and objects. What the manifest says is checked before LLVM sees a byte, for
it dies on a damaged object; what does not match counts as absent. Knows kernels by name only.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from edgeinfer.kernels.cpu.formats import FORMATS
from edgeinfer.kernels.cpu.targets import Target

FOLDER = Path(__file__).parent / "ready"
# Widths of heads in published models that run; others are built when they are asked for.
HEAD_DIMS = (32, 48, 64, 80, 96, 100, 120, 128, 256)
POINTWISE = (
    "silu", "gelu", "sigmoid", "softplus", "relu2", "add", "mul", "scale", "soft_cap", "clamp",
)  # fmt: skip
NAMES = (
    *(f"{op}.{name}" for op in ("matmul", "pack", "embed", "experts") for name in FORMATS),
    *(f"attend.{dim}.{dim}" for dim in HEAD_DIMS),
    *(f"attend.{dim}.{dim}.window" for dim in (64, 128, 256)),
    *(f"attend.{dim}.{dim}.{each}" for dim in (128, 256) for each in ("cap", "window.cap")),
    *(f"attend.{dim}.{dim}.k_q8_0.v_{v}.hadamard" for dim in (64, 128) for v in ("q8_0", "q4_0")),
    *(f"rotate.{kind}.q8_0.{v}" for kind in ("norm", "neox") for v in ("q8_0", "q4_0")),
    *("fold.hadamard", "fold.sinks.hadamard"),
    *("norm", "swiglu", "angles", "angles.scaled", "rotate.norm", "rotate.neox"),
    *("norm_heads", "copy_rows", "quantise"),
    *(f"pointwise.{kind}" for kind in POINTWISE),
    *(f"route.{kind}" for kind in ("softmax", "sigmoid", "raw", "sqrt_softplus")),
    *("dispatch", "gather.a32", "gather.f32", "expert_sum", "mul_parts"),
    *("conv", "conv.silu", "delta_net", "plan_runs"),
    *("plan_attention", "fold", "fold.sinks", "sample", "read", "team.work", "team.step"),
)

_MAGIC = b"edgeinfer ready kernels 1\n"
_LENGTH = 8  # bytes of the manifest's length, little-endian, behind the magic


class _Entry(NamedTuple):
    """Where a kernel's compressed object lies, what it was made of, and its digest."""

    key: str
    sha256: str
    offset: int
    size: int


class Ready(NamedTuple):
    """The readable kernels of one file; none where there is no such file or it is damaged."""

    entries: Mapping[str, _Entry] = MappingProxyType({})
    data: bytes = b""

    @classmethod
    def of(cls, target: Target, folder: Path = FOLDER) -> Ready:
        """Those that ship for the family and system of a target."""
        return cls.open(path(folder, target))

    @classmethod
    def open(cls, file: Path) -> Ready:
        """Those of a file; none where it is absent or damaged."""
        try:
            return cls.parse(file.read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls()

    @classmethod
    def parse(cls, data: bytes) -> Ready:
        """From a file's bytes; raises ValueError, KeyError or TypeError where they are damaged."""
        if not data.startswith(_MAGIC):
            raise ValueError("not a file of ready kernels")
        start = len(_MAGIC) + _LENGTH
        end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
        manifest = json.loads(data[start:end])
        entries = {
            name: _Entry(str(key), str(digest), end + _count(offset), _count(size))
            for name, (key, digest, offset, size) in manifest["kernels"].items()
        }
        return cls(entries, data)

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def has(self, name: str, key: str | None) -> bool:
        """Whether a kernel is there that was made of the sources of this key (None: any)."""
        entry = self.entries.get(name)
        return entry is not None and key in (entry.key, None)

    def read(self, name: str, key: str | None) -> bytes | None:
        """The object of a kernel, or None where it is absent, of other sources, or damaged."""
        if not self.has(name, key):
            return None
        entry = self.entries[name]
        try:
            data = zlib.decompress(self.data[entry.offset : entry.offset + entry.size])
        except zlib.error:
            return None
        return data if hashlib.sha256(data).hexdigest() == entry.sha256 else None


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value} is no number of bytes")
    return value


def path(folder: Path, target: Target) -> Path:
    """The file of a target's family on its system."""
    return folder / f"{target.system}-{target.machine}-{target.family}.kernels"


def write(folder: Path, target: Target, objects: Mapping[str, bytes]) -> Path:
    """Write the file of a target's family, complete or not at all."""
    import llvmlite

    from edgeinfer.kernels.cpu.kept_objects import source_key

    blobs, kernels, offset = [], {}, 0
    for name, data in sorted(objects.items()):
        blob = zlib.compress(data, 9)
        key, digest = source_key(name.partition(".")[0]), hashlib.sha256(data).hexdigest()
        kernels[name] = [key, digest, offset, len(blob)]
        blobs.append(blob)
        offset += len(blob)
    manifest = {
        "triple": target.triple,
        "cpu": target.cpu,
        "features": target.features,
        "llvmlite": llvmlite.__version__.rpartition(".")[0],
        "kernels": kernels,
    }
    text = json.dumps(manifest, indent=1).encode()
    folder.mkdir(parents=True, exist_ok=True)
    part = path(folder, target).with_suffix(".part")
    part.write_bytes(_MAGIC + len(text).to_bytes(_LENGTH, "little") + text + b"".join(blobs))
    os.replace(part, path(folder, target))
    return path(folder, target)
