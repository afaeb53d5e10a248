"""Attention kernels on one core: GMAC/s of prefill, GB/s of decode, by head dim and depth.

`python tests/bench/bench_attention.py [--family avx2]`. Knows no model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgeinfer.batch import PAGE  # noqa: E402
from edgeinfer.kernels.cpu import attention_layout, page_layout  # noqa: E402
from tests import native  # noqa: E402

N_KV_HEADS = 4
TYPES = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"), ("f16", "q8_0"))


def step(
    depth: int,
    n_rows: int,
    dim: int,
    group: int,
    family: str | None,
    window: int = 0,
    types: tuple[str, str] = ("f16", "f16"),
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Calls that attend and fold the last `n_rows` of `depth` positions, once."""
    rng = np.random.default_rng(0)
    n_pages, n_heads = -(-depth // PAGE), N_KV_HEADS * group
    k_bytes, v_bytes = bytes_of_page(dim, types)
    k, v = native.huge(n_pages * k_bytes), native.huge(n_pages * v_bytes)
    for each in (k, v):  # halves and codes of any kind, none of them infinite
        each[:] = rng.integers(0, 63, each.size, np.uint8)
    q = rng.standard_normal((n_rows, n_heads * dim), np.float32)
    pages = rng.permutation(n_pages).astype(np.int32)
    tables = np.array([pages.ctypes.data, n_pages, 0, 1 << 20], np.int64)
    pos, seq = np.arange(depth - n_rows, depth), np.zeros(n_rows, np.int32)
    n_segments = depth // 512 + 1
    items = np.zeros(attention_layout.items_bytes(n_rows, n_segments) // 8, np.int64)
    rooms = page_layout.rooms(dim, dim, *types)
    parts = native.huge(attention_layout.parts_bytes(n_rows, n_heads, *rooms, n_segments))
    out = np.zeros_like(q)
    h = native.header(
        H_ROWS=n_rows, H_POS=pos.ctypes.data, H_SEQ=seq.ctypes.data,
        H_TABLES=tables.ctypes.data,
    )  # fmt: skip
    args = [
        items.ctypes.data, N_KV_HEADS, q.ctypes.data, q[0].nbytes, 0, n_heads,
        native.float_bits(dim**-0.5), k.ctypes.data, k_bytes, v.ctypes.data, v_bytes,
        parts.ctypes.data, *rooms, dim, 0, window, 0, 0, 0, out.ctypes.data, out[0].nbytes, 0, 0,
    ]  # fmt: skip
    items_args = [items.ctypes.data, n_segments, window, 0]
    native.run("plan_attention", h, items_args, range(1), family)
    chunks = range(int(items[0]) * N_KV_HEADS)
    name = f"attend.{dim}.{dim}" + ".window" * (window > 0)
    name += "".join(f".{x}_{kind}" for x, kind in zip("kv", types, strict=True) if kind != "f16")
    name += ".hadamard" * (types[0] != "f16")
    alive = k, v, q, pages, tables, pos, seq, items, parts, out

    def attend() -> None:
        assert alive
        native.run(name, h, args, chunks, family)

    def fold() -> None:
        native.run("fold", h, args, range(n_rows), family)

    attend(), fold()
    return attend, fold


def bytes_of_page(dim: int, types: tuple[str, str]) -> tuple[int, int]:
    """Of K and of V."""
    k_bytes, v_bytes = page_layout.k_bytes(dim, types[0]), page_layout.v_bytes(dim, types[1])
    return N_KV_HEADS * k_bytes, N_KV_HEADS * v_bytes


def median(call: Callable[[], None], seconds: float) -> float:
    """Median thread time of one call."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default=None)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    print("prefill, 128 rows at depth:    attend GMAC/s   fold ms")
    for dim in (64, 128):
        for depth in (128, 1024, 8192):
            attend, fold = step(depth, 128, dim, 4, args.family)
            n_macs = sum(range(depth - 127, depth + 1)) * 4 * N_KV_HEADS * 2 * dim
            rate = n_macs / median(attend, args.seconds) / 1e9
            folding = median(fold, 0.05)
            print(f"head dim {dim:3}, GQA 4, {depth:6}   {rate:12.1f}  {folding * 1e3:10.2f}")
    print("decode, 1 row at depth:        attend GB/s   us a call   fold us")
    for dim in (64, 128):
        for group in (1, 4, 8):
            for depth in (1024, 8192, 32768):
                attend, fold = step(depth, 1, dim, group, args.family)
                seconds, folding = median(attend, args.seconds), median(fold, 0.05)
                rate = depth * N_KV_HEADS * dim * 4 / seconds / 1e9
                print(
                    f"head dim {dim:3}, GQA {group}, {depth:6}   {rate:10.1f}"
                    f"  {seconds * 1e6:10.1f} {folding * 1e6:8.1f}"
                )
    print("head dim 64, GQA 4, depth and window:   128 rows us    1 row us")
    for depth in (1024, 8192):
        for window in (0, 128, 512, 4096):
            calls = [step(depth, n, 64, 4, args.family, window)[0] for n in (128, 1)]
            many, one = (median(call, args.seconds) * 1e6 for call in calls)
            print(f"{depth:28} {window:8} {many:13.0f} {one:11.1f}")
    print("GQA 4, 8192 deep, K and V of types, in turns:   128 rows us    1 row us   of f16")
    for dim in (64, 128):
        took = np.array([in_turns(dim, n, args.family, args.seconds) for n in (128, 1)])
        for types, (many, one), ratios in zip(TYPES, took.T, took.T / took[:, 0], strict=True):
            print(
                f"head dim {dim:3}, {types[0]:>10} {types[1]:>6} {many:27.0f} {one:11.1f}"
                f" {ratios[0]:5.2f} {ratios[1]:5.2f}"
            )


def in_turns(dim: int, n_rows: int, family: str | None, seconds: float) -> list[float]:
    """Least microseconds of a call for each of TYPES."""
    calls = [step(8192, n_rows, dim, 4, family, 0, types)[0] for types in TYPES]
    least = [float("inf")] * len(calls)
    end = time.perf_counter() + 4 * seconds
    while time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = time.thread_time()
            call()
            least[i] = min(least[i], 1e6 * (time.thread_time() - start))
    return least


if __name__ == "__main__":
    main()
