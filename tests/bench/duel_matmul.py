"""Matmul kernels of this checkout against those of another, call by call in turns, in one process.

    python -m tests.bench.duel_matmul OTHER_CHECKOUT [--types q4_0,q6_k] [--tokens 128]

Two runs of a benchmark on a shared machine differ by more than two kernels do; two calls that
follow each other seldom do. With 1 or 2 tokens the weights are larger than any cache and threads
share them: GB/s. With more they fit in the second-level cache: GMAC/s by thread CPU time. The other
checkout's kernels are built from its sources and called with this one's arguments: words that it
does not know must come last. Knows no type's blocks beyond their sizes.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm

from edgeinfer.kernels.cpu.formats import packed_bytes
from edgeinfer.kernels.cpu.kept_objects import symbol
from tests.bench import bench_matmul as bench

_DIGEST = 32  # bytes of SHA-256 in front of an object that the builder writes
_CACHED = 256 << 10  # bytes of weights that fit in the second-level cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--types", default="q4_0,q4_k,q6_k,q8_0")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="for 1 or 2 tokens")
    parser.add_argument("--mib", type=int, default=512, help="of weights, for 1 or 2 tokens")
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    buffer = bench.Buffer(args.mib << 20)
    here, unit = Path(__file__).resolve().parents[2], "GB/s" if args.tokens <= 2 else "GMAC/s"
    print(f"{bench.machine()}; {args.tokens} tokens, {unit}: other, here, median of the ratio")
    for name in args.types.split(","):
        rates: list[list[float]] = [[], []]
        kernels = [_kernel(checkout, name, args.tokens, buffer) for checkout in (args.other, here)]
        for _ in range(args.repeats):
            for kernel, own in zip(kernels, rates, strict=True):
                own.append(_rate(kernel, name, args, buffer))
        ratio = statistics.median(b / a for a, b in zip(*rates, strict=True))
        medians = "  ".join(f"{statistics.median(own):6.1f}" for own in rates)
        print(f"{name:7} {medians}  {ratio:.2f}x", flush=True)


def _groups(name: str, tokens: int, buffer: bench.Buffer) -> tuple[int, int]:
    """Groups of weights, and of each chunk."""
    group_bytes = packed_bytes(name, 8, bench.N_COLS)
    per_chunk = max(4, _CACHED // group_bytes // 4 * 4)
    if tokens > 2:
        return per_chunk, per_chunk
    return (len(buffer.array) - (2 << 20)) // group_bytes // per_chunk * per_chunk, per_chunk


def _kernel(checkout: Path, name: str, tokens: int, buffer: bench.Buffer) -> bench.Kernel:
    """A matmul as `bench_matmul` calls it, with the code of a checkout."""
    n_groups, per_chunk = _groups(name, tokens, buffer)
    kernel = bench.matmul(name, None, buffer.address, n_groups, tokens, per_chunk)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edgeinfer.kernels.cpu.build", folder, f"matmul.{name}"]
        subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
        data = next(Path(folder).glob("*.o")).read_bytes()[_DIGEST:]
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    address = engine.get_function_address(symbol(f"matmul.{name}"))
    kernel.call = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 4)(address)
    kernel.keep.append(engine)
    return kernel


def _rate(kernel: bench.Kernel, name: str, args: argparse.Namespace, buffer: bench.Buffer) -> float:
    n_groups, per_chunk = _groups(name, args.tokens, buffer)
    if args.tokens <= 2:
        seconds = bench.on_threads(args.threads, kernel, n_groups // per_chunk)
        return n_groups * packed_bytes(name, 8, bench.N_COLS) / seconds / 1e9
    macs = args.tokens * n_groups * 8 * bench.N_COLS
    return macs / bench.thread_seconds(kernel) / 1e9


if __name__ == "__main__":
    main()
