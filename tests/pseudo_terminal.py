"""A terminal for tests: runs a program in a session of its own, and knows the modes that it set."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Private modes, set and reset; the keyboard protocol is pushed and popped.
_MODE = re.compile(rb"\x1b\[\?([\d;]+)([hl])|\x1b\[([<>])\d*u")
_WRAPS, _CURSOR = 7, 25  # on in a terminal that nothing was written to


class PseudoTerminal:
    """Of a program; `output` grows as it writes, `wait` gives its exit code."""

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        size: tuple[int, int] = (100, 30),
    ) -> None:
        self._parent, self._child = pty.openpty()
        termios.tcsetwinsize(self._child, size[::-1]) if hasattr(termios, "tcsetwinsize") else None
        self._attributes = self._modes_of_lines()
        self.output, self._n_seen, self._is_gone = b"", 0, False
        self.process = subprocess.Popen(
            command, stdin=self._child, stdout=self._child, stderr=self._child,
            env={**os.environ, "TERM": "xterm-256color", **variables}, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._is_gone:
            try:
                if not select.select([self._parent], [], [], 0.05)[0]:
                    continue
                chunk = os.read(self._parent, 65536)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            self.output += chunk

    def write(self, text: str) -> None:
        os.write(self._parent, text.encode())

    def until(self, is_so: Callable[[], object] | bytes, seconds: float = 120.0) -> None:
        """Until what is so, or bytes come that were not there at the last `forget`."""
        end = time.monotonic() + seconds
        while not (is_so in self.new if isinstance(is_so, bytes) else is_so()):
            assert time.monotonic() < end, f"waited for {is_so!r}: {self.output[-2000:]!r}"
            time.sleep(0.02)

    @property
    def new(self) -> bytes:
        return self.output[self._n_seen :]

    def forget(self, text: bytes | None = None) -> None:
        """Nothing that has come is new, or nothing up to the end of a text that has."""
        if text is None:
            self._n_seen = len(self.output)
        else:
            self._n_seen = self.output.index(text, self._n_seen) + len(text)

    def send(self, number: int) -> None:
        """A signal to the program alone."""
        self.process.send_signal(number)

    def hang_up(self) -> None:
        """The terminal goes away, as a window that is closed."""
        # NOTE: while somebody reads, it stays open.
        self._is_gone = True
        self._reader.join()
        os.close(self._parent)

    def wait(self, seconds: float = 120.0) -> int:
        return self.process.wait(seconds)

    def modes(self) -> set[str]:
        """What the program has changed and not changed back."""
        found = {"cursor hidden": False, "lines cut": False}
        depth = 0
        for numbers, switch, keyboard in _MODE.findall(self.output):
            depth += {b">": 1, b"<": -1}.get(keyboard, 0)
            for number in map(int, filter(None, numbers.split(b";"))):
                name = {_WRAPS: "lines cut", _CURSOR: "cursor hidden"}.get(number, f"?{number}")
                found[name] = (switch == b"h") != (number in (_WRAPS, _CURSOR))
        found["keyboard"] = depth != 0
        found["lines"] = self._modes_of_lines() != self._attributes
        return {name for name, is_on in found.items() if is_on}

    def _modes_of_lines(self) -> list[Any]:
        return termios.tcgetattr(self._child)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._child)
        if not self._is_gone:
            self.hang_up()


def await_rest(pid: int) -> None:
    """Until a program waits for something: readline shows its prompt before it listens for signals.

    Where the system does not tell, for a moment.
    """
    status, before = Path(f"/proc/{pid}/status"), ""
    while True:
        time.sleep(0.15)
        lines = status.read_text().splitlines() if status.exists() else []
        now = [line for line in lines if line.startswith(("State", "voluntary", "nonvoluntary"))]
        if before == (before := "".join(now)) and "running" not in before:
            return


def _take_terminal() -> None:
    import fcntl

    # Whoever runs the tests may ignore some, as nohup does, or a job in the background.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
