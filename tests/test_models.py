"""`Model`: the numbers of each architecture, and the error for every file that can't run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgeinfer import keys
from edgeinfer import model as model_module
from edgeinfer.errors import EdgeInferError, InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import KV, Attention, Embed, Linear, RmsNorm, Rope, Rotate
from edgeinfer.inspect_file import describe
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model, architectures
from edgeinfer.sampling.params import SamplingParams

from .bench import tokenizers
from .models_for_tests import tiny_model
from .test_cpu_program import IDS, LIMITS, batch_of, logits


@contextmanager
def loaded(folder: Path, **options: Any) -> Iterator[Model]:
    with GGUFFile.open(tiny_model(folder, **options)) as file:
        yield Model.load(file)


def linears(model: Model) -> dict[str, Linear]:
    return {op.weight.name: op for op in model.graph.ops if isinstance(op, Linear)}


# -- files that run ------------------------------------------------------------------------------


def test_architectures_are_the_files_of_models() -> None:
    folder = Path(model_module.__file__).parent / "models"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    names = {
        name
        for file in files
        for name in getattr(import_module(f"edgeinfer.models.{file}"), "NAMES", (file,))
    }
    assert {"llama", "qwen2", "gemma3"} <= names == set(architectures())


def test_numbers(tmp_path: Path) -> None:
    options = dict(head_dim=24, n_layers=3, rope_base=5e5, n_ctx=77, norm_eps=2**-17)
    extra = {"general.sampling.temp": 0.5, "general.sampling.top_k": 7}
    with loaded(tmp_path, metadata=extra, **options) as model:
        hp = model.hparams
        assert (hp.architecture, model.architecture) == ("llama", "llama")
        assert (hp.n_layers, hp.dim, hp.vocab_size, hp.n_ctx_train) == (3, 64, 320, 77)
        for op in model.graph.ops:
            if isinstance(op, Attention):
                assert (op.n_heads, op.cache) == (4, KV(2, 24, 24))
            elif isinstance(op, Rotate):
                assert op.rope == Rope("norm", 24, 5e5, 1.0)
            elif isinstance(op, RmsNorm):
                assert op.eps == 2**-17
        assert linears(model)["blk.2.ffn_down.weight"].x.dim == 128
        assert model.name == "random llama Q4_0"
        assert model.sampling == {"temp": 0.5, "top_k": 7}
        n_layer = 64 * 96 * 2 + 64 * 48 * 2 + 3 * 64 * 128 + 2 * 64
        assert model.n_params == 3 * n_layer + 2 * 320 * 64 + 64
        assert model.quantisation.startswith("Q4_0 + Q8_0")
        assert sum(model.bytes_by_type.values()) < model.file.n_bytes
        assert model.graph.unused == []


def test_llama_follows_the_tensors(tmp_path: Path) -> None:
    with loaded(tmp_path, tied=True, rope_freqs=True, bias=True) as model:
        head = linears(model)["token_embd.weight"]
        embed = model.graph.ops[0]
        assert isinstance(embed, Embed) and embed.weight is head.weight
        rotations = [op for op in model.graph.ops if isinstance(op, Rotate)]
        assert {op.rope.kind for op in rotations} == {"norm"}
        assert all(op.rope.factors is not None for op in rotations)
        assert linears(model)["blk.1.attn_k.weight"].bias is not None
        assert linears(model)["blk.1.attn_output.weight"].bias is None


def test_qwen2_has_biases(tmp_path: Path) -> None:
    with loaded(tmp_path, arch="qwen2") as model:
        for name in ("attn_q", "attn_k", "attn_v"):
            bias = linears(model)[f"blk.0.{name}.weight"].bias
            assert bias is not None and bias.name == f"blk.0.{name}.bias"
        rotation = next(op for op in model.graph.ops if isinstance(op, Rotate))
        assert rotation.rope.kind == "neox" and rotation.rope.factors is None


def test_qwen3_norms_heads(tmp_path: Path) -> None:
    with loaded(tmp_path, arch="qwen3", head_dim=32) as model:
        norms = {op.weight.name: op for op in model.graph.ops if isinstance(op, RmsNorm)}
        assert norms["blk.0.attn_q_norm.weight"].n_heads == 4
        assert norms["blk.0.attn_k_norm.weight"].n_heads == 2
        attention = next(op for op in model.graph.ops if isinstance(op, Attention))
        assert attention.scale == 32**-0.5 and attention.out.dim == 4 * 32


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, 1.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 0.25),
        ({"rope.scaling.factor": 4.0}, 0.25),
        ({"rope.scale_linear": 2.0}, 0.5),
        ({"rope.scaling.type": "linear"}, 1.0),
    ],
)
def test_rope_scaling(tmp_path: Path, keys: dict[str, Any], scale: float) -> None:
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    with loaded(tmp_path, metadata=metadata) as model:
        rotations = [op for op in model.graph.ops if isinstance(op, Rotate)]
        assert {op.rope.scale for op in rotations} == {scale}


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_blends_between(tmp_path: Path) -> None:
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 0.5}
    metadata = {f"llama.rope.scaling.{name}": value for name, value in keys.items()}
    with loaded(tmp_path, metadata={**metadata, "llama.rope.freq_base": 100.0}) as model:
        segment = model.graph.segment()
        rope = next(op.rope for op in segment.ops if isinstance(op, Rotate))
        # 16 dims: pairs 0 to 7 of waves 100 ** (i / 8); one turn in 64 positions is pair 4.03.
        own = 100.0 ** (-np.arange(8) / 8)
        kept = np.array([1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0, 0])
        np.testing.assert_allclose(rope.frequencies(), own * kept + own / 4 * (1 - kept))
        assert rope.magnitude == pytest.approx(0.5 * (1 + 0.1 * np.log(4)))
        with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as reference:
            expected = reference.submit(batch_of(IDS)).wait().logits
        np.testing.assert_array_equal(logits(segment, IDS), expected)
    metadata["llama.rope.scaling.yarn_log_multiplier"] = 1.0
    with loaded(tmp_path, metadata=metadata) as model:
        rope = next(op.rope for op in model.graph.ops if isinstance(op, Rotate))
        assert rope.magnitude == pytest.approx(0.5)


def test_counts_per_layer_may_be_equal_arrays(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [128, 128]}
    with loaded(tmp_path, metadata=metadata) as model:
        with loaded(tmp_path) as plain:
            assert shapes(model) == shapes(plain)


def shapes(model: Model) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, op.weight.shape) for name, op in linears(model).items()]


def test_counts_per_layer_are_each_layers_own(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count_kv": [2, 1], "llama.feed_forward_length": [128, 64]}
    rng = np.random.default_rng(0)
    shapes = {"attn_k": (16, 64), "attn_v": (16, 64), "ffn_gate": (64, 64), "ffn_up": (64, 64)}
    shapes["ffn_down"] = (64, 64)
    extra = {
        f"blk.1.{name}.weight": rng.standard_normal(shape, np.float32) / 8
        for name, shape in shapes.items()
    }
    path = write_with_tensors(tmp_path, extra, metadata)
    with GGUFFile.open(path) as file:
        model = Model.load(file)
        caches = [op.cache.n_heads for op in model.graph.ops if isinstance(op, Attention)]
        assert caches == [2, 1]
        segment = model.graph.segment()
        with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as program:
            expected = program.submit(batch_of(IDS)).wait().logits
        np.testing.assert_array_equal(logits(segment, IDS), expected)
    assert describe(str(path))["n_kv_heads"] == [2, 1]


def test_the_real_model(data_file: Callable[[str], Path]) -> None:
    with GGUFFile.open(data_file("models/SmolLM2-135M-Instruct.Q4_1.gguf")) as file:
        model = Model.load(file)
        attention = next(op for op in model.graph.ops if isinstance(op, Attention))
        assert (model.hparams.n_layers, attention.n_heads, attention.cache.k_dim) == (30, 9, 64)
        assert 134e6 < model.n_params < 136e6
        assert model.quantisation == "Q4_1 + Q8_0 + F32"


# -- files that don't ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 0),
        ("llama.block_count", 1 << 31),
        ("llama.block_count", "two"),
        ("llama.block_count", [1, 2]),
        ("llama.context_length", [256, 256]),
        ("llama.embedding_length", 0),
        ("llama.embedding_length", -64),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 1 << 30),
        ("llama.attention.head_count_kv", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.head_count_kv", 8),
        ("llama.attention.head_count_kv", [2, 2, 2]),
        ("llama.attention.head_count_kv", [2, 3]),
        ("llama.attention.head_count_kv", [0, 0]),
        ("llama.attention.head_count_kv", ["a", "b"]),
        ("llama.feed_forward_length", -1),
        ("llama.attention.layer_norm_rms_epsilon", 0.0),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", 10.0),
        ("llama.attention.key_length", 0),
        ("llama.rope.dimension_count", 0),
        ("llama.rope.dimension_count", 15),
        ("llama.rope.dimension_count", 18),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.freq_base", float("inf")),
        ("llama.rope.scaling.factor", -2.0),
        ("llama.rope.scaling.factor", 1e-30),
        ("llama.rope.scaling.type", 1),
        ("llama.context_length", 0),
        ("tokenizer.ggml.tokens", ["a", "b"]),
        ("tokenizer.ggml.tokens", 5),
        ("general.architecture", 3),
        ("general.name", 3),
    ],
)
def test_a_senseless_number_is_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(InvalidModelError) as caught, loaded(tmp_path, metadata={key: value}):
        pass
    assert caught.value.field == key
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("llama.embedding_length", 128, "token_embd.weight"),
        ("llama.feed_forward_length", 96, "blk.0.ffn_gate.weight"),
        ("llama.attention.head_count_kv", 1, "blk.0.attn_k.weight"),
        ("llama.block_count", 3, "blk.2.attn_norm.weight"),
    ],
)
def test_a_number_that_contradicts_the_tensors(
    tmp_path: Path, key: str, value: int, field: str
) -> None:
    with pytest.raises(InvalidModelError) as caught, loaded(tmp_path, metadata={key: value}):
        pass
    assert caught.value.field == field


@pytest.mark.parametrize("arch", ["gemma4", "made-up", "__init__", "os.path", "../x", "Llama"])
def test_an_unknown_architecture_is_named_beside_those_that_run(tmp_path: Path, arch: str) -> None:
    metadata = {"general.architecture": arch}
    with pytest.raises(UnsupportedModelError) as caught, loaded(tmp_path, metadata=metadata):
        pass
    assert caught.value.architecture == arch
    for word in (arch, *architectures()):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "missing"),
    [
        ("rope.scaling.type", "dynamic", "rope scaling 'dynamic'"),
        ("expert_count", 8, "expert_count"),
        ("attention.causal", False, "attention to later tokens (an encoder)"),
        ("attention.clamp_kqv", 8.0, "attention.clamp_kqv"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("nextn_predict_layers", 1, "nextn_predict_layers"),
        ("hidden_activation", "gelu", "hidden_activation"),
        ("hidden_activation", ["silu", "gelu"], "hidden_activation"),
        ("logit_scale", 0.25, "logit_scale"),
        ("logit_scale", [1.0, 2.0], "logit_scale"),
        ("logit_scale", float("nan"), "logit_scale"),
        ("no_such_key", 7, "no_such_key"),
        ("no_such_key", "text\n", "no_such_key"),
        ("attention.recurrent_layers", [False, True], "attention.recurrent_layers"),
        ("attention.sliding_window", 255, "attention.sliding_window"),
        ("attention.sliding_window", [0, 64], "attention.sliding_window"),
        ("attention.sliding_window", "64", "attention.sliding_window"),
        ("attention.sliding_window", float("nan"), "attention.sliding_window"),
    ],
)
def test_a_key_that_acts_and_that_nobody_reads_is_named(
    tmp_path: Path, key: str, value: Any, missing: str | None
) -> None:
    metadata = {f"llama.{key}": value}
    if missing is None:  # neutral where it is false, and never else but true
        with loaded(tmp_path, metadata=metadata):
            return
    with pytest.raises(UnsupportedModelError) as caught, loaded(tmp_path, metadata=metadata):
        pass
    assert caught.value.missing == (missing,)
    assert f"llama.{key}" in str(caught.value) and str(caught.value).isprintable()


def test_keys_that_change_nothing_are_left_aside(tmp_path: Path) -> None:
    for name, entry in keys._INERT.items():
        if name == "rope.scale_linear":  # read where `rope.scaling.factor` is not there
            continue
        for value in entry.values or (7, 0.5, "text", [1, 2]):
            with loaded(tmp_path, metadata={f"llama.{name}": value}):
                pass
    for value in (0, 0.0, False, "", [0, 0], [False], []):
        with loaded(tmp_path, metadata={"llama.no_such_key": value}):
            pass
    with loaded(tmp_path, metadata={"other.logit_scale": 7, "general.no_such_key": 7}):
        pass


def test_what_acts_only_with_another_key_acts_once_that_is_read(tmp_path: Path) -> None:
    """A model file that knows windows must know their rotation, too."""
    metadata = {"llama.attention.sliding_window": 999, "llama.rope.freq_base_swa": 7.0}
    with GGUFFile.open(tiny_model(tmp_path, metadata=metadata)) as file:
        Model.load(file)
        asked = keys.Keys(file)
        for name in ("embedding_length", "feed_forward_length", "rope.dimension_count"):
            asked.count(name)
        asked.count("attention.sliding_window")
        for name in ("head_count", "head_count_kv", "key_length", "value_length"):
            asked.count(f"attention.{name}")
        asked.number("attention.layer_norm_rms_epsilon")
        asked.number("rope.freq_base")
        with pytest.raises(UnsupportedModelError, match="llama.rope.freq_base_swa is 7"):
            asked.check_all_read()


def test_the_order_of_samplers_acts_or_is_refused(tmp_path: Path) -> None:
    key = "general.sampling.sequence"
    with loaded(tmp_path, metadata={key: "top_k;temperature"}) as model:
        params = SamplingParams.resolve({}, model.sampling)
    assert (params.top_k, params.temperature) == (40, 0.8)
    assert (params.top_p, params.min_p, params.typical_p, params.repeat_last_n) == (1, 0, 1, 0)
    default = ";".join(model_module._CHAIN)
    with loaded(tmp_path, metadata={key: default}) as model:
        assert SamplingParams.resolve({"seed": 1}, model.sampling) == SamplingParams(seed=1)
    for odd in ("temperature;top_k", "top_k;top_k", "top_k;made\nup"):
        with pytest.raises(UnsupportedModelError, match="sampling.sequence is .* in the order"):
            with loaded(tmp_path, metadata={key: odd}):
                pass


def test_a_window_that_holds_the_context_changes_nothing(tmp_path: Path) -> None:
    for window in (0, 256, 4096):
        with loaded(tmp_path, metadata={"llama.attention.sliding_window": window}) as model:
            assert model.hparams.n_ctx_train == 256


def test_shapes_may_have_leading_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    extra = {
        "output_norm.weight": np.ones((1, 64), np.float32),
        "blk.1.ffn_norm.weight": np.ones((1, 1, 64), np.float32),
        "rope_freqs.weight": np.ones((1, 8), np.float32),
        "token_embd.weight": rng.standard_normal((1, 320, 64), dtype=np.float32),
        "blk.0.attn_q.weight": rng.standard_normal((1, 1, 64, 64), dtype=np.float32),
    }
    path = write_with_tensors(tmp_path, extra, rope_freqs=True, tied=True)
    with GGUFFile.open(path) as file:
        model = Model.load(file)
        norm = next(op for op in model.graph.ops if isinstance(op, RmsNorm))
        assert norm.weight.shape == (64,)
        embed, head = model.graph.ops[0], linears(model)["token_embd.weight"]
        assert isinstance(embed, Embed) and embed.weight is head.weight
        assert embed.weight.shape == (320, 64)
        assert linears(model)["blk.0.attn_q.weight"].weight.shape == (64, 64)


@pytest.mark.parametrize("shape", [(64, 1), (2, 32), (1, 63)])
def test_other_shapes_of_as_many_numbers_are_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    path = write_with_tensors(tmp_path, {"output_norm.weight": np.ones(shape, np.float32)})
    with GGUFFile.open(path) as file, pytest.raises(InvalidModelError) as caught:
        Model.load(file)
    assert caught.value.field == "output_norm.weight"


def write_with_tensors(
    folder: Path,
    extra: dict[str, np.ndarray[Any, Any]],
    metadata: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    **options: Any,
) -> Path:
    """A tiny model with more tensors and keys, or with other contents of the ones it has."""
    source, path = tiny_model(folder, **options), folder / "more.gguf"
    writer = gguf.GGUFWriter(path, options.get("arch", "llama"))
    with GGUFFile.open(source) as file:
        for key, value in file.metadata.items():
            if key in (metadata or {}):
                continue
            if key != "general.architecture" and not key.startswith("tokenizer."):
                assert isinstance(value, (bool, int, float, str))
                tokenizers.add_value(writer, key, value)
        for name, weight in file.tensors.items():
            if name not in (*extra, *without):
                n_rows = weight.shape[0] if len(weight.shape) == 2 else 1
                data = np.frombuffer(weight.data[:], np.uint8).reshape(n_rows, -1).copy()
                kind = gguf.GGMLQuantizationType(weight.type.ggml_id)
                writer.add_tensor(name, data if n_rows > 1 else data[0], raw_dtype=kind)
        for key, value in (metadata or {}).items():
            tokenizers.add_value(writer, key, value)
        for name, values in extra.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("blk.1.attn_sinks.weight", "blk.1.attn_sinks.weight"),
        ("blk.1.attn_norm.bias", "blk.1.attn_norm.bias"),
        ("blk.1.something.weight", "blk.1.something.weight"),
    ],
)
def test_a_tensor_that_nothing_reads_is_named(tmp_path: Path, name: str, missing: str) -> None:
    path = write_with_tensors(tmp_path, {name: np.ones(32, np.float32)})
    with GGUFFile.open(path) as file, pytest.raises(UnsupportedModelError) as caught:
        Model.load(file)
    assert caught.value.missing == (missing,)


def test_what_stands_in_place_of_a_tensor_is_named(tmp_path: Path) -> None:
    """A llama with experts has the name of one without."""
    extra = {"blk.0.ffn_gate_exps.weight": np.ones((2, 128, 64), np.float32)}
    path = write_with_tensors(tmp_path, extra, without=("blk.0.ffn_gate.weight",))
    with GGUFFile.open(path) as file, pytest.raises(UnsupportedModelError) as caught:
        Model.load(file)
    for word in ("blk.0.ffn_gate.weight", "blk.0.ffn_gate_exps.weight", "llama"):
        assert word in str(caught.value)


def test_old_rotation_tables_are_left_alone(tmp_path: Path) -> None:
    extra = {"blk.0.attn_rot_embd.weight": np.ones(32, np.float32)}
    with GGUFFile.open(write_with_tensors(tmp_path, extra)) as file:
        assert Model.load(file).hparams.vocab_size == 320


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("-inf")])
def test_rope_factors_are_positive(tmp_path: Path, bad: float) -> None:
    factors = np.ones(8, np.float32)
    factors[3] = bad
    path = write_with_tensors(tmp_path, {"rope_freqs.weight": factors}, rope_freqs=True)
    with GGUFFile.open(path) as file, pytest.raises(InvalidModelError) as caught:
        Model.load(file)
    assert caught.value.field == "rope_freqs.weight"


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_rope_factors_of_any_size_and_type_act(tmp_path: Path, kind: type[Any]) -> None:
    """1e30, which float16 holds as infinity, leaves a pair as it is."""
    with np.errstate(over="ignore"):
        factors = np.array([1, 2, 3, 4, 1e30, 1e30, 1e30, 1e30]).astype(kind)
    path = write_with_tensors(tmp_path, {"rope_freqs.weight": factors}, rope_freqs=True)
    with GGUFFile.open(path) as file:
        segment = Model.load(file).graph.segment()
        rope = next(op.rope for op in segment.ops if isinstance(op, Rotate))
        assert (rope.frequencies()[4:] < 1e-20).all()
        with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as reference:
            expected = reference.submit(batch_of(IDS)).wait().logits
        np.testing.assert_array_equal(logits(segment, IDS), expected)


def test_a_type_that_does_not_run_is_named(tmp_path: Path) -> None:
    path = write_with_tensors(tmp_path, {"blk.1.ffn_norm.weight": np.ones(64, np.float64)})
    with GGUFFile.open(path) as file, pytest.raises(UnsupportedModelError) as caught:
        Model.load(file)
    assert caught.value.missing == ("F64",)
    for word in ("blk.1.ffn_norm.weight", "F64", "Q4_K"):
        assert word in str(caught.value)


def test_vocabularies_are_no_models(data_file: Callable[[str], Path]) -> None:
    with GGUFFile.open(data_file("vocab/ggml-vocab-llama-spm.gguf")) as file:
        with pytest.raises(EdgeInferError):
            Model.load(file)
