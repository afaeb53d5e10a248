"""Vectors of texts: which rows they are made of, to the bit, whatever runs beside them."""

from __future__ import annotations

import asyncio
import math
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import (
    LLM,
    AsyncLLM,
    BusyError,
    ClosedError,
    ContextLengthError,
    EdgeInferError,
    InvalidRequestError,
    PlanError,
    Step,
    UnsupportedModelError,
    aio,
)
from edgeinfer.backend import head_reader
from edgeinfer.batch import StepLimits
from edgeinfer.embedding import Embedding, _Pool
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.options import LoadOptions

from .backends import batch_of
from .golden_models import GOLDENS, N_CTX, PROMPT, VOCAB
from .models_for_tests import tiny_model
from .test_plan_reality import with_tokens
from .waiting import wait_until

DIM, EOS = 64, 257
TEXTS = ["a few words", "x", "another text, of more words than the first one has. " * 2, "the end"]
KEYS = {"qwen3.pooling_type": 3, "tokenizer.ggml.add_eos_token": True}
BASE: LoadOptions = {"n_ctx": 256, "threads": 2, "slots": 2}
WHERE: dict[str, LoadOptions] = {
    "cpu": {"device": "cpu"},
    "shim": {"device": "shim"},
    "cpu + shim": {"device": "shim", "gpu_layers": 1},
    "law": {"device": "law"},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the embedding models of Qwen 3 say what they are."""
    return tiny_model(tmp_path_factory.mktemp("last"), arch="qwen3", metadata=KEYS)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, **BASE) as llm:
        yield llm


def held(llm: LLM) -> list[int]:
    """Pages that are not free, of each group; some are kept of answers."""
    engine = llm.runtime.engine
    return engine.between_steps(lambda: [pool.n_pages - pool.n_free for pool in engine.pools])


# -- what they are -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
def test_rows_are_what_the_head_reads_in_every_family(tmp_path: Path, name: str) -> None:
    with GOLDENS[name].draft().loaded(tmp_path) as model:
        n = model.hparams.n_layers
        segment = model.graph.segment(n_ctx=N_CTX, residuals=[n])
        limits = StepLimits(dict.fromkeys(segment.groups, 2), 64, 64, 1, 1, n_states=2)
        batch = batch_of(PROMPT[:5], pages=(0, 1), n_groups=len(segment.groups), states=(-1, 0))
        if not segment.states:
            batch.states = batch.kept = None
        batch.residuals, batch.with_hidden = (n,), True
        with ReferenceBackend(mode="quantised").compile(segment, limits) as program:
            found = program.submit(batch).wait()
            rows = head_reader(segment)(found.residuals[n])
        np.testing.assert_array_equal(rows, found.hidden)


@pytest.mark.parametrize("where", WHERE)
def test_vectors_are_pooled_rows_of_the_law(path: Path, where: str) -> None:
    """Rows come from a forward pass of their own here, as one list of logits takes it."""
    if "shim" in where and shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for processors")
    with LLM(path, **BASE | WHERE[where]) as llm:
        last, mean = llm.embed(TEXTS), llm.embed(TEXTS, pooling="mean")
        lists = [[*llm.tokenize(text, bos=True), EOS] for text in TEXTS]
        segment = llm.runtime.model.graph.segment(n_ctx=256)
        limits = StepLimits({0: 8}, 256, 256, 1, 1)
        with ReferenceBackend(mode="quantised").compile(segment, limits) as program:
            for i, ids in enumerate(lists):
                batch = batch_of(ids, pages=tuple(range(8)), output="hidden")
                batch.states = batch.kept = None
                rows = program.submit(batch).wait().hidden.astype(np.float64)
                for pooled, found in ((rows[-1], last[i]), (rows.mean(0), mean[i])):
                    expected = pooled / math.sqrt(sum(pooled * pooled))
                    np.testing.assert_allclose(found, expected, rtol=2e-7)
    assert last.dtype == mean.dtype == np.float32 and last.shape == mean.shape == (4, DIM)
    np.testing.assert_allclose(np.linalg.norm(last, axis=1), 1, rtol=1e-6)


def test_rounded_activations_turn_vectors_little(path: Path, llm: LLM) -> None:
    """Against the forward pass in float32."""
    for pooling in ("last", "mean"):
        with LLM(path, **BASE, device="reference") as exact:
            truth = exact.embed(TEXTS, pooling=pooling)
        cosines = (truth * llm.embed(TEXTS, pooling=pooling)).sum(1)
        assert 0.999 < cosines.min() < 1 - 1e-9


@pytest.mark.parametrize("kv_type", ["f16", "q8_0/q4_0"])
@pytest.mark.parametrize("family", ["gemma3", "qwen35"])
def test_windows_states_and_short_caches(tmp_path: Path, family: str, kv_type: str) -> None:
    """The CPU has the law's bits there, too."""
    if family == "qwen35":
        path = tiny_model(tmp_path, arch="qwen35", n_layers=4, delta_heads=(2, 4, 16))
    else:
        path = with_tokens(GOLDENS[family].draft(), tmp_path / "m.gguf")
    ids = [[id % VOCAB for id in range(n, 3 * n)] for n in (3, 30, 12)]
    options: Any = dict(BASE, pooling="mean", n_ctx=64, kv_type=tuple(kv_type.split("/") * 2)[:2])
    found = []
    for device in ("cpu", "law"):
        with LLM(path, **options | {"device": device}) as llm:
            found.append(llm.embed(ids))
            np.testing.assert_array_equal(llm.embed(ids[1]), found[-1][1:2])
            assert not any(held(llm))
    np.testing.assert_array_equal(*found)


def test_what_runs_beside_changes_no_bit(path: Path, llm: LLM) -> None:
    """Answers, other texts, and texts that the cache holds already: none of it is read."""
    alone = {}
    for pooling in ("last", "mean"):
        with LLM(path, **BASE) as fresh:
            alone[pooling] = np.concatenate([fresh.embed(each, pooling=pooling) for each in TEXTS])
    llm.generate(TEXTS[2], max_tokens=3)
    with llm.stream("some words", max_tokens=180, seed=1, logit_bias={EOS: -1e9}) as answer:
        next(answer)
        many = ["other words", *TEXTS, *["more words"] * 20, *TEXTS]
        for pooling in ("mean", "last"):
            found = llm.embed(many, pooling=pooling)
            np.testing.assert_array_equal(found[1:5], alone[pooling])
            np.testing.assert_array_equal(found[-4:], alone[pooling])
        beside = answer.run().token_ids
    again = llm.generate("some words", max_tokens=180, seed=1, logit_bias={EOS: -1e9})
    assert again.token_ids == beside


def test_threads_share_the_engine(llm: LLM) -> None:
    alone, found = llm.embed(TEXTS), {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: llm.embed(TEXTS)})) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 6
    for each in found.values():
        np.testing.assert_array_equal(each, alone)


# -- pooling by itself ---------------------------------------------------------------------------


def step_of(rows: np.ndarray[Any, Any], position: int) -> Step:
    ids = np.zeros(len(rows), np.int32)
    return Step(position, ids, None, None, {2: rows.astype(np.float32)})


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_rows_that_come_again_count_once(pooling: str) -> None:
    """As they do after a text had to give way: its steps begin again, cut elsewhere."""
    rows = np.random.default_rng(1).normal(size=(50, 7)).astype(np.float32)
    whole, cut = (_Pool(lambda x: x, 2, pooling, 50) for _ in range(2))
    whole.take(step_of(rows, 0))
    for first, end in ((0, 10), (10, 31), (0, 20), (20, 40), (40, 50)):
        cut.take(step_of(rows[first:end], first))
    np.testing.assert_array_equal(cut.vector(7), whole.vector(7))
    expected = rows[-1] if pooling == "last" else rows.astype(np.float64).mean(0)
    np.testing.assert_allclose(whole.vector(7), expected / np.linalg.norm(expected), rtol=1e-6)
    expected = expected[:3]
    np.testing.assert_allclose(whole.vector(3), expected / np.linalg.norm(expected), rtol=1e-6)


def test_a_zero_vector_stays_one_and_no_number_is_an_error() -> None:
    pool = _Pool(lambda x: x, 2, "mean", 3)
    pool.take(step_of(np.zeros((3, 4)), 0))
    np.testing.assert_array_equal(pool.vector(4), np.zeros(4))
    for bad in (np.nan, np.inf):
        pool = _Pool(lambda x: x, 2, "mean", 2)
        pool.take(step_of(np.array([[1.0, bad], [1.0, -bad]]), 0))
        with pytest.raises(EdgeInferError, match="no number"):
            pool.vector(2)
    pool = _Pool(lambda x: x, 2, "mean", 2)  # whose squares no float32 has
    pool.take(step_of(np.array([[3e38, 0.0], [3e38, 1e-38]]), 0))
    np.testing.assert_array_equal(pool.vector(2).astype(np.float32), [1, 0])


# -- what is asked for ---------------------------------------------------------------------------


def test_texts_end_as_the_file_says_and_ids_as_they_are(llm: LLM) -> None:
    ids = [*llm.tokenize("a few words", bos=True), EOS]
    expected = llm.embed(ids)
    for given in ("a few words", ["a few words"], "a few words<|eos|>", [ids], np.array(ids)):
        np.testing.assert_array_equal(llm.embed(given), expected)  # type: ignore[arg-type]
    assert (llm.embed(ids[:-1]) != expected).any()
    assert llm.embed([]).shape == (0, DIM)
    assert llm.embed(["x", ids], dimensions=5).shape == (2, 5)


def test_what_is_longer_than_the_context(llm: LLM) -> None:
    text = "words and more words. " * 100
    with pytest.raises(ContextLengthError, match="text 1 is .* the context holds 256") as caught:
        llm.embed(["x", text])
    assert caught.value.n_ctx == 256 < caught.value.n_tokens
    ids = llm.tokenize(text, bos=True)
    cut = llm.embed(text, truncate=True)
    np.testing.assert_array_equal(cut, llm.embed([*ids[:255], EOS]))
    np.testing.assert_array_equal(llm.embed(ids, truncate=True), llm.embed(ids[:256]))
    np.testing.assert_array_equal(llm.embed(text * 5000, truncate=True), cut)
    with pytest.raises(ContextLengthError, match="at least"):
        llm.embed(text * 5000)


@pytest.mark.parametrize(
    ("texts", "options", "found"),
    [
        (5, {}, "texts is 5"),
        (b"x", {}, "texts is b'x'"),
        (bytearray(b"x"), {}, "texts is bytearray"),
        ({"x": 1}, {}, "texts is {'x': 1}"),
        (np.array(5), {}, "texts is array"),
        ([5, "x"], {}, "text 0 is"),
        ([True], {}, "text 0 is"),
        ([None], {}, "text 0 is None"),
        (["x", [1.5]], {}, "text 1 is"),
        ([[]], {}, "text 0 has no tokens"),
        ([[5, 320]], {}, "320 is outside the vocabulary"),
        ([[-1]], {}, "-1 is outside the vocabulary"),
        ("x", {"pooling": "cls"}, "pooling is 'cls'"),
        ("x", {"pooling": 1}, "pooling is 1"),
        ("x", {"dimensions": 0}, "dimensions is 0"),
        ("x", {"dimensions": 65}, "dimensions is 65; .* have 64"),
        ("x", {"dimensions": 2.0}, "dimensions is 2.0"),
        ("x", {"truncate": 1}, "truncate is 1"),
    ],
)
def test_what_can_not_be_is_refused_by_name(llm: LLM, texts: Any, options: Any, found: str) -> None:
    before = held(llm)
    with pytest.raises(InvalidRequestError, match=found):
        llm.embed(texts, **options)
    assert held(llm) == before


def test_a_model_that_says_nothing_of_pooling_is_told(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path)
    with LLM(plain, **BASE) as llm, pytest.raises(InvalidRequestError, match="pooling='mean'"):
        llm.embed("x", pooling="mean")
    with LLM(plain, **BASE, pooling="mean") as llm:
        assert llm.embed("x").shape == (1, DIM)
        np.testing.assert_array_equal(llm.embed("x", pooling="mean"), llm.embed("x"))
    other = tiny_model(tmp_path, seed=1, metadata={"llama.pooling_type": 2})
    with LLM(other, **BASE) as llm, pytest.raises(InvalidRequestError, match="is 'cls'"):
        llm.embed("x")
    with LLM(other, **BASE, pooling="last") as llm:
        assert llm.embed("x").shape == (1, DIM)
    with pytest.raises(InvalidRequestError, match="pooling is 'cls'"):
        LLM(plain, pooling="cls")


@pytest.mark.parametrize("arch", ["bert", "nomic-bert", "gemma-embedding"])
def test_encoders_are_refused_by_name(tmp_path: Path, arch: str) -> None:
    path = tiny_model(tmp_path, metadata={"general.architecture": arch})
    with pytest.raises(UnsupportedModelError, match="is an encoder") as caught:
        LLM(path, **BASE)
    assert caught.value.architecture == arch


def test_the_rows_are_planned_where_they_may_be_asked_for(llm: LLM, tmp_path: Path) -> None:
    plain = tiny_model(tmp_path, arch="qwen3")
    with LLM(plain, **BASE) as other:
        assert (list(other.runtime.segment.residuals), other.runtime.pooling) == ([], "")
        assert other.plan.total_bytes <= llm.plan.total_bytes
    assert (list(llm.runtime.segment.residuals), llm.runtime.pooling) == ([2], "last")


# -- the end -------------------------------------------------------------------------------------


def test_a_cancelled_task_gives_all_pages_back(llm: LLM) -> None:
    text, before = "words and more words. " * 10, held(llm)

    async def run() -> None:
        asynchronous = AsyncLLM(llm)
        np.testing.assert_array_equal(await asynchronous.embed(TEXTS), llm.embed(TEXTS))
        task = asyncio.create_task(asynchronous.embed([text] * 500))
        await asyncio.sleep(0.05)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found = await asyncio.gather(*(asynchronous.embed(each) for each in TEXTS))
        np.testing.assert_array_equal(np.concatenate(found), llm.embed(TEXTS))
        with pytest.raises(InvalidRequestError, match="text 0"):
            await asynchronous.embed([None])  # type: ignore[list-item]

    asyncio.run(run())
    end = time.monotonic() + 120  # its texts may still have been on their way to tokens
    while held(llm) > before:
        assert time.monotonic() < end, "pages are still held"
        time.sleep(0.01)


def test_texts_wait_where_no_more_may(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are refused only where others fill the queue, not for those before them."""
    texts = [f"{i} words and more words" for i in range(30)]
    expected = llm.embed(texts)
    monkeypatch.setattr("edgeinfer.engine.engine.WAITING_BYTES", 8_000)
    engine, refused = llm.runtime.engine, list[BusyError]()
    begin = engine.begin

    def counted(job: Any) -> None:
        try:
            begin(job)
        except BusyError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(engine, "begin", counted)
    for _ in range(3):
        np.testing.assert_array_equal(llm.embed(texts), expected)
    assert refused
    monkeypatch.setattr(engine, "begin", lambda job: begin_nothing())
    with pytest.raises(BusyError, match="nobody of ours runs"):
        llm.embed(texts)


def test_a_text_that_was_not_taken_on_is_begun_where_all_others_have_ended(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two nobody would begin it, and nobody else fills the queue."""
    texts = ["some words", "and others"]
    expected, engine, n_begun = llm.embed(texts), llm.runtime.engine, 0
    begin = engine.begin

    def late(job: Any) -> None:
        nonlocal n_begun
        n_begun += 1
        if n_begun == 2:
            is_idle = partial(engine.between_steps, lambda: not engine._scheduler.has_work)
            wait_until(is_idle, "the end of the first text")
            raise BusyError("it was there when this was asked for")
        begin(job)

    monkeypatch.setattr(engine, "begin", late)
    np.testing.assert_array_equal(llm.embed(texts), expected)
    assert n_begun == 3


def begin_nothing() -> None:
    raise BusyError("nobody of ours runs")


def test_an_interrupt_while_texts_are_begun_ends_them(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that ends begins the next: nobody would wait for hundreds of them."""
    begun, made, before = list[int](), Embedding._begin_next, held(llm)

    def interrupted(self: Embedding) -> bool:
        if threading.current_thread() is caller and len(begun) == 3:
            raise KeyboardInterrupt
        begun.append(1)
        return made(self)

    caller = threading.current_thread()
    monkeypatch.setattr(Embedding, "_begin_next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.embed(["words and more words. " * 10] * 400)
    engine = llm.runtime.engine
    is_idle = partial(engine.between_steps, lambda: not engine._scheduler.has_work)
    wait_until(is_idle, "the end of what had begun")
    assert len(begun) < 100 and held(llm) <= before


def test_a_task_that_is_cancelled_as_its_texts_begin_ends_them(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes between the end of what was waited for and the task's next turn is not lost."""
    begun, made, finish, before = list[int](), Embedding._begin_next, aio._finish, held(llm)

    def counted(self: Embedding) -> bool:
        begun.append(1)
        return made(self)

    async def run() -> None:
        task = asyncio.create_task(AsyncLLM(llm).embed(["words and more words. " * 10] * 400))

        def finish_and_cancel(*given: Any) -> None:
            finish(*given)
            task.cancel()

        monkeypatch.setattr(aio, "_finish", finish_and_cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(Embedding, "_begin_next", counted)
    asyncio.run(run())
    engine = llm.runtime.engine
    is_idle = partial(engine.between_steps, lambda: not engine._scheduler.has_work)
    wait_until(is_idle, "the end of what had begun")
    assert len(begun) < 100 and held(llm) <= before


def test_vectors_beyond_memory_are_a_plan_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeinfer.platform.available_memory", lambda: 4 * 3 * DIM - 1)
    with pytest.raises(PlanError, match="3 texts .*fewer at a time"):
        llm.embed(["a", "b", "c"])
    assert llm.embed(["a", "b"]).shape == (2, DIM)


def test_who_waits_is_told_that_the_model_was_closed(path: Path) -> None:
    errors: list[BaseException] = []

    def embed() -> None:
        try:
            llm.embed(["words and more words. " * 10] * 500)
        except BaseException as error:
            errors.append(error)

    with LLM(path, **BASE) as llm:
        thread = threading.Thread(target=embed)
        thread.start()
        wait_until(lambda: llm.runtime.engine._scheduler.jobs or errors, "a text that is read")
    thread.join(120)
    assert [type(error) for error in errors] == [ClosedError]


def test_a_step_that_fails_ends_its_text_alone(llm: LLM) -> None:
    """As where memory runs out in one; the next texts are whole."""
    program, expected = llm.runtime.program, llm.embed(TEXTS)
    submit = program.submit

    def fail(batch: Any) -> Any:
        if batch.n_rows > 150:
            raise MemoryError
        return submit(batch)

    program.submit = fail  # type: ignore[method-assign]
    try:
        with pytest.raises(EdgeInferError, match="memory ran out"):
            llm.embed(["words and more words. " * 10])
        np.testing.assert_array_equal(llm.embed(TEXTS), expected)
    finally:
        del program.submit  # type: ignore[method-assign]
