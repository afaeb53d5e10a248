"""A rehearsal: an architecture of known parts that nobody has runs once its one file is there."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer import LLM, models
from edgeinfer.graph import Segment
from edgeinfer.kernels.reference import ReferenceBackend

from .golden_models import DIM, PROMPT, Draft, Edit, Golden, filled, no_key
from .test_cpu_program import batch_of
from .test_families import check_cuts, limits

MADE_UP = '''"""Rehearsal: norms behind branches, windows, gates behind attention, experts."""

from edgeinfer.graph import Graph


def forward(g: Graph) -> None:
    x = g.scale(g.embed(), g.number("embedding_scale", 1.0))
    for blk in g.layers():
        window = g.window(3)  # two of three layers
        heads = g.heads(window)
        rope = g.rope("neox", heads.k_dim)
        q, k, v = g.qkv(x, blk, heads)
        q = g.rms_norm(q, f"{blk}.attn_q_norm", heads.n)
        if window:
            q, k = g.rotate(q, heads.n, rope), g.rotate(k, heads.n_kv, rope)
        a = g.attention(q, k, v, cache=heads.cache)
        a = a * g.activation("sigmoid", g.linear(x, f"{blk}.attn_gate", a.dim))
        x = x + g.rms_norm(g.linear(a, f"{blk}.attn_output", g.dim), f"{blk}.attn_norm")
        f = g.experts(x, blk, g.count("feed_forward_length"), gating="sigmoid")
        x = g.layer_output(x + g.rms_norm(f, f"{blk}.ffn_norm"))
    g.head(g.rms_norm(g.select_rows(x), "output_norm"), soft_cap=9.0)
'''

HEAD, FFN, N_EXPERTS, N_VOCAB = 32, 64, 5, 320
HEADS, KV_HEADS = [4, 4, 4, 4, 2, 2], [2, 2, 2, 2, 1, 2]  # other ones in the last layers
WINDOW = 11


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (N_VOCAB, DIM),
        "output.weight": (N_VOCAB, DIM),
        "output_norm.weight": (DIM,),
    }
    for i, (n, n_kv) in enumerate(zip(HEADS, KV_HEADS, strict=True)):
        layer: dict[str, tuple[int, ...]] = {
            "attn_q": (n * HEAD, DIM), "attn_k": (n_kv * HEAD, DIM), "attn_v": (n_kv * HEAD, DIM),
            "attn_q_norm": (HEAD,), "attn_gate": (n * HEAD, DIM), "attn_output": (DIM, n * HEAD),
            "attn_norm": (DIM,), "ffn_norm": (DIM,), "ffn_gate_inp": (N_EXPERTS, DIM),
            "ffn_gate_exps": (N_EXPERTS, FFN, DIM), "ffn_up_exps": (N_EXPERTS, FFN, DIM),
            "ffn_down_exps": (N_EXPERTS, DIM, FFN), "ffn_gate_shexp": (FFN, DIM),
            "ffn_up_shexp": (FFN, DIM), "ffn_down_shexp": (DIM, FFN),
        }  # fmt: skip
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


KEYS: dict[str, Any] = {
    "block_count": len(HEADS), "context_length": 256, "embedding_length": DIM,
    "feed_forward_length": FFN, "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD,
    "attention.layer_norm_rms_epsilon": 1e-5, "attention.sliding_window": WINDOW,
    "expert_count": N_EXPERTS, "expert_used_count": 2, "vocab_size": N_VOCAB,
}  # fmt: skip


@pytest.fixture
def draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draft:
    """The model; its architecture is a file in a folder of its own."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "rehearsal.py").write_text(MADE_UP, encoding="utf-8")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    return Golden("rehearsal", "rehearsal", KEYS, shapes(), {}).draft()


def reference(segment: Segment, ids: list[int]) -> NDArray[np.float32]:
    with ReferenceBackend().compile(segment, limits(segment), mode="quantised") as program:
        batch = batch_of(ids, pages=(0, 1), n_groups=len(segment.groups))
        return program.submit(batch).wait().logits


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_the_cpu_has_the_references_bits(draft: Draft, tmp_path: Path, quant: str) -> None:
    assert len(MADE_UP.splitlines()) <= 50
    with draft.loaded(tmp_path, quant) as model:
        segment = model.graph.segment()
        assert len(segment.groups) == 2 and len({*segment.caches.values()}) == 3
        check_cuts(segment, [0, 13, 14, 45])


def test_every_part_takes_part(draft: Draft, tmp_path: Path) -> None:
    """Without any of them the logits are others."""

    edits: list[Edit] = [
        no_key("attention.sliding_window"),
        filled(0, "attn_gate.weight"),
        filled(1, "attn_q_norm.weight"),
        filled(0, "ffn_down_shexp.weight"),
        filled(0, "ffn_down_exps.weight"),
    ]
    found = []
    for edit in (lambda draft: None, *edits):
        edit(draft)
        with draft.loaded(tmp_path) as model:
            found.append(reference(model.graph.segment(), PROMPT[:20])[-1])
    assert all(np.abs(a - b).max() > 0.01 for a, b in pairwise(found))


def test_it_runs_like_any_other(draft: Draft, tmp_path: Path) -> None:
    path = draft.write(tmp_path / "m.gguf", "Q4_0", has_tokenizer=True)
    with LLM(path, n_ctx=128) as llm:
        answer = llm.generate("hello", max_tokens=40, logit_bias={257: -1e9})  # which would end it
        assert len(answer.token_ids) == 40
