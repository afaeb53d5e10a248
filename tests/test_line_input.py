"""Lines at a plain terminal: pastes, history, interrupts, terminals that can do little."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer.cli.line_input import _History

if sys.platform == "win32":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

from .pseudo_terminal import PseudoTerminal, await_rest

SCRIPT = """
import sys
from pathlib import Path
if sys.argv[2] == "bare":
    sys.modules["readline"] = None
from edgeinfer.cli import line_input
line_input._TWICE_SECONDS = 0.0  # no two come at once
typed = line_input.LineInput(Path(sys.argv[1]) if sys.argv[1] else None)
while (text := typed.next()) is not None:
    print("got", ascii(text))
    if text == "twice":  # any two do from now on
        line_input._TWICE_SECONDS = 600.0
print("ended")
"""
UP = b"\x1b[A"


class Terminal(PseudoTerminal):
    """The script in a terminal of its own."""

    def __init__(self, history: Path | str = "", term: str = "xterm", editor: str = "") -> None:
        command = [sys.executable, "-c", SCRIPT, str(history), editor]
        super().__init__(command, {"TERM": term, "INPUTRC": os.devnull})
        self.expect("> ")

    def type(self, text: bytes, then: str) -> None:
        self.write(text.decode())
        self.expect(then)

    def interrupt(self, then: str) -> None:
        await_rest(self.process.pid)
        self.type(b"\x03", then)
        if then != "ended":
            self.expect("> ")

    def expect(self, text: str) -> None:
        """Wait for a text; what came before it is done with."""
        self.until(text.encode())
        self.forget(text.encode())


@pytest.fixture
def opened() -> Iterator[list[Terminal]]:
    terminals: list[Terminal] = []
    yield terminals
    for each in terminals:
        each.close()


def marks_pastes() -> bool:
    try:
        import readline
    except ImportError:
        return False
    return "GNU" in str(readline.__doc__)


@pytest.mark.skipif(not marks_pastes(), reason="needs GNU readline")
def test_a_marked_paste_is_one_message_and_what_is_typed_ahead_are_several(
    opened: list[Terminal],
) -> None:
    opened.append(terminal := Terminal())
    paste = b"\x1b[200~one\n\n/clear\nthree\x1b[201~"
    terminal.type(paste + b"\r", "got 'one\\n\\n/clear\\nthree'")
    terminal.type(b"first\rsecond\r", "got 'first'")
    terminal.expect("got 'second'")
    terminal.type(UP + UP + UP + b"!\r", "got 'one\\n\\n/clear\\nthree!'")


@pytest.mark.parametrize(("term", "editor"), [("dumb", ""), ("xterm", "bare")])
def test_a_paste_that_nothing_marks_is_one_message_too(
    opened: list[Terminal], term: str, editor: str
) -> None:
    opened.append(terminal := Terminal(term=term, editor=editor))
    terminal.type(b"one\ntwo\nthree\n", "got 'one\\ntwo\\nthree'")
    terminal.type(b"typed\n", "got 'typed'")
    terminal.expect("> ")
    terminal.type(b"\x04", "ended")
    assert b"\x1b" not in terminal.output


@pytest.mark.skipif(not marks_pastes(), reason="needs GNU readline")
def test_an_interrupt_clears_the_line_keeps_it_and_ends_only_when_it_comes_twice(
    opened: list[Terminal],
) -> None:
    opened.append(terminal := Terminal())
    terminal.type(b"half a thought", "thought")
    terminal.interrupt("brings it back")
    terminal.type(UP + b"!\r", "got 'half a thought!'")
    terminal.expect("> ")
    terminal.interrupt("once more")
    terminal.interrupt("once more")  # much later: as the first one
    terminal.type(b"twice\rmore\r", "got 'more'")
    terminal.expect("> ")
    terminal.interrupt("once more")
    terminal.type(b"text", "text")
    terminal.interrupt("brings it back")  # at once, but there was something to lose
    terminal.interrupt("ended")


@pytest.mark.parametrize("editor", ["", "bare"])
def test_the_prompt_and_what_is_written_are_drawn_again_after_the_shell_had_the_terminal(
    opened: list[Terminal], editor: str
) -> None:
    if not editor and not marks_pastes():
        pytest.skip("needs GNU readline")
    opened.append(shell := Shell(editor))
    # A terminal that edits lines itself throws away what was written.
    kept = "" if editor else "half a thought"
    shell.type(b"half a thought", "thought")
    for number in (None, signal.SIGTSTP, signal.SIGSTOP):
        await_rest(shell.typed_pid)
        shell.write("\x1a") if number is None else os.kill(shell.typed_pid, number)
        shell.expect("Stopped")
        shell.type(b"bg\n", "&\r\n")
        shell.type(b"fg\n", "> " + kept)
    os.kill(shell.typed_pid, signal.SIGCONT)
    shell.expect("> " + kept)
    shell.type(b"!\n", f"got '{kept}!'")
    shell.type(b"\x04", "ended")


class Shell(Terminal):
    """The script as a job of a shell."""

    def __init__(self, editor: str) -> None:
        # Only the script is to show "> ": the shell would before each further line of the command.
        variables = {"TERM": "xterm", "INPUTRC": os.devnull, "PS1": "$ ", "PS2": ""}
        PseudoTerminal.__init__(self, ["bash", "--norc", "-i"], variables)
        self.write(shlex.join([sys.executable, "-c", SCRIPT, "", editor]) + "\n")
        self.until(lambda: self.output.endswith(b"> ") and b"$ " in self.output)
        self.forget()

    @property
    def typed_pid(self) -> int:
        return int(subprocess.check_output(["pgrep", "-P", str(self.process.pid)], text=True))


@pytest.mark.skipif(not marks_pastes(), reason="needs GNU readline")
def test_what_was_typed_is_there_in_the_next_chat_for_its_user_alone(
    opened: list[Terminal], tmp_path: Path
) -> None:
    history = tmp_path / "home" / "typed-lines"
    for n, (keys, text) in enumerate(
        [
            (b"\x1b[200~two\nlines\x1b[201~\r", "two\\nlines"),
            ("naïve\r".encode(), "na\\xefve"),
            (UP + UP + b"\r", "two\\nlines"),
        ]
    ):
        if n == 2:
            history.chmod(0o644)
            history.write_bytes(history.read_bytes() + b'{"damaged": \n')
        opened.append(terminal := Terminal(history))
        terminal.type(keys, f"got '{text}'")
        terminal.expect("> ")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    kept = history.read_text().splitlines()
    assert [json.loads(kept[i]) for i in (0, 1, 3)] == ["two\nlines", "naïve", "two\nlines"]


def test_a_history_is_cut_to_its_newest_lines(tmp_path: Path) -> None:
    path = tmp_path / "typed-lines"
    path.write_bytes(
        b"".join(json.dumps(f"{n} {'x' * 1000}").encode() + b"\n" for n in range(2000))
    )
    texts = _History(path).read()
    assert (texts[0].split()[0], texts[-1].split()[0]) == ("1000", "1999")
    assert len(path.read_text().splitlines()) == 1000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_can_not_be_kept_ends_no_chat(
    opened: list[Terminal], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder", "elsewhere/below"):
        opened.append(terminal := Terminal(tmp_path / name))
        terminal.type(b"a\r", "got 'a'")
        terminal.type(b"b\r", "got 'b'")
    assert elsewhere.read_text() == ""
