"""What converters write of families beside the numbers that act, and numbers that can't be."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.errors import EdgeInferError, InvalidModelError, UnsupportedModelError
from edgeinfer.graph import Attention, Op, Rotate
from edgeinfer.kernels.cpu.blueprint import Blueprint
from edgeinfer.kernels.shapes import check_shapes
from edgeinfer.rope import LEAST_FACTOR

from . import golden_models
from .golden_models import FFN, GOLDENS, HEAD, N_CTX, Draft
from .test_families import limits


def recorded(draft: Draft, folder: Path) -> list[tuple[str, Any]]:
    """What acts of a model's pass: ropes, and how attention sees."""
    with draft.loaded(folder) as model:
        return [_facts(op) for op in model.graph.ops]


def _facts(op: Op) -> tuple[str, Any]:
    if isinstance(op, Rotate):
        return "rotate", op.rope._replace(factors=None)
    if isinstance(op, Attention):
        return "attention", (op.cache, op.scale, op.soft_cap)
    return type(op).__name__, op.out.dim


_OWN = 1 + 0.1 * math.log(4)  # the magnitude of YaRN by 4, which the goldens have


@pytest.mark.parametrize(
    "keys",
    [
        {"yarn_attn_factor": _OWN, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0},  # OLMo 3
        {"yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0},  # Rnj-1
        {"yarn_attn_factor": 1 / _OWN},  # DeepSeek's Qwen 3
        {"yarn_ext_factor": -1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["olmo3", "llama-yarn"])
def test_what_says_that_yarn_is_as_usual_changes_nothing(
    name: str, keys: dict[str, float], tmp_path: Path
) -> None:
    expected = recorded(GOLDENS[name].draft(), tmp_path)
    draft = GOLDENS[name].draft()
    draft.keys |= {f"rope.scaling.{key}": value for key, value in keys.items()}
    assert recorded(draft, tmp_path) == expected


@pytest.mark.parametrize("name", ["olmo3", "llama-yarn", "mistral3"])
def test_the_betas_of_a_file_act_in_every_family(name: str, tmp_path: Path) -> None:
    draft = GOLDENS[name].draft()
    draft.keys |= {"rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.5}
    ropes = [fact for kind, fact in recorded(draft, tmp_path) if kind == "rotate"]
    yarns = {rope.yarn for rope in ropes if rope.yarn is not None}
    assert [yarn[1:] for yarn in yarns] == [(4.0, 0.5)]


@pytest.mark.parametrize(
    ("key", "value"),
    [("yarn_attn_factor", 1.25), ("yarn_attn_factor", 0.0), ("yarn_ext_factor", 0.5)],
)
def test_what_would_change_yarn_is_named(key: str, value: float, tmp_path: Path) -> None:
    draft = GOLDENS["olmo3"].draft()
    draft.keys[f"rope.scaling.{key}"] = value
    with pytest.raises(UnsupportedModelError, match=f"olmo2.rope.scaling.{key} is {value}"):
        recorded(draft, tmp_path)


WINDOWED = {
    "rope.freq_base_swa": 1e4, "attention.key_length_swa": 8, "attention.value_length_swa": 8,
    "rope.dimension_count_swa": 8,
}  # fmt: skip


@pytest.mark.parametrize("width", [None, 0])
def test_keys_of_windows_change_nothing_where_there_are_none(
    width: int | None, tmp_path: Path
) -> None:
    """A Gemma 3 without windows, as Rnj-1 is, says the base of those that it has not."""
    draft = GOLDENS["gemma3"].draft()
    draft.keys["attention.sliding_window"] = 0
    expected = recorded(draft, tmp_path)
    draft.keys |= WINDOWED
    if width is None:
        del draft.keys["attention.sliding_window"]
    assert recorded(draft, tmp_path) == expected


def test_keys_of_windows_act_where_there_are_some(tmp_path: Path) -> None:
    for name in ("gemma2", "gemma3"):
        draft = GOLDENS[name].draft()
        expected = recorded(draft, tmp_path)
        draft.keys["rope.freq_base_swa"] = 77.0
        if name == "gemma3":
            assert recorded(draft, tmp_path) != expected
            continue
        del draft.keys["attention.sliding_window"]  # it has some by default
        with pytest.raises(UnsupportedModelError, match="gemma2.rope.freq_base_swa is 77"):
            recorded(draft, tmp_path)


def test_the_length_that_yarn_sets_out_from_may_be_any_that_a_context_has(tmp_path: Path) -> None:
    draft = GOLDENS["llama-yarn"].draft()
    del draft.keys["rope.scaling.original_context_length"]
    draft.keys["context_length"] = 1 << 22
    ropes = {facts for kind, facts in recorded(draft, tmp_path) if kind == "rotate"}
    assert [rope.yarn.n_ctx for rope in ropes] == [1 << 22]


def test_a_width_of_layers_that_are_not_there_changes_nothing(tmp_path: Path) -> None:
    draft = GOLDENS["lfm2moe"].draft()
    draft.keys["leading_dense_block_count"] = 0
    for name in [name for name in draft.tensors if name.startswith("blk.0.ffn_")]:
        del draft.tensors[name]
    for name in [name for name in draft.tensors if name.startswith("blk.1.")]:
        if "_exps" in name or "ffn_norm" in name or "_inp" in name or "exp_probs" in name:
            draft.tensors[name.replace("blk.1", "blk.0")] = draft.tensors[name]
    assert draft.keys["feed_forward_length"] == FFN
    assert recorded(draft, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "runs"),
    [
        ("gemma3", "gelu_pytorch_tanh", True), ("gemma2", "gelu", True), ("llama", "silu", True),
        ("gemma3", "silu", False), ("gemma2", "silu", False), ("llama", "gelu", False),
    ],
)  # fmt: skip
def test_the_activation_that_a_file_names_is_the_familys(
    name: str, value: str, runs: bool, tmp_path: Path
) -> None:
    draft = GOLDENS[name].draft()
    draft.keys["hidden_activation"] = value
    if runs:
        assert recorded(draft, tmp_path)
        return
    with pytest.raises(UnsupportedModelError, match=f"{name}.hidden_activation is {value}"):
        recorded(draft, tmp_path)


def test_a_width_that_nothing_tells_is_said_to_be_missing(tmp_path: Path) -> None:
    draft = GOLDENS["qwen3moe"].draft()
    del draft.keys["expert_feed_forward_length"], draft.keys["feed_forward_length"]
    with pytest.raises(InvalidModelError, match="lacks this metadata key") as caught:
        recorded(draft, tmp_path)
    assert caught.value.field == "qwen3moe.expert_feed_forward_length"


NUMBERS = [
    *(("granite", f"{key}_scale") for key in ("embedding", "residual", "logit")),
    ("granite", "attention.scale"), ("qwen35", "attention.scale"),
    ("gemma2", "attn_logit_softcapping"), ("gemma2", "final_logit_softcapping"),
    ("lfm2moe", "expert_weights_scale"), ("qwen3moe", "swiglu_clamp_exp"),
    ("qwen35moe", "swiglu_clamp_shexp"), ("llama-linear", "rope.scaling.factor"),
    ("llama-yarn", "rope.scaling.attn_factor"), ("mistral3", "attention.temperature_scale"),
    ("llama", "attention.layer_norm_rms_epsilon"), ("llama", "rope.freq_base"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_a_number_that_no_float32_holds_is_named(name: str, key: str, tmp_path: Path) -> None:
    """It would be infinite, or 0, where kernels have it."""
    for value in (1e300, -1e300, 1e-300, -1e-300, 3e38, 1e-40, 5e-324):
        draft = GOLDENS[name].draft()
        draft.keys[key] = value
        with pytest.raises(InvalidModelError) as caught:
            recorded(draft, tmp_path)
        assert caught.value.field == f"{draft.arch}.{key}"


@pytest.mark.parametrize(("quant", "guesses"), [("F32", True), ("Q8_0", False)])
def test_a_block_that_guesses_is_left_alone_where_it_would_be_cut_inside_a_block(
    quant: str, guesses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream 48 wide: two beside each other are three blocks of 32, one is none."""
    monkeypatch.setattr(golden_models, "DIM", 48)
    golden = next(each for each in golden_models._deltas() if each.name == "qwen35")
    draft = golden.draft()
    draft.keys |= {"attention.key_length": HEAD, "attention.value_length": HEAD}
    with draft.loaded(tmp_path, quant) as model:
        assert (model.graph.segment(drafts=True).draft is not None) == guesses


@pytest.mark.parametrize("least", [0.01, 0.009])
def test_angles_are_none_that_kernels_lose_the_sine_of(least: float, tmp_path: Path) -> None:
    """Those of position 10^9 are at most 10^13."""
    for table in (False, True):
        draft = GOLDENS["llama"].draft()
        if table:
            draft.tensors["rope_freqs.weight"][3] = least * (1 + 1e-6)
        else:
            draft.keys["rope.scaling.factor"] = least * (1 + 1e-6)
        if least < LEAST_FACTOR:
            with pytest.raises(InvalidModelError, match="a number from 0.01"):
                recorded(draft, tmp_path)
        else:
            assert recorded(draft, tmp_path)


SIZES = st.sampled_from([0, 1, 2, 3, 4, 7, 16, 24, 31, 33, 64, 96, 255, 1 << 20, (1 << 31) - 1])
REALS = st.sampled_from([
    0.0, -0.0, 1.0, -1.0, 0.5, 1e-6, 1e6, 1e-30, 1e30, 1e-40, 3e38, 5e-324, 1e300, 1e39, math.nan,
    math.inf,
])  # fmt: skip
ARRAYED = REALS.filter(lambda x: abs(x) < 1e38)  # which are written as float32
TEXTS = st.sampled_from(["yarn", "linear", "none", "longrope", "x", ""])
VALUES = st.one_of(SIZES, REALS, REALS, TEXTS, st.booleans())
NAMED = sorted({key for _, key in NUMBERS} | WINDOWED.keys() | {
    "attention.sliding_window", "attention.sliding_window_pattern", "attention.key_length",
    "attention.value_length", "rope.scaling.type", "rope.scaling.original_context_length",
    "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_fast", "expert_weights_norm",
    "expert_gating_func", "expert_group_count", "expert_group_used_count",
    "full_attention_interval", "leading_dense_block_count", "nextn_predict_layers",
    "attention.causal", "pooling_type",
})  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_numbers_are_refused_by_name_or_lowered(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """What is lowered is what was said: no kernel is told of infinity, or 0, in its place."""
    pairs = st.tuples(st.sampled_from(sorted(GOLDENS)), st.sampled_from(NAMED))
    name, first = data.draw(st.one_of(st.sampled_from(NUMBERS), pairs))
    draft = GOLDENS[name].draft()
    n_layers = draft.keys["block_count"]
    for key in [first, *data.draw(st.lists(st.sampled_from([*draft.keys, *NAMED]), max_size=2))]:
        is_of_layers = data.draw(st.sampled_from([False, False, True]))
        kind = data.draw(st.sampled_from([SIZES, ARRAYED, st.booleans()]))
        of_layers = st.lists(kind, min_size=n_layers, max_size=n_layers)
        draft.keys[key] = data.draw(of_layers if is_of_layers else VALUES)
    with suppress(EdgeInferError):
        with draft.loaded(tmp_path_factory.mktemp("any")) as model:
            segment = model.graph.segment(n_ctx=N_CTX)
            check_shapes(segment, "cpu")
            Blueprint(segment, limits(segment))
            for value in (field for op in segment.ops for field in op):
                is_number = isinstance(value, float) and math.isfinite(value) and value != 0
                assert not is_number or 1e-37 < abs(value) < 3e38, "a float32 holds it"
