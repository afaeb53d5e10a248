"""What callers are shown of the steps of their requests, and what they may edit."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import LLM, ClosedError, InvalidRequestError, PlanError, Step
from edgeinfer.backend import attention_weights
from edgeinfer.batch import StepLimits
from edgeinfer.graph import Attention
from edgeinfer.kernels.reference import ReferenceBackend

from .backends import batch_of
from .golden_models import GOLDENS, N_CTX, PROMPT
from .models_for_tests import tiny_model

N_LAYERS, DIM, VOCAB = 3, 64, 320
LAYERS = tuple(range(N_LAYERS + 1))
SPEC: Any = dict(seed=3, max_tokens=12, temperature=0.9, logit_bias={257: -1e9})
WHERE: dict[str, dict[str, Any]] = {
    "cpu": dict(device="cpu"),
    "shim": dict(device="shim"),
    "cpu + shim": dict(device="shim", gpu_layers=1),
    "law": dict(device="law"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hooks")
    return tiny_model(folder, arch="qwen3", qk_norm=True, n_ctx=512, n_layers=N_LAYERS)


def opened(path: Path, where: str, **options: Any) -> LLM:
    if "shim" in where and shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for processors")
    given: dict[str, Any] = dict(n_ctx=256, threads=2, slots=2, residuals=LAYERS)
    return LLM(path, **given | WHERE[where] | options)


@pytest.fixture(scope="module", params=list(WHERE))
def anywhere(request: pytest.FixtureRequest, path: Path) -> Iterator[LLM]:
    with opened(path, request.param) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with opened(path, "cpu") as llm:
        yield llm


def copied(step: Step) -> Step:
    """What is left once the next step has overwritten the views."""
    arrays = [None if each is None else each.copy() for each in (step.logits, step.hidden)]
    residuals = {layer: rows.copy() for layer, rows in step.residuals.items()}
    return step._replace(
        token_ids=step.token_ids.copy(), logits=arrays[0], hidden=arrays[1], residuals=residuals
    )


# -- what is shown -------------------------------------------------------------------------------


def test_who_edits_nothing_changes_nothing(anywhere: LLM) -> None:
    """The same tokens and log-probabilities, and the logits of `logits`."""
    plain = anywhere.generate("some words", logprobs=3, **SPEC)
    steps: list[Step] = []
    watched = anywhere.generate(
        "some other words first", on_step=lambda step: steps.append(copied(step)), **SPEC
    )
    steps.clear()
    watched = anywhere.generate(
        "some words", logprobs=3, on_step=lambda step: steps.append(copied(step)), **SPEC
    )
    assert (watched.token_ids, watched.logprobs) == (plain.token_ids, plain.logprobs)
    picked = [step.logits for step in steps if step.logits is not None]
    ids = [*anywhere.tokenize("some words", bos=True), *plain.token_ids]
    expected = anywhere.logits(ids[:-1], last=12)
    np.testing.assert_array_equal(np.stack(picked), expected)


def test_residuals_and_hidden_rows_are_those_of_every_device(anywhere: LLM, llm: LLM) -> None:
    """Of prompt and answer, row after row, wherever a chain is cut."""
    seen: dict[int, Step] = {}
    watch = ("hidden", *LAYERS)
    answer = anywhere.generate(
        "a prompt that nobody has read", on_step=lambda step: keep(seen, step), watch=watch, **SPEC
    )
    ids = [*anywhere.tokenize("a prompt that nobody has read", bos=True), *answer.token_ids[:-1]]
    first = min(seen)
    assert [id for at in sorted(seen) for id in seen[at].token_ids.tolist()] == ids[first:]
    for layer in LAYERS:
        rows = np.concatenate([seen[at].residuals[layer] for at in sorted(seen)])
        assert rows.shape == (len(ids) - first, DIM)
        expected = llm.residuals(ids, layer)
        np.testing.assert_array_equal(rows, expected[first:])
        np.testing.assert_array_equal(anywhere.residuals(ids, layer), expected)
    hidden = [step.hidden for step in seen.values() if step.hidden is not None]
    assert len(hidden) == 12 and all(each.shape == (DIM,) for each in hidden)
    assert all(step.logits is None for step in seen.values())


def keep(seen: dict[int, Step], step: Step) -> None:
    seen[step.position] = copied(step)


def test_views_are_views(llm: LLM) -> None:
    """Nothing is copied on the CPU: what one step shows, the next one writes over."""
    bases = []

    def look(step: Step) -> None:
        bases.append((step.residuals[2].ctypes.data, step.residuals[2].flags.owndata))

    llm.generate("x", on_step=look, watch=[2], **SPEC)
    assert len(set(bases[1:])) == 1 and not bases[0][1]


# -- what is edited ------------------------------------------------------------------------------


def test_edited_logits_are_what_is_picked_from(anywhere: LLM) -> None:
    def only(step: Step) -> None:
        if step.logits is not None:
            step.logits[:] = -np.inf
            last = step.position + len(step.token_ids) - 1
            step.logits[70 + last % 3] = 0.0

    answer = anywhere.generate([5, 6, 7], on_step=only, **SPEC)
    assert answer.token_ids == tuple(70 + (2 + i) % 3 for i in range(12))


def test_others_in_the_step_have_their_own(anywhere: LLM) -> None:
    alone = anywhere.generate("the other one", **SPEC).token_ids
    results: dict[str, Any] = {}

    def edit(step: Step) -> None:
        if step.logits is not None:
            step.logits[:] = np.roll(step.logits, 1)

    def call(name: str, **options: Any) -> None:
        results[name] = anywhere.generate(name, **SPEC | options).token_ids

    edited = anywhere.generate("edited", on_step=edit, **SPEC).token_ids
    threads = [
        threading.Thread(target=call, args=("the other one",)),
        threading.Thread(target=call, args=("edited",), kwargs=dict(on_step=edit)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {"the other one": alone, "edited": edited}


def test_what_leaves_no_token_is_an_error_of_its_request(llm: LLM) -> None:
    def ban(step: Step) -> None:
        if step.logits is not None:
            step.logits[:] = np.nan

    with pytest.raises(InvalidRequestError, match="no number.* once on_step was shown") as raised:
        llm.generate("x", on_step=ban, **SPEC)
    assert raised.value.param == "on_step"
    assert llm.generate("x", **SPEC).token_ids


def test_a_caller_that_raises_ends_its_request_alone(llm: LLM) -> None:
    def fail(step: Step) -> None:
        raise KeyError("mine")

    with llm.stream("the other one", **SPEC) as other:
        with pytest.raises(KeyError, match="mine"):
            llm.generate("x", on_step=fail, **SPEC)
        assert other.run().usage.completion_tokens == 12
    assert llm.generate("x", **SPEC).token_ids


def test_a_caller_may_end_its_request_and_wait_for_none(llm: LLM) -> None:
    streams: list[Any] = []
    told: list[BaseException] = []

    def end(step: Step) -> None:
        if step.position > 5:
            try:
                llm.generate("y", max_tokens=1)
            except InvalidRequestError as error:
                told.append(error)
            streams[0].close()

    with llm.stream("hello", **SPEC | dict(max_tokens=100), on_step=end) as stream:
        streams.append(stream)
        assert stream.run().finish_reason == "cancelled"
    assert told and "callback" in str(told[0])


# -- what costs, and what is refused -------------------------------------------------------------


def test_nothing_is_asked_of_a_program_for_who_watches_nothing(llm: LLM) -> None:
    program = llm.runtime.program
    submit, batches = program.submit, []
    program.submit = lambda batch: batches.append(batch) or submit(batch)  # type: ignore
    try:
        llm.generate("x", **SPEC)
    finally:
        del program.submit  # type: ignore[attr-defined]
    assert {batch.output for batch in batches} == {"ids"}
    assert not any(batch.with_hidden or batch.residuals for batch in batches)


def test_what_can_not_be_watched_is_refused_by_name(path: Path, llm: LLM) -> None:
    def look(step: Step) -> None:
        raise AssertionError

    with LLM(path, n_ctx=64, residuals=[1]) as one:
        assert one.residuals([5, 6], 1).shape == (2, DIM)
        for watch in ([2], ["logits", 0], (1, 3)):
            with pytest.raises(InvalidRequestError, match="load it with residuals") as caught:
                one.generate("x", on_step=look, watch=watch)  # type: ignore[arg-type]
            assert caught.value.param == "watch"
        with pytest.raises(InvalidRequestError, match="load it with residuals"):
            one.residuals([5, 6], 2)
        with pytest.raises(InvalidRequestError, match="load it with residuals"):
            one.attention([5, 6], 0)
    for layer in (N_LAYERS + 1, 99):
        for ask in (
            lambda layer=layer: llm.residuals([5], layer),
            lambda layer=layer: llm.generate("x", on_step=look, watch=[0, layer]),
        ):
            with pytest.raises(InvalidRequestError, match="the model has 0 to 2, and 3 is"):
                ask()
    with pytest.raises(InvalidRequestError, match="on_step") as caught:
        llm.generate("x", watch=["logits"])
    with pytest.raises(InvalidRequestError, match="residuals names layer 4") as caught:
        LLM(path, residuals=[4])
    assert caught.value.param == "residuals"
    for layer in (-1, 1.5, "1", None):
        with pytest.raises(InvalidRequestError, match="layer"):
            llm.attention([5, 6], layer)  # type: ignore[arg-type]
    for last in (0, 3, "1"):
        with pytest.raises(InvalidRequestError, match="last"):
            llm.attention([5, 6], 0, last=last)  # type: ignore[arg-type]


def test_streams_that_may_be_watched_are_in_the_plan(path: Path) -> None:
    with opened(path, "cpu") as kept, opened(path, "cpu", residuals=()) as plain:
        assert kept.plan.total_bytes > plain.plan.total_bytes


# -- attention -----------------------------------------------------------------------------------


def test_attention_is_the_softmax_of_scores(llm: LLM) -> None:
    """Rows add up to 1 over the past; a token that is alone gives itself everything."""
    ids = llm.tokenize("some words that attend to each other, over more than one page", bos=True)
    for layer in range(N_LAYERS):
        weights = llm.attention(ids, layer)
        assert weights.shape == (len(ids), 4, len(ids)) and len(ids) > 32
        np.testing.assert_allclose(weights.sum(2), 1, rtol=1e-5)
        assert not np.triu(weights.transpose(1, 0, 2), 1).any()
        np.testing.assert_array_equal(weights[0, :, 0], 1)
        np.testing.assert_array_equal(llm.attention(ids, layer, last=2), weights[-2:])
    with pytest.raises(InvalidRequestError, match="no attention"):
        llm.attention(ids, N_LAYERS)


def test_what_a_text_shows_beyond_memory_is_a_plan_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of it is computed; of what is wrong that is told instead."""
    ids, available = list(range(20, 60)), 4 * 40 * 4 * 40 - 1
    monkeypatch.setattr("edgeinfer.platform.available_memory", lambda: available)
    with pytest.raises(PlanError, match="40 rows of 4 heads.*ask for the last") as caught:
        llm.attention(ids, 0)
    assert (caught.value.needed, caught.value.available) == (available + 1, available)
    assert llm.attention(ids, 0, last=39).shape == (39, 4, 40)
    with pytest.raises(InvalidRequestError, match="need 1 to 40"):
        llm.attention(ids, 0, last=41)
    monkeypatch.setattr("edgeinfer.platform.available_memory", lambda: 4 * 40 * DIM - 1)
    with pytest.raises(PlanError, match="shorten the text"):
        llm.residuals(ids, 0)
    assert llm.residuals(ids[1:], 0).shape == (39, DIM)


def test_attention_is_that_of_every_device(anywhere: LLM, llm: LLM) -> None:
    ids = list(range(20, 60))
    np.testing.assert_array_equal(anywhere.attention(ids, 2, last=3), llm.attention(ids, 2, last=3))


@pytest.mark.parametrize("name", GOLDENS)
def test_weights_times_values_are_what_attention_yields(tmp_path: Path, name: str) -> None:
    """Of every family: windows, caps, sinks, layers of other kinds, caches that are shared."""
    with GOLDENS[name].draft().loaded(tmp_path) as model:
        graph = model.graph
        n = graph.hparams.n_layers
        attentions = {op.layer: op for op in graph.ops if isinstance(op, Attention)}
        segment = graph.segment(n_ctx=N_CTX, residuals=range(n + 1))
        shown = {100 + i: op.out for i, op in attentions.items()}
        shown |= {200 + i: op.v for i, op in attentions.items() if op.v is not None}
        limits = StepLimits(dict.fromkeys(segment.groups, 2), 64, 64, 1, 1)
        law = ReferenceBackend(mode="quantised")
        whole = segment._replace(residuals={**segment.residuals, **shown})
        with law.compile(whole, limits) as program:
            batch = batch_of(PROMPT, pages=(0, 1), n_groups=len(segment.groups))
            batch.residuals = tuple(whole.residuals)
            found = program.submit(batch).wait().residuals
        for layer in range(n):
            op = attentions.get(layer)
            if op is None or op.source is not None:
                with pytest.raises(InvalidRequestError, match="no attention"):
                    attention_weights(segment, layer, found[layer], [0])
                continue
            rows = [5, 33, 55]
            weights = attention_weights(segment, layer, found[layer], rows)
            values = found[200 + layer].reshape(len(PROMPT), op.cache.n_heads, -1)
            values = np.repeat(values, op.n_heads // op.cache.n_heads, axis=1)
            out = np.einsum("rhp,phd->rhd", weights, values).reshape(len(rows), -1)
            expected = found[100 + layer][rows]
            np.testing.assert_allclose(out, expected, atol=2e-3 * np.abs(expected).max())
            if op.cache.window:
                ages = np.subtract.outer(rows, range(len(PROMPT)))
                assert not weights.transpose(1, 0, 2)[:, ages >= op.cache.window].any()


# -- what outlives the model ---------------------------------------------------------------------


def test_views_outlive_the_model(path: Path) -> None:
    """Whoever keeps one past the end reads what was there: no crash, and the rest is given back."""
    kept: list[Step] = []
    with opened(path, "cpu") as llm:
        llm.generate("x", on_step=kept.append, watch=["logits", "hidden", 2], **SPEC)
        expected = copied(kept[-1])
    for found, array in (
        (kept[-1].logits, expected.logits),
        (kept[-1].hidden, expected.hidden),
        (kept[-1].residuals[2], expected.residuals[2]),
    ):
        assert found is not None and array is not None
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("where", ["hook", "notify"])
def test_a_model_that_a_callback_closes_gives_its_memory_back(path: Path, where: str) -> None:
    llm, is_freed = opened(path, "cpu"), threading.Event()
    program = llm.runtime.program
    close = program.close
    program.close = lambda: (close(), is_freed.set())  # type: ignore[method-assign,func-returns-value]
    if where == "hook":
        with pytest.raises(ClosedError, match="closed"):
            llm.generate("x", on_step=lambda step: llm.close(), **SPEC)
    else:
        llm.stream("x", **SPEC).notify(llm.close)
    assert is_freed.wait(120)
