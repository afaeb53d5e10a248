"""10,000 damaged GGUF files: each opens or is refused, fast and without large allocations.

Knows nothing of what a message says; test_gguf.py checks those.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import Array, GGUFFile, Metadata
from edgeinfer.quant import dequantize

N_FILES = 10_000
_MAX_SECONDS = 2.0
_MAX_EXTRA_BYTES = 64 << 20
# Lengths at the edges of integer types, and small ones that shift what follows.
_NUMBERS = (0, 1, 2, 7, 8, 9, 31, 32, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
            2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)  # fmt: skip
_REFUSED = (InvalidModelError, UnsupportedModelError)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of value and several tensor types."""
    path = tmp_path_factory.mktemp("sound") / "sound.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("general.alignment", 32)
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_uint64("big", 2**60)
    writer.add_float64("exact", 0.1)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(20)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 20)
    writer.add_array("scores", [0.5] * 20)
    writer.add_array("flags", [True, False] * 5)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 64), dtype=np.float32)
    writer.add_tensor("blk.0.attn_norm.weight", values[0])
    for i, name in enumerate(("Q4_0", "Q8_0", "F16")):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(f"blk.{i}.attn_q.weight", gguf.quantize(values, kind), raw_dtype=kind)
    block = rng.integers(0, 256, (1, 144), dtype=np.uint8)
    writer.add_tensor("output.weight", block, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def header_bytes(sound: bytes) -> int:
    return sound.index(b"output.weight") + 40


@pytest.mark.slow
def test_damaged_files(sound: bytes, header_bytes: int, tmp_path: Path) -> None:
    rng = random.Random(20261122)
    path = tmp_path / "damaged.gguf"
    n_opened, slowest, largest = 0, 0.0, 0
    tracemalloc.start()
    try:
        for i in range(N_FILES):
            damaged = _damage(rng, sound, header_bytes)
            # A new file each time: shrinking one that is still mapped would be a bus error.
            path.unlink(missing_ok=True)
            path.write_bytes(damaged)
            tracemalloc.reset_peak()
            before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
            try:
                _read_everything(path)
                n_opened += 1
            except _REFUSED:
                pass
            except Exception as error:
                pytest.fail(f"file {i}: {error!r} is not one of ours")
            seconds = time.perf_counter() - start
            extra = tracemalloc.get_traced_memory()[1] - before
            slowest, largest = max(slowest, seconds), max(largest, extra)
            assert seconds < _MAX_SECONDS, f"file {i} took {seconds:.1f} s"
            assert extra < len(damaged) + _MAX_EXTRA_BYTES, f"file {i} took {extra} bytes"
    finally:
        tracemalloc.stop()
    print(f"\n{n_opened} of {N_FILES} opened; at most {slowest:.3f} s and {largest} bytes")
    # Both outcomes must be common, or the damage tests only one of them.
    assert N_FILES // 50 < n_opened < N_FILES * 49 // 50


def test_the_sound_file_reads(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sound)
    assert _read_everything(path) == 0


def test_every_truncation_is_refused(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    n_data = 144 + 144 % 32  # the writer pads the last tensor
    for n_bytes in range(len(sound) - n_data):
        path.unlink(missing_ok=True)
        path.write_bytes(sound[:n_bytes])
        with pytest.raises(InvalidModelError):
            GGUFFile.open(path)


def _read_everything(path: Path) -> int:
    """Open a file and touch all it holds; returns how many values were refused."""
    n_refused = 0
    with GGUFFile.open(path) as file:
        meta = file.metadata
        for key in meta:
            readers: list[Callable[[str], object]] = [
                meta.__getitem__, meta.get_int, meta.get_float, meta.get_str, meta.get_bytes,
                meta.get_bool, meta.get_ints, meta.get_floats, meta.get_bools,
            ]  # fmt: skip
            n_read = 0
            for read in readers:
                try:
                    read(key)
                    n_read += 1
                except InvalidModelError:
                    pass
            n_refused += n_read < 1
            n_refused += _read_array(meta, key)
        for weight in file.tensors.values():
            try:
                dequantize(weight)
            except UnsupportedModelError:
                n_refused += 1
    return n_refused


def _read_array(meta: Metadata, key: str) -> int:
    value = meta[key]
    if not isinstance(value, Array):
        return 0
    try:
        assert len(value.tolist()) == len(value)
        if value.item_type == "string":
            assert len(value.bytes()) == len(value)
        else:
            assert len(value.numpy()) == len(value)
    except InvalidModelError:
        return 1
    return 0


def _damage(rng: random.Random, sound: bytes, header_bytes: int) -> bytes:
    damaged = bytearray(sound)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(min(header_bytes, len(damaged) - 8))
        match rng.randrange(6):
            case 0:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at] = rng.randrange(256)
            case 2:
                form = rng.choice(("<Q", "<I"))
                number = rng.choice(_NUMBERS) & (2**64 - 1 if form == "<Q" else 2**32 - 1)
                struct.pack_into(form, damaged, at, number)
            case 3:
                end = min(len(damaged), at + rng.randrange(1, 64))
                damaged[at:at] = damaged[rng.randrange(at + 1) : end]
            case 4:
                del damaged[at : at + rng.randrange(1, 32)]
            case _:
                # Rarely short, or hardly any file would get past this.
                if rng.randrange(4) == 0:
                    del damaged[rng.randrange(8, len(damaged)) :]
                else:
                    damaged[rng.randrange(header_bytes, len(damaged))] ^= 255
        if len(damaged) <= header_bytes:
            break
    return bytes(damaged)
