"""CUDA kernels of weights and matrix products, on the shim, bit for bit against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer import quant
from edgeinfer.dequantize import dequantize
from edgeinfer.kernels.cuda import tiles
from edgeinfer.kernels.cuda.kernel import Kernel, Sources
from edgeinfer.kernels.cuda.shim import ShimDevice
from edgeinfer.kernels.reference.blocks import quantise
from edgeinfer.kernels.reference.experts import multiply_chosen
from edgeinfer.kernels.reference.functions import silu
from edgeinfer.kernels.reference.quantised import Quantised
from edgeinfer.ops import ExpertLinear, Value
from edgeinfer.quant import QuantType, Weight
from tests.shim import SEEDS, get, put, put_step, shim

Floats = NDArray[np.float32]
BLOCK_TYPES = [kind for kind in quant.RUNNABLE if kind.block > 1]
FLOAT_TYPES = [kind for kind in quant.RUNNABLE if kind.block == 1]
REFERENCE = Quantised()
GUARD = 64  # floats behind an output, which nobody may write


@pytest.fixture(scope="module")
def device() -> Iterator[ShimDevice]:
    device = shim()
    yield device
    device.close()


# -- data ----------------------------------------------------------------------------------------

# Where a block of the file has its half floats.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


@cache
def weight(kind: QuantType, *shape: int) -> Weight:
    """Any bits, but halves of a sane size."""
    rng = np.random.default_rng(shape)
    if kind.block == 1:
        values = rng.standard_normal(shape, np.float32)
        data = {
            "F32": values,
            "F16": values.astype(np.float16),
            "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        }[kind.name]
        return Weight("w", shape, kind, memoryview(data.tobytes()))
    n_blocks = int(np.prod(shape)) // kind.block
    blocks = rng.integers(0, 256, (n_blocks, kind.block_bytes), np.uint8)
    for at in HALVES[kind.name]:
        halves = rng.uniform(-0.02, 0.02, (n_blocks, 1)).astype("<f2")
        blocks[:, at : at + 2] = halves.view(np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = rng.integers(115, 122, n_blocks)
        blocks[0, 0] = 0  # denormal
    return Weight("w", shape, kind, memoryview(blocks.tobytes()))


def rows_of(n_rows: int, dim: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, dim), np.float32)
    return x * rng.uniform(0.1, 3, (n_rows, 1)).astype(np.float32)


def strange_rows(dim: int) -> Floats:
    """Zeros, numbers too small and very large, and what is no number."""
    x = rows_of(8, dim)
    x[0] = 0
    x[1, : dim // 2] = 1e-37
    x[2] *= np.float32(1e30)
    x[3, dim // 3] = np.nan
    x[4, dim // 2] = np.inf
    x[5, dim - 1] = -np.inf
    x[6, 0], x[6, 1] = np.inf, np.nan
    x[7] = -0.0
    return x


# -- the device ----------------------------------------------------------------------------------


def padded(x: NDArray[Any]) -> NDArray[Any]:
    """Rows at the stride of the device; what lies between them is no number."""
    out = np.full((len(x), tiles.row_stride(x.shape[1])), np.nan, x.dtype)
    out[:, : x.shape[1]] = x
    return out


def launch(device: ShimDevice, kernel: Kernel, grid: tuple[int, int, int], **args: Any) -> None:
    device.load([kernel])
    defines = dict(kernel.defines)
    threads = {"repack": 256, "quantise": 256, "embed": 32}.get(
        kernel.name, 32 * int(defines.get("WARPS", 1))
    )
    device.launch(kernel, grid, threads, 0, args)


def put_weight(device: ShimDevice, w: Weight, pieces: int = 1) -> int:
    """The address of a matrix or a stack in tiles."""
    *stack, n, k = w.shape
    size = tiles.matrix_bytes(w.type, n, k)
    address = device.reserve(size * (stack[0] if stack else 1))
    for i in range(stack[0] if stack else 1):
        matrix = w.matrix(i) if stack else w
        step = 32 * up(n, 32 * pieces)
        for first in range(0, n, step):
            last = min(n, first + step)
            raw = put(device, np.frombuffer(matrix.rows(first, last).data, np.uint8))
            grid = (up(last - first, 32), up(k * (2 if w.type is quant.F32 else 1), 256), 1)
            launch(
                device, Kernel.of("repack", TYPE=w.type.name), grid,
                step=0, raw=raw, w=address + i * size, n=n, k=k, first=first, n_there=last - first,
            )  # fmt: skip
            device.free(raw)
    return address


def up(n: int, size: int) -> int:
    return -(-n // size)


def same(got: NDArray[Any], want: Floats) -> None:
    """Bit for bit, but for the payload of NaN; in front of the guard, which is as it was."""
    flat, guard = got[:-GUARD], got[-GUARD:]
    assert (guard.view(np.uint32) == 0xFFFFFFFF).all(), "written past the end"
    rows = flat.reshape(len(want), -1)[:, : want.shape[1]]
    is_nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(rows), is_nan)
    np.testing.assert_array_equal(
        np.where(is_nan, 0, rows.view(np.uint32)), np.where(is_nan, 0, want.view(np.uint32))
    )


class Out(NamedTuple):
    """Memory for rows of floats."""

    device: ShimDevice
    address: int
    n_rows: int
    dim: int

    @classmethod
    def of(cls, device: ShimDevice, n_rows: int, dim: int) -> Out:
        n = n_rows * tiles.row_stride(dim) + GUARD
        return cls(device, device.reserve(4 * n), n_rows, dim)

    def check(self, want: Floats) -> None:
        n = self.n_rows * tiles.row_stride(self.dim) + GUARD
        with np.errstate(all="ignore"):
            same(get(self.device, self.address, n, np.float32), want)
        self.device.free(self.address)


# -- weights -------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", quant.RUNNABLE, ids=lambda kind: kind.name)


def shapes(kind: QuantType) -> list[tuple[int, int]]:
    """Odd ones that a type can have."""
    n_cols = {1: (1, 33, 100, 512), 32: (32, 96, 288, 512), 256: (256, 256, 768, 512)}[kind.block]
    return list(zip((1, 31, 33, 100), n_cols, strict=True))


@KINDS
def test_rows_of_tiles_are_rows_of_the_file(device: ShimDevice, kind: QuantType) -> None:
    """Whole matrices and, in pieces, larger ones: repacked, then read row by row."""
    for n, k in shapes(kind):
        w = weight(kind, n, k)
        ids = np.random.default_rng(n).permutation(n).astype(np.int32)
        out = Out.of(device, n, k)
        tiles_at = put_weight(device, w, pieces=2)
        launch(
            device, Kernel.of("embed", TYPE=kind.name), (up(k, 256), n, 1),
            step=put_step(device, n), ids=put(device, ids), w=tiles_at, y=out.address, n=n, k=k,
        )  # fmt: skip
        out.check(dequantize(w)[ids])


def test_tiles_are_as_large_as_the_file() -> None:
    sizes = {kind.name: tiles.matrix_bytes(kind, 64, 512) for kind in quant.RUNNABLE}
    file = {kind.name: 64 * kind.row_bytes(512) for kind in quant.RUNNABLE}
    # 14 bytes of scales and d are 16 here.
    assert sizes == file | {"Q3_K": 64 * 2 * 112}
    with pytest.raises(ValueError, match="100 elements are not whole Q4_0 blocks"):
        tiles.matrix_bytes(quant.Q4_0, 32, 100)
    with pytest.raises(ValueError, match="100 values can't be quantised"):
        tiles.x8_bytes(100)


# -- activations ---------------------------------------------------------------------------------


def x8(x: Floats) -> NDArray[np.uint8]:
    """Rows as X8: what kernels multiply. Behind the last column are zeros."""
    n_rows, k = x.shape
    with np.errstate(all="ignore"):
        q, d = quantise(np.pad(x, ((0, 0), (0, -k % 256))))
        q = np.where(np.isfinite(d)[..., None], q, 0)
        sums = q.reshape(n_rows, -1, 2, 16).sum(3)
        factors = np.stack([d, d * sums.sum(2).astype(np.float32)], 2)
    factors[np.isnan(factors)] = np.nan
    parts = (q.astype(np.int8), factors, sums.astype(np.int16), np.zeros((n_rows, 32), np.int8))
    return np.concatenate([part.reshape(n_rows, -1).view(np.uint8) for part in parts], 1)


def get_x8(device: ShimDevice, address: int, n_rows: int, k: int) -> NDArray[np.uint8]:
    """Rows of X8 on the device, with one NaN for all."""
    rows = get(device, address, (n_rows, tiles.x8_bytes(k)), np.uint8)
    columns = k + -k % 256
    factors = rows[:, columns : columns + columns // 4].view(np.float32)
    factors[np.isnan(factors)] = np.nan
    return rows


def put_x8(device: ShimDevice, x: Floats) -> int:
    """Rows that the kernel has quantised."""
    n_rows, k = x.shape
    address = device.reserve(n_rows * tiles.x8_bytes(k))
    device.fill(address, n_rows * tiles.x8_bytes(k))
    launch(
        device, Kernel.of("quantise"), (up(k, 256), n_rows, 1), step=put_step(device, n_rows),
        rows=0, x=put(device, padded(x)), x8=address, k=k,
    )  # fmt: skip
    return address


@pytest.mark.parametrize("k", (32, 96, 288, 512))
def test_quantise(device: ShimDevice, k: int) -> None:
    for seed, x in ((0, rows_of(3, k)), (1, strange_rows(k)), (7, strange_rows(k))):
        device.seed = seed
        got = get_x8(device, put_x8(device, x), len(x), k)
        np.testing.assert_array_equal(got, x8(x))


@pytest.mark.parametrize("warps", (1, 8))
@pytest.mark.parametrize(("n_parts", "width"), ((1, 1), (1, 100), (1, 288), (3, 40), (2, 64)))
def test_norm(device: ShimDevice, warps: int, n_parts: int, width: int) -> None:
    """Of whole rows and of heads, of all rows and of those that are wanted, and in its place."""
    wanted = np.array([6, 0, 3, 3, 5, 7, 2, 1], np.int32)
    x = strange_rows(n_parts * width) if n_parts * width > 3 else rows_of(8, width)
    weights = rows_of(1, width)[0]
    for seed, weight, gather in ((0, weights, None), (1, None, wanted), (7, weights, wanted)):
        device.seed = seed
        with np.errstate(all="ignore"):
            want = REFERENCE.rms_norm(x.reshape(-1, width), weight, 1e-5).reshape(x.shape)
        n_rows, rows, y = len(x), 0, Out.of(device, *x.shape)
        x_at = put(device, padded(x))
        if gather is not None:
            n_rows, rows = 6, 1
            y = Out.of(device, n_rows, n_parts * width)
            want = want[wanted[:n_rows]]
        quantised = 0
        if n_parts == 1 and width % 32 == 0:
            quantised = device.reserve(n_rows * tiles.x8_bytes(width))
            device.fill(quantised, n_rows * tiles.x8_bytes(width))
        launch(
            device, Kernel.of("rms_norm", WARPS=warps), (n_parts, len(x), 1),
            step=put_step(device, len(x), n_rows), rows=rows, x=x_at, y=y.address, x8=quantised,
            gather=0 if gather is None else put(device, gather), width=width, eps=1e-5,
            weight=0 if weight is None else put(device, weight),
        )  # fmt: skip
        y.check(want)
        if quantised:
            got = get_x8(device, quantised, n_rows, width)
            np.testing.assert_array_equal(got, x8(want))


# -- products ------------------------------------------------------------------------------------


class Product:
    """x times a matrix: on the device, and what the reference says of it."""

    def __init__(self, device: ShimDevice, w: Weight, x: Floats) -> None:
        self.device, self.w, self.n_rows = device, w, len(x)
        n, k = w.shape
        self.residual, bias = rows_of(len(x), n, 2), rows_of(1, n, 1)
        with np.errstate(all="ignore"):
            self.plain = REFERENCE.matmul(x, REFERENCE.load(w))
            self.summed = self.residual + (self.plain + bias)
        self.at = {
            "x": put(device, padded(x)) if w.type.block == 1 else put_x8(device, x),
            "w": put_weight(device, w),
            "bias": put(device, bias),
        }

    def run(
        self, kernel: Kernel, n_rows: int, is_summed: bool = False, seed: int = 0, n_made: int = 0
    ) -> Out:
        """The first rows; `is_summed`: with the bias, added to what is there.

        Of each row the first `n_made` values at least, 0: all.
        """
        n, k = self.w.shape
        defines = {macro: int(v) for macro, v in kernel.defines if macro != "TYPE"}
        size = defines.get("TOKENS", defines.get("ROWS"))
        tile = 32
        if kernel.name == "matmul_mma":
            tile = tiles.mma_rows(defines["TOKENS"], defines["WARPS"])
        grid = up(n_made or n, tile), up(n_rows + 3, size), 1
        y = Out.of(self.device, n_rows, n)
        if is_summed:
            self.device.write(y.address, padded(self.residual[:n_rows]))
        self.device.seed = seed
        launch(
            self.device, kernel, grid, y=y.address, n=n, k=k,
            step=put_step(self.device, n_rows), rows=0, x=self.at["x"], w=self.at["w"],
            bias=self.at["bias"] * is_summed, residual=y.address * is_summed,
        )  # fmt: skip
        return y

    def check(self, kernel: Kernel, n_rows: int, is_summed: bool = False, seed: int = 0) -> None:
        want = self.summed if is_summed else self.plain
        self.run(kernel, n_rows, is_summed, seed).check(want[:n_rows])


def products(device: ShimDevice, kind: QuantType, n_rows: int = 8) -> Iterator[Product]:
    for i, shape in enumerate(shapes(kind)):
        x = rows_of(n_rows, shape[1], i)
        if i % 2:
            x[:8] = strange_rows(shape[1])
        yield Product(device, weight(kind, *shape), x)


def matmul(kind: QuantType, warps: int, rows: int) -> Kernel:
    assert warps <= tiles.most_warps(kind, rows)
    return Kernel.of("matmul", TYPE=kind.name, WARPS=warps, ROWS=rows)


def matmul_mma(kind: QuantType, tokens: int) -> Kernel:
    warps = 4 if tokens > 16 else 2
    return Kernel.of("matmul_mma", TYPE=kind.name, TOKENS=tokens, WARPS=warps)


SOME_TYPES = (quant.Q4_0, quant.Q2_K, quant.Q4_K, quant.Q6_K)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_matmul(device: ShimDevice, kind: QuantType) -> None:
    """Row by row or several at once, any number of warps, alone and added to what is there."""
    most = tiles.most_warps(kind, 4)
    kernels = [matmul(kind, 1, 1), matmul(kind, 4, 1), matmul(kind, most, 4)]
    if kind in SOME_TYPES:
        kernels += [matmul(kind, tiles.most_warps(kind, 1), 1), matmul(kind, 2, 1)]
        kernels += [matmul(kind, 1, 2)]
    device.load(kernels)
    for j, product in enumerate(products(device, kind)):
        for i, kernel in enumerate(kernels):
            product.check(kernel, 8 - i, bool(i % 2), seed=SEEDS[(i + j) % 3])


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_matmul_by_tensor_cores(device: ShimDevice, kind: QuantType) -> None:
    """Of fewer rows and of more than a block of threads takes."""
    kernels = [matmul_mma(kind, 8)]
    if kind in SOME_TYPES:
        kernels += [matmul_mma(kind, 64), matmul_mma(kind, 16)]
    device.load(kernels)
    for j, product in enumerate(products(device, kind, 66)):
        for i, kernel in enumerate(kernels):
            product.check(kernel, (9, 66, 15)[i], bool(i % 2), seed=SEEDS[(i + j) % 3])


@pytest.mark.parametrize("kind", FLOAT_TYPES, ids=lambda kind: kind.name)
def test_matmul_of_floats(device: ShimDevice, kind: QuantType) -> None:
    kernels = [Kernel.of("matmul_float", TYPE=kind.name, WARPS=4, ROWS=rows) for rows in (1, 4)]
    device.load(kernels)
    for j, product in enumerate(products(device, kind)):
        for i, kernel in enumerate(kernels):
            product.check(kernel, 8 - i, bool(i), seed=SEEDS[(i + j) % 3])


@pytest.mark.parametrize("n_made", [1, 32, 64, 65, 100])
def test_fewer_blocks_make_the_first_values_of_each_row(device: ShimDevice, n_made: int) -> None:
    """With the bits of all, and nothing behind what their blocks of threads take."""
    plain = Kernel.of("matmul_float", TYPE="F16", WARPS=4, ROWS=4)
    kernels = [matmul(quant.Q4_K, 4, 1), matmul(quant.Q4_K, 2, 2), matmul_mma(quant.Q4_K, 8), plain]
    device.load(kernels)
    for kernel in kernels:
        kind = quant.F16 if kernel is plain else quant.Q4_K
        product = Product(device, weight(kind, 200, 512), rows_of(3, 512))
        out, n_there = product.run(kernel, 3, n_made=n_made), 32 * up(n_made, 32)
        rows = get(device, out.address, 3 * tiles.row_stride(200), np.float32).reshape(3, -1)
        np.testing.assert_array_equal(rows[:, :n_there], product.plain[:, :n_there])
        assert np.isnan(rows[:, n_there:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", quant.RUNNABLE, ids=lambda kind: kind.name)
def test_every_variant_that_is_compiled_ahead(device: ShimDevice, kind: QuantType) -> None:
    names = ("matmul_float",) if kind.block == 1 else ("matmul", "matmul_mma")
    kernels = [each for name in names for each in Sources().variants(name)]
    kernels = [each for each in kernels if dict(each.defines)["TYPE"] == kind.name]
    device.load(kernels)
    for shape in (*shapes(kind), (1, 512), (65, 2304), (300, 1024)):
        product = Product(device, weight(kind, *shape), rows_of(130, shape[1]))
        for kernel in kernels:
            most = 130 if kernel.name == "matmul_mma" else 9
            for n_rows, seed in ((1, 0), (2, 1), (5, 7), (most, 1)):
                product.check(kernel, n_rows, n_rows > 2, seed)


# What goes wrong, and in which kernel, without a line of its text.
PLANTED = {
    "a barrier of rounds": (
        "matmul.cuh", "                __syncthreads();\n", matmul(quant.Q4_K, 4, 1),
    ),
    "a barrier of stages": ("mma.cuh", "        __syncthreads();\n", matmul_mma(quant.Q4_K, 8)),
    "a wait for copies": (
        "mma.cuh", "        ei_copy_wait<M::N_STAGES - 2>();\n", matmul_mma(quant.Q4_K, 8),
    ),
    "a barrier of scales": ("mma.cuh", "            __syncwarp();\n", matmul_mma(quant.Q4_K, 64)),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_missing_is_found(tmp_path: Path, what: str) -> None:
    file, line, kernel = PLANTED[what]
    text = (Path(tiles.__file__).parent / file).read_text("utf-8")
    assert line in text
    (tmp_path / file).write_text(text.replace(line, ""), "utf-8")
    device = shim(tmp_path / "compiled", sources=[tmp_path])
    product = Product(device, weight(quant.Q4_K, 100, 2048), rows_of(9, 2048))
    for seed in (1, 7):
        with pytest.raises(AssertionError):
            product.check(kernel, 9, seed=seed)
    device.close()


# -- products of normed rows -----------------------------------------------------------------------


def normed(x: Floats, weight: Floats | None) -> Floats:
    with np.errstate(all="ignore"):
        return REFERENCE.rms_norm(x, weight, 1e-5)


class Step(NamedTuple):
    """How products of normed rows are tried."""

    seed: int
    sizes: tuple[int, int, int]
    is_normed: bool = True
    has_weight: bool = True
    is_gathered: bool = False
    has_residual: bool = False


@pytest.mark.parametrize(
    ("kind", "last", "rows"),
    [(quant.Q4_0, quant.Q4_0, 4), (quant.Q4_K, quant.Q6_K, 1), (quant.Q8_0, quant.Q8_0, 1)],
    ids=lambda each: getattr(each, "name", each),
)
def test_products_of_normed_rows(
    device: ShimDevice, kind: QuantType, last: QuantType, rows: int
) -> None:
    """Three matrices side by side, or one alone; of all rows, or of those that are wanted."""
    k = 288 if kind.block == 32 else 512
    x, norm = strange_rows(k), rows_of(1, k)[0]
    wanted = np.array([3, 7, 0, 0, 6], np.int32)
    kernel = Kernel.of("norm_matmul", TYPE=kind.name, LAST=last.name, WARPS=4, ROWS=rows)
    device.load([kernel])
    for step in (
        Step(0, (100, 33, 65)),
        Step(1, (1, 0, 0), has_weight=False, is_gathered=True),
        Step(7, (64, 40, 0), is_gathered=True),
        Step(1, (70, 0, 0), is_normed=False, has_weight=False, has_residual=True),
    ):
        device.seed = step.seed
        picked = x[wanted] if step.is_gathered else x
        weights = norm if step.has_weight else None
        n_rows, args, checks = len(picked), dict[str, int](), []
        for i, (n, type) in enumerate(zip(step.sizes, (kind, kind, last), strict=True)):
            w, bias = weight(type, max(n, 1), k), rows_of(1, max(n, 1), i)
            y, residual = Out.of(device, n_rows, max(n, 1)), rows_of(n_rows, max(n, 1), 5)
            args |= {f"w_{i}": put_weight(device, w), f"y_{i}": y.address, f"n_{i}": n}
            args |= {f"bias_{i}": put(device, bias) if i else 0}
            with np.errstate(all="ignore"):
                values = normed(picked, weights) if step.is_normed else picked
                want = REFERENCE.matmul(values, REFERENCE.load(w))
                want = want + bias if i else want
                want = residual + want if step.has_residual else want
            if step.has_residual:
                device.write(y.address, padded(residual))
            checks += [(y, want)] * (n > 0)
        blocks = [up(n, 64) for n in step.sizes]
        counts = (99, n_rows) if step.is_gathered else (n_rows, 0)
        device.launch(
            kernel, (sum(blocks), up(n_rows, rows), 1), 128,
            tiles.normed_bytes((kind, last), k, 4, rows),
            args | {
                "step": put_step(device, *counts), "rows": int(step.is_gathered),
                "x": put(device, padded(x)), "gather": put(device, wanted) * step.is_gathered,
                "norm": put(device, norm) * step.has_weight, "eps": 1e-5,
                "is_normed": int(step.is_normed), "residual": args["y_0"] * step.has_residual,
                "blocks_0": blocks[0], "blocks_1": blocks[1], "k": k,
            },
        )  # fmt: skip
        for y, want in checks:
            y.check(want)


@pytest.mark.parametrize("kind", (quant.Q4_0, quant.Q4_K), ids=lambda kind: kind.name)
def test_gate_and_up_of_normed_rows(device: ShimDevice, kind: QuantType) -> None:
    k = 256
    x, norm = strange_rows(k), rows_of(1, k)[0]
    kernel = Kernel.of("norm_swiglu", TYPE=kind.name, WARPS=4, ROWS=1)
    device.load([kernel])
    for seed, n, has_bias in ((0, 96, False), (1, 40, True), (7, 320, True)):
        device.seed = seed
        gate, up_ = (weight(kind, each, k).rows(0, n) for each in (n, n + 1))
        biases = rows_of(2, n, 1) * np.float32(has_bias)
        with np.errstate(all="ignore"):
            rows = normed(x, norm)
            sums = [REFERENCE.matmul(rows, REFERENCE.load(w)) for w in (gate, up_)]
            if has_bias:
                sums = [sum + bias for sum, bias in zip(sums, biases, strict=True)]
            want = silu(sums[0]) * sums[1]
        y, quantised = Out.of(device, len(x), n), 0
        if n % 32 == 0:
            quantised = device.reserve(len(x) * tiles.x8_bytes(n))
            device.fill(quantised, len(x) * tiles.x8_bytes(n))
        device.launch(
            kernel, (up(n, 64), len(x), 1), 128, tiles.normed_bytes([kind], k, 4, 1),
            {
                "step": put_step(device, len(x)), "rows": 0, "gather": 0,
                "x": put(device, padded(x)), "norm": put(device, norm), "eps": 1e-5,
                "gate": put_weight(device, gate), "up": put_weight(device, up_),
                "gate_bias": put(device, biases[0]) * has_bias,
                "up_bias": put(device, biases[1]) * has_bias,
                "y": y.address, "x8": quantised, "n": n, "k": k,
            },
        )  # fmt: skip
        y.check(want)
        if quantised:
            np.testing.assert_array_equal(get_x8(device, quantised, len(x), n), x8(want))


EXPERTS = (quant.Q4_0, quant.Q2_K, quant.Q4_K, quant.Q6_K, quant.MXFP4, quant.F16, quant.F32)


@pytest.mark.parametrize("kind", EXPERTS, ids=lambda kind: kind.name)
def test_experts(device: ShimDevice, kind: QuantType) -> None:
    """Numbers of experts from the route; one value of a row for all of them, or one for each."""
    n_experts, n_used, n_rows = 5, 3, 4
    for n_parts, n, k in ((1, 33, 256), (n_used, 40, 256 if kind.block == 256 else 96)):
        stack = weight(kind, n_experts, n, k)
        scale, bias = weight(quant.F32, n_experts), weight(quant.F32, n_experts, n)
        x = rows_of(n_rows, n_parts * k)
        chosen = np.random.default_rng(n).permuted(
            np.tile(np.arange(n_experts), (n_rows, 1)), axis=1
        )
        weights = np.full((n_rows, n_used), np.nan)
        route = np.concatenate([chosen[:, :n_used], weights], 1).astype(np.float32)
        x_at = put(device, padded(x)) if kind.block == 1 else put_x8(device, x)
        route_at, w_at = put(device, padded(route)), put_weight(device, stack)
        loaded = [REFERENCE.load(stack.matrix(i)) for i in range(n_experts)]
        for seed, s, b in ((0, None, None), (1, scale, bias), (7, None, bias)):
            device.seed = seed
            values = [Value(cast(Any, None), i, dim) for i, dim in enumerate((n, k, 2 * n_used))]
            op = ExpertLinear(0, *values, stack, s, b)
            y = Out.of(device, n_rows, n_used * n)
            launch(
                device, Kernel.of("expert_matmul", TYPE=kind.name, WARPS=4),
                (up(n, 32), n_used, n_rows), step=put_step(device, n_rows), rows=0, route=route_at,
                x=x_at, w=w_at, scale=vector(device, s), bias=vector(device, b), y=y.address,
                n=n, k=k, n_parts=n_parts,
            )  # fmt: skip
            y.check(multiply_chosen(REFERENCE, op, x, route, loaded))


def vector(device: ShimDevice, w: Weight | None) -> int:
    return 0 if w is None else put(device, dequantize(w))
