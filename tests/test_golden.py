"""The real model against the float32 truth of shared data's golden file, and contract 1 on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer import LLM

LLAMA_CPP_KL = 0.0027  # llama.cpp's mean divergence at these positions
HASH = "66f7afa22c72b5e6"  # of all logits: no change but of the arithmetic itself may move a bit
SURE = 0.3  # nats between the first and the second token: llama.cpp never loses more


@pytest.fixture(scope="module")
def golden() -> Iterator[dict[str, NDArray[np.float64]]]:
    from .conftest import shared_data

    folder = shared_data()
    if folder is None or not (folder / "golden").is_dir():
        pytest.skip("no golden/smollm2-text1.npz: set EDGEINFER_TEST_DATA to shared data")
    with np.load(folder / "golden" / "smollm2-text1.npz") as file:
        yield {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def model_path() -> Path:
    from .conftest import shared_data

    folder = shared_data()
    path = folder / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf" if folder else None
    if path is None or not path.exists():
        pytest.skip("no SmolLM2 model: set EDGEINFER_TEST_DATA to shared data")
    return path


@pytest.fixture(scope="module")
def logits(golden: dict[str, NDArray[np.float64]], model_path: Path) -> NDArray[np.float32]:
    with LLM(model_path, device="cpu", n_ctx=1024, threads=2) as llm:
        return llm.logits(golden["ids"].tolist())


def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def mean_divergence(golden: dict[str, NDArray[np.float64]], logits: NDArray[np.float32]) -> float:
    """Of what logits say from the truth; all that is beyond the golden file's tokens is one."""
    ours, ids = log_softmax(logits), golden["top_ids"]
    theirs = golden["top_logprobs"].astype(np.float64)
    p, q = np.exp(theirs), np.take_along_axis(ours, ids, 1)
    rest_p, rest_q = (np.maximum(1 - np.exp(x).sum(1), 1e-12) for x in (theirs, q))
    kl = (p * (theirs - q)).sum(1) + rest_p * np.log(rest_p / rest_q)
    return float(kl.mean())


def test_divergence_from_the_truth_is_below_llama_cpps(
    golden: dict[str, NDArray[np.float64]], logits: NDArray[np.float32]
) -> None:
    assert mean_divergence(golden, logits) <= LLAMA_CPP_KL


@pytest.mark.parametrize(
    ("types", "most"), [(("q8_0", "q8_0"), 0.0025), (("q8_0", "q4_0"), 0.0075)], ids=["8", "8/4"]
)
def test_caches_in_blocks_stay_near_the_truth(
    golden: dict[str, NDArray[np.float64]],
    model_path: Path,
    types: tuple[str, str],
    most: float,
) -> None:
    """Without the Hadamard transform it is 0.0032 and 0.0096."""
    with LLM(model_path, device="cpu", n_ctx=1024, threads=2, kv_type=types) as llm:
        assert mean_divergence(golden, llm.logits(golden["ids"].tolist())) <= most


def test_the_likeliest_token_is_the_truths(
    golden: dict[str, NDArray[np.float64]], logits: NDArray[np.float32]
) -> None:
    same = logits.argmax(axis=1) == golden["top_ids"][:, 0]
    margin = golden["top_logprobs"][:, 0] - golden["top_logprobs"][:, 1]
    assert same.mean() >= 0.955
    assert same[margin > SURE].all()


def test_bits_stay_what_they_were(logits: NDArray[np.float32]) -> None:
    assert hashlib.sha256(logits.tobytes()).hexdigest()[:16] == HASH


Cut = Callable[[LLM, list[int]], NDArray[np.float32]]


@pytest.mark.parametrize(
    ("threads", "cut"),
    [
        (2, lambda llm, ids: llm.logits(ids, prefill_chunk=7)),
        (2, lambda llm, ids: llm.logits(ids, prefill_chunk=64)),
        (2, lambda llm, ids: llm.logits(ids, prefill_chunk=50, batch_with=[ids[:37], ids[5:60]])),
        (1, lambda llm, ids: llm.logits(ids)),
    ],
    ids=["chunks of 7", "chunks of 64", "beside others", "one thread"],
)
def test_bits_do_not_depend_on_the_cut(
    golden: dict[str, NDArray[np.float64]],
    logits: NDArray[np.float32],
    model_path: Path,
    threads: int,
    cut: Cut,
) -> None:
    with LLM(model_path, device="cpu", n_ctx=1024, threads=threads) as llm:
        assert np.array_equal(cut(llm, golden["ids"].tolist()), logits)


@pytest.mark.slow
def test_bits_of_single_rows_are_those_of_the_whole(
    golden: dict[str, NDArray[np.float64]], logits: NDArray[np.float32], model_path: Path
) -> None:
    with LLM(model_path, device="cpu", n_ctx=1024, threads=2) as llm:
        assert np.array_equal(llm.logits(golden["ids"].tolist(), prefill_chunk=1), logits)


def test_sanity_completions(model_path: Path) -> None:
    with LLM(model_path, device="cpu", n_ctx=512) as llm:
        answer = llm.chat("What is gravity?", temperature=0, max_tokens=20)
        assert answer.text.startswith(
            "Gravity is a fundamental concept in physics that describes the curvature of spacetime"
        )
        story = llm.generate("Once upon a time", temperature=0, max_tokens=12)
        assert story.text.startswith(", the city of Nova Haven was a thriving metropolis")
