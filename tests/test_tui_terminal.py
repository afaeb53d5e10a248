"""The chat end to end: the real command and the small model in a real terminal, which tmux is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeinfer import config
from edgeinfer.tui.conversation import Conversation
from edgeinfer.tui.records import Attachment
from edgeinfer.tui.store import FILE_NAME, Store

ROOT = Path(__file__).resolve().parent.parent
MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux to be a terminal"),
]


class Terminal:
    """A tmux server of its own with one window."""

    def __init__(self, home: Path) -> None:
        self.home = home
        # Kernels that are built already serve here too: building takes a minute.
        config.cache_folder().mkdir(parents=True, exist_ok=True)
        (home / "cache").symlink_to(config.cache_folder())
        self._n_servers = 0
        self._tmux: list[str] = []

    def start(self, *flags: str, size: tuple[int, int] = (100, 30)) -> None:
        self._n_servers += 1
        socket = str(self.home / f"tmux{self._n_servers}")
        self._tmux = ["tmux", "-S", socket, "-f", os.devnull]
        command = [sys.executable, "-m", "edgeinfer", "chat", *flags, "--device", "cpu"]
        shell = f"cd {ROOT}; {' '.join(command)}; echo LEFT $?; sleep 600"
        environment = {**os.environ, "EDGEINFER_HOME": str(self.home)}
        subprocess.run(
            [*self._tmux, "new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), shell],
            env=environment, check=True,
        )  # fmt: skip

    def tmux(self, *arguments: str, text: str | None = None) -> str:
        done = subprocess.run(
            [*self._tmux, *arguments], capture_output=True, text=True, input=text, check=False
        )
        return done.stdout

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def say(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)
        self.keys("Enter")

    @property
    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def until(self, is_so: Callable[[str], object] | str, seconds: float = 30.0) -> str:
        end = time.monotonic() + seconds
        while True:
            screen = self.screen
            if is_so in screen if isinstance(is_so, str) else is_so(screen):
                return screen
            assert time.monotonic() < end, f"waited for {is_so!r}:\n{screen}"
            time.sleep(0.05)

    @property
    def chat_pid(self) -> int:
        shell = self.tmux("list-panes", "-F", "#{pane_pid}").strip()
        found = subprocess.run(
            ["pgrep", "-P", shell, "-f", "edgeinfer"], capture_output=True, text=True, check=True
        )
        return int(found.stdout.split()[0])

    def messages(self) -> list[tuple[str, str, str]]:
        """Role, state and text of every message of the latest conversation."""
        store = Store(self.home / "data" / FILE_NAME)
        nodes = store.messages(store.recent(1)[0].id)
        store.close()
        return [(node.role, node.state, node.content) for node in nodes]

    def close(self) -> None:
        self.tmux("kill-server")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def model(data_file: Callable[[str], Path]) -> str:
    return str(data_file(MODEL))


def is_answered(screen: str) -> bool:
    return "● ready" in screen and " tok/s" in screen.split("● ready")[1]


def test_send_stream_stop_edit_branch_and_leave(terminal: Terminal, model: str) -> None:
    terminal.start(model, "--temperature", "0", "-n", "400")
    terminal.until("Ask anything", 15)
    terminal.until("● ready", 150)
    terminal.say("What is the capital of France?")
    terminal.until(is_answered)
    assert terminal.messages()[-1][2].strip()
    terminal.say("Write a very long story about the sea, with many chapters.")
    terminal.until("writing")
    time.sleep(0.5)
    terminal.keys("Escape")
    terminal.until("stopped", 2)
    assert [state for _, state, _ in terminal.messages()] == ["done", "done", "done", "stopped"]
    assert len(terminal.messages()[-1][2]) > 20
    terminal.say("/edit")
    terminal.until("editing an earlier message")
    terminal.keys("C-u")
    terminal.say("And of Italy?")
    terminal.until(lambda screen: is_answered(screen) and "And of Italy?" in screen)
    assert "‹ 2 of 2 ›" in terminal.screen
    terminal.keys("C-q")
    terminal.until("LEFT 0", 10)


def test_resume_after_kill_9(terminal: Terminal, model: str) -> None:
    terminal.start(model)
    terminal.until("● ready", 150)
    terminal.say("Write a very long story about the sea, with many chapters.")
    terminal.until("writing")
    time.sleep(1.6)
    os.kill(terminal.chat_pid, signal.SIGKILL)
    terminal.until("LEFT 137", 5)
    role, state, text = terminal.messages()[-1]
    assert (role, state) == ("assistant", "partial") and len(text) > 20
    terminal.close()
    terminal.start(model)
    terminal.until("resume “Write a very long story")
    terminal.keys("C-o")
    terminal.until("History")
    terminal.keys("Enter")
    terminal.until(lambda screen: "stopped" in screen and text.split()[-2] in screen)


def test_a_missing_and_a_corrupt_model_lead_to_the_chooser(terminal: Terminal, model: str) -> None:
    broken = terminal.home / "broken.gguf"
    broken.write_bytes(Path(model).read_bytes()[: 1 << 20])
    terminal.start(str(broken))
    screen = terminal.until("did not load")
    assert "broken.gguf" in screen and "smollm2" in screen
    terminal.say("missing.gguf")
    terminal.until(lambda screen: "did not load" in screen and "missing.gguf" in screen)
    terminal.say(model)
    terminal.until("● ready", 150)


def test_resize_while_streaming(terminal: Terminal, model: str) -> None:
    terminal.start(model)
    terminal.until("● ready", 150)
    terminal.say("Write a very long story about the sea, with many chapters.")
    terminal.until("writing")
    for width, height in ((60, 20), (140, 45), (60, 16), (100, 30)):
        terminal.tmux("resize-window", "-x", str(width), "-y", str(height))
        time.sleep(0.5)
        terminal.until("Ask anything", 3)
        lines = terminal.screen.split("\n")
        assert max(map(len, lines)) <= width
    terminal.keys("Escape")
    terminal.until("stopped", 3)


def test_stopped_and_continued_by_signals(terminal: Terminal, model: str) -> None:
    terminal.start(model)
    terminal.until("● ready", 150)
    for stop in (None, signal.SIGSTOP, signal.SIGTSTP):
        if stop is not None:
            os.kill(terminal.chat_pid, stop)
            time.sleep(0.3)
        os.kill(terminal.chat_pid, signal.SIGCONT)
        time.sleep(0.5)
        text = f"every letter comes, in order, after {stop}"
        for letter in text:
            terminal.tmux("send-keys", "-l", letter)
        terminal.until(text, 5)
        terminal.keys("C-u")
    terminal.keys("C-q")
    terminal.until("LEFT 0", 10)


def test_a_pasted_megabyte(terminal: Terminal, model: str) -> None:
    text = "The sea was calm and the boat went on its way.\n" * 22_000
    terminal.start(model)
    terminal.until("● ready", 150)
    terminal.tmux("load-buffer", "-", text=text)
    terminal.tmux("paste-buffer", "-p")
    screen = terminal.until("pasted text 1 · ", 30)
    terminal.until("tokens", 30)
    assert "pasted text 1" in screen
    terminal.keys("Enter")
    terminal.until(lambda screen: "the context holds" in screen and "● ready" not in screen, 60)
    terminal.keys("BSpace")
    terminal.say("Hello?")
    terminal.until(lambda screen: "Hello?" in screen, 10)


def test_model_text_never_reaches_the_terminal_as_it_is(terminal: Terminal, model: str) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;aGk=\x07still here"
    store = Store(terminal.home / "data" / FILE_NAME)
    conversation = Conversation(store)
    question = conversation.ask(evil, (Attachment(evil, evil),), None)
    answer = conversation.answer(question.id)
    answer.content, answer.reasoning, answer.state = f"# {evil}", evil, "done"
    conversation.save(answer)
    store.close()
    terminal.start(model)
    terminal.until("● ready", 150)
    terminal.keys("C-o")
    terminal.until("History")
    terminal.keys("Enter")
    screen = terminal.until(lambda screen: screen.count("still here") >= 4)
    assert "owned" not in screen
    assert terminal.tmux("display-message", "-p", "#{pane_title}").strip() != "owned"


def test_no_history_writes_none(terminal: Terminal, model: str) -> None:
    terminal.start(model, "--no-history", "-n", "5")
    terminal.until("● ready", 150)
    terminal.say("Hello")
    terminal.until(is_answered)
    assert "not kept" in terminal.screen
    assert not (terminal.home / "data" / FILE_NAME).exists()


def test_a_long_answer(terminal: Terminal, model: str) -> None:
    """10,000 tokens in a context of 2,048: the cache slides, the screen follows."""
    terminal.start(model, "--ctx", "2048", "-n", "10000", "--temperature", "1.3", "--seed", "5")
    terminal.until("● ready", 150)
    terminal.say("Write an endless list of numbers and words. Never stop.")
    terminal.until("writing")
    terminal.until(lambda screen: "● ready" in screen or "failed" in screen, 500)
    terminal.keys("PPage")
    terminal.until("Ask anything", 3)
    assert terminal.messages()[-1][1] == "done"
