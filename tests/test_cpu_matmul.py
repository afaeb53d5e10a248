"""Packing, matmul and embedding kernels against NumPy, for every type and instruction family."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

import numpy as np
import pytest

from edgeinfer import quant
from edgeinfer.dequantize import dequantize
from edgeinfer.kernels.cpu import layout
from edgeinfer.kernels.cpu.formats import FORMATS, packed_bytes
from tests import native

FAMILIES = (None, "avx2", "generic")
TYPES = tuple(FORMATS)
KINDS = ("pack", "embed", "matmul")
QUANT_TYPES = {t.name.lower(): t for t in quant.RUNNABLE}


# -- data ----------------------------------------------------------------------------------------


def random_rows(type_name: str, n_rows: int, n_cols: int, seed: int = 0) -> np.ndarray:
    """File bytes of random rows: any bits, but half floats of a sane size."""
    rng = np.random.default_rng(seed)
    form = FORMATS[type_name]
    if type_name in ("f16", "bf16", "f32"):
        values = rng.standard_normal((n_rows, n_cols), np.float32)
        if type_name == "f16":
            return values.astype(np.float16).view(np.uint8)
        if type_name == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.view(np.uint8)
    blocks = rng.integers(0, 256, (n_rows, n_cols // form.block, form.file_bytes), np.uint8)
    halves = rng.uniform(-0.02, 0.02, (*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
    for i, at in enumerate(HALVES[type_name]):
        blocks[..., at : at + 2] = halves[..., 2 * i : 2 * i + 2]
    if type_name == "mxfp4":
        blocks[..., 0] = rng.integers(115, 122, blocks.shape[:2])
        blocks[0, 0, 0] = 0  # denormal
    return blocks.reshape(n_rows, -1)


# Where a block of the file has its half floats.
HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,),
    "iq4_xs": (0,), "mxfp4": (),
}  # fmt: skip


def tiles(n_tokens: int) -> list[tuple[int, int]]:
    """First token and size of every tile."""
    size = layout.MAX_TILE
    return [(t, min(size, n_tokens - t)) for t in range(0, n_tokens, size)]


def activations(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The activation bytes of `layout.py`, and the quants and scales in them."""
    if kind == "f32":
        return x.view(np.uint8), x, np.ones((len(x), 1), np.float32)
    xb = x.reshape(len(x), -1, 32)
    m = np.abs(xb).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(m == 0, 0, np.rint(xb * (np.float32(127) / m))).astype(np.int8)
    d = (m / np.float32(127))[..., 0]
    return lay_out(q, d), q, d


def lay_out(q: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Quants (T, blocks, 32) and scales (T, blocks) as bytes, tile by tile."""
    rows = np.zeros((*q.shape[:2], layout.A32_BYTES), np.uint8)
    sums = q.reshape(*q.shape[:2], 2, 16).sum(-1, dtype=np.int16)
    dsum = d * sums.sum(-1).astype(np.float32)
    rows[..., :32] = q.view(np.uint8)
    rows[..., layout.A32_D : layout.A32_D + 4] = d[..., None].view(np.uint8)
    rows[..., layout.A32_DSUM : layout.A32_DSUM + 4] = dsum[..., None].view(np.uint8)
    rows[..., layout.A32_SUMS :] = sums.view(np.uint8)
    return np.concatenate([rows[t : t + n].swapaxes(0, 1).reshape(-1) for t, n in tiles(len(q))])


# -- the law of kernels/reference/, in NumPy -----------------------------------------------------


def fma(a, b, c):
    """Rounded twice where the exact sum is not a double: within 1e-6 of the real one."""
    wide = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return wide.astype(np.float32)


def with_halves(type_name: str, data: np.ndarray, *values: float) -> np.ndarray:
    """A copy of blocks with these half floats."""
    copy = data.copy()
    for at, value in zip(HALVES[type_name], values, strict=False):
        copy[..., at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    if type_name == "mxfp4":
        copy[..., 0] = 128  # its scale of 1
    return copy


def integers(type_name: str, data: np.ndarray, n_cols: int) -> dict[str, np.ndarray]:
    """Integers and scales of rows, in blocks of 32 columns: every array (N, K / 32, ...)."""
    form = FORMATS[type_name]
    b = data.reshape(len(data), -1, form.file_bytes)

    def values(*halves: float) -> np.ndarray:
        """The oracle's dequantisation of blocks with unit scales gives their integers."""
        plain = with_halves(type_name, b, *halves)
        w = dequantize(plain, QUANT_TYPES[type_name], (len(data), n_cols))
        return w.astype(np.int64).reshape(len(data), -1, 32)

    if type_name == "mxfp4":
        d = np.ldexp(np.float32(1), b[..., 0].astype(np.int32) - 128)
        return {"w": values(), "d": d.astype(np.float32)}
    d, *m = (
        np.repeat(b[..., at : at + 2].copy().view(np.float16)[..., 0], form.block // 32, axis=1)
        for at in HALVES[type_name]
    )
    out = {"w": values(1, 0), "d": d.astype(np.float32)}
    if m:
        out |= {"low": values(0, 1), "m": m[0].astype(np.float32)}
    if type_name in ("q4_k", "q5_k"):
        packed = b[..., 4:16].astype(np.int64)
        top = packed[..., 0:4] >> 6 << 4
        scales = np.concatenate([packed[..., 0:4] & 63, packed[..., 8:12] & 15 | top], -1)
        out["scale"] = scales.reshape(len(data), -1)
    if type_name == "iq4_xs":
        packed = b[..., 2:8].astype(np.int64)
        high = packed[..., 0:2, None] >> np.arange(0, 8, 2) & 3
        low = packed[..., 2:6, None] >> np.arange(0, 8, 4) & 15
        out["scale"] = (high.reshape(len(data), -1) << 4 | low.reshape(len(data), -1)) - 32
    return out


def expected(type_name: str, data: np.ndarray, n_cols: int, q, d) -> np.ndarray:
    """(T, N) by the law; q, d as `activations` gives them."""
    if FORMATS[type_name].activation == "f32":
        w = dequantize(data.copy(), QUANT_TYPES[type_name], (len(data), n_cols))
        acc = [np.zeros((len(q), len(w)), np.float32) for _ in range(4)]
        for k in range(n_cols):
            acc[k % 4] = fma(q[:, None, k], w[None, :, k], acc[k % 4])
        return (acc[0] + acc[1]) + (acc[2] + acc[3])
    f = integers(type_name, data, n_cols)
    acc = np.zeros((len(q), len(data)), np.float32)
    for i in range(q.shape[1]):
        x, w, dw, dx = q[:, i].astype(np.int64), f["w"][:, i], f["d"][None, :, i], d[:, i, None]
        if "scale" in f:
            scale = f["scale"][:, i]
            w, dw = w // np.where(scale == 0, 1, scale)[:, None], dw * scale.astype(np.float32)
        acc = fma(dw * dx, (x @ w.T).astype(np.float32), acc)
        if type_name == "q2_k":
            acc = fma(f["m"][None, :, i] * dx, (x @ f["low"][:, i].T).astype(np.float32), acc)
        elif "low" in f:
            low = f["m"][:, i] * f["low"][:, i, 0].astype(np.float32)
            acc = fma(low, dx * x.sum(-1, keepdims=True).astype(np.float32), acc)
    return acc


# -- running the kernels -------------------------------------------------------------------------


def guarded(data: np.ndarray, before: int = 0) -> np.ndarray:
    """A copy that ends where a page begins that may not be read."""
    page = mmap.PAGESIZE
    size = -(-max(1, data.nbytes) // page) * page
    area = mmap.mmap(-1, size + page)
    base = np.frombuffer(area, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(base.ctypes.data + size), page, mmap.PROT_READ * 0) == 0
    copy = base[size - data.nbytes : size]
    copy[:] = data.reshape(-1).view(np.uint8)
    return copy


def pack(type_name: str, data: np.ndarray, n_cols: int, family: str | None) -> np.ndarray:
    form, src = FORMATS[type_name], guarded(data)
    dst = native.huge(packed_bytes(type_name, len(data), n_cols))
    dst[:] = 0xA5
    args = [src.ctypes.data, dst.ctypes.data, len(data), n_cols // form.block, 2]
    native.run(f"pack.{type_name}", native.header(), args, range(-(-len(data) // 16)), family)
    return dst


def matmul(
    type_name: str,
    packed: np.ndarray,
    n_rows: int,
    n_cols: int,
    x_bytes: np.ndarray,
    n_tokens: int,
    family: str | None = None,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    wanted: bool = False,
) -> np.ndarray:
    form, n_groups = FORMATS[type_name], -(-n_rows // 8)
    packed, x_bytes = guarded(packed), guarded(x_bytes)
    out = np.full((n_tokens, n_groups * 8), np.nan, np.float32)
    bounds = [*range(0, n_groups, layout.PANEL_GROUPS), n_groups]
    scratch = native.huge(layout.MATMUL_SCRATCH_BYTES)
    row_bytes = 4 * n_cols if form.activation == "f32" else n_cols // 32 * layout.A32_BYTES
    args = [
        packed.ctypes.data, n_cols // form.block, x_bytes.ctypes.data, out.ctypes.data,
        out.strides[0], 0 if bias is None else bias.ctypes.data,
        0 if residual is None else residual.ctypes.data, int(wanted), row_bytes,
        scratch.ctypes.data, *bounds,
    ]  # fmt: skip
    rows = dict(H_ROWS=99, H_WANTED_ROWS=n_tokens) if wanted else dict(H_ROWS=n_tokens)
    chunks = range(len(bounds) - 1)
    native.run(f"matmul.{type_name}", native.header(**rows), args, chunks, family)
    return out[:, :n_rows]


def shapes(type_name: str) -> list[tuple[int, int]]:
    """Rows that are not whole groups; columns of an odd number of blocks."""
    block = FORMATS[type_name].block
    return [(8, block), (13, 3 * block), (37, 512 if block < 256 else 768)]


@cache
def case(type_name: str, shape: tuple[int, int], n_tokens: int):
    data = random_rows(type_name, *shape)
    x = np.random.default_rng(1).standard_normal((n_tokens, shape[1]), np.float32)
    x[n_tokens // 2, : shape[1] // 2] = 0
    return data, x


# -- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """All kernels of this file, built side by side."""
    for family in FAMILIES:
        native.library(family).load(f"{kind}.{t}" for t in TYPES for kind in KINDS)


@pytest.mark.parametrize("type_name", TYPES)
def test_packed_size_is_close_to_the_file(type_name: str) -> None:
    form = FORMATS[type_name]
    assert form.packed_bytes <= 1.03 * 8 * form.file_bytes
    assert form.file_bytes == QUANT_TYPES[type_name].row_bytes(form.block)
    assert packed_bytes(type_name, 9, 2 * form.block) == 4 * form.packed_bytes
    if form.activation == "f32":
        assert packed_bytes(type_name, 8, form.block + 1) == 2 * form.packed_bytes
    else:
        with pytest.raises(ValueError, match="whole"):
            packed_bytes(type_name, 8, form.block + 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type_name", TYPES)
def test_embedding_rows_are_the_dequantised_ones(type_name: str, family: str | None) -> None:
    n_cols = 2 * max(FORMATS[type_name].block, 8)
    data = random_rows(type_name, 21, n_cols)
    packed = guarded(pack(type_name, data, n_cols, family))
    ids = np.array([0, 20, 7, 8, 13], np.int32)
    out = np.full((len(ids), n_cols + 3), np.nan, np.float32)
    args = [
        packed.ctypes.data, n_cols // FORMATS[type_name].block, out.ctypes.data, out.strides[0],
        n_cols,
    ]  # fmt: skip
    h = native.header(H_ROWS=len(ids), H_IDS=ids.ctypes.data)
    native.run(f"embed.{type_name}", h, args, range(len(ids)), family)
    oracle = dequantize(data, QUANT_TYPES[type_name], data.shape[:1] + (n_cols,))
    np.testing.assert_array_equal(out[:, :n_cols].view(np.int32), oracle[ids].view(np.int32))
    assert np.isnan(out[:, n_cols:]).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_every_family_packs_the_same(type_name: str) -> None:
    n_cols = 3 * FORMATS[type_name].block
    data = random_rows(type_name, 19, n_cols)
    first, *others = (pack(type_name, data, n_cols, family) for family in FAMILIES)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("type_name", TYPES)
def test_matmul_is_the_law(type_name: str) -> None:
    """One token or many, whatever the family: the same bits, and those of `expected`."""
    kind, n = FORMATS[type_name].activation, layout.MAX_TILE + 3
    for shape in shapes(type_name):
        data, x = case(type_name, shape, n)
        packed = pack(type_name, data, shape[1], None)
        x_bytes, q, d = activations(x, kind)
        law = expected(type_name, data, shape[1], q, d)
        whole = matmul(type_name, packed, *shape, x_bytes, n)
        scale = np.abs(law).max()
        np.testing.assert_allclose(whole, law, rtol=1e-6, atol=1e-6 * scale)
        assert np.mean(whole == law) > 0.97
        for family in FAMILIES:
            for n_tokens in (1, 2, 3, 4, 5, 8, 13, n):
                some = activations(x[:n_tokens], kind)[0]
                out = matmul(type_name, packed, *shape, some, n_tokens, family)
                np.testing.assert_array_equal(out.view(np.int32), whole[:n_tokens].view(np.int32))
        for t in range(0, n, 7):
            alone = activations(x[t : t + 1], kind)[0]
            out = matmul(type_name, packed, *shape, alone, 1)
            np.testing.assert_array_equal(out[0].view(np.int32), whole[t].view(np.int32))


@pytest.mark.parametrize("type_name", [t for t in TYPES if FORMATS[t].activation != "f32"])
@pytest.mark.parametrize("byte", [0xFF, 0x7F, 0x80, 0x00])
def test_largest_quants_do_not_overflow(type_name: str, byte: int) -> None:
    """All bits set in quants, scales and mins, and activations of 127 and -127."""
    form, n_cols = FORMATS[type_name], 256
    data = np.full((8, n_cols // form.block, form.file_bytes), byte, np.uint8)
    data = with_halves(type_name, data, 0.5, 0.5).reshape(8, -1)
    q = np.full((3, n_cols // 32, 32), 127, np.int8)
    q[1] = -127
    q[2, :, ::2] = -127
    d = np.full(q.shape[:2], 0.25, np.float32)
    law = expected(type_name, data, n_cols, q, d)
    x_bytes = lay_out(q, d)
    for family in FAMILIES:
        packed = pack(type_name, data, n_cols, family)
        out = matmul(type_name, packed, 8, n_cols, x_bytes, 3, family)
        np.testing.assert_allclose(out, law, rtol=1e-6)


@pytest.mark.parametrize("type_name", ["q4_0", "q6_k", "f16"])
def test_bias_then_residual_and_wanted_rows(type_name: str) -> None:
    n_rows, n_cols, n_tokens = 21, 512, 7
    rng = np.random.default_rng(2)
    data, x = case(type_name, (n_rows, n_cols), n_tokens)
    packed = pack(type_name, data, n_cols, None)
    x_bytes = activations(x, FORMATS[type_name].activation)[0]
    plain = matmul(type_name, packed, n_rows, n_cols, x_bytes, n_tokens)
    bias = rng.standard_normal(24, np.float32)
    residual = rng.standard_normal((n_tokens, 24), np.float32)
    out = matmul(
        type_name, packed, n_rows, n_cols, x_bytes, n_tokens, None, bias, residual, wanted=True
    )
    np.testing.assert_array_equal(out, residual[:, :n_rows] + (plain + bias[:n_rows]))


@pytest.mark.parametrize("type_name", TYPES)
def test_missing_rows_of_the_last_group_give_zero(type_name: str) -> None:
    n_cols = 2 * FORMATS[type_name].block
    data, x = case(type_name, (9, n_cols), 3)
    packed = pack(type_name, data, n_cols, None)
    x_bytes = activations(x, FORMATS[type_name].activation)[0]
    out = matmul(type_name, packed, 16, n_cols, x_bytes, 3)
    assert (out[:, 9:] == 0).all()
