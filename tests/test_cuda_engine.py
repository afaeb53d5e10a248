"""The engine on the CUDA backend, on the shim: the CPU's tokens, whoever shares a step."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, DeviceError
from edgeinfer.batch import Batch
from edgeinfer.kernels.cuda.program import CudaProgram, Running
from edgeinfer.kernels.cuda.shim import ShimDevice

from .models_for_tests import tiny_model
from .shim import shim
from .test_stream import pages_held

PROMPTS = ["hello there", "a b c d e f", "x", "one two three four five six seven"]
CHOICES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0.0, "repeat_penalty": 1.3},
    {"temperature": 0.7, "seed": 5, "mirostat": 2},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.2, "seed": 4, "top_k": 0, "presence_penalty": 0.4, "repeat_last_n": -1},
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cuda"), quant="Q4_0")


@pytest.fixture(scope="module")
def alone(path: Path) -> dict[tuple[int, int], str]:
    """What the CPU generates for each prompt and choice, by their numbers."""
    with LLM(path, device="cpu", n_ctx=256, threads=1) as llm:
        return {
            (i, j): llm.generate(prompt, max_tokens=40, **choice).text
            for i, prompt in enumerate(PROMPTS)
            for j, choice in enumerate(CHOICES)
        }


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    shim()  # skips where it can't run
    with LLM(path, device="shim", n_ctx=256, slots=8, threads=1) as llm:
        yield llm


class Guesses:
    """Which of the steps that were submitted ran already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[bool] = []
        guessed = CudaProgram._guessed

        def counted(program: CudaProgram, batch: Batch) -> Running | None:
            running = guessed(program, batch)
            self.held.append(running is not None)
            return running

        monkeypatch.setattr(CudaProgram, "_guessed", counted)


@pytest.mark.parametrize("j", range(len(CHOICES)))
def test_tokens_are_the_cpus(
    llm: LLM, alone: dict[tuple[int, int], str], j: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guesses = Guesses(monkeypatch)
    for i, prompt in enumerate(PROMPTS):
        assert llm.generate(prompt, max_tokens=40, **CHOICES[j]).text == alone[i, j]
    is_the_devices = "logprobs" not in CHOICES[j]
    assert any(guesses.held) == is_the_devices, "what the host picks, nobody can go on from"


def test_tokens_are_the_same_where_nothing_is_begun_ahead(
    llm: LLM, alone: dict[tuple[int, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaProgram, "_is_told", lambda *_: False)
    for i, prompt in enumerate(PROMPTS):
        assert llm.generate(prompt, max_tokens=40, temperature=0.0).text == alone[i, 0]


def test_sequences_that_come_and_go_have_the_tokens_of_each_alone(
    llm: LLM, alone: dict[tuple[int, int], str]
) -> None:
    """16 clients, some of whom leave in the middle."""
    wrong: list[object] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(2):
            i, j = rng.randrange(len(PROMPTS)), rng.choice([0, 1, 2, 3])
            most = rng.choice([3, 17, None])
            text = ""
            with llm.stream(PROMPTS[i], max_tokens=40, **CHOICES[j]) as stream:
                for n, delta in enumerate(stream):
                    text += delta.text
                    if n == most:
                        break
            expected = alone[i, j]
            if not (text == expected if most is None else expected.startswith(text)):
                wrong.append((i, j, text, expected))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert pages_held(llm) == 0


def test_a_context_that_slides_has_the_cpus_tokens(path: Path) -> None:
    shim()
    texts = []
    for device in ("cpu", "shim"):
        with LLM(path, device=device, n_ctx=128, threads=1) as llm:
            sliding = llm.generate(PROMPTS[3], max_tokens=250, temperature=0.0, overflow="slide")
            again = llm.generate(PROMPTS[3] + " eight", max_tokens=9, temperature=0.0)
            texts.append((sliding.text, again.text))
        with LLM(path, device=device, n_ctx=1024, threads=1) as llm:  # 24 of 32 pages stay
            asked: Any = dict(overflow="slide", max_tokens=200, logit_bias={257: -1e9})
            kept = llm.generate("a long text " * 105, n_keep=768, temperature=0.0, **asked)
            assert kept.usage.completion_tokens == 200 and kept.usage.prompt_tokens > 900
            texts[-1] += (kept.text,)
    assert texts[0] == texts[1]


def test_a_fault_fails_what_runs_clearly_and_the_process_lives(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim()
    with LLM(path, device="shim", n_ctx=96, threads=1) as llm:
        write, count = ShimDevice.write, iter(range(10_000))

        def faulty(device: ShimDevice, *args: Any) -> None:
            if next(count) == 20:  # of a step: as if a kernel had left its memory
                device._do(lambda: 1 // 0)
            write(device, *args)

        monkeypatch.setattr(ShimDevice, "write", faulty)
        for _ in range(2):
            with pytest.raises(DeviceError, match="division"):
                llm.generate(PROMPTS[0], max_tokens=80, temperature=0.0)
    monkeypatch.setattr(ShimDevice, "write", write)
    with LLM(path, device="shim", n_ctx=96, threads=1) as llm:
        assert llm.generate(PROMPTS[0], max_tokens=3, temperature=0.0).text
