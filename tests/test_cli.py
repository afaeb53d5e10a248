"""The command as a person or a script meets it: output, exit codes, interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeinfer import __version__
from edgeinfer.cli import models as cli_models
from edgeinfer.cli.main import main
from edgeinfer.cli.options import LOAD_NAMES, SAMPLING_NAMES
from edgeinfer.errors import ModelNotFoundError
from edgeinfer.hub.discovery import find_model
from edgeinfer.options import LoadOptions, Sampling
from edgeinfer.platform import ReadableFile
from edgeinfer.terminal import StreamFilter, printable

from .models_for_tests import tiny_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
COMMAND = (sys.executable, "-m", "edgeinfer")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cli"), n_ctx=4096, chat_template=TEMPLATE)


@pytest.fixture(autouse=True)
def no_models_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not this machine's models; its built kernels stay in use."""
    monkeypatch.setattr("edgeinfer.config.data_folder", lambda: tmp_path / "data")
    monkeypatch.setattr("edgeinfer.config.model_folders", dict)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, out, err

    return run


Call = Callable[..., tuple[int, str, str]]


def test_run_prints_the_answer_only(call: Call, path: Path) -> None:
    code, out, err = call("run", path, "-p", "hi", "-n", 4, "--device", "reference", "--seed", 1)
    assert code == 0
    assert out.endswith("\n")
    assert "context 4096 of 4096" in err
    assert "context" not in out


def test_run_json(call: Call, path: Path) -> None:
    code, out, _ = call(
        "run", path, "-p", "hi", "--max-tokens", "4", "--device", "reference", "--json", "--raw"
    )
    answer = json.loads(out)
    assert code == 0
    assert answer["completion_tokens"] == len(answer["token_ids"]) <= 4
    assert answer["prompt_token_ids"][0] == 256
    assert {"text", "finish_reason", "prompt_tokens", "cached_tokens", "seed", "model"} <= set(
        answer
    )
    assert answer["timings"]["load_s"] > 0
    assert answer["sampling"] == {"max_tokens": 4}


def test_run_reads_stdin_and_files(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "more.txt"
    file.write_text("from a file")
    base = [*COMMAND, "run", str(path), "--raw", "-n", "1", "--device", "reference", "--json"]
    for extra, expected in (
        ([], "piped"),
        (["-p", "-", "-f", str(file)], "piped\n\nfrom a file"),
        (["-p", "given", "-f", str(file)], "given\n\npiped\n\nfrom a file"),
    ):
        done = subprocess.run([*base, *extra], input=b"piped", capture_output=True, check=True)
        assert json.loads(done.stdout)["prompt"] == expected


def test_same_seed_same_text(call: Call, path: Path) -> None:
    arguments = ("run", path, "-p", "hi", "-n", "20", "--seed", "5", "--device", "reference")
    assert call(*arguments)[1] == call(*arguments)[1]


def test_info(call: Call, path: Path) -> None:
    code, out, _ = call("info", path, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["architecture"], facts["runs"], facts["n_layers"]) == ("llama", True, 2)
    assert "architecture: llama" in call("info", path)[1]


def test_plan(call: Call, path: Path) -> None:
    code, out, _ = call("plan", path, "--json", "-c", "512")
    plan = json.loads(out)
    assert code == 0
    assert plan["fits"]
    assert plan["solved"]["n_ctx"] == 512
    assert plan["total_bytes"] == sum(row["bytes"] for row in plan["rows"])
    assert "KV cache" in call("plan", path)[1]


def test_tokenize(call: Call, path: Path) -> None:
    code, out, _ = call("tokenize", path, "-p", "hi", "--json")
    assert code == 0
    assert "".join(json.loads(out)["pieces"]) == "hi"
    assert "'h'" in call("tokenize", path, "-p", "hi")[1]


def test_bench(call: Call, path: Path) -> None:
    arguments = ("bench", path, "-p", "16", "-n", "4", "-r", "2", "--device", "reference")
    code, out, _ = call(*arguments, "--json")
    result = json.loads(out)
    assert code == 0
    assert {
        "prefill_tok_s", "decode_tok_s", "decode_sampled_tok_s", "read_gb_s", "decode_fraction",
        "load_s", "first_token_s", "peak_rss_mib", "cpu",
    } <= set(result)  # fmt: skip
    assert result["decode_tok_s"] > 0
    assert result["device"] == "reference" and "threads" not in result
    assert "prefill_tok_s" in call(*arguments)[1]
    for wrong in (("-r", "0"), ("-p", "1_0"), ("-d", "-1"), ("-n", "٣")):
        assert call("bench", path, *wrong)[0] == 2


@pytest.mark.parametrize("named", ["missing/llama-bench", "no-such-llama-bench", "."])
def test_a_missing_llama_bench_is_found_out_before_a_model_is_loaded(
    call: Call, named: str
) -> None:
    code, out, err = call("bench", "no-such-model.gguf", "--compare", named)
    assert code == 1 and not out and "give the path of llama-bench" in err


def test_bench_measures_the_memory_on_the_cpu(call: Call, path: Path) -> None:
    result = json.loads(call("bench", path, "-p", "8", "-n", "4", "-r", "1", "--json")[1])
    assert result["read_gb_s"] > 0 and result["device"] == "cpu" and result["threads"] > 0
    assert result["decode_fraction"] > 0


def test_perplexity_in_windows(call: Call, path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words of text " * 20)
    arguments = ("perplexity", path, text, "--device", "reference")
    whole = json.loads(call(*arguments, "--json")[1])
    windows = json.loads(call(*arguments, "--json", "-c", "64")[1])
    assert whole["tokens"] == windows["tokens"] > 100
    assert whole["ppl"] > 1
    assert "ppl" in call(*arguments)[1]


def test_perplexity_where_the_context_slides(call: Call, path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words of text " * 20)

    def found(*flags: str) -> str:
        arguments = ("perplexity", path, text, "--device", "reference", "--json", "--last", "40")
        return call(*arguments, *flags)[1]

    assert json.loads(found("--slide"))["tokens"] == 40
    assert found("--slide") != found("--slide", "-c", "128") != found("-c", "128")
    code, _, err = call("perplexity", path, text, "-c", "1", "--device", "reference")
    assert code == 2 and "give 2 or more" in err
    code, _, err = call("perplexity", path, text, "--last", "0")
    assert code == 2 and "--last" in err


def test_a_model_without_numbers_has_no_perplexity(call: Call, tmp_path: Path) -> None:
    model, text = tiny_model(tmp_path, quant="F32"), tmp_path / "text.txt"
    text.write_text("a few words of text")
    raw = model.read_bytes()
    model.write_bytes(raw[:-4096] + b"\xff" * 4096)  # the last rows of the head: not a number
    code, out, err = call("perplexity", model, text, "--device", "reference", "--json")
    assert (code, out) == (1, "") and "yields no number" in err.splitlines()[-1]


def test_warmup(call: Call, path: Path) -> None:
    code, out, err = call("warmup", path, "--device", "reference")
    assert (code, out) == (0, "")
    assert "ready" in err


def test_plain_chat_answers_line_by_line(path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "chat", "--plain", str(path), "-n", "3", "--device", "reference"],
        input=b"hi\n\nmore\n",
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0
    assert done.stdout.count(b"\n") >= 2
    assert b"Traceback" not in done.stderr


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "PATH", "--bogus"], 2, "No such option"),
        (["run", "PATH", "-p", "x", "--raw", "--system", "y"], 2, "--system"),
        (["run", "PATH", "-p", "x", "--top-p", "7"], 2, "top_p"),
        (["run", "-p", "x"], 1, "edgeinfer pull smollm2"),
        (["run", "smolm2", "-p", "x"], 1, "did you mean smollm2"),
        (["run", "PATH", "-p", "x", "--device", "cuda"], 1, "cuda"),
        (["run", "PATH", "-p", "x", "--memory", "1M"], 1, "MiB"),
        (["run", "PATH", "-f", "/no/such/file"], 1, "No such file"),
        (["run", "PATH", "-f", "/no/such/file"], 1, "edgeinfer: /no/such/file: "),
        (["run", "PATH", "hi", "--schema", ""], 1, "edgeinfer: '': No such file"),
        (["run", "PATH", "hi", "--schema", "/no/such"], 1, "edgeinfer: /no/such: No such file"),
        (["run", "PATH", "-p", "x" * 500, "-c", "64"], 1, "context holds 64"),
        (["frobnicate"], 2, "No such command"),
        (["runn", "x"], 2, "No such command 'runn'. Did you mean `edgeinfer run`?"),
        (["RUN", "x"], 2, "Did you mean `edgeinfer run`?"),
        (["my.gguf"], 2, "Did you mean `edgeinfer chat my.gguf`?"),
        (["run", "PATH", "x", "-n", "1_0"], 2, "max_tokens is '1_0'"),
        (["run", "PATH", "x", "--temp", "\u0661"], 2, "temperature is '\u0661'"),
        (["run", "PATH", "x", "--stop-token-ids", "1_0"], 2, "'1_0' is not a number in plain"),
        (["serve", "PATH", "--port", "8_0"], 2, "'8_0' is not a number in plain digits"),
        (["load", "http://127.0.0.1:1", "--rate", "nan"], 2, "'nan' is not a number"),
        (["load", "http://127.0.0.1:1", "--seconds", "-NaN "], 2, "is not a number"),
        (["load", "http://127.0.0.1:1", "--turns", "5-"], 2, "'5-' is no range"),
        (["load", "http://127.0.0.1:1", "--turns", "\u0663"], 2, "is no range"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    call: Call, path: Path, arguments: list[str], code: int, message: str
) -> None:
    given = [str(path) if argument == "PATH" else argument for argument in arguments]
    if "--device" not in given and "PATH" in arguments:
        given += ["--device", "reference"]
    found, out, err = call(*given)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="what a limit leaves room for differs")
def test_a_library_that_finds_no_room_is_a_lack_of_memory(path: Path) -> None:
    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (45 << 20, 45 << 20))

    done = subprocess.run(
        [*COMMAND, "run", str(path), "-p", "a"], capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 1
    assert done.stderr.startswith("edgeinfer: memory ran out: close other programs"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "info", "tokenize", "bench", "plan"])
@pytest.mark.parametrize("damage", ["cut", "not gguf", "empty", "counts", "folder"])
def test_hostile_files_are_one_line(
    call: Call, path: Path, tmp_path: Path, command: str, damage: str
) -> None:
    data = path.read_bytes()
    file = tmp_path / "bad\x1b[31m.gguf"
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(
            {
                "cut": data[: len(data) // 3],
                "not gguf": b"#!/bin/sh\necho\n",
                "empty": b"",
                "counts": data[:8] + b"\xff" * 16 + data[24:],
            }[damage]
        )
    more = ["-p", "x"] if command in ("run", "tokenize") else []
    code, out, err = call(command, file, *more)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_debug_shows_the_traceback(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"nothing")
    code, _, err = call("info", file, "--debug")
    assert code == 1
    assert "Traceback" in err


def test_unknown_architecture_is_described(call: Call, tmp_path: Path) -> None:
    path = tiny_model(tmp_path, n_ctx=128)
    data = path.read_bytes().replace(b"llama", b"lhama")
    path.write_bytes(data)
    facts = json.loads(call("info", path, "--json")[1])
    assert not facts["runs"]
    assert "lhama" in facts["reason"]
    code, _, err = call("run", path, "-p", "x", "--device", "reference")
    assert code == 1
    assert "lhama" in err


def test_version_and_help(call: Call) -> None:
    assert __version__ in call("--version")[1]
    code, out, _ = call("--help")
    assert code == 0
    for name in ("run", "chat", "info", "plan", "bench", "perplexity", "tokenize", "warmup"):
        assert name in out


def test_every_flag_is_an_api_keyword() -> None:
    assert set(LOAD_NAMES) <= set(LoadOptions.__annotations__)
    assert set(SAMPLING_NAMES) <= set(Sampling.__annotations__)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("-c", "64.0"), ("-c", "0"), ("-t", "1000000"), ("--slots", "x"), ("--memory", "lots"),
        ("-n", "-2"), ("-n", "1.5"), ("--top-p", "1.5"), ("--temp", "nan"), ("--seed", "-1"),
        ("--stop", ""), ("--mirostat", "3"), ("--repeat-penalty", "0"), ("--overflow", "drop"),
        ("--stop-token-ids", "-1"),
    ],
)  # fmt: skip
def test_flags_are_checked_before_a_model_is_looked_for(
    call: Call, flag: str, text: str, tmp_path: Path
) -> None:
    code, out, error = call("run", tmp_path / "none.gguf", "-p", "x", flag, text)
    assert (code, out) == (2, "")
    assert flag in error
    assert "none.gguf" not in error


# -- interrupts and pipes ------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_interrupt_acts_at_once(path: Path, device: str, phase: str) -> None:
    prompt = "x" * 200_000 if phase == "prefill" else "hi"
    job = subprocess.Popen(
        [
            *COMMAND, "run", str(path), "--raw", "-p", "-", "-n", "1000000",
            "--overflow", "slide", "--temperature", "0", "--device", device,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert job.stdin and job.stdout and job.stderr
    job.stdin.write(prompt.encode())
    job.stdin.close()
    job.stderr.readline()  # the model is open
    if phase == "decode":
        job.stdout.read(1)
    else:
        time.sleep(0.3)
    job.send_signal(signal.SIGINT)
    job.stdin = None  # which is closed
    _, errors = job.communicate(timeout=120)  # what was begun would take longer
    assert job.returncode == 130, errors
    assert b"Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_closed_pipe_is_quiet(path: Path) -> None:
    job = subprocess.Popen(
        [*COMMAND, "run", str(path), "--raw", "-p", "hi", "-n", "4000", "--device", "reference"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert job.stdout and job.stderr
    job.stdout.read(1)
    job.stdout.close()
    errors = job.stderr.read()
    job.stderr.close()
    assert job.wait(timeout=300) == 0
    assert errors.count(b"\n") == 1  # the line about the context


# -- the terminal --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nü 漢", "plain\ttext\nü 漢"),
        ("a\x1b[31mred\x1b[0mb", "aredb"),
        ("a\x1b]52;c;aGk=\x07b", "ab"),
        ("a\x1b]0;title\x1b\\b", "ab"),
        ("a\x9b31mb\x9d52;c;x\x9cc", "abc"),
        ("a\x1bPq#0\x1b\\b\x1bcd", "abd"),
        ("bell\x07 back\x08 nul\x00 cr\r", "bell back nul cr"),
        ("a\u202eb\u2066c", "abc"),
        ("a\x1b]never ended", "a]never ended"),
    ],
)
def test_terminal_text_is_harmless(text: str, shown: str) -> None:
    assert printable(text) == shown
    for n in (1, 2, 3):
        parts = StreamFilter()
        pieces = [parts.push(text[i : i + n]) for i in range(0, len(text), n)]
        assert "".join(pieces) + parts.flush() == shown


def test_endless_sequence_does_not_hide_the_rest() -> None:
    parts = StreamFilter()
    shown = "".join(parts.push(text) for text in ["\x1b]", *["word "] * 200]) + parts.flush()
    assert shown.count("word") == 200


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_what_is_shown_on_a_terminal_is_filtered(path: Path) -> None:
    import pty

    arguments = [*COMMAND, "tokenize", str(path), "-p", "a\x1b[31mb"]
    leader, follower = pty.openpty()
    done = subprocess.run(arguments, stdout=follower, stderr=subprocess.PIPE, check=True)
    os.close(follower)
    shown = os.read(leader, 10_000)
    os.close(leader)
    assert b"\x1b" not in shown
    assert done.returncode == 0


# -- standard streams and files that are not what they should be -----------------------------------


def _shell(path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in which `edgeinfer` is the command and $FILE the model."""
    script = f'edgeinfer() {{ "$PYTHON" -m edgeinfer "$@"; }}; {script}'
    environment = {**os.environ, "PYTHON": sys.executable, "FILE": str(path)}
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("script", "code", "says"),
    [
        ("edgeinfer plan $FILE --json 2>/dev/full", 0, "total_bytes"),
        (
            "edgeinfer run $FILE --raw -p a -n 1 --json --device reference 2>/dev/full",
            0,
            "token_ids",
        ),
        ("edgeinfer plan --nothing 2>/dev/full", 2, ""),
        ("edgeinfer plan /nowhere/x.gguf 2>/dev/full", 1, ""),
        ("edgeinfer plan $FILE --json 2>&-", 0, "total_bytes"),
        ("edgeinfer plan $FILE >&-", 0, ""),
        ("edgeinfer tokenize $FILE --json <&-", 0, '"token_ids": []'),
        ("edgeinfer plan $FILE >/dev/full", 1, "edgeinfer: No space left on device"),
    ],
)
def test_a_standard_stream_that_is_full_or_closed(
    path: Path, script: str, code: int, says: str
) -> None:
    """What stderr does not take costs no answer; a full stdout is one line."""
    done = _shell(path, script)
    assert done.returncode == code, done
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "FILE", "--raw", "-f", "/dev/zero"),
        ("perplexity", "FILE", "/dev/zero"),
        ("run", "FILE", "-p", "a", "--chat-template", "/dev/zero", "--device", "reference"),
    ],
)
def test_a_file_without_end_is_not_read_to_the_end(
    call: Call, path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("edgeinfer.cli.input._MOST_TEXT", 3 << 20)
    code, out, err = call(*(path if each == "FILE" else each for each in arguments))
    assert code in (1, 2)
    assert not out
    assert "/dev/zero" in err
    assert "unexpected" not in err


@pytest.mark.parametrize("name", ["x" * 300, "/" + "x" * 300 + "/y.gguf", "x" * 5000])
def test_a_name_that_no_file_can_have_is_no_model(call: Call, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        find_model(name)
    code, _, err = call("run", name, "-p", "a", "-y")
    assert code == 1
    assert err.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="a folder in use can't be deleted there")
def test_a_home_relative_to_a_folder_that_is_gone(path: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = _shell(
        path, f"cd '{gone}' && rmdir '{gone}' && EDGEINFER_HOME=here edgeinfer list --json"
    )
    assert done.returncode == 0, done


def test_a_file_that_can_not_be_opened_leaves_nothing_to_close(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # what a destructor can't do is an error in tests
        ReadableFile(tmp_path / "nothing")


def test_what_to_pull_is_told_once_and_only_to_people(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEINFER_HOME", str(tmp_path))
    small = Path("SmolLM2-135M-Instruct.Q4_1.gguf")
    told = []
    for is_person in (False, True, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_person=is_person: is_person)
        cli_models.advise_after(Path("qwen3-4b.gguf"))
        cli_models.advise_after(small)
        told.append(capsys.readouterr().err)
    assert told[0] == told[2] == "" and told[1].startswith("(135 M parameters")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_start_has_no_threads_that_nobody_uses(tmp_path: Path, device: str) -> None:
    """NumPy's library has one for each processor, and spins while it waits."""
    code = (
        "import atexit, os, sys; from edgeinfer.cli.main import main\n"
        "atexit.register(lambda: print(len(os.listdir('/proc/self/task')), file=sys.stderr))\n"
        "main(sys.argv[1:])"
    )
    model = tiny_model(tmp_path)
    environment = {k: v for k, v in os.environ.items() if "NUM_THREADS" not in k}
    command = [sys.executable, "-c", code, "plan", str(model), "--device", device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    n_threads = int(done.stderr.split()[-1])
    has_many = device == "reference" and len(os.sched_getaffinity(0)) > 1
    assert (n_threads > 1) == has_many, done.stderr
