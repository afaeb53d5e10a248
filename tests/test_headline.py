"""The headline's bench: its load and windows, worked out beforehand, and runs that are kept."""

from __future__ import annotations

import json
import random
import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.dequantize import dequantize
from edgeinfer.gguf import GGUFFile
from edgeinfer.load.traffic import Conversation, Shape, Turn, read_traffic, repeated, synthetic
from edgeinfer.text.tokenizer import Tokenizer
from tests.bench import headline, headline_runs, tokenizers
from tests.bench.headline_load import Cost, Served, long_run_p95, p95_of, queue, rate_of_share
from tests.bench.headline_runs import HEAD_START, TRAFFIC, Bench
from tests.models_for_tests import tiny_model

COST = Cost(0.00633, 0.0261)  # of the 1.1 B model on two cores


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def one_turn(at: float, answer: int) -> Conversation:
    return Conversation(at, [Turn(0, answer)])


def test_a_queue_serves_one_at_a_time_and_a_talk_goes_on_behind_its_answer() -> None:
    talks = [Conversation(0.0, [Turn(0, 4), Turn(0, 2, 3.0)]), one_turn(1.0, 5)]
    # 4 s from 0 on; due at 1 s, 5 s from 4 on; due 3 s behind 4, 2 s from 9 on.
    served = [Served(0.0, 4.0, 4.0), Served(1.0, 9.0, 5.0), Served(7.0, 11.0, 2.0)]
    assert queue(talks, Cost(0.0, 1.0), 1.0, 8.0) == served
    assert queue(talks, Cost(0.0, 1.0), 1.0, 7.0) == served[:2]  # none comes at the end
    assert queue(talks, Cost(0.0, 1.0), 0.5, 8.0)[1].due == 2.0
    assert p95_of(served) == 8.0 and p95_of(served, 2.0) == 4.0


def test_conversations_before_a_window_go_on_in_it() -> None:
    talk = Conversation(0.0, [Turn(0, 4), Turn(0, 2, 3.0), Turn(0, 1, 3.0)])
    # It began 6 s before: its second turn 2 + 3 s later, its third one as much behind that.
    assert queue([talk], Cost(0.0, 1.0), 1.0, 9.0, 6.0) == [Served(4.0, 5.0, 1.0)]
    assert queue([talk], Cost(0.0, 1.0), 1.0, 9.0, 60.0) == []


def test_waits_are_those_of_pollaczek_and_khinchine() -> None:
    """Of requests that come by chance, without conversations."""
    draw, at, talks = random.Random(1), 0.0, []
    for _ in range(40_000):
        at += draw.expovariate(1.0)
        talks.append(one_turn(at, draw.choice((30, 170))))
    for share in (0.4, 0.7):
        served = queue(talks, Cost(0.0, 0.01), share, 1e9)
        waits = [each.ended - each.due - each.cost for each in served]
        squared = (0.3**2 + 1.7**2) / 2
        expected = share * squared / 2 / (1 - share)
        assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("n_requests", [38, 319])
def test_what_comes_in_a_window_costs_the_share_that_was_asked_for(
    seed: int | None, n_requests: int
) -> None:
    traffic = read_traffic(TRAFFIC)
    if seed is not None:
        traffic = list(islice(synthetic(Shape(), seed), 200))
    seconds = n_requests * COST.mean_seconds(traffic) / headline.LOADED
    rate = rate_of_share(traffic, COST, headline.LOADED, seconds, HEAD_START)
    served = queue(repeated(traffic), COST, rate, seconds, HEAD_START)
    at_least = headline.LOADED * seconds - 2 * max(each.cost for each in served)
    assert at_least < sum(each.cost for each in served) < headline.LOADED * seconds


def test_a_queue_has_just_begun_in_a_window() -> None:
    traffic = read_traffic(TRAFFIC)
    seconds = 38 * COST.mean_seconds(traffic) / headline.LOADED
    rate = rate_of_share(traffic, COST, headline.LOADED, seconds, HEAD_START)
    at_first = p95_of(queue(repeated(traffic), COST, rate, seconds, HEAD_START), seconds / 4)
    assert at_first < long_run_p95(traffic, COST, headline.LOADED)


def test_the_cost_is_what_a_run_has_shown() -> None:
    run = {
        "first_token_s": {"mean": 6.1}, "end_to_end_s": {"mean": 16.1}, "prompt_tokens": 1000.0,
        "answer_tokens": 101.0,
    }  # fmt: skip
    cost = Cost.of(run)
    assert cost == Cost(pytest.approx(0.006), pytest.approx(0.1))
    talk = Conversation(0.0, [Turn(20, 30), Turn(40, 50)], 0, 500)
    prompts = (500 + 20 + 15), (500 + 20 + 30 + 40 + 25)  # and 5 for each message, the answer's too
    assert cost.mean_seconds([talk]) == pytest.approx((sum(prompts) * 0.006 + 8.0) / 2)


# A run of one user, of the 1.1 B model: 8.67 s for a request.
ONE_USER = {
    "first_token_s": {"mean": 5.863}, "end_to_end_s": {"mean": 8.619}, "prompt_tokens": 926.8,
    "answer_tokens": 106.75, "window_s": 3600.0,
}  # fmt: skip


@pytest.mark.parametrize(("minutes", "n"), [(45, 38), (90, 82), (1, headline.FEWEST)])
def test_windows_are_as_long_as_there_is_time(minutes: float, n: int) -> None:
    args = Namespace(minutes=minutes, result=Path("found.json"))
    assert headline.n_requests(Bench(args, {"naive capacity": ONE_USER})) == n


@pytest.mark.parametrize(("rate", "seconds"), [(0.38, 100.0), (0.01, 387.8)])
def test_no_window_is_longer_than_that_of_naive_serving(
    monkeypatch: pytest.MonkeyPatch, rate: float, seconds: float
) -> None:
    bench = Bench(Namespace(minutes=45, result=Path("f.json")), {"naive capacity": ONE_USER})
    asked: list[float] = []
    monkeypatch.setattr(Bench, "run", lambda _, name, seconds, **more: asked.append(seconds))
    headline._at_rate(bench, "some load", rate)
    assert asked == [pytest.approx(seconds, rel=0.01)]


def test_users_say_something_else_in_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server has what was said before: later runs had been measured with all they ask kept."""
    seeds: list[int] = []

    class Asked(Exception):
        pass

    def settings(**given: Any) -> None:
        seeds.append(given["seed"])
        raise Asked

    monkeypatch.setattr(headline_runs, "Settings", settings)
    bench = Bench(Namespace(again=False, result=Path("f.json")), {"tokens_per_word": 1.0})
    bench.url = lambda: "http://h"
    for name in ("ours saturated", "ours at naive's load", "ours saturated"):
        with pytest.raises(Asked):
            bench.run(name, 1.0, rate=1.0)
    assert seeds[0] == seeds[2] != seeds[1]


def bench(model: Path, result: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    command = ["headline", str(model), "--result", str(result), "--slots", "2", *flags]
    monkeypatch.setattr(sys, "argv", command)
    headline.main()
    return json.loads(result.read_text())


def test_runs_are_kept_and_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path, n_ctx=4096, chat_template=TEMPLATE)
    result, flags = (
        tmp_path / "found.json",
        ("--only", "naive", "--minutes", "0.01", "--threads", "1"),
    )
    found = bench(model, result, monkeypatch, *flags)
    first = capsys.readouterr()
    assert "starting naive" in first.err and "p95 should be" in first.err
    one, loaded = found["naive capacity"], found["naive loaded"]
    assert one["answered"] == one["requests"] == 4 + 6 + 4  # of three conversations, all turns
    service = Cost.of(one).mean_seconds(read_traffic(TRAFFIC))
    assert loaded["window_s"] == pytest.approx(headline.FEWEST * service / headline.LOADED)
    assert loaded["requests"] and loaded["due_per_s"] > 0

    assert bench(model, result, monkeypatch, *flags) == found
    again = capsys.readouterr()
    assert again.err.count("kept from before") == 2 and "starting" not in again.err
    assert again.out == first.out and "| naive loaded |" in again.out

    del found["naive loaded"]  # as where a bench was stopped meanwhile
    result.write_text(json.dumps(found))
    resumed = bench(model, result, monkeypatch, *flags)
    assert resumed["naive capacity"] == one
    assert resumed["naive loaded"]["requests_per_s"] == loaded["requests_per_s"]
    assert capsys.readouterr().err.count("kept from before") == 1


def test_what_is_not_there_or_of_another_load_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, result = tmp_path / "none.gguf", tmp_path / "found.json"
    with pytest.raises(SystemExit, match="naive capacity is not in .*: measure that piece first"):
        bench(model, result, monkeypatch, "--only", "ours")
    result.write_text(json.dumps({"naive capacity": {"answered_per_s": 1.0}}))  # of before windows
    with pytest.raises(SystemExit, match="naive capacity is not in .*: measure that piece first"):
        bench(model, result, monkeypatch, "--only", "ours")
    result.write_text(json.dumps({"model": "none.gguf", "threads": 4}))
    with pytest.raises(SystemExit, match="is of threads 4, not 1: name another --result"):
        bench(model, result, monkeypatch, "--threads", "1")
    with pytest.raises(SystemExit):
        bench(model, tmp_path / "new.json", monkeypatch, "--only", "naive,yours")
    assert not (tmp_path / "new.json").exists()


def test_a_model_that_says_words_is_read_as_it_wrote(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path)
    words = tokenizers.words_of(plain)
    for quant in ("Q4_0", "Q4_K_M"):
        path = tiny_model(tmp_path, quant=quant, tokenizer=plain, says_words=True)
        with GGUFFile.open(path) as file:
            tokenizer = Tokenizer.from_metadata(file.metadata)
            rows = dequantize(file.tensors["output.weight"])
        assert np.flatnonzero(rows.any(axis=1)).tolist() == words
    assert [tokenizer.text(id) for id in words] == ["Ġt", "Ġthe", "Ġa", "Ġan"]
    said = random.Random(0).choices(words, k=200)
    assert tokenizer.encode_middle(tokenizer.decode(said)) == said
    with pytest.raises(ValueError, match="says_words needs a head of its own and the words"):
        tiny_model(tmp_path, says_words=True)
