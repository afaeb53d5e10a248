"""The benchmark of guessed tokens: what it compares, and that noise is told from an effect."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from edgeinfer.engine import drafting
from edgeinfer.engine.drafter import Drafter
from edgeinfer.engine.drafting import Drafting
from tests.bench import bench_drafting as bench
from tests.bench.bench_drafting import Round
from tests.models_for_tests import tiny_model


def test_a_machine_that_slows_down_counts_for_both() -> None:
    """Times of 1, 2, 3, 4 and 5 s: with guesses as without, on a machine that slows down."""
    rounds = [Round(1.0, 1 / 2, 1 / 3), Round(1 / 3, 1 / 4, 1 / 5)]
    assert [each.ratio for each in rounds] == pytest.approx([1.0, 1.0])
    assert [each.noise for each in rounds] == pytest.approx([1 / 3, 3 / 5])


def test_each_round_is_told_then_medians_and_quartiles() -> None:
    lines = [*bench.told([Round(10.0, 15.0, 10.0), Round(10.0, 12.0, 12.0), Round(12.0, 18.0, 12)])]
    assert (
        lines[0]
        == "round 1: 10.0 tok/s plain, 15.0 with guesses: 1.500x; plain behind plain 1.000x"
    )
    assert len(lines) == 4
    # Ratios 1.5, 1.1 and 1.5; noise 1, 1.2 and 1.
    assert lines[-1] == (
        "10.9 tok/s plain, 15.0 with guesses: 1.50x "
        "(1.300 to 1.500; plain behind plain 1.000 to 1.100)"
    )
    assert "1.50x (1.500 to 1.500" in [*bench.told([Round(10.0, 15.0, 10.0)])][-1]


def test_answers_with_guesses_and_without_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path, arch="qwen35", n_layers=8, drafts=True, n_ctx=512)
    for place, name in ((Drafter, "_run"), (Drafting, "chances"), (drafting, "SHORTLIST")):
        monkeypatch.setattr(place, name, getattr(place, name))  # which the bench replaces
    asked: list[bool] = []
    generate = bench.LLM.generate

    def listened(self, prompt, **options):  # type: ignore[no-untyped-def]
        asked.append(options["speculation"])
        return generate(self, prompt, **options)

    monkeypatch.setattr(bench.LLM, "generate", listened)
    monkeypatch.setattr(sys, "argv", ["bench", str(model), "--rounds", "2", "--threads", "1"])
    bench.main()
    assert asked == [False, True, False, True, False, True, False]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    found = re.search(r"; (\d+) of (\d+) held$", lines[-1])
    assert found is not None and int(found[1]) <= int(found[2])
