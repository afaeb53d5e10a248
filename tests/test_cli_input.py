"""What a person gives a command to read: prompts, pipes, files, terminals, and how far it goes."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer import EdgeInferError
from edgeinfer.cli.input import read_file, read_prompt
from edgeinfer.cli.main import main
from edgeinfer.text.chat_templates import choose_template
from edgeinfer.text.plain_text import decode, lines

from .models_for_tests import metadata_of, tiny_model
from .waiting import wait_until

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
Pipe = Callable[[bytes], None]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("input"), n_ctx=4096, chat_template=TEMPLATE)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    """Makes stdin a pipe that holds some bytes and ends."""
    opened: list[io.TextIOWrapper] = []

    def feed(data: bytes) -> None:
        reads, writes = os.pipe()
        with open(writes, "wb") as file:
            file.write(data)
        opened.append(open(reads, encoding="utf-8"))
        monkeypatch.setattr(sys, "stdin", opened[-1])

    yield feed
    for file in opened:
        file.close()


# -- where a prompt comes from -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "prompt", "files", "expected"),
    [
        ([], None, [], "piped"),
        ([], "-", [], "piped"),
        (["-"], None, [], "piped"),
        ([], "asked", [], "asked\n\npiped"),
        (["asked"], None, [], "asked\n\npiped"),
        (["two", "words"], None, [], "two words\n\npiped"),
        ([], None, ["FILE"], "piped\n\nfiled"),
        ([], "asked", ["FILE"], "asked\n\npiped\n\nfiled"),
        ([], "asked", ["FILE", "-"], "asked\n\nfiled\n\npiped"),
        ([], "", ["FILE"], "piped\n\nfiled"),
    ],
)
def test_everything_that_is_given_is_read(
    pipe: Pipe,
    tmp_path: Path,
    words: list[str],
    prompt: str | None,
    files: list[str],
    expected: str,
) -> None:
    file = tmp_path / "file"
    file.write_text("filed")
    pipe(b"piped")
    named = [str(file) if each == "FILE" else each for each in files]
    assert read_prompt(words, prompt, named) == expected


def test_a_prompt_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal, /dev/null and a stdin that is none of the system's are not read beside one."""
    for stdin in (open(os.devnull, encoding="utf-8"), io.StringIO("never")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompt([], "asked", []) == "asked"
        stdin.close()


def test_what_can_not_be_meant_is_refused(pipe: Pipe) -> None:
    pipe(b"piped")
    for words, prompt, files in (
        (["a"], "b", []),
        ([], "-", ["-"]),
        ([], None, ["-", "-"]),
    ):
        with pytest.raises(click.UsageError):
            read_prompt(words, prompt, files)


def test_a_pipe_that_does_not_end_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgeinfer.cli.input._QUIET_SECONDS", 0.05)
    reads, writes = os.pipe()
    monkeypatch.setattr(sys, "stdin", open(reads, encoding="utf-8"))
    said: Any = sys.stderr  # of pytest's

    def end() -> None:
        try:
            wait_until(said.getvalue, "a word of what is waited for")
        finally:
            os.close(writes)

    ending = threading.Thread(target=end)
    ending.start()
    assert read_prompt([], "asked", []) == "asked"
    ending.join()
    assert capsys.readouterr().err == "waiting for standard input to end, or give </dev/null\n"
    sys.stdin.close()


@pytest.mark.skipif(os.name == "nt", reason="pipes always wait there")
def test_a_pipe_that_others_made_non_blocking_is_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    monkeypatch.setattr(sys, "stdin", open(reads, encoding="utf-8"))

    def write() -> None:
        with open(writes, "wb") as file:
            file.write(b"late")

    threading.Timer(0.1, write).start()
    assert read_prompt([], None, []) == "late"
    sys.stdin.close()


# -- what is text --------------------------------------------------------------------------------

PROSE = "Grüße, 天气 – naïve\r\nzweite Zeile\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"]
)
def test_text_with_or_without_a_mark_is_decoded(pipe: Pipe, tmp_path: Path, encoding: str) -> None:
    text = PROSE if encoding[-3:] not in ("-le", "-be") else "Grüße aus Windows\r\n"
    data = text.encode(encoding)
    file = tmp_path / "notes.txt"
    file.write_bytes(data)
    assert read_file(str(file)) == text
    pipe(data)
    assert read_prompt([], None, []) == text
    parts = (data[i : i + 5] for i in range(0, len(data), 5))
    if encoding[-3:] not in ("-le", "-be"):  # lines that come one by one can't be guessed
        assert list(lines(parts)) == text.splitlines()


@settings(max_examples=50)
@given(st.binary(min_size=256, max_size=4096))
def test_decoding_never_fails_but_by_its_own_error(data: bytes) -> None:
    try:
        text, n_lost = decode(data, "x")
    except EdgeInferError as error:
        assert "x is not text" in str(error)
        return
    assert text.count("\ufffd") >= n_lost


@pytest.mark.parametrize("n", [64, 1000, 100_000])
def test_random_bytes_are_no_text(tmp_path: Path, n: int) -> None:
    file = tmp_path / "picture.jpg"
    file.write_bytes(random.Random(n).randbytes(n))
    with pytest.raises(EdgeInferError, match=r"picture.jpg is not text: .* converts"):
        read_file(str(file))


def test_a_few_bytes_that_are_not_utf8_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"a line of a log\n" * 20 + b"caf\xe9 \xff\n")
    assert read_file(str(file)).count("\ufffd") == 2
    assert "log: 2 characters are not UTF-8" in capsys.readouterr().err


def test_a_template_may_begin_with_a_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "chat.jinja").write_bytes("{{ 'naïve' }}".encode(encoding))
        assert choose_template(str(tmp_path / "chat.jinja"), metadata_of({})) == "{{ 'naïve' }}"


# -- the command as a whole ----------------------------------------------------------------------


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `edgeinfer run` in this process: (exit code, stdout, stderr)."""

    def call(model: Path | str, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["run", str(model), "--device", "reference", "--seed", "1", *arguments])
        out, err = capfd.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, out, err

    return call


def test_a_pipe_and_a_prompt_make_one_answer(path: Path, run: Run, pipe: Pipe) -> None:
    pipe("naïve".encode("utf-16"))
    _, out, _ = run(path, "--json", "-n", "1", "Sum this up:")
    assert json.loads(out)["prompt"] == "Sum this up:\n\nnaïve"


@pytest.mark.parametrize("arguments", [(), ("-p", ""), ("-f", os.devnull), ("",)])
@pytest.mark.parametrize("piped", [b"", b" \n"])
def test_nothing_is_not_answered(
    path: Path, run: Run, pipe: Pipe, arguments: tuple[str, ...], piped: bytes
) -> None:
    pipe(piped)
    code, out, err = run(path, *arguments)
    assert (code, out) == (2, "")
    assert "the prompt is empty" in err


def test_a_question_in_place_of_a_model_is_named(run: Run, pipe: Pipe) -> None:
    pipe(b"")
    code, _, err = run("Why is the sky blue?")
    assert code == 2
    assert "a prompt without MODEL needs -p" in err


@pytest.mark.parametrize(
    ("flags", "n_tokens", "says"),
    [
        ((), 30, "stopped after 30 tokens; -n -1"),
        (("-n", "40"), 40, ""),
        (("-n", "-1", "-c", "64"), None, "the context of 64 tokens is full"),
        (("-n", "200", "-c", "128", "--overflow", "slide"), 200, ""),  # it slid
    ],
)
def test_an_answer_without_end_is_ended_and_told(
    path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    n_tokens: int | None,
    says: str,
) -> None:
    monkeypatch.setattr("edgeinfer.cli.run._MOST_TOKENS", 30)
    code, out, err = run(path, "-p", "hi", "--json", *flags)
    answer = json.loads(out)
    assert code == 0
    assert answer["sampling"].get("max_tokens") == n_tokens
    assert answer["finish_reason"] == "length"
    assert says in err and ("stopped" in err) == bool(says)


@pytest.mark.skipif(os.name == "nt", reason="a folder in use can't be deleted there")
def test_a_folder_that_is_gone_is_named(path: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'cd "{gone}" && rmdir "{gone}" && exec "$0" -m edgeinfer run "$@"'
    command = ["sh", "-c", script, sys.executable, str(path), "-f", "notes.txt"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "the folder you are in was deleted" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["load", "h", "--seconds", "[" * 80_000], ["selftest", "--only", "a\nb"], ["x" * 80_000]],
)
def test_a_wrong_value_is_one_line_however_it_is(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    _, _, told = capfd.readouterr().err.partition("Error: ")
    assert exit.value.code == 2 and told.count("\n") == 1 and 0 < len(told) < 3000


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay", ""], ["perplexity", "smollm2", ""], ["run", "smollm2", "hi", "-f", ""],
        ["selftest", "--json", ""], ["selftest", "--device", "cpu", "--write", ""],
        ["load", "h", "--plot", ""], ["load", "h", "--traffic", ""],
        ["load", "h", "--write-traffic", ""], ["serve", "smollm2", "--api-key-file", ""],
        ["history", "--export", ""], ["history", "--import", ""],
    ],
)  # fmt: skip
def test_no_file_is_called_nothing(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Which would mean the folder that a person is in, or that nothing was asked for."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capfd.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert "the name is empty; is a variable not set?" in err
