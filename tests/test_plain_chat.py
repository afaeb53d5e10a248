"""The chat line by line: commands, turns that drop out, answers that are stopped."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import LLM, ContextLengthError, InvalidRequestError, Message
from edgeinfer.cli.line_input import LineInput
from edgeinfer.cli.plain_chat import talk as talk_to
from edgeinfer.text.turns import ANSWER_SHARE, drop_turns

from .models_for_tests import tiny_model
from .pseudo_terminal import await_rest

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
COMMAND = (sys.executable, "-m", "edgeinfer", "chat", "--plain", "--device", "reference")


def message(role: str, size: int) -> Message:
    return {"role": role, "content": "x" * size}


def size(message: Message) -> int:
    return len(str(message["content"]))


def talk(n_turns: int, each: int) -> list[Message]:
    turns = [m for _ in range(n_turns) for m in (message("user", each), message("assistant", each))]
    return [message("system", 10), *turns, message("user", each)]


def test_what_fits_stays() -> None:
    messages = talk(3, 10)
    assert drop_turns(messages, size, 1000) == (messages, 0)


def test_the_oldest_turns_drop_and_the_system_message_stays() -> None:
    kept, n_dropped = drop_turns(talk(20, 10), size, 200)
    assert kept[0]["role"] == "system" and kept[1]["role"] == "user"
    assert n_dropped > 0 and len(kept) == 1 + 41 - 2 * n_dropped
    assert sum(map(size, kept)) <= 200 * (1 - ANSWER_SHARE)


def test_cuts_stay_where_they_are_while_the_conversation_grows() -> None:
    cuts = [drop_turns(talk(n, 10), size, 200)[1] for n in range(40)]
    assert cuts == sorted(cuts)
    assert len(set(cuts)) < 15  # several turns pass between two cuts


@pytest.mark.parametrize("n_system", [100, 500, 600, 700])
def test_turns_stay_beside_a_long_system_text(n_system: int) -> None:
    """Of a context of 1,000; beside one that took half of it every cut had left the last alone."""
    cuts = []
    for n in range(60):
        kept, n_dropped = drop_turns([message("system", n_system), *talk(n, 5)[1:]], size, 1000)
        cuts.append(n_dropped)
        assert sum(map(size, kept)) <= 1000 * (1 - ANSWER_SHARE)
        if n_dropped:
            assert sum(map(size, kept)) - n_system >= (750 - n_system) / 2 - 10
    assert cuts == sorted(cuts) and len(set(cuts)) < 30


def test_the_last_turn_is_kept_however_long() -> None:
    kept, n_dropped = drop_turns([*talk(2, 10), message("user", 999)], size, 100)
    assert [size(m) for m in kept] == [10, 999]
    assert n_dropped == 3
    assert drop_turns([message("assistant", 5)], size, 100)[1] == 0
    assert drop_turns([message("system", 5)], size, 100) == ([message("system", 5)], 0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("chat"), n_ctx=4096, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, device="reference", n_ctx=256) as llm:
        yield llm


def test_a_long_chat_keeps_going_in_a_short_context(llm: LLM) -> None:
    messages: list[Message] = [{"role": "system", "content": "be brief"}]
    dropped = []
    for i in range(12):
        messages.append({"role": "user", "content": f"question {i} " * 3})
        with llm.stream_chat(messages, overflow="drop-turns", max_tokens=8, seed=1) as stream:
            answer = stream.run()
        dropped.append(stream.dropped_turns)
        assert answer.usage.prompt_tokens <= 256 * (1 - ANSWER_SHARE) + 32
        messages.append({"role": "assistant", "content": answer.text})
    assert dropped[0] == 0 < dropped[-1]
    assert dropped == sorted(dropped)


@pytest.mark.parametrize("overflow", ["error", "slide", "drop-turns"])
def test_messages_are_checked_before_anything_reads_them(llm: LLM, overflow: Any) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    calls: list[Any] = [
        {"role": "system", "content": None},
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    options: Any = {"overflow": overflow, "max_tokens": 2, "seed": 1}
    generator: Any = iter(calls)
    assert llm.chat(calls, **options).text == llm.chat(generator, **options).text
    wrong: list[Any] = [[{"content": "x"}], ["x"], [None], {}, [], iter(()), 5, None, [{"role": 1}]]
    for messages in wrong:
        with pytest.raises(InvalidRequestError) as caught:
            llm.chat(messages, **options)
        assert caught.value.param == "messages"


def test_a_single_message_that_is_too_long_names_both_counts(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match=r"is \d+ tokens, the context holds 256"):
        llm.chat("long " * 300, overflow="drop-turns")
    with pytest.raises(InvalidRequestError, match="'error', 'slide', 'drop-turns'"):
        llm.chat("x", overflow="forget")  # type: ignore[typeddict-item]


def run(path: Path, text: str, *flags: str) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, str(path), "-n", "3", "--seed", "1", *flags]
    return subprocess.run(command, input=text.encode(), capture_output=True, timeout=300)


def test_commands_in_a_pipe(path: Path) -> None:
    done = run(path, "/help\nhi\n/stats\n/system be brief\n/clear\n/nonsense\n/exit\nnever\n")
    err = done.stderr.decode()
    assert done.returncode == 0
    for part in ("Ctrl-C stops", "1 turns", "3 tokens at", "system: be brief", "no command /nons"):
        assert part in err
    assert len(done.stdout.decode("utf-8", "replace").splitlines()) >= 1
    assert b"never" not in done.stderr


def test_a_text_of_several_lines_is_a_message_whatever_it_begins_with(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = iter(["/clear\nis a command\n/help", "/stats", None])
    monkeypatch.setattr(LineInput, "next", lambda self: next(read))
    talk_to(llm, None, {"max_tokens": 2, "seed": 1}, lambda stream, output: stream.run())
    assert "1 turns" in capsys.readouterr().err


def test_the_first_drop_is_one_line(path: Path) -> None:
    done = run(path, "tell me more\n" * 12, "-c", "128", "--system", "be brief")
    assert done.returncode == 0
    told = [line for line in done.stderr.decode().splitlines() if "is full" in line]
    full = "(the context of 128 tokens is full: the oldest turns drop out"
    assert told == [f"{full}; the system message stays)"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_chat(path: Path) -> None:
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, str(path), "--seed", "1", "--temp", "0"],
        stdin=child, stdout=child, stderr=child, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(child)
    try:
        read_until(parent, b"> ")
        os.write(parent, b"hello\n")
        seen = read_until(parent, b"hello\r\n").partition(b"hello\r\n")[2]
        while len(seen) < 50:  # of its answer
            seen += os.read(parent, 50)
        os.write(parent, b"\x03")
        seen = read_until(parent, b"(stopped)\r\n")
        if not seen.endswith(b"> "):
            read_until(parent, b"> ")
        await_rest(process.pid)
        os.write(parent, b"\x03")
        read_until(parent, b"ends the chat")
        os.write(parent, b"/bye\n")
        assert process.wait(120) == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(parent)


def read_until(terminal: int, wanted: bytes, seconds: float = 120) -> bytes:
    seen, end = b"", time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < end, f"no {wanted!r} in {seen!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536)
    return seen


def test_stdin_in_utf16_with_half_a_character_is_read_line_by_line(path: Path) -> None:
    command = [*COMMAND, str(path), "-n", "2"]
    text = "\ufeffhi\r\n/stats\r\n/exit\r\n".encode("utf-16-le") + b"\xff"
    done = subprocess.run(command, input=text, capture_output=True, timeout=300)
    assert done.returncode == 0
    assert b"1 turns" in done.stderr
