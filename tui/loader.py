"""Work that a thread does while the screen stays alive, such as to load a model.

Knows nothing of widgets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from edgeinfer import PlanError
from edgeinfer.tui.settings import ChatModel, ChatSettings

if TYPE_CHECKING:
    from edgeinfer import Progress

T = TypeVar("T")

_STAGES = {"kernels": "building kernels", "weights": "loading weights"}


class Task(Generic[T]):
    """A call in a thread of its own: look at `is_over`, then take the `result`."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        self.is_over = False
        self._call = call
        self._result: list[T] = []
        self._thread = threading.Thread(target=self._run, name="edgeinfer-task", daemon=True)
        self._thread.start()

    @property
    def result(self) -> T:
        return self._result[0]

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is over by then; without a limit it waits for ever."""
        self._thread.join(seconds)
        return self.is_over

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:
            self.error = error
        finally:
            self.is_over = True


class ModelLoader:
    """Opens a model in a thread; `text` and `share` say how far it is.

    In place of another it first looks whether the file can be opened, and `wants_old` only then.
    Where it fails after that it opens the old one again; `error` says why.
    """

    def __init__(self, settings: ChatSettings, path: str, *, replaces: bool) -> None:
        self.path = path
        self.text, self.share = "opening", 0.0
        self.started_at = time.perf_counter()
        self.error: BaseException | None = None
        self.wants_old = False
        self._settings = settings
        self._old: SimpleQueue[tuple[ChatModel, str]] = SimpleQueue()
        self.task = Task(self._replace if replaces else lambda: self._open(path))

    def give(self, old: ChatModel, path: str) -> None:
        """The model to replace, which nobody uses any more."""
        self.wants_old = False
        self._old.put((old, path))

    def _replace(self) -> ChatModel:
        plan = self._settings.plan_model
        if plan is not None:
            with suppress(PlanError):  # the old one still holds its memory
                plan(self.path)
        self.wants_old = True
        old, path = self._old.get()
        self.text = "closing the one before"
        old.close()
        del old  # its memory is for the next
        try:
            return self._open(self.path)
        except Exception as error:
            self.path, self.error = path, error
            with suppress(Exception):
                return self._open(path)
            raise error

    def _open(self, path: str) -> ChatModel:
        self.text, self.share = "opening", 0.0
        return self._settings.open_model(path, self._note)

    def _note(self, progress: Progress) -> None:
        self.text = _STAGES.get(progress.stage, progress.stage)
        self.share = progress.done / progress.total if progress.total else 0.0
