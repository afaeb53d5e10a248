"""Tensor types against the gguf package bit by bit, and against blocks written by hand.

Knows nothing of kernels.
"""

from __future__ import annotations

import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest

from edgeinfer import quant
from edgeinfer.dequantize import dequantize
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.quant import QUANT_TYPES, RUNNABLE, QuantType, Weight, quant_type

from .bench.blocks import quantize

_BY_NAME = {t.name: t for t in RUNNABLE}
# Root mean square error of unit normal values: what each type's precision allows.
_RMSE = {
    "F32": 0.0, "F16": 0.0003, "BF16": 0.002, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04,
    "Q5_1": 0.04, "Q5_0": 0.045, "Q4_K": 0.08, "Q4_1": 0.08, "Q4_0": 0.09, "Q3_K": 0.2,
    "Q2_K": 0.35, "IQ4_NL": 0.085, "IQ4_XS": 0.085, "MXFP4": 0.125,
}  # fmt: skip


def _half(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}e", *values)


def _block(n_bytes: int, fields: dict[int, bytes]) -> bytes:
    """A block of zeros but for `fields`, by byte offset."""
    block = bytearray(n_bytes)
    for at, value in fields.items():
        block[at : at + len(value)] = value
    return bytes(block)


# The 12 bytes of Q4_K and Q5_K: scale 0 is 63, min 0 is 2, scale 7 is 53 and min 7 is 33.
_SCALES_12 = bytes([63, 0, 0, 0xC0, 2, 0, 0, 0x80, 0, 0, 0, 0x15])

# type -> (block, {element: value}, value of every other element, None where not said)
_BY_HAND: dict[str, tuple[bytes, dict[int, float], float | None]] = {
    "F32": (struct.pack("<f", -1.5), {0: -1.5}, None),
    "F16": (_half(0.1), {0: 0.0999755859375}, None),
    "BF16": (b"\x80\xbf", {0: -1.0}, None),
    "Q4_0": (_half(0.5) + b"\x1f" + b"\x88" * 15, {0: 3.5, 16: -3.5}, 0.0),
    "Q4_1": (_half(0.5, 1.0) + b"\x1f" + bytes(15), {0: 8.5, 16: 1.5}, 1.0),
    "Q5_0": (
        _half(1.0) + bytes([1, 0, 0, 0x80]) + b"\x03" + bytes(15), {0: 3.0, 31: 0.0}, -16.0,
    ),
    "Q5_1": (
        _half(0.5, 2.0) + bytes([1, 0, 0, 0x80]) + b"\x03" + bytes(15), {0: 11.5, 31: 10.0}, 2.0,
    ),
    "Q8_0": (_half(0.25) + struct.pack("<32b", -128, *[4] * 30, 127), {0: -32.0, 31: 31.75}, 1.0),
    "Q2_K": (
        _block(84, {0: b"\x21", 15: b"\x0f", 16: b"\x03", 79: b"\xc0", 80: _half(1.0, 0.5)}),
        {0: 2.0, **dict.fromkeys(range(1, 16), -1.0), 255: 45.0},
        0.0,
    ),
    "Q3_K": (
        _block(
            110,
            {
                0: b"\x01", 31: b"\x80", 32: b"\x01", 95: b"\xc0",
                96: b"\x01", 103: b"\xf0", 104: b"\x02", 107: b"\xc0", 108: _half(1.0),
            },
        ),
        {0: 1.0, **dict.fromkeys(range(1, 16), -4.0),
         **dict.fromkeys(range(240, 255), -124.0), 255: 93.0},
        128.0,
    ),
    "Q4_K": (
        _block(144, {0: _half(1.0, 0.5), 4: _SCALES_12, 16: b"\x0f", 143: b"\x90"}),
        {0: 944.0, **dict.fromkeys(range(1, 32), -1.0),
         **dict.fromkeys(range(224, 255), -16.5), 255: 460.5},
        0.0,
    ),
    "Q5_K": (
        _block(
            176,
            {
                0: _half(1.0, 0.5), 4: _SCALES_12, 16: b"\x01", 47: b"\x80", 48: b"\x0f",
                175: b"\x90",
            },
        ),
        {0: 1952.0, **dict.fromkeys(range(1, 32), -1.0),
         **dict.fromkeys(range(224, 255), -16.5), 255: 1308.5},
        0.0,
    ),
    "Q6_K": (
        _block(
            210,
            {
                0: b"\x05", 127: b"\x10", 128: b"\x03", 191: b"\x80", 192: b"\x02", 207: b"\xfd",
                208: _half(0.5),
            },
        ),
        {0: 21.0, **dict.fromkeys(range(1, 16), -32.0),
         **dict.fromkeys(range(240, 255), 48.0), 255: -1.5},
        0.0,
    ),
    "IQ4_NL": (_half(0.5) + b"\x1f" + b"\x88" * 15, {0: 56.5, 16: -52.0}, 0.5),
    # Scale 0 is 63 - 32, scale 7 is 17 - 32, the others are 32 - 32.
    "IQ4_XS": (
        _block(136, {0: _half(0.5), 2: b"\xab\x6a", 4: b"\x0f\0\0\x10", 8: b"\x0f", 135: b"\x80"}),
        {0: 1751.5, **dict.fromkeys(range(1, 32), -1968.5),
         **dict.fromkeys(range(224, 255), 952.5), 255: -7.5},
        0.0,
    ),
    "MXFP4": (b"\x81\x1f" + b"\x70" * 15, {0: -24.0, 16: 2.0, **dict.fromkeys(range(17, 32), 24.0)},
              0.0),
}  # fmt: skip


@pytest.mark.parametrize("type", RUNNABLE, ids=lambda t: t.name)
def test_random_blocks_match_the_gguf_package(type: QuantType) -> None:
    rng = np.random.default_rng(type.ggml_id)
    blocks = rng.integers(0, 256, (3 * 700, type.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType(type.ggml_id))
    values = dequantize(blocks, type, (3, 700 * type.block))
    assert values.dtype == np.float32 and values.shape == (3, 700 * type.block)
    expected = expected.astype(np.float32).reshape(values.shape)
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("type", RUNNABLE, ids=lambda t: t.name)
def test_a_block_written_by_hand(type: QuantType) -> None:
    block, stated, rest = _BY_HAND[type.name]
    values = dequantize(block, type, (type.block,))
    for i, value in enumerate(values.tolist()):
        assert value == stated.get(i, rest), f"element {i}"


@pytest.mark.parametrize("type", RUNNABLE, ids=lambda t: t.name)
def test_quantised_values_come_back(type: QuantType) -> None:
    values = np.random.default_rng(0).standard_normal((8, 1024), dtype=np.float32)
    values[0] = 0
    back = dequantize(quantize(values, type.name), type, values.shape)
    assert not back[0].any()
    assert np.sqrt(np.mean((values - back) ** 2)) <= _RMSE[type.name]


def test_every_exponent_of_mxfp4() -> None:
    blocks = np.zeros((256, 17), np.uint8)
    blocks[:, 0], blocks[:, 1:] = np.arange(256), 0x91
    values = dequantize(blocks, quant.MXFP4, (256, 32))
    powers = np.ldexp(1.0, np.arange(256) - 128)
    np.testing.assert_array_equal(values[:, 0], powers)
    np.testing.assert_array_equal(values[:, 16], -powers)


def test_long_tensors_are_unpacked_in_pieces_without_a_seam(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = quantize(np.random.default_rng(0).standard_normal((7, 2560), np.float32), "Q4_K")
    whole = dequantize(blocks, quant.Q4_K, (7, 2560))
    monkeypatch.setattr("edgeinfer.dequantize._CHUNK", 3 * 256)
    np.testing.assert_array_equal(dequantize(blocks, quant.Q4_K, (7, 2560)), whole)


def test_a_weight_carries_its_own_type_and_shape() -> None:
    block = memoryview(_BY_HAND["Q4_0"][0] * 2)
    weight = Weight("blk.0.attn_q.weight", (2, 32), quant.Q4_0, block)
    assert weight.n_elements == 64
    assert dequantize(weight).shape == (2, 32)
    assert dequantize(weight)[1, 0] == 3.5


def test_the_table_matches_ggml() -> None:
    for ggml_id, type in QUANT_TYPES.items():
        if type.name in {"Q8_1", "Q2_0"}:  # gguf 0.19 has another size, or none
            continue
        known = gguf.GGMLQuantizationType[type.name]
        assert known == ggml_id
        assert gguf.GGML_QUANT_SIZES[known] == (type.block, type.block_bytes), type.name
    assert {int(t) for t in gguf.GGMLQuantizationType} <= set(QUANT_TYPES)


def test_row_bytes() -> None:
    assert quant.Q4_K.row_bytes(2048) == 8 * 144
    with pytest.raises(ValueError, match="100 elements are not whole Q4_0 blocks"):
        quant.Q4_0.row_bytes(100)


def test_types_that_do_not_run_are_named() -> None:
    iq2_s, unknown = quant_type(22), quant_type(4321)
    assert (iq2_s.name, iq2_s.is_known, iq2_s.is_runnable) == ("IQ2_S", True, False)
    assert (unknown.name, unknown.is_known, unknown.is_runnable) == ("type 4321", False, False)
    with pytest.raises(UnsupportedModelError, match=r"IQ2_S; edgeinfer runs F32, .*Q4_K") as error:
        dequantize(bytes(82), iq2_s, (256,))
    assert error.value.missing == ("IQ2_S",)


def test_bytes_must_match_the_shape() -> None:
    with pytest.raises(ValueError, match="18 bytes are not"):
        dequantize(bytes(18), quant.Q4_0, (64,))


def test_importing_does_not_load_numpy() -> None:
    code = "import sys, edgeinfer.quant, edgeinfer.gguf; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
