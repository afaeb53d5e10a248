"""Copies that are under way: programs of the system may take seconds, and then it is told.

Knows nothing of widgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeinfer.tui.clipboard import copy_with_tools, is_in_tmux, osc52
from edgeinfer.tui.gauge import size_text
from edgeinfer.tui.loader import Task
from edgeinfer.tui.settings import RunTool


class Copies:
    """Starts copies; `take` gives what became of them, in words that are true."""

    def __init__(
        self, environment: Mapping[str, str], run_tool: RunTool, write: Callable[[str], None]
    ) -> None:
        """`write` sends a sequence to the terminal."""
        self._environment, self._run_tool, self._write = environment, run_tool, write
        self._tasks: list[tuple[str, Task[list[str]]]] = []

    def start(self, text: str) -> None:
        """Tools are asked beside the chat; without tmux the terminal is told at once."""
        environment, run_tool = self._environment, self._run_tool
        if not is_in_tmux(environment):
            self._send(text)
        self._tasks.append((text, Task(lambda: copy_with_tools(text, environment, run_tool))))

    def take(self) -> list[tuple[str, bool]]:
        """Copies that are over since the last look: what to say, and whether it went wrong."""
        over = [each for each in self._tasks if each[1].is_over]
        self._tasks = [each for each in self._tasks if not each[1].is_over]
        return [self._told(text, [] if task.error else task.result) for text, task in over]

    def _told(self, text: str, found: list[str]) -> tuple[str, bool]:
        n_lines = text.count("\n") + 1
        lines = f"{n_lines:,} line{'s' * (n_lines != 1)}"
        if found:
            where = "" if found[-1] == "the clipboard" else " to tmux"
            return f"copied{where}, {lines}", False
        in_tmux = is_in_tmux(self._environment)
        if self._send(text) if in_tmux else osc52(text, in_tmux=False):
            return f"sent to the terminal’s clipboard, {lines}", False
        size = size_text(len(text.encode(errors="replace")))
        return (
            f"not copied: {size} are more than terminals take, and no clipboard tool works here; "
            "/export writes a file",
            True,
        )

    def _send(self, text: str) -> bool:
        sequence = osc52(text, in_tmux=is_in_tmux(self._environment))
        if sequence is not None:
            self._write(sequence)
        return sequence is not None
