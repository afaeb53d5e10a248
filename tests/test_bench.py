"""`bench`: reading what llama-bench prints, grouping and tables. No figure is judged here."""

from __future__ import annotations

import io
import json
import re
import stat
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from edgeinfer import LLM, BusyError, ContextLengthError, DeviceError, EdgeInferError
from edgeinfer.batch import OpTime
from edgeinfer.bench.compare import Comparison, Rates, compare, llama_command, parse_rates
from edgeinfer.bench.speed import run_bench
from edgeinfer.bench.steps import (
    OpRow,
    SweepRow,
    group_ops,
    step_seconds,
    sweep,
    sweep_threads,
    time_ops,
)
from edgeinfer.bench.tables import compare_lines, op_lines, sweep_lines, table
from edgeinfer.cli.main import commands

from .models_for_tests import tiny_model

LLAMA = json.dumps(
    [
        {"n_prompt": 256, "n_gen": 0, "avg_ts": 200.5, "build_commit": "abc"},
        {"n_prompt": 0, "n_gen": 32, "avg_ts": 40.25},
    ]
)


def fake_llama_bench(folder: Path, body: str) -> str:
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bench"), n_ctx=1024)


def test_rates_of_llama_bench() -> None:
    assert parse_rates(LLAMA) == Rates(200.5, 40.25)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "[]",
        "{}",
        "[1]",
        '[{"n_prompt": 1}]',
        "null",
        '[{"n_prompt": 1, "n_gen": 0, "avg_ts": 1%s}]' % ("0" * 400),
        "[" * 100_000,
    ],
)
def test_other_output_is_refused(text: str) -> None:
    with pytest.raises(EdgeInferError, match="llama-bench"):
        parse_rates(text)


def test_the_command_measures_what_we_do() -> None:
    command = llama_command("lb", Path("m.gguf"), 3, 0, 256, 32, 0)
    assert command == "lb -m m.gguf -t 3 -ngl 0 -p 256 -n 32 -r 1 -o json".split()
    command = llama_command("lb", Path("m.gguf"), 3, 99, 256, 32, 4096)
    assert command == "lb -m m.gguf -t 3 -ngl 99 -p 256 -n 32 -d 4096 -r 1 -o json".split()


@pytest.mark.skipif(sys.platform == "win32", reason="a script with #! is no program there")
def test_compare_takes_turns(path: Path, tmp_path: Path) -> None:
    llama = fake_llama_bench(tmp_path, f"print({LLAMA!r})")
    with LLM(path, device="reference") as llm:
        rows = compare(llm.runtime, llama, 8, 4, 0, 2)
        assert [row.what for row in rows] == ["prefill", "decode"]
        assert [row.llama_cpp for row in rows] == [200.5, 40.25]
        assert all(row.ratio > 0 for row in rows)
        broken = fake_llama_bench(tmp_path, "raise SystemExit('no such model')")
        with pytest.raises(EdgeInferError, match="failed with 1: no such model"):
            compare(llm.runtime, broken, 8, 4, 0, 1)
        (tmp_path / "notes").write_text("not a program")
        (folder := tmp_path / "folder").mkdir()
        for path_of in (tmp_path / "missing", tmp_path / "notes", folder):
            with pytest.raises(EdgeInferError) as caught:
                compare(llm.runtime, str(path_of), 8, 4, 0, 1)
            says = rf"{path_of} can't be run \([A-Z][a-z ]+\); give the path of llama-bench"
            assert re.fullmatch(says, str(caught.value))
        (tmp_path / "notes").chmod(0o755)  # which has no #! either
        with pytest.raises(EdgeInferError, match="can't be run .*; give the path"):
            compare(llm.runtime, str(tmp_path / "notes"), 8, 4, 0, 1)


class Program:
    """Counts the rows of all steps."""

    def __init__(self, program: Any) -> None:
        self.program, self.n_rows = program, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def submit(self, batch: Any) -> Any:
        self.n_rows += batch.n_rows
        return self.program.submit(batch)

    def close(self) -> None:
        self.program.close()


@pytest.mark.parametrize("depth", [0, 70])
def test_a_context_is_read_once_and_every_prompt_after_it_anew(path: Path, depth: int) -> None:
    with LLM(path, n_ctx=128, threads=1) as llm:
        engine = llm.runtime.engine
        engine._runner.program = program = Program(engine._runner.program)
        result = run_bench(llm.runtime, 40, 8, depth, 2)
        assert (result.depth, result.prompt_tokens, result.gen_tokens) == (depth, 40, 8)
        assert program.n_rows == depth + 2 * (40 + 9 + 9)
        assert min(result.prefill_tok_s, result.decode_tok_s, result.first_token_s) > 0


def test_a_depth_that_the_context_does_not_hold_is_refused(path: Path) -> None:
    with LLM(path, n_ctx=128, threads=1) as llm:
        for n_prompt, n_gen in ((40, 8), (8, 39)):
            with pytest.raises(ContextLengthError, match="a context of 129"):
                run_bench(llm.runtime, n_prompt, n_gen, 88, 1)
        with pytest.raises(ContextLengthError, match="a context of 129"):
            time_ops(llm.runtime, 1, 128, 1)
        assert run_bench(llm.runtime, 40, 39, 87, 1).decode_tok_s > 0


def test_ops_of_one_name_are_one_row() -> None:
    def run(factor: float) -> list[OpTime]:
        return [
            OpTime("norm", ("norm",), 1e-3 * factor, 0, 0),
            OpTime("ffn_down", ("matmul.q4_0",), 2e-3 * factor, 10_000_000, 20_000_000),
            OpTime("ffn_down", ("matmul.q6_k",), 2e-3 * factor, 30_000_000, 20_000_000),
        ]

    norm, down = group_ops([run(1.0), run(9.0), run(1.0)], read_bandwidth=20e9)
    assert (norm.n, norm.gb_s, norm.gmac_s) == (1, 0, 0)
    assert (down.n, down.kernels) == (2, "matmul.q4_0 matmul.q6_k")
    assert down.seconds == pytest.approx(4e-3)
    assert down.share == pytest.approx(0.8)
    assert down.gb_s == pytest.approx(10)
    assert down.read_fraction == pytest.approx(0.5)
    assert down.gmac_s == pytest.approx(10)


def test_ops_of_a_real_step_cover_all_weights(path: Path) -> None:
    with LLM(path) as llm:
        for n_rows in (1, 40):
            rows = time_ops(llm.runtime, n_rows, 0, 2)
            assert sum(row.share for row in rows) == pytest.approx(1)
            read = sum(row.gb_s * 1e9 * row.seconds for row in rows)
            assert read == pytest.approx(llm.runtime.bytes_per_token)
            head = next(row for row in rows if row.op == "output" or "token_embd" in row.op)
            assert head.gmac_s * 1e9 * head.seconds == pytest.approx(320 * 64)
    with LLM(path, device="reference") as llm, pytest.raises(DeviceError, match="op|step"):
        time_ops(llm.runtime, 1, 0, 1)


def test_steps_of_a_model_with_states_are_timed(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, arch="qwen35", n_layers=4)
    with LLM(path, n_ctx=200) as llm:
        names = {row.op for row in time_ops(llm.runtime, 1, 40, 1)}
        assert {"conv", "delta_net", "attend"} <= names
        assert step_seconds(llm.runtime, [1, 4], 40, 1).keys() == {1, 4}


@pytest.mark.parametrize("arch", ["llama", "qwen35"])
def test_what_is_measured_overwrites_no_conversation(tmp_path: Path, arch: str) -> None:
    path = tiny_model(tmp_path, arch=arch, n_layers=4)
    with LLM(path, n_ctx=200, device="reference") as llm:

        def answer() -> tuple[int, ...]:
            return llm.generate(list(range(3, 80)), max_tokens=8, temperature=0.0).token_ids

        before = answer()
        step_seconds(llm.runtime, [1, 4], 70, 1)
        assert answer() == before


def test_nothing_is_measured_in_what_an_unread_answer_holds(tmp_path: Path) -> None:
    """It pauses, and keeps its pages and its state."""
    for arch in ("llama", "qwen35"):
        path = tiny_model(tmp_path, arch=arch, n_layers=4)
        asked: Any = dict(max_tokens=400, temperature=0.0, logit_bias={257: -1e9})
        with LLM(path, n_ctx=600, threads=1) as llm:
            expected = llm.generate([3, 4, 5], **asked).token_ids
            with llm.stream([3, 4, 5], **asked) as stream:
                while not llm.runtime.engine._scheduler.paused:
                    time.sleep(0.01)
                with pytest.raises(BusyError, match="end them first"):
                    step_seconds(llm.runtime, [1, 4], 40, 1)
                assert stream.run().token_ids == expected
            assert step_seconds(llm.runtime, [1, 4], 40, 1).keys() == {1, 4}


def test_sweep_goes_as_deep_as_the_context(path: Path) -> None:
    with LLM(path, n_ctx=600, device="reference") as llm:
        rows = sweep(llm.runtime, 1)
        # Nothing of the sweep is left in the cache's bookkeeping.
        assert llm.runtime.engine.pools[0].n_free == llm.runtime.engine.pools[0].n_pages
    assert [(row.depth, row.rows) for row in rows] == [
        (d, n) for d in (0, 512) for n in (1, 2, 4, 8)
    ]
    assert all(row.seconds > 0 for row in rows)


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_thread_counts_double_up_to_the_most(most: int, counts: list[int]) -> None:
    assert sweep_threads(most) == counts


def test_tables() -> None:
    assert table(["a", "bcd"], [["long", "1"]]) == ["a     bcd", "long    1"]
    compared = [Comparison("decode", 60.04, 30.0, 2.0)]
    assert compare_lines(compared, 0) == [
        "tok/s   edgeinfer  llama.cpp  ratio",
        "decode       60.0       30.0  2.00x",
    ]
    assert compare_lines(compared, 512)[0].startswith("tok/s at depth 512  edgeinfer")
    sweep = [SweepRow(2, 512, 1, 0.01), SweepRow(2, 512, 4, 0.02)]
    assert [line.split() for line in sweep_lines(sweep)[1:]] == [
        ["2", "512", "10.00", "20.00", "100.0", "200.0"]
    ]
    ops = [
        OpRow("norm", "norm", 5, 0.001, 0.2, 0, 0, 0),
        OpRow("output", "matmul.q6_k", 1, 0.004, 0.8, 12.0, 0.9, 7.5),
    ]
    assert [line.split() for line in op_lines(ops)[1:]] == [
        ["norm", "5", "1.000", "20.0", "norm"],
        ["output", "1", "4.000", "80.0", "12.0", "90", "7.5", "matmul.q6_k"],
        ["all", "6", "5.000"],
    ]


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with commands.make_context("edgeinfer", ["bench", *arguments]) as context:
        commands.invoke(context)
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--sweep"], ["--ops"], ["--ops", "-d", "100"]])
def test_on_the_command_line(
    path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(path), "-p", "8", "-r", "1", "-t", "1", *flags]
    text = shown(arguments, capsys)
    assert "ms" in text and ("at depth 100" in text) == ("-d" in flags)
    assert json.loads(shown([*arguments, "--json"], capsys))["cpu"]


@pytest.mark.skipif(sys.platform == "win32", reason="a script with #! is no program there")
def test_depth_on_the_command_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = f"import sys; assert sys.argv[sys.argv.index('-d') + 1] == '50'; print({LLAMA!r})"
    sizes = ["-p", "8", "-n", "4", "-r", "1", "-t", "1", "-d", "50"]
    assert "depth                  50\n" in shown([str(path), *sizes], capsys)
    sizes += ["--compare", fake_llama_bench(tmp_path, body)]
    assert "tok/s at depth 50" in shown([str(path), *sizes], capsys)
    assert json.loads(shown([str(path), *sizes, "--json"], capsys))["depth"] == 50


@pytest.mark.parametrize("flags", [["-d", "-1"], ["-d", "8", "--sweep"]])
def test_depths_that_mean_nothing(
    path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(click.UsageError, match="-1 is not in the range|leave -d out"):
        shown([str(path), *flags], capsys)


def test_modes_exclude_each_other(path: Path) -> None:
    with (
        commands.make_context("edgeinfer", ["bench", str(path), "--ops", "--sweep"]) as context,
        pytest.raises(click.UsageError, match="alone"),
    ):
        commands.invoke(context)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.skipif(sys.platform == "win32", reason="a script with #! is no program there")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-d", "64"], ["reading the context before", "measuring 0 %"]),
        (["--compare", "LLAMA"], ["measuring 0 %", "waiting for llama-bench 50 %"]),
        (["--ops", "-d", "64"], ["reading the context before", "measuring steps"]),
        (["--sweep"], ["measuring steps"]),
    ],
)
def test_what_takes_long_says_how_far_it_is_to_people_only(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: list[str],
) -> None:
    monkeypatch.setattr("edgeinfer.cli.console._QUIET_SECONDS", 0.0)
    monkeypatch.setattr("edgeinfer.cli.console._REDRAW_SECONDS", 0.0)
    llama = fake_llama_bench(tmp_path, f"print({LLAMA!r})")
    arguments = [llama if each == "LLAMA" else each for each in arguments]
    command = ["bench", str(path), *arguments, "-p", "8", "-n", "4", "-r", "2", "-t", "1"]
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        with commands.make_context("edgeinfer", command) as context:
            commands.invoke(context)
        shown = stderr.getvalue()
        assert [each in shown for each in says] == [stderr.isatty()] * len(says), shown
        assert ("\r" in shown) == stderr.isatty()
