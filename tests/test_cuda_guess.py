"""A GPU goes on from the tokens that it has guessed itself: no logits come to the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import LLM
from edgeinfer.batch import Batch, PageTable
from edgeinfer.engine import drafter
from edgeinfer.engine.drafting import MOST
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cuda.backend import CudaBackend
from edgeinfer.kernels.cuda.commands import Launch
from edgeinfer.kernels.cuda.program import CudaProgram
from edgeinfer.model import Model
from edgeinfer.sampling.sampler import ReferenceSampler

from .backends import LIMITS
from .models_for_tests import tiny_model
from .shim import SEEDS, shim
from .test_drafting import SPEC, always, is_well


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guess")
    return tiny_model(folder, arch="qwen35", n_layers=8, drafts=True, n_ctx=512)


@contextmanager
def draft(path: Path, seed: int) -> Iterator[CudaProgram]:
    """The block of a model, whose threads run in an order of their own."""
    device = shim(seed=seed, runs_at_once=False)
    machine = CudaBackend(device, "shim:0", lambda n_vocab, n_threads: ReferenceSampler())
    with GGUFFile.open(path) as file:
        segment = Model.load(file).graph.segment(drafts=True)
        with machine.compile(segment, LIMITS._replace(n_states=4)) as program:
            assert program.draft is not None
            yield program.draft
    device.close()


def prompts(dim: int) -> Batch:
    """Rows of three sequences, one of which is read further only."""
    counts, starts = [5, 3, 4], [0, 29, 1]
    rng, n = np.random.default_rng(0), sum(counts)
    return Batch(
        ids=rng.integers(20, 90, n).astype(np.int32),
        pos=np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]),
        seq=np.repeat(np.arange(3, dtype=np.int32), counts),
        tables=[(PageTable(np.array([i, i + 3], np.int32), 0, 1 << 30),) for i in range(3)],
        wanted=np.array([4, 11], np.int32),
        hidden=rng.standard_normal((n, dim)).astype(np.float32),
        with_hidden=True,
    )


def one_by_one(program: CudaProgram, batch: Batch, n: int) -> tuple[Any, Any]:
    """What the host makes of the logits of each step."""
    tokens = []
    for _ in range(n):
        out = program.submit(batch).wait()
        tokens.append(out.logits.argmax(axis=1).astype(np.int32))
        wanted = np.arange(len(batch.wanted), dtype=np.int32)
        batch = replace(
            batch, ids=tokens[-1], pos=batch.pos[batch.wanted] + 1, seq=batch.seq[batch.wanted],
            hidden=out.hidden.copy(), wanted=wanted,
        )  # fmt: skip
    return np.array(tokens), out.hidden


@pytest.mark.parametrize("seed", SEEDS)
def test_guesses_are_those_of_steps_one_by_one(path: Path, seed: int) -> None:
    with draft(path, seed) as program:
        batch = prompts(program.segment.hidden.dim)
        expected = one_by_one(program, batch, MOST)
        for _ in range(3):  # the third time as graphs
            found = program.guess(batch, MOST)
            for got, each in zip(found, expected, strict=True):
                np.testing.assert_array_equal(got, each)
        assert len(np.unique(expected[0])) > 2
        tokens, hidden = program.guess(replace(batch, with_hidden=False), 2)
        np.testing.assert_array_equal(tokens, expected[0][:2])
        assert not len(hidden)
        nothing = program.guess(replace(batch, wanted=batch.wanted[:0]), 1)
        assert nothing[0].shape == (1, 0)
        with pytest.raises(AssertionError, match="room for 4"):
            program.guess(batch, MOST + 1)


@pytest.mark.parametrize("n_logits", [33, 100, 1 << 20])
def test_guesses_are_the_likeliest_of_the_first_tokens(
    path: Path, monkeypatch: pytest.MonkeyPatch, n_logits: int
) -> None:
    """Of which alone the head's matrix is read; launch by launch and as graphs."""
    heads, grid = set[int](), Launch.grid

    def seeing(self: Launch, n_rows: int, n_segments: int) -> Any:
        if self.values_per_block and self.args["n"] == n_vocab:
            heads.add(grid(self, n_rows, n_segments)[0])
        return grid(self, n_rows, n_segments)

    with draft(path, seed=1) as program:
        n_vocab = program.segment.output.dim
        batch = replace(prompts(program.segment.hidden.dim), n_logits=n_logits)
        expected = one_by_one(program, batch, MOST)
        of_all = one_by_one(program, replace(batch, n_logits=0), MOST)
        monkeypatch.setattr(Launch, "grid", seeing)
        for _ in range(3):
            found = program.guess(batch, MOST)
            for got, each in zip(found, expected, strict=True):
                np.testing.assert_array_equal(got, each)
    assert np.array_equal(expected[0], of_all[0]) == (n_logits > n_vocab)
    assert heads == {-(-min(n_logits, n_vocab) // 32)}


@pytest.mark.parametrize("way", [dict(temperature=0.0), dict(temperature=0.01)], ids=str)
@pytest.mark.parametrize("drafts", [False, True])
def test_no_logits_come_to_the_host(
    path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], drafts: bool
) -> None:
    """Neither of guesses nor of the steps that check them, be they of a block or looked up."""
    shim()
    names, read = set[str](), CudaProgram._read_rows

    def reading(self: CudaProgram, buffer: Any, n_rows: int, dim: int) -> Any:
        names.add("logits" if buffer is self._lowered.logits else "others")
        return read(self, buffer, n_rows, dim)

    monkeypatch.setattr(CudaProgram, "_read_rows", reading)
    always(monkeypatch, 0.999)
    with LLM(path, device="shim", n_ctx=128, slots=2, threads=1, drafts=drafts) as llm:
        prompt = list(range(20, 30)) * 3
        answer = llm.generate(prompt, **SPEC | way | dict(max_tokens=24, speculation=True))
        assert answer.timings.proposed_tokens > 5
    assert names == ({"others"} if drafts else set())


@pytest.mark.parametrize("place", [dict(device="shim"), dict(device="shim:0,shim:1")], ids=str)
def test_who_leaves_in_the_middle_changes_no_token_of_the_others(
    path: Path, monkeypatch: pytest.MonkeyPatch, place: dict[str, Any]
) -> None:
    shim()
    always(monkeypatch, 0.999)
    monkeypatch.setattr(drafter.Drafter, "_choose", lambda _, states: (MOST * bool(states), False))
    spec = SPEC | dict(max_tokens=16, temperature=0.7)
    with LLM(path, n_ctx=96, slots=3, threads=1) as llm:
        expected = [llm.generate([30 + i], **spec).text for i in range(2)]
    with LLM(path, n_ctx=96, slots=3, threads=1, drafts=True, **place) as llm:
        streams = [llm.stream([30 + i], **spec) for i in range(3)]
        for _ in range(3):
            next(streams[2])
        streams[2].close()  # beside steps of the others
        found = ["".join(delta.text for delta in stream) for stream in streams[:2]]
        assert is_well(llm)
    assert found == expected
