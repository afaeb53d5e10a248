"""Models of every family with a key or a tensor that is another: refused, or computed as the law.

What the models are: golden_models.py. Files that are damaged as files: test_gguf_fuzz.py.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import StepLimits, StepRequest
from edgeinfer.engine.engine import Engine
from edgeinfer.errors import EdgeInferError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.model import Model

from .backends import backend
from .golden_models import GOLDENS, VOCAB, Draft

VALUES: tuple[Any, ...] = (
    0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 96, 100, 127, 255, 256, 1000, 4096,
    65535, 2**20, 2**31 - 1, 2**32 - 1, -1, -5, 0.5, 1.5, 16.0, 1e-30, 1e30, float("nan"),
    float("inf"), -1.0, True, False, "", "yarn", "linear", "none", "longrope", [1, 2], [2, 2],
    [0, 0], [16, 16], [1.5, 2.5], [True, False], ["a", "b"], [], [1, 2, 3], [4] * 40,
)  # fmt: skip
KEYS = (
    "attention.key_length", "attention.value_length", "attention.key_length_swa",
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.freq_base_swa", "attention.temperature_scale", "attention.scale", "logit_scale",
    "embedding_scale", "residual_scale", "final_logit_softcapping", "attn_logit_softcapping",
    "expert_count", "expert_used_count", "expert_weights_scale", "nextn_predict_layers",
    "full_attention_interval", "attention.recurrent_layers", "ssm.group_count", "ssm.conv_kernel",
    "shortconv.l_cache", "attention.causal", "rope.scaling.yarn_log_multiplier", "pooling_type",
)  # fmt: skip
FILLS = (np.nan, np.inf, -np.inf, 0.0, 1e38, 1e-45)


def change(rng: random.Random, draft: Draft) -> str:
    """One thing of a model becomes another; what it was."""
    kind = rng.randrange(8)
    if kind < 6:
        name = rng.choice([*draft.keys] if kind < 4 else KEYS)
        draft.keys[name] = rng.choice(VALUES)
    elif kind == 6:
        del draft.keys[name := rng.choice([*draft.keys])]
    else:
        name = rng.choice([*draft.tensors])
        old = draft.tensors[name]
        draft.tensors[name] = rng.choice(
            (old.T, np.full_like(old, rng.choice(FILLS)), old[: max(1, len(old) - 1)],
             old[..., : max(1, old.shape[-1] // 2)])
        ).copy()  # fmt: skip
    return name


def logits(machine: str, segment: Segment, ids: list[int]) -> NDArray[np.float32]:
    request = StepRequest(96, 1, 2, n_states=9 if segment.states else 0)
    limits = StepLimits.of(request, segment.output.dim, segment.groups, 32)
    engine = Engine(backend(machine).compile(segment, limits), limits, 96, segment.output.dim)
    try:
        return engine.logits(ids, last=3, prefill_chunk=17)
    finally:
        engine.close()


@pytest.mark.parametrize("n", [40, pytest.param(4000, marks=pytest.mark.slow)])
def test_odd_models_are_refused_or_computed_alike(tmp_path: Path, n: int) -> None:
    outcomes = Counter[str]()
    for seed in range(n):
        rng = random.Random(seed)
        draft = GOLDENS[rng.choice([*GOLDENS])].draft()
        names = [change(rng, draft) for _ in range(rng.choice((1, 1, 2)))]
        with np.errstate(all="ignore"):  # gguf-py's blocks of what is infinite
            path = draft.write(tmp_path / f"{seed}.gguf", rng.choice(("F32", "Q8_0")))
        try:
            with GGUFFile.open(path) as file:
                segment = Model.load(file).graph.segment()
                ids = [(7 * i + 3) % min(VOCAB, segment.output.dim) for i in range(40)]
                ours = logits("cpu", segment, ids)
                np.testing.assert_array_equal(ours, logits("reference", segment, ids), str(names))
            outcomes["computed"] += 1
        except EdgeInferError:
            outcomes["refused"] += 1
        path.unlink()
    assert min(outcomes.values()) > n // 20 and len(outcomes) == 2, outcomes
