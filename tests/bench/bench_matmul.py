"""How fast the matmul and packing kernels are: `python -m tests.bench.bench_matmul`.

GEMV (one token): GB/s of packed weights and the share of what a read loop reaches in the same run,
one pass of each after the other. GEMM (8 tokens, weights in the second-level cache): GMAC/s by
thread CPU time. Pack: GB/s of file bytes by thread CPU time. Medians, or the best of short runs
where the clock is the thread's own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.formats import FORMATS, packed_bytes
from edgeinfer.kernels.cpu.targets import Target
from tests import native

N_COLS = 2048
CHUNK_BYTES = 512 << 10


class Buffer:
    """Anonymous memory in huge pages, filled with bytes that are sane halves and floats."""

    def __init__(self, n_bytes: int) -> None:
        self.area = mmap.mmap(-1, n_bytes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.area.madvise(mmap.MADV_HUGEPAGE)
        self.array = np.frombuffer(self.area, np.uint8)
        self.array[:] = 0x2A
        self.address = self.array.ctypes.data


class Kernel:
    """A kernel with its arguments, as a function of the chunk; ctypes releases the GIL."""

    def __init__(self, name: str, family: str | None, args: list[int], n_tokens: int = 1) -> None:
        self.call = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 4)(native.address(name, family))
        self.header = native.header(H_ROWS=n_tokens)
        self.words = np.array(args, np.int64)
        self.keep: list[object] = []  # what must live as long

    def __call__(self, chunk: int, thread: int = 0) -> None:
        self.call(self.header.ctypes.data, self.words.ctypes.data, chunk, thread)


def matmul(
    type_name: str, family: str | None, w: int, n_groups: int, n_tokens: int, per_chunk: int
) -> Kernel:
    """A matmul of packed weights at w."""
    form = FORMATS[type_name]
    n_blocks = N_COLS // form.block
    row_bytes = 4 * N_COLS if form.activation == "f32" else N_COLS // 32 * layout.A32_BYTES
    x = native.huge(row_bytes * n_tokens)
    out = np.zeros((n_tokens, n_groups * 8 + 16), np.float32)
    scratch = native.huge(layout.MATMUL_SCRATCH_BYTES * 64)
    args = [
        w, n_blocks, x.ctypes.data, out.ctypes.data, out.strides[0], 0, 0, layout.ALL_ROWS,
        row_bytes, scratch.ctypes.data, *range(0, n_groups, per_chunk), n_groups,
    ]  # fmt: skip
    kernel = Kernel(f"matmul.{type_name}", family, args, n_tokens)
    kernel.keep = [x, out, scratch]
    return kernel


def on_threads(n_threads: int, kernel: Callable[[int, int], None], n_chunks: int) -> float:
    """Seconds for all chunks; threads take chunks as they go."""
    chunks = iter(range(n_chunks))

    def work(thread: int) -> None:
        for chunk in chunks:
            kernel(chunk, thread)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def gemv(
    type_name: str, family: str | None, buffer: Buffer, n_threads: int, repeats: int, tokens: int
) -> tuple[float, float]:
    """GB/s of weights and the share of the read loop's, as medians of alternating passes."""
    group_bytes = packed_bytes(type_name, 8, N_COLS)
    n_groups = (len(buffer.array) - (2 << 20)) // group_bytes
    per_chunk = max(1, CHUNK_BYTES // group_bytes)
    n_bytes = n_groups * group_bytes
    kernel = matmul(type_name, family, buffer.address, n_groups, tokens, per_chunk)
    total = np.zeros(1, np.int64)
    read = Kernel("read", family, [buffer.address, n_bytes, CHUNK_BYTES, total.ctypes.data])
    rates, shares = [], []
    for _ in range(repeats):
        baseline = on_threads(n_threads, read, -(-n_bytes // CHUNK_BYTES))
        taken = on_threads(n_threads, kernel, -(-n_groups // per_chunk))
        rates.append(n_bytes / taken / 1e9)
        shares.append(baseline / taken)
    return statistics.median(rates), statistics.median(shares)


def gemm(type_name: str, family: str | None, buffer: Buffer, n_tokens: int, runs: int) -> float:
    """GMAC/s of one core with the weights of one chunk in cache."""
    group_bytes = packed_bytes(type_name, 8, N_COLS)
    n_groups = max(1, (256 << 10) // group_bytes)
    kernel = matmul(type_name, family, buffer.address, n_groups, n_tokens, n_groups)
    kernel(0)
    best = min(thread_seconds(kernel) for _ in range(runs))
    return n_tokens * n_groups * 8 * N_COLS / best / 1e9


def pack(type_name: str, family: str | None, buffer: Buffer, runs: int) -> float:
    """GB/s of file bytes packed by one core."""
    form = FORMATS[type_name]
    n_blocks = N_COLS // form.block
    row_bytes = n_blocks * form.file_bytes
    n_rows = (8 << 20) // row_bytes // 8 * 8
    args = [buffer.address, buffer.address + (16 << 20), n_rows, n_blocks, n_rows // 8]
    kernel = Kernel(f"pack.{type_name}", family, args)
    kernel(0)
    rate = n_rows * row_bytes / min(thread_seconds(kernel) for _ in range(runs)) / 1e9
    buffer.array[16 << 20 : 32 << 20] = 0x2A
    return rate


def thread_seconds(kernel: Kernel) -> float:
    """CPU time of one call, of the only chunk."""
    start = time.thread_time()
    kernel(0)
    return time.thread_time() - start


def machine() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores, LLVM calls it {Target.host().cpu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(FORMATS))
    parser.add_argument("--families", default="vnni,avx2")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of the GEMM")
    parser.add_argument("--gemv-tokens", type=int, default=1)
    parser.add_argument("--mib", type=int, default=640, help="size of the GEMV's weights")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=["gemv", "gemm", "pack"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    threads = [int(n) for n in args.threads.split(",")]
    buffer = Buffer(args.mib << 20)
    rows = []
    if not args.json:
        print(f"{machine()}; load {os.getloadavg()[0]:.2f}")
    for family in args.families.split(","):
        for type_name in args.types.split(","):
            row: dict[str, object] = {"family": family, "type": type_name}
            if args.only in (None, "gemv"):
                for n in threads:
                    rate, share = gemv(type_name, family, buffer, n, args.repeats, args.gemv_tokens)
                    row |= {
                        f"gemv{n} GB/s": round(rate, 1),
                        f"gemv{n} % of read": round(100 * share),
                    }
            if args.only in (None, "gemm"):
                runs = 30 * args.repeats
                row["gemm GMAC/s"] = round(gemm(type_name, family, buffer, args.tokens, runs), 1)
            if args.only in (None, "pack"):
                row["pack GB/s"] = round(pack(type_name, family, buffer, args.repeats), 2)
            if not rows and not args.json:
                print(" | ".join(row))
            if not args.json:
                print(" | ".join(str(v).rjust(len(k)) for k, v in row.items()), flush=True)
            rows.append(row)
    if args.json:
        print(json.dumps({"machine": machine(), "cols": N_COLS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
