"""Every family against logits of llama.cpp, and against itself without each of its features."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer import LLM
from edgeinfer.batch import Batch, PageTable, StepLimits
from edgeinfer.errors import InvalidModelError, UnsupportedModelError
from edgeinfer.gguf import GGUFFile
from edgeinfer.graph import Attention, Growth, Rotate, Segment
from edgeinfer.kernels.cpu.backend import CpuBackend
from edgeinfer.kernels.reference import ReferenceBackend, exact
from edgeinfer.model import Model

from .backends import FAST, backend
from .golden_models import DIM, GOLDENS, N_CTX, N_PROMPT, PROMPT, ROWS, Draft
from .native import cache_root
from .test_cpu_program import batch_of

FOLDER = Path(__file__).parent / "goldens"
Logits = NDArray[np.float32]


@pytest.fixture(autouse=True)
def gelu_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks GELU up in a table of float16."""
    plain = exact._EXACT_ACTIVATIONS["gelu"]

    def gelu(x: NDArray[np.float64]) -> Any:
        return plain(x.astype(np.float16).astype(np.float64)).astype(np.float16).astype(np.float64)

    monkeypatch.setitem(exact._EXACT_ACTIVATIONS, "gelu", gelu)


def limits(segment: Segment) -> StepLimits:
    n_pages = {window: 2 for window in segment.groups}
    return StepLimits(n_pages, N_PROMPT, N_PROMPT, 1, 2, n_states=2)


def kept(name: str, draft: Draft) -> Logits:
    """The logits that llama.cpp has for a model."""
    with np.load(FOLDER / f"{name}.npz") as golden:
        assert golden["digest"] == draft.digest(), "the model is another: make its golden anew"
        logits: Logits = golden["logits"]
        return logits


def ours(draft: Draft, folder: Path) -> Logits:
    """The reference's."""
    with draft.loaded(folder) as model:
        segment = rewritten(model.graph.segment(n_ctx=N_CTX), draft)
        with ReferenceBackend().compile(segment, limits(segment)) as program:
            batch = batch_of(PROMPT, pages=(0, 1), n_groups=len(segment.groups))
            batch.wanted = np.array(ROWS, np.int32)
            return program.submit(batch).wait().logits


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
    draft = GOLDENS[name].draft()
    theirs = kept(name, draft)
    assert (theirs.max(axis=1) - theirs.min(axis=1)).min() >= 2
    assert divergence(theirs, ours(draft, tmp_path)) <= 1e-6


FEATURES = [(name, feature) for name, golden in GOLDENS.items() for feature in golden.without]


@pytest.mark.parametrize(("name", "feature"), FEATURES)
def test_without_a_feature_they_are_others(name: str, feature: str, tmp_path: Path) -> None:
    draft = GOLDENS[name].draft()
    theirs = kept(name, draft)
    GOLDENS[name].without[feature](draft)
    assert divergence(theirs, ours(draft, tmp_path)) > 1e-3


@pytest.mark.parametrize("machine", FAST)
@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
@pytest.mark.parametrize("name", GOLDENS)
def test_a_machine_has_the_references_bits_in_one_pass_and_in_many(
    name: str, quant: str, machine: str, tmp_path: Path
) -> None:
    with GOLDENS[name].draft().loaded(tmp_path, quant) as model:
        check_cuts(model.graph.segment(n_ctx=N_CTX), [0, 1, 9, 31, 33, 40], machine)


def check_cuts(segment: Segment, cuts: list[int], machine: str = "cpu") -> None:
    """A machine has the reference's bits, for a prompt in one step and cut into some."""
    ids, n = PROMPT[: cuts[-1]], len(segment.groups)
    everything = batch_of(ids, pages=(0, 1), n_groups=n)
    with ReferenceBackend().compile(segment, limits(segment), mode="quantised") as program:
        expected = program.submit(everything).wait().logits
    with backend(machine).compile(segment, limits(segment)) as program:
        whole = program.submit(everything).wait().logits.copy()
        parts, states = [], (-1, 0)
        for i, j in pairwise(cuts):
            step = batch_of(ids[i:j], i, (1, 0), n_groups=n, states=states)
            parts.append(program.submit(step).wait().logits.copy())
            states = states[1], 1 - states[1]
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(np.concatenate(parts), expected)


# -- what a family has that a golden can't show --------------------------------------------------


def test_a_load_chooses_the_rope_factors_of_its_context_length(tmp_path: Path) -> None:
    """Of 100 positions and of 101: the model was trained for 100."""
    draft = GOLDENS["phi3-long"].draft()
    draft.keys["vocab_size"] = 320
    for name in ("token_embd.weight", "output.weight"):
        draft.tensors[name] = np.resize(draft.tensors[name], (320, DIM))
    path = draft.write(tmp_path / "phi3.gguf", has_tokenizer=True)
    found = []
    for n_ctx in (100, 101):
        with LLM(path, n_ctx=n_ctx) as llm:
            found.append(llm.logits(PROMPT, last=len(PROMPT)))
        with GGUFFile.open(path) as file:
            segment = Model.load(file).graph.segment(n_ctx=n_ctx)
            with ReferenceBackend().compile(segment, limits(segment), mode="quantised") as program:
                expected = program.submit(batch_of(PROMPT, pages=(0, 1))).wait().logits
        np.testing.assert_array_equal(found[-1], expected)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_the_other_context_lengths_have_no_factors_where_the_file_has_one_table(
    tmp_path: Path,
) -> None:
    draft = GOLDENS["phi3-long"].draft()
    del draft.tensors["rope_factors_short.weight"]
    with draft.loaded(tmp_path) as model:
        graph = model.graph
    for n_ctx, has_factors in ((100, False), (101, True), (None, True)):
        ops = graph.segment(n_ctx=n_ctx).ops
        assert {op.rope.factors is not None for op in ops if isinstance(op, Rotate)} == {
            has_factors
        }
        assert {op.rope.longer for op in ops if isinstance(op, Rotate)} == {None}


def test_queries_grow_up_to_the_last_span(tmp_path: Path) -> None:
    """As the CPU does, far beyond any context; and only once they have a length of training."""
    draft = GOLDENS["mistral3"].draft()
    draft.keys["rope.scaling.type"] = "none"
    with draft.loaded(tmp_path) as model:
        segment = model.graph.segment()
        growth = {op.rope.growth for op in segment.ops if isinstance(op, Rotate)}
        assert growth == {None, Growth(0.5, 32)}
        with ReferenceBackend().compile(segment, limits(segment), mode="quantised") as program:
            expected = [program.submit(far(pos)).wait().logits for pos in FAR]
        with CpuBackend(cache_root()).compile(segment, limits(segment)) as cpu:
            found = [cpu.submit(far(pos)).wait().logits.copy() for pos in FAR]
    np.testing.assert_array_equal(found, expected)


FAR = (0, 31, 32, 255 * 32 - 1, 255 * 32, 2**31 - 1)


def far(pos: int) -> Batch:
    """One row that sees its own page alone."""
    batch = batch_of(PROMPT[:1], pos)
    batch.tables = [(PageTable(np.array([1], np.int32), 0, 1),)]
    return batch


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("mistral3", "attention.temperature_scale", -1.0),
        ("mistral3", "attention.temperature_scale", float("nan")),
        ("mistral3", "attention.temperature_scale", float("inf")),
        ("mistral3", "attention.temperature_scale", "1"),
        ("mistral3", "rope.scaling.original_context_length", 0),
        ("phi3-long", "rope.scaling.original_context_length", 0),
        ("phi3-long", "rope.dimension_count", 18),
        ("llama-yarn", "rope.freq_base", 1.0),
        ("llama", "rope.scaling.type", "longrope"),
        ("granite", "logit_scale", 0.0),
        ("granite", "logit_scale", -1.0),
        ("granite", "logit_scale", float("nan")),
        ("granite", "embedding_scale", float("inf")),
        ("granite", "residual_scale", "much"),
        ("granite", "rope.scaling.finetuned", 2),
        ("gemma2", "attn_logit_softcapping", -1.0),
        ("gemma2", "final_logit_softcapping", -1.0),
        ("gemma3", "final_logit_softcapping", float("nan")),
        ("gemma3", "rope.freq_base_swa", 1.0),
        ("gemma3", "attention.sliding_window", -1),
        ("olmo3", "attention.sliding_window_pattern", [True, False]),
    ],
)
def test_a_senseless_number_is_named(tmp_path: Path, name: str, key: str, value: Any) -> None:
    draft = GOLDENS[name].draft()
    draft.keys[key] = value
    with pytest.raises(InvalidModelError) as caught, draft.loaded(tmp_path):
        pass
    assert caught.value.field == f"{draft.arch}.{key}"


def test_queries_that_grow_are_rotated_as_a_whole(tmp_path: Path) -> None:
    draft = GOLDENS["mistral3"].draft()
    draft.keys["rope.dimension_count"] = 8
    with pytest.raises(UnsupportedModelError, match="attention.temperature_scale"):
        with draft.loaded(tmp_path):
            pass


@pytest.mark.parametrize(("name", "n_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemmas_of_27_b_scale_scores_by_another_width(
    name: str, n_layers: int, tmp_path: Path
) -> None:
    scales = []
    for n in (n_layers - 1, n_layers):
        draft = GOLDENS[name].draft()
        draft.keys["block_count"] = n
        first = {each: x for each, x in draft.tensors.items() if each.startswith("blk.0.")}
        draft.tensors |= {
            each.replace("blk.0.", f"blk.{i}."): x for each, x in first.items() for i in range(n)
        }
        with draft.loaded(tmp_path) as model:
            ops = model.graph.ops
            (scale,) = {op.scale for op in ops if isinstance(op, Attention)}
            scales.append(scale)
    assert scales == [24**-0.5, 16**-0.5]


@pytest.mark.parametrize(
    ("name", "pattern", "windows"),
    [
        ("gemma2", None, [20, 0, 20]),
        ("gemma2", 0, [20, 20, 20]),
        ("gemma2", 1, [0, 0, 0]),
        ("gemma2", [False, True, True], [0, 20, 20]),
        ("gemma3", None, [20, 20, 20, 20, 20, 0, 20]),
        ("olmo3", None, [20, 20, 20, 0]),
        ("olmo3", [True, False, True, False], [20, 0, 20, 0]),
    ],
)
def test_a_pattern_is_a_number_or_says_of_each_layer_whether_it_has_a_window(
    name: str, pattern: int | list[bool] | None, windows: list[int], tmp_path: Path
) -> None:
    draft = GOLDENS[name].draft()
    if pattern is not None:
        draft.keys["attention.sliding_window_pattern"] = pattern
    with draft.loaded(tmp_path) as model:
        ops = model.graph.ops
        assert [op.cache.window for op in ops if isinstance(op, Attention)] == windows
        bases = [op.rope.base for op in ops if isinstance(op, Rotate)][::2]
    if name == "gemma3":
        assert bases == [10000.0 if window else 100000.0 for window in windows]


def test_a_model_without_a_window_has_none_whatever_its_pattern_says(tmp_path: Path) -> None:
    draft = GOLDENS["gemma3"].draft()
    del draft.keys["attention.sliding_window"]
    draft.keys["attention.sliding_window_pattern"] = 6
    with draft.loaded(tmp_path) as model:
        ops = model.graph.ops
    assert {op.cache.window for op in ops if isinstance(op, Attention)} == {0}
    assert {op.rope.base for op in ops if isinstance(op, Rotate)} == {100000.0}


def test_gemma_2_has_windows_of_4096_where_the_file_says_none(tmp_path: Path) -> None:
    draft = GOLDENS["gemma2"].draft()
    del draft.keys["attention.sliding_window"]
    with draft.loaded(tmp_path) as model:
        ops = model.graph.ops
    assert [op.cache.window for op in ops if isinstance(op, Attention)] == [4096, 0, 4096]
