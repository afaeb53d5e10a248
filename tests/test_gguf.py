"""The GGUF reader: what it reads from sound files, and what it says of damaged ones.

Knows nothing of models. Random damage is the business of test_gguf_fuzz.py.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgeinfer.dequantize import dequantize
from edgeinfer.errors import ClosedError, InvalidModelError, ModelNotFoundError
from edgeinfer.gguf import Array, GGUFFile, Metadata

from .models_for_tests import tiny_model

U32, STRING, ARRAY, BOOL = 4, 8, 9, 7


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _string(name) + struct.pack("<I", kind) + value


def _tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _file(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    n_keys = len(keys) if n_keys is None else n_keys
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    head = struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def _open(tmp_path: Path, content: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return GGUFFile.open(path)


def _fails(tmp_path: Path, content: bytes, match: str) -> InvalidModelError:
    with pytest.raises(InvalidModelError, match=match) as error:
        _open(tmp_path, content)
    assert str(tmp_path / "model.gguf") in str(error.value)
    assert error.value.path == tmp_path / "model.gguf"
    assert error.value.field is not None
    return error.value


# -- sound files -------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """A file from the gguf package with every value type, and its tensors."""
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"t.{kind}", 7 if kind[0] == "u" else -7)
    writer.add_float32("t.float32", 0.5)
    writer.add_float64("t.float64", 0.1)
    writer.add_bool("t.bool", True)
    writer.add_string("t.string", "grüße")
    writer.add_array("t.strings", ["a", "", "ü", "long " * 100])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.5, 1.5])
    writer.add_array("t.bools", [True, False])
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((3, 64), dtype=np.float32),
        "vector": rng.standard_normal(5, dtype=np.float32).astype(np.float16),
        "cube": rng.standard_normal((2, 3, 32), dtype=np.float32),
    }
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    packed = gguf.quantize(tensors["matrix"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


def test_metadata_of_every_type(written: tuple[Path, Any]) -> None:
    with GGUFFile.open(written[0]) as file:
        meta = file.metadata
        assert file.version == 3
        assert meta["general.architecture"] == "llama"
        for bits in (8, 16, 32, 64):
            assert (meta[f"t.uint{bits}"], meta[f"t.int{bits}"]) == (7, -7)
        assert (meta["t.float32"], meta["t.float64"]) == (0.5, 0.1)
        assert meta["t.bool"] is True
        assert meta["t.string"] == "grüße"
        strings = meta.get_array("t.strings")
        assert (strings.item_type, len(strings)) == ("string", 4)
        assert strings.strings() == strings.tolist() == ["a", "", "ü", "long " * 100]
        assert strings.bytes()[2] == "ü".encode()
        assert meta.get_array("t.ints").numpy().tolist() == [1, -2, 3]
        assert meta.get_array("t.floats").tolist() == [0.5, 1.5]
        assert meta.get_array("t.bools").numpy().tolist() == [True, False]
        assert meta.get_array("t.bools").tolist() == [True, False]
        assert list(meta)[0] == "general.architecture" and len(meta) == len(list(meta))


def test_tensors_are_read(written: tuple[Path, dict[str, np.ndarray[Any, Any]]]) -> None:
    path, tensors = written
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == [*tensors, "packed"]
        for name, values in tensors.items():
            weight = file.tensors[name]
            assert weight.shape == values.shape and weight.name == name
            np.testing.assert_array_equal(dequantize(weight), values.astype(np.float32))
            assert weight.data[:].readonly and len(weight.data) == values.nbytes
            assert bytes(weight.data[4:8]) == values.tobytes()[4:8]
        assert file.tensors["packed"].type.name == "Q8_0"
        assert file.tensors["packed"].shape == (3, 64)
        assert file.n_bytes == path.stat().st_size


def test_typed_getters(written: tuple[Path, Any]) -> None:
    with GGUFFile.open(written[0]) as file:
        meta = file.metadata
        assert meta.get_int("t.uint64") == 7
        assert meta.get_int("absent", 5) == 5
        assert meta.get_float("t.int8", 1.0) == -7.0
        assert meta.get_str("t.string") == "grüße" and meta.get_str("absent", "x") == "x"
        assert meta.get_bool("t.bool") is True and meta.get_bool("absent", False) is False
        assert meta.get_ints("t.ints", 3, low=-9) == (1, -2, 3)
        assert meta.get_ints("t.uint8", 4) == (7, 7, 7, 7)
        assert meta.get_floats("t.floats") == (0.5, 1.5)
        assert meta.get_bools("t.bools") == (True, False)
        assert meta.get_bools("t.bool", 2) == (True, True)


@pytest.mark.parametrize(
    ("get", "message"),
    [
        (lambda m: m.get_int("absent"), "lacks this metadata key"),
        (lambda m: m.get_int("t.string"), "found 'grüße', need an integer"),
        (lambda m: m.get_int("t.bool"), "found True, need an integer"),
        (lambda m: m.get_int("t.float32"), "found 0.5, need an integer"),
        (lambda m: m.get_int("t.int32"), "found -7, need an integer from 0 to"),
        (lambda m: m.get_int("t.uint8", high=6), "found 7, need an integer from 0 to 6"),
        (lambda m: m.get_float("t.bool"), "need a number"),
        (lambda m: m.get_str("t.uint8"), "found 7, need a string"),
        (lambda m: m.get_bool("t.uint8"), "need a boolean"),
        (lambda m: m.get_array("t.uint8"), "need an array"),
        (
            lambda m: m.get_ints("t.strings"),
            r"found Array\(4 x string\), need an array of integers",
        ),
        (lambda m: m.get_ints("t.floats"), "need an array of integers"),
        (lambda m: m.get_ints("t.bools"), "need an array of integers"),
        (lambda m: m.get_ints("t.ints"), "found -2, need an integer from 0"),
        (lambda m: m.get_ints("t.ints", 4), "need 4 integers"),
        (lambda m: m.get_bools("t.ints"), "need an array of booleans"),
        (lambda m: m.get_array("t.ints").bytes(), "found an array of int32, need strings"),
        (lambda m: m.get_array("t.strings").numpy(), "array of strings, need numbers"),
    ],
)
def test_a_wrong_value_names_its_key(
    written: tuple[Path, Any], get: Callable[[Metadata], object], message: str
) -> None:
    with GGUFFile.open(written[0]) as file:
        with pytest.raises(InvalidModelError, match=message) as error:
            get(file.metadata)
        assert str(error.value.field) in str(error.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    nan = struct.pack("<f", float("nan"))
    with _open(tmp_path, _file((_key("x", 6, nan),))) as file:
        with pytest.raises(InvalidModelError, match="found nan, need a finite number"):
            file.metadata.get_float("x")


def test_a_value_too_long_to_read_is_still_there(tmp_path: Path) -> None:
    with _open(tmp_path, _file((_key("s", STRING, _string(b"a" * (1 << 21))),))) as file:
        assert "s" in file.metadata and "t" not in file.metadata
        with pytest.raises(InvalidModelError, match="field s"):
            file.metadata["s"]


def test_text_that_is_not_utf8_is_shown_with_marks_and_kept(tmp_path: Path) -> None:
    array = struct.pack("<IQ", STRING, 1) + _string(b"\xff\xfe")
    keys = (_key("s", STRING, _string(b"a\xff")), _key("a", ARRAY, array))
    with _open(tmp_path, _file(keys)) as file:
        assert file.metadata["s"] == "a\ufffd"
        assert file.metadata.get_array("a").strings() == ["\ufffd\ufffd"]
        assert file.metadata.get_array("a").bytes() == [b"\xff\xfe"]


@pytest.mark.parametrize(
    "odd",
    [b"x" * 256, b"y" * 70_000, b"", b"a" + bytes(9), bytes(300), b"\x08" + bytes(7)],
    ids=["256 bytes", "70,000 bytes", "empty", "zeros behind", "zeros", "like a length"],
)
@pytest.mark.parametrize("at", [0, 5, 1500, 29_999])
def test_strings_are_found_whatever_is_in_them(tmp_path: Path, odd: bytes, at: int) -> None:
    strings = [b"s%d" % i + b"." * (i % 30) for i in range(30_000)]  # more than one window
    strings[at] = odd
    array = struct.pack("<IQ", STRING, len(strings)) + b"".join(map(_string, strings))
    keys = (_key("a", ARRAY, array), _key("after", STRING, _string("it")))
    with _open(tmp_path, _file(keys)) as file:
        assert file.metadata.get_array("a").bytes() == strings
        assert file.metadata["after"] == "it"


def test_version_2_and_alignment(tmp_path: Path) -> None:
    keys = (_key("general.alignment", U32, struct.pack("<I", 256)),)
    content = _file(keys, (_tensor("x", [4], 0, 256),), version=2)
    content += bytes(-len(content) % 256 + 256) + struct.pack("<4f", 1, 2, 3, 4)
    with _open(tmp_path, content) as file:
        assert file.version == 2
        assert dequantize(file.tensors["x"]).tolist() == [1, 2, 3, 4]


def test_types_that_do_not_run_are_listed(tmp_path: Path) -> None:
    tensors = (_tensor("iq2", [256], 22, 0), _tensor("new", [256], 4321, 96))
    with _open(tmp_path, _file((), tensors, bytes(128))) as file:
        assert file.tensors["iq2"].type.name == "IQ2_S" and len(file.tensors["iq2"].data) == 82
        assert file.tensors["new"].type.name == "type 4321" and not file.tensors["new"].data


def test_closing(written: tuple[Path, Any]) -> None:
    file = GGUFFile.open(written[0])
    numbers = file.metadata.get_array("t.ints").numpy()
    values = np.frombuffer(file.tensors["matrix"].data[:], np.float32)
    strings, vector = file.metadata.get_array("t.strings"), file.tensors["vector"]
    file.close()
    file.close()
    assert numbers.tolist() == [1, -2, 3]  # a NumPy view keeps what it looks at
    assert np.isfinite(values).all()
    assert file.metadata["t.string"] == "grüße"
    with pytest.raises(ClosedError, match="was closed"):
        strings.strings()
    with pytest.raises(ClosedError, match="was closed"):
        dequantize(vector)


def test_a_tiny_model(tmp_path: Path) -> None:
    with GGUFFile.open(tiny_model(tmp_path, quant="Q4_K_M", n_layers=8)) as file:
        types = {name: weight.type.name for name, weight in file.tensors.items()}
        assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == "Q4_K"
        assert types["output.weight"] == types["blk.0.ffn_down.weight"] == "Q6_K"
        assert types["blk.1.attn_v.weight"] == "Q4_K" and types["blk.3.attn_v.weight"] == "Q6_K"
        assert types["blk.7.attn_v.weight"] == "Q6_K"
        assert types["output_norm.weight"] == "F32"
        assert file.metadata.get_int("llama.block_count") == 8


@pytest.mark.parametrize(
    ("quant", "embedding", "value", "head"),
    [
        ("IQ4_XS", "IQ4_XS", "Q5_K", "Q6_K"),
        ("IQ4_NL", "IQ4_NL", "IQ4_NL", "Q6_K"),
        ("MXFP4", "MXFP4", "MXFP4", "Q8_0"),
    ],
)
def test_mixes_of_types_with_tables(
    tmp_path: Path, quant: str, embedding: str, value: str, head: str
) -> None:
    path = tiny_model(tmp_path, quant=quant, n_layers=8, dim=256, ffn_dim=512)
    with GGUFFile.open(path) as file:
        types = {name: weight.type.name for name, weight in file.tensors.items()}
    assert types["token_embd.weight"] == types["blk.1.attn_v.weight"] == embedding
    assert types["blk.7.attn_v.weight"] == value
    assert types["output.weight"] == head


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2", "gpt-2", "bert-bge"])
def test_vocabularies_open_at_once(data_file: Callable[[str], Path], name: str) -> None:
    path = data_file(f"vocab/ggml-vocab-{name}.gguf")
    start = time.thread_time()
    with GGUFFile.open(path) as file:
        # 0.04 s of a processor for llama-bpe where this was written.
        assert time.thread_time() - start < 0.5
        tokens = file.metadata.get_array("tokenizer.ggml.tokens")
        assert len(tokens.bytes()) == len(tokens) > 30_000
        kinds = file.metadata["tokenizer.ggml.token_type"]
        assert isinstance(kinds, Array) and len(kinds.numpy()) == len(tokens)


def test_a_published_model(data_file: Callable[[str], Path]) -> None:
    with GGUFFile.open(data_file("models/SmolLM2-135M-Instruct.Q4_1.gguf")) as file:
        assert file.metadata.get_int("llama.block_count") == 30
        assert file.tensors["blk.29.ffn_down.weight"].shape == (576, 1536)
        assert file.tensors["token_embd.weight"].type.name == "Q8_0"
        assert abs(dequantize(file.tensors["blk.0.attn_q.weight"])).max() < 10


# -- split files -------------------------------------------------------------------------------


def split(folder: Path, n_tensors: int) -> list[Path]:
    """The three parts of a file, of two tensors each at most."""
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "big.gguf", "llama", split_max_tensors=2)
    for i in range(n_tensors):
        writer.add_tensor(f"t{i}", np.full(4, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / f"big-{no:05}-of-00003.gguf" for no in (1, 2, 3)]


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return split(tmp_path, 5)


@pytest.mark.parametrize("opened", [0, 2])
def test_a_split_model_opens_from_any_part(parts: list[Path], opened: int) -> None:
    with GGUFFile.open(parts[opened]) as file:
        assert file.path == parts[0] and file.paths == tuple(parts)
        assert [int(dequantize(w)[0]) for w in file.tensors.values()] == [0, 1, 2, 3, 4]
        assert file.metadata["general.architecture"] == "llama"
        assert file.n_bytes == sum(part.stat().st_size for part in parts)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(InvalidModelError, match="part 2 of 3 is missing: big-00002-of-00003.gguf"):
        GGUFFile.open(parts[0])


def test_parts_in_the_wrong_order_are_noticed(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(InvalidModelError, match="found 2, need 1.*field split.no"):
        GGUFFile.open(parts[0])


@pytest.mark.parametrize("odd", [0, 1])
def test_a_part_of_another_model_is_named(parts: list[Path], tmp_path: Path, odd: int) -> None:
    """It fits into the gap, under the right number: only the count of all tensors tells."""
    others = split(tmp_path / "other", 6)
    parts[odd].write_bytes(others[odd].read_bytes())
    named, found, first = (parts[1], 5, 6) if odd == 0 else (parts[1], 6, 5)
    message = f"found {found}, {parts[0].name} has {first}.*{named.name}, field split.tensors.count"
    with pytest.raises(InvalidModelError, match=message):
        GGUFFile.open(parts[0])


def test_a_part_under_another_name_is_refused(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(InvalidModelError, match="split into 3 files.*original names"):
        GGUFFile.open(renamed)


# -- damaged and foreign files -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (bytes(200), "unfinished download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (struct.pack("<Q", 60) + b'{"__metadata__":{}}', "safetensors"),
        (b"PK\x03\x04rest", "zip archive or PyTorch"),
        (b"tjgg\x01\x00\x00\x00", "before GGUF"),
        (b"something else", r"begins with b'something else'"),
    ],
)
def test_what_is_not_gguf_is_recognised(tmp_path: Path, content: bytes, message: str) -> None:
    error = _fails(tmp_path, content, message)
    assert (error.field, error.offset) == ("magic", 0)


_X = _tensor("x", [32], 0, 0)  # 128 bytes of data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_file(version=1), "version 1, edgeinfer reads 2 and 3; convert"),
        (_file(version=4), "version 4, edgeinfer reads 2 and 3; update"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
        (b"GGUF\x03\x00", "file ends at 6"),
        (_file()[:20], "8 bytes needed at byte 16, the file ends at 20"),
        (_file(n_keys=2**63), "at most 65536.*metadata count"),
        (_file(n_tensors=2**40), "at most 65536.*tensor count"),
        (_file(n_keys=3), "metadata key 0|the file ends|empty name"),
        (_file((_key("k", STRING, struct.pack("<Q", 2**63)),)), "808 bytes more text"),
        (_file((_key("k", STRING, struct.pack("<Q", 999)),)), "999 bytes needed.*field k"),
        (_file((struct.pack("<Q", 2**17) + b"k",)), "name of 131072 bytes"),
        (_file((_key("", U32, bytes(4)),)), "empty name"),
        (_file((_key("k", 13, b""),)), "value type 13, known are 0 to 12.*field k"),
        (_file((_key("k", BOOL, b"\x02"),)), "boolean of 2, need 0 or 1"),
        (_file((_key("k", U32, bytes(4)), _key("k", U32, bytes(4)))), "second value for this key"),
        (_file((_key("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "array of arrays"),
        (_file((_key("k", ARRAY, struct.pack("<IQ", U32, 2**62)),)), "bytes needed.*field k"),
        (_file((_key("k", ARRAY, struct.pack("<IQ", STRING, 2**62)),)), "strings, at most 4194304"),
        (_file((_key("k", ARRAY, struct.pack("<IQ", STRING, 9)),)), "9 strings run past the end"),
        (
            _file((_key("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**64 - 8)),)),
            "1 strings run past the end",
        ),
        (_file((_key("general.alignment", U32, struct.pack("<I", 48)),)), "48, need a power"),
        (_file((_key("general.alignment", U32, bytes(4)),)), "found 0, need an integer from 1"),
        (_file((_key("general.alignment", STRING, _string("x")),)), "'x', need an integer"),
        (_file((), (_tensor("x", [1] * 5, 0, 0),)), "5 dimensions, at most 4.*field x"),
        (_file((), (_tensor("x", [32, 0], 0, 0),)), "a dimension of 0"),
        (_file((), (_tensor("x", [33], 2, 0),), bytes(64)), "33 elements are not whole"),
        (_file((), (_tensor("x", [2**62] * 4, 0, 0),), bytes(64)), "cut short.*field x"),
        (_file((), (_tensor("x", [32], 0, 2**64 - 32),), bytes(64)), "cut short.*field x"),
        (_file((), (_X,), bytes(100)), "the tensors need 192 bytes, the file has 164.*download"),
        (_file((), (_tensor("x", [8], 0, 8),), bytes(64)), "data at 8, need a multiple of 32"),
        (_file((), (_X, _tensor("x", [32], 0, 128)), bytes(256)), "second tensor of this name"),
        (_file((), (_X, _tensor("y", [32], 0, 96)), bytes(256)), "overlaps that of x.*field y"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    _fails(tmp_path, content, message)


def test_a_boolean_array_holds_only_0_and_1(tmp_path: Path) -> None:
    array = struct.pack("<IQ", BOOL, 3) + b"\x00\x01\x02"
    with _open(tmp_path, _file((_key("k", ARRAY, array),))) as file:
        for read in (file.metadata.get_array("k").numpy, file.metadata.get_array("k").tolist):
            with pytest.raises(InvalidModelError, match="neither 0 nor 1.*field k"):
                read()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<Q", 2**33), "8589934592 bytes more text, at most 100663296"),
        (struct.pack("<IQ", STRING, 2**23), "8388608 strings, at most 4194304"),
        (struct.pack("<IQQ", STRING, 1, 2**33), "bytes more text, at most 100663296"),
        (struct.pack("<IQ", STRING, 2**22), None),
        (struct.pack("<IQ", 0, 2**33), "a header of more than 536870912 bytes"),
        (struct.pack("<IQ", 0, 2**23), None),
    ],
)
def test_a_file_that_is_really_huge_costs_little(
    tmp_path: Path, value: bytes, message: str | None
) -> None:
    path, kind = tmp_path / "huge.gguf", STRING if len(value) == 8 else ARRAY
    with path.open("wb") as out:
        out.write(_file((_key("k", kind, value),)))
        try:
            out.truncate(2**36)  # zeros that take no disk
        except OSError:
            pytest.skip("this file system has no sparse files: use another TMPDIR")
    start = time.thread_time()
    if message is not None:
        with pytest.raises(InvalidModelError, match=message):
            GGUFFile.open(path)
    else:
        with GGUFFile.open(path) as file:
            array = file.metadata.get_array("k")
            assert len(array) >= 2**22
            if array.item_type != "string":
                assert len(array.numpy()) == 2**23
                with pytest.raises(InvalidModelError, match="found 8388608 numbers, at most"):
                    array.tolist()
    assert time.thread_time() - start < 15


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no file"):
        GGUFFile.open(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFoundError, match="is not a file"):
        GGUFFile.open(tmp_path)


def test_a_fingerprint_tells_models_that_differ_in_tensors_of_one_kind(tmp_path: Path) -> None:
    """As adapters leave most kinds as they were; so many layers that few of each could be read."""
    path = tiny_model(tmp_path, n_layers=64, dim=32, n_heads=1, n_kv_heads=1, ffn_dim=32)
    tensors, other = gguf.GGUFReader(path).tensors, tmp_path / "other.gguf"
    kinds = {tensor.name.split(".", 2)[-1] for tensor in tensors}
    found = set[str]()
    for kind in sorted({"", *kinds}):
        data = bytearray(path.read_bytes())
        for tensor in tensors:
            if kind and tensor.name.endswith(kind):
                for at in range(tensor.data_offset, tensor.data_offset + tensor.n_bytes):
                    data[at] ^= 1
        other.write_bytes(data)
        with GGUFFile.open(other) as file:
            found.add(file.fingerprint())
    assert len(kinds) > 9 and len(found) == len(kinds) + 1
