"""Runs single CUDA kernels for tests, on the shim: arrays go to the device and come back."""

from __future__ import annotations

from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeinfer.graph import KVType
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.shim import ShimDevice
from tests.shim import SEEDS, shim

Floats = NDArray[np.float32]


_shim = cache(shim)
_SEEDS = cycle(SEEDS)


def step(n_rows: int, n_wanted: int = 0, n_sequences: int = 1, abort: int = 0) -> NDArray[np.int32]:
    """The header of a step."""
    return np.array([n_rows, n_wanted, n_sequences, abort], np.int32)


def run(
    kernel: Kernel,
    grid: tuple[int, ...],
    threads: int,
    *,
    shared: int = 0,
    seed: int | None = None,
    device: ShimDevice | None = None,
    **args: Any,
) -> None:
    """Launch a kernel whose arguments are numbers, arrays, or None for a null pointer.

    What the kernel writes is in the arrays afterwards; those that it reads must be as they were.
    Without a seed threads run in another order each time.
    """
    device = device or _shim()
    device.load([kernel])
    addresses: dict[str, int] = {}
    try:
        for name, value in args.items():
            if isinstance(value, np.ndarray):
                addresses[name] = device.reserve(value.nbytes)
                device.write(addresses[name], value)
        values = {name: 0 if value is None else value for name, value in args.items()}
        device.seed = next(_SEEDS) if seed is None else seed
        device.launch(kernel, (*grid, 1, 1)[:3], threads, shared, {**values, **addresses})
        for name, address in addresses.items():
            device.read(address, args[name])
    finally:
        for address in addresses.values():
            device.free(address)


def stride_of(dim: int) -> int:
    """Floats of a row in device memory."""
    return -(-dim // 32) * 32


def rows_in_memory(x: Floats) -> Floats:
    """Rows as they lie in device memory, NaN behind their ends."""
    out = np.full((len(x), stride_of(x.shape[1])), np.nan, np.float32)
    out[:, : x.shape[1]] = x
    return out


def empty_rows(n: int, dim: int) -> Floats:
    return np.full((n, stride_of(dim)), np.nan, np.float32)


def pages_of_blocks(blocks: NDArray[Any], kind: KVType, is_key: bool) -> NDArray[np.uint8]:
    """Blocks (page, kv head, 32 positions, blocks) as they lie in device memory."""
    n_pages, n_heads, n_positions, n_blocks = blocks.shape
    codes, scales = blocks["q"].reshape(n_pages, n_heads, n_positions, -1), blocks["d"]
    if kind == "q4_0":
        codes = (codes + 8).view(np.uint8)
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    units = codes.view(np.uint8).reshape(n_pages, n_heads, n_positions, -1, 16)
    if is_key:
        units, scales = units.swapaxes(2, 3), scales.swapaxes(2, 3)
    parts = (np.ascontiguousarray(each).view(np.uint8) for each in (units, scales))
    return np.concatenate([part.reshape(n_pages, n_heads, -1) for part in parts], axis=2)


def same_bits(got: NDArray[Any], expected: NDArray[Any]) -> None:
    """Every bit alike, but for what is no number: that has many forms."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    where = np.isnan(expected) if expected.dtype.kind == "f" else np.zeros(expected.shape, bool)
    assert np.array_equal(np.isnan(got), where) if expected.dtype.kind == "f" else True
    bits = f"u{got.itemsize}"
    got, expected = (
        np.where(where, 0, np.ascontiguousarray(x).view(bits)) for x in (got, expected)
    )
    np.testing.assert_array_equal(got, expected)
