"""What a model file may rely on: fused matrices, scales beside them, no list to sign up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer import models
from edgeinfer.dequantize import dequantize
from edgeinfer.errors import InvalidModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model, architectures

from .models_for_tests import tiny_model
from .test_cpu_program import IDS, LIMITS, batch_of, logits
from .test_models import write_with_tensors


def check_reference(segment: Segment, ours: NDArray[np.float32]) -> None:
    with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as program:
        np.testing.assert_array_equal(program.submit(batch_of(IDS)).wait().logits, ours)


# -- one matrix or several, and scales beside them -----------------------------------------------


def tensor(path: Path, name: str) -> np.ndarray[Any, Any]:
    with GGUFFile.open(path) as file:
        return dequantize(file.tensors[name])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_fused_matrices_are_those_they_are_made_of(tmp_path: Path, arch: str) -> None:
    options: dict[str, Any] = dict(arch=arch, quant="F32")
    source = tiny_model(tmp_path, **options)
    fused, without = dict[str, np.ndarray[Any, Any]](), list[str]()
    for blk in ("blk.0", "blk.1"):
        for whole, names in (("attn_qkv", ("attn_q", "attn_k", "attn_v")), FEED_FORWARD):
            for part in ("weight", "bias") if arch == "qwen2" and whole != "ffn_up" else PLAIN:
                parts = [f"{blk}.{name}.{part}" for name in names]
                fused[f"{blk}.{whole}.{part}"] = np.concatenate([tensor(source, n) for n in parts])
                without += parts
    path = write_with_tensors(tmp_path, fused, without=tuple(without), **options)
    with GGUFFile.open(source) as split_file, GGUFFile.open(path) as fused_file:
        split, whole_model = Model.load(split_file), Model.load(fused_file)
        assert len(fused_file.tensors) < len(split_file.tensors)
        segments = split.graph.segment(), whole_model.graph.segment()
        ours, theirs = (logits(segment, IDS) for segment in segments)
        np.testing.assert_array_equal(ours, theirs)
        check_reference(segments[1], ours)


FEED_FORWARD, PLAIN = ("ffn_up", ("ffn_gate", "ffn_up")), ("weight",)


def test_a_scale_beside_a_matrix_multiplies_its_product(tmp_path: Path) -> None:
    """Of powers of two: the same bits as with the weights times that."""
    names = ("token_embd", "output", "blk.0.attn_q", "blk.1.ffn_down", "blk.1.attn_v")
    options: dict[str, Any] = dict(arch="qwen2", quant="F32")
    source = tiny_model(tmp_path, **options)
    twins = {f"{name}.scale": np.full(1, 0.5, np.float32) for name in names}
    twins["blk.0.attn_k.input_scale"] = np.full(1, 7, np.float32)
    scaled = {f"{name}.weight": tensor(source, f"{name}.weight") / 2 for name in names}
    found = []
    for extra in (twins, scaled):
        with GGUFFile.open(write_with_tensors(tmp_path, extra, **options)) as file:
            segment = Model.load(file).graph.segment()
            found.append(logits(segment, IDS))
            with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as program:
                np.testing.assert_array_equal(
                    program.submit(batch_of(IDS)).wait().logits, found[-1]
                )
    np.testing.assert_array_equal(*found)
    twins["output.scale"][0] = np.nan
    with GGUFFile.open(write_with_tensors(tmp_path, twins, **options)) as file:
        with pytest.raises(InvalidModelError, match="output.scale"):
            Model.load(file)


# -- a model file of one's own -------------------------------------------------------------------

MADE_UP = '''"""Norms behind blocks, gated attention, every second layer without positions."""

from edgeinfer.graph import Graph

NAMES = ("made-up", "made-up-2")


def forward(g: Graph) -> None:
    x = g.scale(g.embed(), g.number("embedding_scale"))
    for i, blk in enumerate(g.layers()):
        heads = g.heads()
        rope = g.rope("neox", heads.k_dim)
        q, k, v = g.qkv(x, blk, heads)
        q = g.rms_norm(q, f"{blk}.attn_q_norm")
        if i % 2 == 0:
            q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
        a = g.attention(q, k, g.rms_norm(v, None, heads.n_kv), cache=heads.cache)
        gate = g.linear(x, f"{blk}.attn_gate", a.dim)
        a = g.linear(a * g.activation("sigmoid", gate), f"{blk}.attn_output", g.dim)
        x = x + g.rms_norm(a, f"{blk}.attn_norm")
        gate, up = g.gate_up(x, blk)
        f = g.linear(g.activation("gelu", gate) * up, f"{blk}.ffn_down", g.dim)
        x = g.layer_output(x + g.rms_norm(f, f"{blk}.ffn_norm"))
    cap = g.number("final_logit_softcapping", 0.0)
    g.head(g.rms_norm(g.select_rows(x), "output_norm"), soft_cap=cap)
'''


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_a_model_file_in_the_folder_is_all_that_an_architecture_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    (tmp_path / "made_up.py").write_text(MADE_UP, encoding="utf-8")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    rng = np.random.default_rng(0)
    extra = {
        f"blk.{i}.{name}.weight": values
        for i in range(2)
        for name, values in (
            ("attn_q_norm", (1 + rng.standard_normal(64) / 4).astype(np.float32)),
            ("attn_gate", rng.standard_normal((64, 64), np.float32) / 8),
        )
    }
    metadata = {
        "made-up-2.embedding_scale": 3.0,
        "made-up-2.final_logit_softcapping": 2.0,
    }
    options: dict[str, Any] = dict(arch="made-up-2", quant=quant)
    path = write_with_tensors(tmp_path, extra, metadata, **options)
    with GGUFFile.open(path) as file:
        model = Model.load(file)
        ours = logits(model.graph.segment(), IDS)
        assert 1 < np.abs(ours).max() < 2
        check_reference(model.graph.segment(), ours)
    assert {"made-up", "made-up-2"} <= set(architectures())
