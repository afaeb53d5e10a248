"""Counts the tokens of attachments in threads: a megabyte takes a second.

Knows nothing of widgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeinfer.tui.loader import Task
from edgeinfer.tui.records import Attachment

if TYPE_CHECKING:
    from edgeinfer import ChatModel


class TokenCounts:
    """Counts that are under way."""

    def __init__(self) -> None:
        self._tasks: list[tuple[Attachment, Task[int]]] = []

    def start(self, model: ChatModel | None, attachment: Attachment) -> None:
        """Without a model there is nothing to count with yet."""
        if model is not None and attachment.n_tokens is None:
            tokenize = model.tokenize
            task = Task(lambda: len(tokenize(attachment.text)))
            self._tasks.append((attachment, task))

    def take(self) -> list[tuple[Attachment, int]]:
        """Counts that have come since the last look."""
        over = [each for each in self._tasks if each[1].is_over]
        self._tasks = [each for each in self._tasks if not each[1].is_over]
        return [(attachment, task.result) for attachment, task in over if task.error is None]
