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
from edgeinfer.kernels.cpu.program import CpuBackend
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model

from .golden_models import GOLDENS, N_CTX, N_PROMPT, PROMPT, ROWS, TO_COME, Draft
from .native import cache_root
from .test_cpu_program import batch_of

FOLDER = Path(__file__).parent / "goldens"
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
        segment = Model.load(file).graph.segment(n_ctx=N_CTX)
        with ReferenceBackend().compile(rewritten(segment, draft), LIMITS) as program:
            batch = batch_of(PROMPT, pages=(0, 1))
            batch.wanted = np.array(ROWS, np.int32)
            return program.submit(batch).wait().logits


def skip_if_to_come(name: str, folder: Path) -> None:
    """What is not known here yet ends with what is missing, and what is known may not."""
    if name in TO_COME:
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
    skip_if_to_come(name, tmp_path)
    draft = GOLDENS[name].draft()
    theirs = kept(name, draft)
    assert (theirs.max(axis=1) - theirs.min(axis=1)).min() >= 2
    assert divergence(theirs, ours(draft, tmp_path)) <= 1e-6


FEATURES = [(name, feature) for name, golden in GOLDENS.items() for feature in golden.without]


@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_without_a_feature_they_are_others(name: str, feature: str, tmp_path: Path) -> None:
    skip_if_to_come(name, tmp_path)
    draft = GOLDENS[name].draft()
    theirs = kept(name, draft)
    GOLDENS[name].without[feature](draft)
    assert divergence(theirs, ours(draft, tmp_path)) > 1e-3


@pytest.mark.parametrize("name", GOLDENS)
def test_the_cpu_has_the_references_bits_in_one_pass_and_in_many(name: str, tmp_path: Path) -> None:
    skip_if_to_come(name, tmp_path)
    ids = PROMPT[:40]
    with GGUFFile.open(GOLDENS[name].draft().write(tmp_path / "golden.gguf")) as file:
        segment = Model.load(file).graph.segment(n_ctx=N_CTX)
        limits = LIMITS._replace(max_outputs=N_PROMPT, n_threads=2)
        with ReferenceBackend().compile(segment, limits, mode="quantised") as program:
            expected = program.submit(batch_of(ids, pages=(0, 1))).wait().logits
        with CpuBackend(cache_root()).compile(segment, limits) as cpu:
            whole = cpu.submit(batch_of(ids, pages=(0, 1))).wait().logits.copy()
            cuts = [0, 1, 9, 31, 33, 40]
            parts = [
                cpu.submit(batch_of(ids[i:j], i, (1, 0))).wait().logits.copy()
                for i, j in zip(cuts, cuts[1:], strict=False)
            ]
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(np.concatenate(parts), expected)
