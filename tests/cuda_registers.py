"""What every CUDA kernel takes of a GPU: compiled, and held against `cuda_registers.json`.

`python -m tests.cuda_registers` brings that file up to date for the kernels whose text has changed,
`--all` for all of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from edgeinfer import platform
from edgeinfer.kernels.cuda.cubins import Cubins
from edgeinfer.kernels.cuda.kernel import Kernel, Sources
from edgeinfer.kernels.cuda.nvrtc import Usage, compile_all

TABLE = Path(__file__).with_suffix(".json")
MOST_SHARED = 48 << 10  # bytes of static shared memory
# Every architecture that kernels are compiled for, by the CUDA whose compiler knows it. There is no
# 62, Jetson TX2: its last driver runs CUDA 10.2, and we need 12.
ALL = {
    12: (61, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121),
    13: (75, 80, 86, 87, 88, 89, 90, 100, 103, 107, 110, 120, 121),
}
USUAL = {12: (61, 87, 90), 13: (110,)}  # those that the table has


class Entry(TypedDict):
    """Of a variant: the key of what it was made of, and its registers by architecture."""

    key: str
    registers: dict[str, int]


Table = dict[str, Entry]


class Kernels:
    """The usual variants of all kernels, and what is known of them."""

    def __init__(self, sources: Sources, table: Table) -> None:
        self.all = [kernel for name in sources.names() for kernel in sources.variants(name)]
        self.table = table
        self._cubins = {
            (cuda, arch): Cubins(TABLE.parent, sources, arch, cuda)  # nothing is kept there
            for cuda, architectures in ALL.items()
            for arch in architectures
        }
        any_ = next(iter(self._cubins.values()))
        self.keys = {str(kernel): any_.key(kernel) for kernel in self.all}

    def changed(self) -> list[Kernel]:
        """Those whose texts are not those that the table was made of."""
        known = {kernel: entry["key"] for kernel, entry in self.table.items()}
        return [kernel for kernel in self.all if known.get(str(kernel)) != self.keys[str(kernel)]]

    def usages(
        self, kernels: Sequence[Kernel], cuda: int, architectures: Sequence[int]
    ) -> Iterator[tuple[Kernel, int, int, Usage]]:
        """What kernels take on each architecture, with the compiler of a CUDA."""
        library = next(each for each in platform.nvrtc_libraries() if each.cuda == cuda)
        for arch in architectures:
            jobs = [self._cubins[cuda, arch].job(kernel) for kernel in kernels]
            for kernel, cubin in zip(kernels, compile_all(library.path, jobs), strict=True):
                yield kernel, cuda, arch, cubin.usage

    def objections(
        self, kernels: Sequence[Kernel], cuda: int, architectures: Sequence[int]
    ) -> list[str]:
        """All that is wrong with kernels on architectures."""
        found = self.usages(kernels, cuda, architectures)
        return list(filter(None, (self.objection(*each) for each in found)))

    def objection(self, kernel: Kernel, cuda: int, arch: int, usage: Usage) -> str | None:
        """What is wrong with a kernel on an architecture, None where nothing is."""
        what = f"{kernel} for sm_{arch} by CUDA {cuda}"
        if usage.spilled_bytes or usage.stack_bytes:
            return f"{what} has {usage.stack_bytes} bytes of stack, {usage.spilled_bytes} spilled"
        if usage.shared_bytes > MOST_SHARED:
            return f"{what} has {usage.shared_bytes} bytes of static shared memory"
        entry = self.table.get(str(kernel))
        most = entry["registers"].get(str(arch)) if entry and arch in USUAL[cuda] else None
        if most is not None and usage.registers > most:
            return f"{what} takes {usage.registers} registers, {TABLE.name} has {most}"
        return None


def read() -> Table:
    table: Table = json.loads(TABLE.read_text("utf-8"))
    return table


def write(table: Table) -> None:
    """One line for each variant."""
    lines = (f"{json.dumps(kernel)}: {json.dumps(table[kernel])}" for kernel in sorted(table))
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def main() -> None:
    kernels = Kernels(Sources(), read())
    measured = kernels.all if sys.argv[1:] == ["--all"] else kernels.changed()
    table = {k: entry for k, entry in kernels.table.items() if k in kernels.keys}
    table |= {str(k): Entry(key=kernels.keys[str(k)], registers={}) for k in measured}
    kernels.table = table
    for cuda, architectures in USUAL.items():
        for kernel, _, arch, usage in kernels.usages(measured, cuda, architectures):
            table[str(kernel)]["registers"][str(arch)] = usage.registers
            if objection := kernels.objection(kernel, cuda, arch, usage):
                print(objection, flush=True)
                table[str(kernel)]["key"] = ""  # so that tests find it, too
    write(table)


if __name__ == "__main__":
    main()
