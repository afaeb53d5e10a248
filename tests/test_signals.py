"""What ends or stops the chat from outside: the terminal is as it was, and nothing is lost."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeinfer import platform
from edgeinfer.platform.signals import signals_handled
from edgeinfer.tui.store import FILE_NAME, Store

if sys.platform == "win32":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

from .models_for_tests import tiny_model
from .pseudo_terminal import PseudoTerminal

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
# At temperature 0 this model never ends an answer by itself.
FLAGS = ("--device", "reference", "--temperature", "0")
Start = Callable[..., PseudoTerminal]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), n_ctx=4096, chat_template=TEMPLATE)


@pytest.fixture
def start(tmp_path: Path, model: Path) -> Iterator[Start]:
    opened: list[PseudoTerminal] = []

    def start(
        *flags: str, home: str = "home", before: str = "", editor: str = ""
    ) -> PseudoTerminal:
        """A chat, in which code runs `before`."""
        code = f"import sys\n{before}\nfrom edgeinfer.__main__ import main\nmain()"
        command = [sys.executable, "-c", code, "chat", str(model), *FLAGS, *flags]
        variables = {"EDGEINFER_HOME": str(tmp_path / home), "VISUAL": editor}
        opened.append(PseudoTerminal(command, variables))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def messages(home: Path) -> list[tuple[str, str, str]]:
    """Role, state and text of every message of the latest conversation."""
    store = Store(home / "data" / FILE_NAME)
    nodes = store.messages(store.recent(1)[0].id)
    store.close()
    return [(node.role, node.state, node.content) for node in nodes]


def test_whatever_ends_it_restores_the_terminal_and_keeps_all(tmp_path: Path, start: Start) -> None:
    ends = {"SIGTERM": 143, "closed window": 129}  # others: test_tui_storm.py
    chats = {name: start(home=name) for name in ends}
    for chat in chats.values():
        chat.until(b"ready")
        chat.write("a long story\r")
        chat.until(b"writing")
        assert {"?1049", "?1003", "?2004", "keyboard", "lines", "cursor hidden"} <= chat.modes()
        chat.write("and then\rhalf a tho")
        chat.until(b"half a tho")
    for name, chat in chats.items():
        chat.hang_up() if name == "closed window" else chat.send(getattr(signal, name))
    for name, chat in chats.items():
        assert chat.wait() == ends[name], name
        asked, answer, waiting = messages(tmp_path / name)
        assert asked[2] == "a long story" and waiting == ("user", "done", "and then"), name
        assert answer[:2] == ("assistant", "stopped") and len(answer[2]) > 20, name
        if name != "closed window":
            chat.until(b"not sent: half a tho")
            chat.until(lambda chat=chat: chat.modes() == set())
            assert b"Traceback" not in chat.output, name


PATIENT = """
from edgeinfer.platform import signals
signals._GRACE_SECONDS = 600.0  # what ends before then has ended by itself
"""
FAULTS = f"""{PATIENT}
import os, time
from edgeinfer.tui import controls

def hang(app):
    open(os.path.join(os.environ["EDGEINFER_HOME"], "hangs"), "w").close()
    time.sleep(600)

controls.show_help = hang  # before the table of commands is made of it

from edgeinfer.tui.terminal_colors import Answers

def fail(self, text, push=Answers.push):
    if "!" in text:
        raise RuntimeError("a fault in a thread")
    return push(self, text)

Answers.push = fail
"""


EDITOR = """#!/bin/sh
trap 'echo saved >> "$1"; exit 1' TERM
echo IN THE EDITOR
while :; do sleep 0.1; done
"""


def test_neither_a_hang_nor_a_fault_nor_an_editor_keeps_the_terminal(
    tmp_path: Path, start: Start
) -> None:
    editor = tmp_path / "editor"
    editor.write_text(EDITOR)
    editor.chmod(0o700)
    hung, failed = start(home="hung", before=FAULTS), start(home="failed", before=FAULTS)
    edits = start(home="edits", before=PATIENT, editor=str(editor))
    hung.until(b"ready")
    hung.write("\x1bOP")  # F1
    failed.until(b"ready")
    failed.write("half a thought")
    failed.until(b"thought")
    failed.write("!")
    assert failed.wait() == 1
    failed.until(b"unexpected RuntimeError: a fault in a thread")
    assert b"not sent: half a thought" in failed.output
    failed.until(lambda: failed.modes() == set())
    edits.until(b"ready")
    edits.write("half a thought\x07")  # Ctrl-G
    edits.until(b"IN THE EDITOR")
    edits.send(signal.SIGTERM)  # which an editor takes as all programs do
    assert edits.wait() == 143
    edits.until(b"not sent: half a thought\r\nsaved")
    edits.until(lambda: edits.modes() == set())
    hung.until((tmp_path / "hung" / "hangs").exists)
    hung.send(signal.SIGTERM)
    time.sleep(0.2)
    assert hung.process.poll() is None
    # The second one does not wait; those that come before the first was heard are that one.
    hung.until(lambda: hung.process.poll() is not None or hung.send(signal.SIGTERM))
    assert hung.wait() == 143
    hung.until(lambda: hung.modes() == set())


def test_it_stops_and_goes_on_with_the_shell_while_it_answers(tmp_path: Path, model: Path) -> None:
    shell = PseudoTerminal(["bash", "--norc", "-i"], {"EDGEINFER_HOME": str(tmp_path), "PS1": "$ "})
    try:
        shell.write(shlex.join([sys.executable, "-m", "edgeinfer", "chat", str(model), *FLAGS]))
        shell.write("\n")
        shell.until(b"ready")
        shell.write("a long story\r")
        shell.until(b"writing")
        chat = int(subprocess.check_output(["pgrep", "-P", str(shell.process.pid)], text=True))
        for stop in (None, signal.SIGTSTP, signal.SIGSTOP):
            shell.forget()
            shell.write("\x1a") if stop is None else os.kill(chat, stop)
            shell.until(b"Stopped")
            assert stop is signal.SIGSTOP or not shell.modes() - SHELL_MODES
            shell.write("bg\n")
            shell.until(b"&\r\n")
            shell.forget()
            shell.write("fg\n")
            shell.until(lambda: b"sk anything" in shell.new and b"writing" in shell.new)
            assert {"?1049", "?1003", "?2004", "keyboard"} <= shell.modes()
        shell.forget()
        shell.write("\x1a")
        shell.until(b"Stopped")
        shell.write("kill %1\n")  # which lets it go on, in the background
        shell.until(lambda: not is_running(chat))
        end = time.monotonic() + 120
        while b"Exit 143" not in shell.new and time.monotonic() < end:
            shell.write("\n")  # a shell tells it with its next prompt, once it knows
            time.sleep(0.1)
        assert b"Exit 143" in shell.new
        assert not shell.modes() - SHELL_MODES
    finally:
        shell.close()
    assert messages(tmp_path)[-1][:2] == ("assistant", "stopped")


SHELL_MODES = {"?2004", "lines"}  # it edits lines itself


def is_running(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", str(pid)], capture_output=True, text=True)
    return found.stdout.strip()[:1] not in ("", "Z")


def test_line_commands_end_as_any_program_does(tmp_path: Path, model: Path) -> None:
    def begin(*words: str) -> PseudoTerminal:
        command = [sys.executable, "-m", "edgeinfer", *words[:1], str(model), *words[1:], *FLAGS]
        return PseudoTerminal(command, {"EDGEINFER_HOME": str(tmp_path)})

    def await_answer(each: PseudoTerminal) -> None:
        each.until(lambda: each.output.count(b"tok") > 20)

    at_prompt, answers = begin("chat", "--plain"), begin("chat", "--plain")
    endless = ("run", "-p", "a story", "-n", "-1", "--overflow", "slide")
    runs, closed = begin(*endless), begin("chat", "--plain")
    try:
        for each in (at_prompt, answers, closed):
            each.until(b"> ")
        at_prompt.write("half")
        at_prompt.until(b"half")
        assert "lines" in at_prompt.modes()  # readline's own
        answers.write("a story\n")
        await_answer(answers)
        await_answer(runs)
        at_prompt.send(signal.SIGTERM)
        answers.send(signal.SIGQUIT)
        runs.send(signal.SIGHUP)
        closed.hang_up()
        assert [each.wait() for each in (at_prompt, answers, runs)] == [143, 131, 129]
        assert closed.wait() in (129, 0)  # whichever comes first: the signal, or the input's end
        for each in (at_prompt, answers, runs):
            each.until(lambda each=each: each.modes() == set())
            assert b"Traceback" not in each.output
    finally:
        for each in (at_prompt, answers, runs, closed):
            each.close()


@pytest.mark.parametrize(
    ("name", "why"), [("nope", b"no chat template 'nope'"), ("broken.jinja", b"line 2")]
)
def test_a_wrong_template_is_told_before_the_screen_opens(
    tmp_path: Path, start: Start, name: str, why: bytes
) -> None:
    (tmp_path / "broken.jinja").write_text("a\n{% if %}")
    chat = start("--chat-template", str(tmp_path / name) if "." in name else name)
    assert chat.wait() in (1, 2)
    chat.until(why)
    assert b"?1049h" not in chat.output


def test_an_editor_that_has_just_begun_is_asked_to_end_with_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that comes before anybody here knows of it: the editor would be waited for."""
    start, heard = subprocess.Popen, list[int]()

    def start_and_end(*given: Any, **more: Any) -> Any:
        process = start(*given, **more)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_end)
    command = [sys.executable, "-c", "import time; time.sleep(120)"]
    with signals_handled([signal.SIGTERM], lambda number, frame: heard.append(number)):
        assert platform.run_editor(command, tmp_path / "file") == -signal.SIGTERM
    assert heard == [signal.SIGTERM]
