"""What every CUDA kernel takes of a GPU: compiled, and held against `cuda_registers.json`.

`python -m tests.cuda_registers` writes that file anew: for all kernels, or those that are named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgeinfer import platform
from edgeinfer.kernels.cuda.cubins import Cubins
from edgeinfer.kernels.cuda.kernel import Kernel, Sources
from edgeinfer.kernels.cuda.nvrtc import Usage, compile_all

TABLE = Path(__file__).with_suffix(".json")
MOST_SHARED = 48 << 10  # bytes of static shared memory
# The architectures that GPUs of our users have, by the CUDA whose compiler knows them.
ARCHITECTURES = {12: (61, 70, 72, 75, 80, 86, 87, 89, 90, 120), 13: (110, 121)}
USUAL = {12: (61, 87, 90), 13: (110,)}

Table = dict[str, dict[str, int]]  # registers, by kernel and architecture


def usages(
    cuda: int, architectures: Sequence[int], names: Sequence[str], folder: Path
) -> Iterator[tuple[Kernel, int, Usage]]:
    """What the usual variants of kernels take on each architecture."""
    sources = Sources()
    kernels = [kernel for name in names for kernel in sources.variants(name)]
    library = next(library for library in platform.nvrtc_libraries() if library.cuda == cuda)
    for arch in architectures:
        cubins = Cubins(folder, sources, arch, cuda)
        jobs = [cubins.job(kernel) for kernel in kernels]
        for kernel, cubin in zip(kernels, compile_all(library.path, jobs), strict=True):
            yield kernel, arch, cubin.usage


def objection(kernel: Kernel, arch: int, usage: Usage, table: Table) -> str | None:
    """What is wrong with a kernel on an architecture, None where nothing is."""
    what = f"{kernel} for sm_{arch}"
    if usage.spilled_bytes or usage.stack_bytes:
        return f"{what} has {usage.stack_bytes} bytes of stack, {usage.spilled_bytes} spilled"
    if usage.shared_bytes > MOST_SHARED:
        return f"{what} has {usage.shared_bytes} bytes of static shared memory"
    most = table.get(str(kernel), {}).get(str(arch))
    if most is None or usage.registers > most:
        return f"{what} takes {usage.registers} registers, {TABLE.name} has {most}"
    return None


def read() -> Table:
    table: Table = json.loads(TABLE.read_text("utf-8"))
    return table


def write(table: Table) -> None:
    """One line for each variant, so that two changes seldom meet."""
    lines = (f"{json.dumps(kernel)}: {json.dumps(table[kernel])}" for kernel in sorted(table))
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def main() -> None:
    names = sys.argv[1:] or Sources().names()
    table: Table = read() if sys.argv[1:] else {}
    for cuda, architectures in ARCHITECTURES.items():
        for kernel, arch, usage in usages(cuda, architectures, names, TABLE.parent):
            table.setdefault(str(kernel), {})[str(arch)] = usage.registers
            print(kernel, arch, *usage, flush=True)
    write(table)


if __name__ == "__main__":
    main()
