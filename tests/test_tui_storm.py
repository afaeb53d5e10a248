"""A storm of keys, pastes, mouse, sizes and signals on the chat in a real terminal, which tmux is.

STORM_EVENTS, STORM_SIGNALS and STORM_SEED in the environment make it longer, or another one.
"""

from __future__ import annotations

import os
import random
import re
import select
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from edgeinfer.tui.store import FILE_NAME

from .models_for_tests import tiny_model

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux to be a terminal"),
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no file of a process to signal it"),
]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
PASSING = (signal.SIGTSTP, signal.SIGSTOP, signal.SIGCONT, signal.SIGWINCH)
MODE = re.compile(rb"\x1b\[\?([\d;]+)([hl])|\x1b\[([<>])\d*u")
PROMPT_ROW = 26  # of 30
READY = re.compile("ready|stopped|failed")
GRACE = 5.0  # seconds after which a signal ends what hangs

LETTERS = "etaoin shrdlu.,;:!?0123456789äß天気😀é\u0301\u200d"
KEYS = [
    "\r", "\t", "\x7f", "\x1b[A", "\x1b[B", "\x1b[C", "\x1b[D", "\x1b[5~", "\x1b[6~", "\x1b[H",
    "\x1b[F", "\x1b[3~", "\x1bOP", "\x1b[1;5A", "\x1b[1;5F", "\x1b[1;2A", "\x1b\r", "\x1b[Z",
    "\n", *(chr(ord(c) - 96) for c in "abeghklnoprtuvwxy"), "\x1bb", "\x1b[17~", "\x1b[18~",
    "\x1b[", "\x1b]11;rgb:", "\x1b[<", "\xff", "\x00", "\x1c",
]  # fmt: skip
COMMANDS = [
    "/help", "/stats", "/clear", "/retry", "/edit", "/undo", "/branch", "/save a title", "/load a",
    "/export", "/export json", "/copy", "/copy code", "/theme", "/theme edge-light", "/params",
    "/params temperature 0.5", "/params top_k x", "/system be brief", "/system -", "/nonsense",
    "@no", "/model",
]  # fmt: skip


_RC = """
PROMPT_COMMAND='echo $? >> codes'
PS1='$ '
IGNOREEOF=1000
bind 'set enable-bracketed-paste off'
"""


_CHAT = """
import faulthandler, signal
faulthandler.register(signal.SIGUSR1, file=open("stacks", "w"))
from edgeinfer.__main__ import main
main()
"""


class TerminalGone(Exception):
    """tmux has died, as it does now and then at sizes of one cell."""


class Storm:
    """A shell in tmux with the chat inside; all that it writes is read along."""

    def __init__(self, home: Path, model: Path, seed: int) -> None:
        self.home, self.random = home, random.Random(seed)
        self.n_events = self.n_signals = self.n_lives = 0
        self.sent: list[str] = []
        self.n_unsent = self.n_terminals = 0
        self.chat = -1
        self.trace: list[str] = []
        self.size = (100, 30)
        self._log = home / "output"
        self._log.touch()
        (home / "codes").touch()
        self._n_seen = self._n_codes = 0
        flags = ("--device", "reference", "--temperature", "0", "-n", "300")
        self._chat = shlex.join([sys.executable, "-c", _CHAT, "chat", str(model), *flags])
        (home / "rc").write_text(_RC, encoding="utf-8")
        self.open_terminal()

    def open_terminal(self) -> None:
        self.n_terminals += 1
        home = self.home
        self._log.write_bytes(b"")
        self._n_seen, self._n_codes = 0, len(self.codes())
        self._tmux = ["tmux", "-S", str(home / f"tmux{self.n_terminals}"), "-f", os.devnull]
        shell = f"cd {shlex.quote(str(home))}; exec bash --rcfile rc -i"
        variables = {"EDGEINFER_HOME": str(home), "EDGEINFER_DEBUG": "1", "EDITOR": "true"}
        variables["VISUAL"] = "true"
        subprocess.run(
            [*self._tmux, "new-session", "-d", "-x", "100", "-y", "30", shell],
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)}, check=True,
        )  # fmt: skip
        self.shell = self.tmux("list-panes", "-F", "#{pane_pid}").strip()
        self.tmux("set", "-g", "window-size", "manual")
        self.tmux("pipe-pane", f"cat >> {shlex.quote(str(self._log))}")
        self.await_prompt()
        self.tmux_state = self.state()

    def tmux(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux, *arguments], capture_output=True, text=True).stdout

    def bytes(self, text: str) -> None:
        self.trace.append(text[:40])
        data = text.encode("latin-1") if text == "\xff" else text.encode()
        self.tmux("send-keys", "-H", *(f"{byte:02x}" for byte in data))

    # -- what it has written ---------------------------------------------------------------------

    @property
    def new(self) -> bytes:
        with self._log.open("rb") as file:
            file.seek(self._n_seen)
            return file.read()

    def forget(self) -> None:
        self._n_seen = self._log.stat().st_size

    def until(self, is_so: Callable[[], object], what: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            self.must_be_there()
            assert time.monotonic() < end, f"waited for {what}; {self.where()}"
            time.sleep(0.05)

    def must_be_there(self) -> None:
        if not self.tmux("list-panes"):
            raise TerminalGone

    def where(self) -> str:
        screen = self.tmux("capture-pane", "-p")
        stat = ["ps", "-o", "pid,ppid,pgid,tpgid,stat,wchan:20,cmd", "--ppid", self.shell]
        screen += subprocess.run(stat, capture_output=True, text=True).stdout
        with suppress(OSError):
            signal.pidfd_send_signal(self.chat, signal.SIGUSR1)
            time.sleep(0.5)
        screen += (self.home / "stacks").read_text()
        at = f"life {self.n_lives}, event {self.n_events}, size {self.size}"
        return f"{at}:\n{screen}\nthe last of its life: {self.trace[-150:]}"

    def await_prompt(self) -> int:
        """The exit code of what the shell's next prompt comes after."""
        self.until(lambda: len(self.codes()) > self._n_codes, "the shell")
        code = self.codes()[self._n_codes]
        self._n_codes = len(self.codes())
        return code

    def empty_line(self) -> None:
        """Whatever the shell was given, once the chat had left."""
        self._n_codes = len(self.codes())
        end = time.monotonic() + 10.0
        while len(self.codes()) == self._n_codes:
            self.must_be_there()
            if time.monotonic() > end:  # bash reads for ever, after some keys
                self.close()
                raise TerminalGone
            self.bytes("\x03")
            time.sleep(0.2)
        self._n_codes = len(self.codes())

    def codes(self) -> list[int]:
        return [int(line) for line in (self.home / "codes").read_text().splitlines()]

    def state(self) -> str:
        """The terminal as the shell has it."""
        flags = ("alternate_on", "cursor_flag", "mouse_any_flag", "mouse_sgr_flag", "wrap_flag")
        found = self.tmux("display-message", "-p", " ".join(f"#{{{each}}}" for each in flags))
        self.forget()
        self.bytes("stty -g | tr : =\n")
        self.until(lambda: re.search(rb"=[0-9a-f=]{40,}", self.new), "stty")
        lines = re.search(rb"[0-9a-f]+=[0-9a-f=]{40,}", self.new)
        return found + (lines.group().decode() if lines else "")

    def modes(self) -> set[str]:
        """Private modes that were set and not reset, and the keyboard protocol."""
        found, depth = {"7": True, "25": True}, 0
        for numbers, switch, keyboard in MODE.findall(self._log.read_bytes()):
            depth += {b">": 1, b"<": -1}.get(keyboard, 0)
            for number in filter(None, numbers.decode().split(";")):
                found[number] = switch == b"h"
        changed = {mode for mode, is_on in found.items() if is_on != (mode in ("7", "25"))}
        return changed | ({"keyboard"} if depth > 0 else set())

    # -- a life ----------------------------------------------------------------------------------

    def begin(self) -> None:
        self.n_lives += 1
        self.resize(100, 30)
        self.forget()
        self.trace.clear()
        self.bytes(self._chat + "\n")
        self.until(lambda: b"\x1b[?1049h" in self.new, "the chat")
        self._n_codes = len(self.codes())
        time.sleep(self.random.choice((0.0, 0.5, 1.0)))
        found = subprocess.run(["pgrep", "-P", self.shell], capture_output=True, text=True)
        self.pid = int(found.stdout.split()[0])
        if self.chat >= 0:
            os.close(self.chat)
        # NOTE: not by its number, which may be another process's a minute later.
        self.chat = os.pidfd_open(self.pid)
        self.forget()

    @property
    def has_left(self) -> bool:
        return bool(select.select([self.chat], [], [], 0)[0])

    @property
    def is_stopped(self) -> bool:
        found = subprocess.run(["ps", "-o", "stat=", str(self.pid)], capture_output=True, text=True)
        return found.stdout.startswith("T")

    def signal(self, number: int) -> bool:
        self.trace.append(f"signal {number}")
        try:
            signal.pidfd_send_signal(self.chat, number)
        except ProcessLookupError:
            return False
        self.n_signals += 1
        return True

    def end(self, number: int) -> None:
        """By a signal: the terminal is as it was, and what was sent is in the history."""
        start = time.monotonic()
        came = not self.has_left and self.signal(number)
        self.until(lambda: self.has_left, "the end")
        assert time.monotonic() - start < GRACE, f"it hung; {self.where()}"
        self.check(self.await_prompt(), {0, 128 + number} if came else {0})

    def check(self, code: int, expected: set[int]) -> None:
        self.resize(100, 30)
        self.empty_line()
        assert code in expected, f"exit code {code}; {self.where()}"
        assert self.modes() == set(), self.where()
        assert self.state() == self.tmux_state, self.where()
        assert "Traceback" not in self.tmux("capture-pane", "-p"), self.where()
        lost = [each for each in self.sent if each not in self.history()]
        assert not lost, f"lost {lost}; {self.where()}"

    def end_without_terminal(self) -> None:
        """A terminal that is gone ends the chat, and takes nothing with it."""
        end = time.monotonic() + GRACE
        while not self.has_left:
            assert time.monotonic() < end, f"it goes on; {self.where()}"
            time.sleep(0.05)
        assert all(each in self.history() for each in self.sent), self.where()

    def history(self) -> str:
        address = f"{(self.home / 'data' / FILE_NAME).as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as db:
            rows = db.execute("SELECT content FROM message").fetchall()
            rows += db.execute("SELECT value FROM preference").fetchall()
        return "\n".join(row[0] for row in rows)

    # -- events ----------------------------------------------------------------------------------

    def send(self) -> None:
        """A message, whatever was on the screen before; nothing where a dialog stays open."""
        size = self.size
        self.resize(100, 30)
        for key in ("\x1b", "\x1b", "\x1b", "\x15\x7f" * 15):  # leave dialogs, empty the prompt
            self.bytes(key)
            time.sleep(0.12)
        text = f"message-{len(self.sent):05}-"
        self.bytes(f"\x1b[200~{text} {self.text(20)}\x1b[201~")
        end = time.monotonic() + 3.0
        while not self.has_left and time.monotonic() < end:
            rows = "".join(self.tmux("capture-pane", "-p").split("\n")[PROMPT_ROW - 1 :])
            is_alone = re.match(r"\W*╮\W*│ " + text, rows)  # not after a command's name
            if is_alone and READY.search(rows):  # else it would wait, and Escape takes it back
                self.bytes("\r")
                self.sent.append(text)
                time.sleep(self.random.choice((0.05, 0.3)))
                break
        else:
            self.n_unsent += 1
        self.resize(*size)

    def stop_and_go_on(self, number: int) -> None:
        self.forget()
        if number == signal.SIGTSTP and self.random.random() < 0.5:
            self.bytes("\x1a")  # the key
            self.n_signals += 1
        elif not self.signal(number):
            return
        if number in (signal.SIGTSTP, signal.SIGSTOP):
            self.until(lambda: self.is_stopped or self.has_left, "a stop")
            if self.has_left:
                return
            self.await_prompt()
            self.forget()
            if self.random.random() < 0.5:
                self.empty_line()
                self.bytes("bg\n")
                self.await_prompt()
            self.empty_line()
            self.bytes("fg\n")
            self.until(lambda: b"\x1b[?1049h" in self.new or self.has_left, "the chat after fg")
            if not self.has_left:  # the shell waits: it shows no prompt
                self._n_codes = len(self.codes())

    def event(self) -> None:
        self.n_events += 1
        choice = self.random.random()
        if choice < 0.35:
            self.bytes(self.text(self.random.randint(1, 8)))
        elif choice < 0.60:
            self.bytes(self.random.choice(KEYS))
        elif choice < 0.66:
            self.bytes("\x1b")
            time.sleep(0.03)
        elif choice < 0.72:
            pasted = self.text(self.random.choice((5, 200, 5000)), LETTERS + "\n\n\t#*`|$")
            self.bytes(f"\x1b[200~{pasted}\x1b[201~")
        elif choice < 0.86:
            self.bytes(self.mouse())
        elif choice < 0.92:
            self.resize(*self.random.choice(((1, 1), (300, 80), (20, 5), (80, 24), (100, 30),
                (self.random.randint(1, 300), self.random.randint(1, 80)))))  # fmt: skip
        elif choice < 0.99:
            self.bytes(self.random.choice(COMMANDS) + "\r")
        else:
            self.bytes("\x03")

    def text(self, n: int, letters: str = LETTERS) -> str:
        return "".join(self.random.choice(letters) for _ in range(n))

    def mouse(self) -> str:
        button = self.random.choice((0, 0, 1, 2, 32, 35, 64, 65, 66))
        x, y = self.random.randint(1, 320), self.random.randint(1, 90)
        return f"\x1b[<{button};{x};{y}{self.random.choice('Mm')}"

    def resize(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.trace.append(f"{width}x{height}")
        self.tmux("resize-window", "-x", str(width), "-y", str(height))

    def close(self) -> None:
        self.tmux("kill-server")


@pytest.fixture
def storm(tmp_path: Path) -> Iterator[Storm]:
    model = tiny_model(tmp_path, n_ctx=4096, chat_template=TEMPLATE)
    opened = Storm(tmp_path, model, int(os.environ.get("STORM_SEED", "1")))
    yield opened
    opened.close()


def test_no_event_crashes_it_and_every_end_restores_the_terminal(storm: Storm) -> None:
    n_events = int(os.environ.get("STORM_EVENTS", "10000"))
    n_signals = int(os.environ.get("STORM_SIGNALS", "500"))
    while storm.n_events < n_events or storm.n_signals < n_signals:
        try:
            live(storm, n_events / n_signals)
        except TerminalGone:
            storm.end_without_terminal()
            storm.open_terminal()
    print(f"\n{storm.n_events} events, {storm.n_signals} signals, {storm.n_lives} starts, "
          f"{len(storm.sent)} messages, {storm.n_unsent} attempts at dialogs, "
          f"{storm.n_terminals} terminals")  # fmt: skip


def live(storm: Storm, per_signal: float) -> None:
    """A chat from its start to a signal that ends it."""
    draw = storm.random
    storm.begin()
    for _ in range(draw.randint(1, 8)):
        for _ in range(round(draw.expovariate(1 / per_signal))):
            storm.event()
            if storm.n_events % 25 == 0:
                storm.send()
            if storm.has_left:
                break
        if storm.has_left:
            break
        storm.stop_and_go_on(draw.choice(PASSING))
    storm.end(draw.choice(ENDING))
