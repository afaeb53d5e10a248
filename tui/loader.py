"""Work that a thread does while the screen stays alive, such as to load a model.

Knows nothing of widgets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from edgeinfer import PlanError
from edgeinfer.tui.settings import ChatSettings

if TYPE_CHECKING:
    from edgeinfer import ChatModel, Progress

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
    Where it fails after that it opens the old one again, and `path` and `n_ctx` are those of it;
    `error` says why.
    """

    def __init__(
        self, settings: ChatSettings, path: str, n_ctx: int | None, *, replaces: bool
    ) -> None:
        self.path, self.n_ctx = path, n_ctx
        self.text, self.share = "opening", 0.0
        self.started_at = time.perf_counter()
        self.error: BaseException | None = None
        self.wants_old = False
        self._settings = settings
        self._old: SimpleQueue[tuple[ChatModel, str, int | None]] = SimpleQueue()
        self.task = Task(self._replace if replaces else self._open)

    def give(self, old: ChatModel, path: str, n_ctx: int | None) -> None:
        """The model to replace, which nobody uses any more, and how it was opened."""
        self.wants_old = False
        self._old.put((old, path, n_ctx))

    def _replace(self) -> ChatModel:
        plan = self._settings.plan_model
        if plan is not None:
            with suppress(PlanError):  # the old one still holds its memory
                plan(self.path, **self._asked())
        self.wants_old = True
        old, path, n_ctx = self._old.get()
        self.text = "closing the one before"
        old.close()
        del old  # its memory is for the next
        try:
            return self._open()
        except Exception as error:
            self.path, self.n_ctx, self.error = path, n_ctx, error
            with suppress(Exception):
                return self._open()
            raise error

    def _open(self) -> ChatModel:
        self.text, self.share = "opening", 0.0
        return self._settings.open_model(self.path, self._note, **self._asked())

    def _asked(self) -> dict[str, Any]:
        return {} if self.n_ctx is None else {"n_ctx": self.n_ctx}

    def _note(self, progress: Progress) -> None:
        self.text = _STAGES.get(progress.stage, progress.stage)
        self.share = progress.done / progress.total if progress.total else 0.0
