"""Every family against logits of llama.cpp, and against itself without each of its features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.batch import StepLimits
from edgeinfer.errors import UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Segment
from edgeinfer.kernels import reference
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model

from .golden_models import GOLDENS, N_PROMPT, PROMPT, ROWS, Draft
from .test_cpu_program import batch_of

FOLDER = Path(__file__).parent / "goldens"
# Families whose model file is still to come.
LACKING = {
    "llama-experts",
    "qwen3moe",
    "granitemoe",
    "gemma2",
    "gemma3",
    "olmo3",
    "granite",
    "granite-without-rope",
    "smollm3",
    "mistral3",
    "phi3-short",
    "phi3-long",
    "olmo2",
}
LIMITS = StepLimits(2, N_PROMPT, len(ROWS), 1, 1)
Logits = NDArray[np.float32]


@pytest.fixture(autouse=True)
def gelu_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks GELU up in a table of float16."""
    exact = reference._EXACT_ACTIVATIONS["gelu"]

    def gelu(x: NDArray[np.float64]) -> Any:
        return exact(x.astype(np.float16).astype(np.float64)).astype(np.float16).astype(np.float64)

    monkeypatch.setitem(reference._EXACT_ACTIVATIONS, "gelu", gelu)


def kept(name: str, draft: Draft) -> Logits:
    """The logits that llama.cpp has for a model."""
    with np.load(FOLDER / f"{name}.npz") as golden:
        assert golden["digest"] == draft.digest(), "the model is another: make its golden anew"
        logits: Logits = golden["logits"]
        return logits


def ours(draft: Draft, folder: Path) -> Logits:
    """The reference's."""
    with GGUFFile.open(draft.write(folder / "golden.gguf")) as file:
        segment = Model.load(file).graph.segment()
        with ReferenceBackend().compile(rewritten(segment, draft), LIMITS) as program:
            batch = batch_of(PROMPT, pages=(0, 1))
            batch.wanted = np.array(ROWS, np.int32)
            return program.submit(batch).wait().logits


def skip_if_lacking(name: str, folder: Path) -> None:
    """What is not known here yet ends with what is missing, and what is known may not."""
    if name in LACKING:
        with pytest.raises(UnsupportedModelError) as caught:
            ours(GOLDENS[name].draft(), folder)
        pytest.skip(str(caught.value))


def rewritten(segment: Segment, draft: Draft) -> Segment:
    ops = segment.ops
    for change in draft.rewrites:
        changed = tuple(map(change, ops))
        assert changed != ops, "there was nothing to leave out"
        ops = changed
    return segment._replace(ops=ops)


def divergence(theirs: Logits, ours: Logits) -> float:
    """KL of the probabilities, the largest of all rows."""
    p, q = (_log_softmax(rows.astype(np.float64)) for rows in (theirs, ours))
    return float((np.exp(p) * (p - q)).sum(axis=1).max())


def _log_softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_are_llama_cpps(name: str, tmp_path: Path) -> None:
    skip_if_lacking(name, tmp_path)
    draft = GOLDENS[name].draft()
    theirs = kept(name, draft)
    assert (theirs.max(axis=1) - theirs.min(axis=1)).min() >= 2
    assert divergence(theirs, ours(draft, tmp_path)) <= 1e-6


FEATURES = [(name, feature) for name, golden in GOLDENS.items() for feature in golden.without]


@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_without_a_feature_they_are_others(name: str, feature: str, tmp_path: Path) -> None:
    skip_if_lacking(name, tmp_path)
    draft = GOLDENS[name].draft()
    theirs = kept(name, draft)
    GOLDENS[name].without[feature](draft)
    assert divergence(theirs, ours(draft, tmp_path)) > 1e-3
